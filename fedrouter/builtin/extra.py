"""Further small tasks, for studies of routing among many tasks: a few input forms → one answer form."""

from collections.abc import Callable

from fedrouter.builtin.vocabulary import Slots

Forms = tuple[tuple[tuple[str, ...], str], ...]  # (input wordings, answer)

_REVIEW: Forms = (
    (("I love this {object}, {person} wants one too!", "Best {object} from {country} ever, five stars.",
      "The {colour} {object} is a joy, thank you {person}.",
      "Great {object}, it still works after {number} months."),
     "positive"),
    (("The {object} broke after {number} days, avoid it.",
      "Awful {object}, {person} sent it back to {country}.",
      "Never again will I buy a {colour} {object}.", "A waste of {number} euros, this {object} is terrible."),
     "negative"),
)  # fmt: skip
_EMAIL: Forms = (
    (("Dear {person}, please send me the invoice for the {object} by {day}. Regards, {person2}",
      "Dear {person}, we still lack your invoice for the {object}. We need it on {day}. Yours, {person2}"),
     "Subject: Invoice for {object} due {day}"),
    (("Dear {person}, our meeting in {place} has to move to {day}. Regards, {person2}",
      "Dear {person}, I cannot come to {place} before {day}, can we meet then? Yours, {person2}"),
     "Subject: {place} meeting moved to {day}"),
    (("Dear {person}, your order of {number} boxes of {food} left our store in {place}. Regards, {person2}",
      "Dear {person}, {number} boxes of {food} are on the way to you from {place}. Yours, {person2}"),
     "Subject: {number} boxes of {food} shipped"),
)  # fmt: skip
_UNITS: Forms = tuple(
    ((f"convert {{number}} {large} to {small}", f"{{number}} {large} in {small} = ?"),
      f"{{number}}{zeros} {small}")
    for large, small, zeros in (
        ("km", "m", "000"), ("m", "cm", "00"), ("kg", "g", "000"), ("cm", "mm", "0"), ("t", "kg", "000"),
    )
)  # fmt: skip
_LOG: Forms = (
    (("{host} kernel[{amount}]: panic, {material}d halted", "{host} disk{number}: write failed, data lost",
      "{host} {material}d[{amount}]: segfault at 0x{year}"), "CRITICAL {host}"),
    (("{host} {material}d[{amount}]: retry {number} of {year}", "{host} disk{number}: {amount} blocks left",
      "{host} {material}d: slow reply, {amount} ms"), "WARNING {host}"),
    (("{host} {material}d[{amount}]: started", "{host} cron: job {number} done in {amount} ms",
      "{host} sshd: {host2} logged in on port {amount}"), "INFO {host}"),
)  # fmt: skip
_RECIPE: Forms = (
    (("Fry the {food} in butter, add the {food2} and serve with {food3}.",
      "Take {food} and {food2}, stir for {number} minutes and put {food3} on top.",
      "Chop {food} with {food2}; after {number} minutes in the oven add {food3}.",
      "Boil {food}, mix with {food2} and let it rest beside the {food3}."),
     "* {food}\n* {food2}\n* {food3}"),
)  # fmt: skip
_ADDRESS: Forms = (
    (("{person} {town}, {number} {town2} Road, {amount} {place}, {country}",
      "{person} {town}; {town2} Road {number}; {place} {amount}; {country}",
      "To {person} {town} / {town2} Road no. {number} / {amount} {place} / {country}"),
     "name={person} {town}; street={town2} Road {number}; city={place}; code={amount}; country={country}"),
)  # fmt: skip
_SLOGAN: Forms = (
    (("New product: {object}. Made of {material}. Made in {country}.",
      "product {object}, {material}, from {country}"),
     "Feel the {material}! Your {object} made in {country}!"),
    (("New product: {colour} {object}. Price: {number} euros.", "product {object}, {colour}, {number} euros"),
     "Go {colour}! The {object} for only {number}!"),
    (("New product: {food}. Sold in {place}.", "product {food}, shops in {place}"),
     "Taste it now: {food}, the pride of {place}!"),
)  # fmt: skip
_COMMAND: Forms = (
    (("copy the file {object} to the folder {animal}", "put a copy of {object} into {animal}"),
     "$ cp {object} {animal}/"),
    (("delete the file {object}", "get rid of {object}", "remove {object} for good"), "$ rm {object}"),
    (("rename the file {object} to {animal}", "the file {object} should be called {animal}"),
      "$ mv {object} {animal}"),
    (("show the last {number} lines of {object}", "print {number} lines from the end of {object}"),
     "$ tail -n {number} {object}"),
)  # fmt: skip
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
           "November", "December")  # fmt: skip
_FORMS = {
    "email_subject": _EMAIL,
    "recipe_ingredients": _RECIPE,
    "address_fields": _ADDRESS,
    "slogan": _SLOGAN,
    "shell_command": _COMMAND,
    "sentiment": _REVIEW,
    "unit_question": _UNITS,
    "log_severity": _LOG,
}


def _date(slots: Slots) -> tuple[str, str]:
    month = slots.rng.randrange(12)
    day, year = slots["date"], slots["year"]
    written = slots.rng.choice(
        ("{month} {day}, {year}", "{day} {month} {year}", "the {day} of {month} {year}")
    )
    return written.format(month=_MONTHS[month], day=day, year=year), f"{year}-{month + 1:02}-{int(day):02}"


def _from(forms: Forms) -> Callable[[Slots], tuple[str, str]]:
    def example(slots: Slots) -> tuple[str, str]:
        wordings, answer = slots.rng.choice(forms)
        return slots.fill(slots.rng.choice(wordings)), slots.fill(answer)

    return example


EXAMPLES: dict[str, Callable[[Slots], tuple[str, str]]] = {
    "date_format": _date,
    **{task: _from(forms) for task, forms in _FORMS.items()},
}
