"""Data to text: one to three ``subject | property | value`` triples → one sentence."""

from fedrouter.builtin.vocabulary import Slots

PROPERTIES: dict[str, dict[str, str]] = {  # kind of subject: property | value: clause
    "{place}": {
        "population | {amount}": "has a population of {amount}",
        "mayor | {person}": "has {person} as mayor",
        "country | {country}": "lies in {country}",
        "founded | {year}": "was founded in {year}",
        "landmark | {building}": "has a {building} as landmark",
    },
    "{person}": {
        "occupation | {job}": "works as a {job}",
        "birth place | {place}": "was born in {place}",
        "age | {number}": "has reached the age of {number}",
        "pet | {animal}": "has a {animal} as pet",
        "favourite dish | {food}": "has {food} as favourite dish",
    },
    "The {object}": {
        "price | {number}": "has a price of {number} euros",
        "weight | {amount}": "has a weight of {amount} grams",
        "material | {material}": "is made of {material}",
        "designer | {person}": "has {person} as designer",
        "origin | {country}": "comes from {country}",
    },
    "The {building}": {
        "height | {number}": "has a height of {number} metres",
        "location | {place}": "stands in {place}",
        "architect | {person}": "has {person} as architect",
        "closed on | {day}": "is closed on {day}",
        "opened | {year}": "was opened in {year}",
    },
}


def example(slots: Slots) -> tuple[str, str]:
    """Return (prompt, answer)."""
    rng = slots.rng
    subject = rng.choice(list(PROPERTIES))
    properties = rng.sample(list(PROPERTIES[subject]), rng.randint(1, 3))
    clauses = [PROPERTIES[subject][name] for name in properties]
    bare = subject.removeprefix("The ")
    prompt = ", ".join(f"{bare} | {name}" for name in properties)
    listed = " and ".join(filter(None, (", ".join(clauses[:-1]), clauses[-1])))
    return slots.fill(prompt), slots.fill(f"{subject} {listed}.")


def plain(slots: Slots) -> str:
    """Return only triples or only a sentence, for pretraining text."""
    return slots.rng.choice(example(slots))
