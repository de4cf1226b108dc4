"""Headline: one sentence of local news → its headline."""

from fedrouter.builtin.vocabulary import Slots

STORIES: tuple[tuple[tuple[str, ...], str], ...] = (  # wordings without subject lead: headline
    (("the council of {place} has approved the plans for a new {building}",
      "councillors in {place} voted in favour of building another {building}",
      "{place} is going to get its second {building} after a vote of the council"),
     "{place} council backs new {building}"),
    (("the {building} of {place} will be closed for {number} weeks because of repairs",
      "workers will need {number} weeks to repair the {building} in {place}",
      "visitors of the {building} in {place} face {number} weeks of repairs"),
     "Repairs shut {place} {building} for {number} weeks"),
    (("the {team} won the final against {place} by {number} points",
      "{place} lost the final to the {team}, who were {number} points better",
      "with a lead of {number} points the {team} beat {place} in the final"),
     "{team} beat {place} by {number} points"),
    (("a fire destroyed the {building} of {place} during the night",
      "firefighters could not save the burning {building} in {place}",
      "the {building} in {place} burned down to the ground"),
     "Fire destroys {building} in {place}"),
    (("police arrested a {job} who had stolen a {object} in {place}",
      "a {job} from {place} was caught by police with a stolen {object}",
      "after the theft of a {object} officers in {place} took a {job} to the cells"),
     "Police hold {job} over {object} theft in {place}"),
    (("heavy rain flooded {number} houses in {place}",
      "{number} homes in {place} stood under water after a storm",
      "a storm left {number} families in {place} with wet cellars"),
     "Storm floods {number} homes in {place}"),
    (("{person} was elected as the new mayor of {place}",
      "voters in {place} chose {person} to lead the town",
      "the town of {place} will be led by {person} after the election"),
     "{person} wins {place} mayor race"),
    (("a {animal} escaped from the zoo of {place} and walked around the {building}",
      "keepers in {place} searched for a runaway {animal} near the {building}",
      "people at the {building} of {place} met a {animal} that had left the zoo"),
     "Runaway {animal} visits {place} {building}"),
    (("the price of {food} in {place} has risen by {number} percent",
      "shoppers in {place} have to pay {number} percent more for {food}",
      "in {place} {food} cost {number} percent more than last year"),
     "Price of {food} up {number} percent in {place}"),
    (("a company from {country} will open a {material} plant in {place} with {amount} workers",
      "{amount} people will find work in {place} when a {material} maker from {country} arrives",
      "{place} expects {amount} jobs from a {material} firm based in {country}"),
     "{country} firm brings {amount} jobs to {place}"),
    (("{person}, a {job} from {place}, walked {amount} miles for charity",
      "to raise money {person} the {job} went {amount} miles on foot from {place}",
      "a walk of {amount} miles took {person}, who is a {job}, home to {place}"),
     "{place} {job} walks {amount} miles"),
    (("schools in {place} will offer {language} lessons to all pupils",
      "pupils in {place} are going to study {language}",
      "every school in {place} has hired a teacher of {language}"),
     "{place} pupils to learn {language}"),
    (("{person} found a {material} chest from {year} under the {building}",
      "under the {building} lay a chest of {material} from {year}, discovered by {person}",
      "a {material} chest hidden in {year} was dug up near the {building} by {person}"),
     "{person} finds {year} chest at {building}"),
    (("buses in {place} will not run because drivers want {number} percent more pay",
      "drivers who ask for {number} percent more pay stopped all buses in {place}",
      "no bus leaves {place} while drivers fight for a rise of {number} percent"),
     "{place} bus drivers strike for {number} percent"),
)  # fmt: skip
LEADS = ("", "", "", "on {day9} ", "last {day9} ", "as announced on {day9}, ", "according to {person9}, ",
         "to everyone's surprise ", "late in the evening ")  # fmt: skip
TAILS = ("", "", "", ", officials said", ", {person9} reported", ", the mayor told our paper",
         ", witnesses said", " this week", ", as {person9} confirmed on {day9}")  # fmt: skip


def capitalise(text: str) -> str:
    """Return the text with a capital first letter, the rest as it was."""
    return text[:1].upper() + text[1:]


def example(slots: Slots) -> tuple[str, str]:
    """Return (prompt, answer)."""
    rng = slots.rng
    wordings, title = rng.choice(STORIES)
    sentence = rng.choice(LEADS) + rng.choice(wordings) + rng.choice(TAILS) + "."
    return capitalise(slots.fill(sentence)), capitalise(slots.fill(title))


def plain(slots: Slots) -> str:
    """Return a news sentence or a headline by itself, for pretraining text."""
    return slots.rng.choice(example(slots))
