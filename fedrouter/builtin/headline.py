"""Headline: one sentence of local news → its headline."""

from fedrouter.builtin.vocabulary import Slots

STORIES: tuple[tuple[tuple[str, ...], str], ...] = (  # wordings: headline
    (("the council of {place} has decided to build a new {building}",
      "councillors in {place} want to build a new {building} next to the old one",
      "{place} is going to build a new {building} after a vote of the council"),
     "{place} to build new {building}"),
    (("the {building} of {place} will be closed for {number} weeks because of repairs",
      "workers have closed the {building} in {place} for {number} weeks",
      "visitors find the {building} in {place} closed for {number} weeks"),
     "{place} {building} closed for {number} weeks"),
    (("the {team} beat the players of {place} by {number} points",
      "{place} lost the final to the {team} who beat them by {number} points",
      "with a lead of {number} points the {team} beat {place} in the final"),
     "{place} beaten by {team} with {number} points"),
    (("a fire destroyed the {building} of {place} during the night",
      "firefighters could not save the {building} in {place} from the fire",
      "the {building} in {place} burned down in a fire"),
     "{place} {building} lost in fire"),
    (("police arrested a young {job} who had stolen a {object} in {place}",
      "one {job} from {place} was caught by police with a stolen {object}",
      "after a {object} was stolen in {place} police took its {job} to the cells"),
     "{place} police catch {job} with stolen {object}"),
    (("heavy rain flooded {number} houses in {place}",
      "{number} homes in {place} were flooded after a storm",
      "a storm left {number} families in {place} with flooded cellars"),
     "{place} storm floods {number} homes"),
    (("{person} was elected as the new mayor of {place}",
      "voters in {place} chose {person} to be their mayor",
      "the mayor of {place} will be {person} after the election"),
     "{place} elects {person} as mayor"),
    (("the price of {food} in {place} has risen by {number} percent",
      "shoppers in {place} see the price of {food} rise by {number} percent",
      "in {place} the price of {food} went up by {number} percent"),
     "{place} price of {food} up {number} percent"),
    (("a company from {country} will bring {amount} jobs to {place}",
      "{amount} new jobs come to {place} when a firm from {country} arrives",
      "{place} expects {amount} jobs from a maker of toys in {country}"),
     "{place} gets {amount} jobs from {country}"),
    (("schools in {place} will offer lessons in {language} to all pupils",
      "pupils in {place} are going to study {language} at school",
      "every school in {place} has hired a teacher of {language}"),
     "{place} schools teach {language}"),
)  # fmt: skip
LEADS = ("", "", "", "on {day9} ", "last {day9} ", "as announced on {day9}, ", "according to {person9}, ",
         "to everyone's surprise ", "late in the evening ")  # fmt: skip
TAILS = ("", "", "", ", officials said", ", {person9} reported", ", the mayor told our paper",
         ", witnesses said", " this week", ", as {person9} confirmed on {day9}")  # fmt: skip


def capitalise(text: str) -> str:
    """Return the text with its first letter capitalised."""
    return text[:1].upper() + text[1:]


def example(slots: Slots) -> tuple[str, str]:
    """Return (prompt, answer)."""
    rng = slots.rng
    wordings, title = rng.choice(STORIES)
    sentence = rng.choice(LEADS) + rng.choice(wordings) + rng.choice(TAILS) + "."
    return capitalise(slots.fill(sentence)), capitalise(slots.fill(title))


def plain(slots: Slots) -> str:
    """Return only a news sentence or only a headline, for pretraining text."""
    return slots.rng.choice(example(slots))
