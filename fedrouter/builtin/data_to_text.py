"""Data to text: one to three ``subject | property | value`` triples → one sentence."""

from fedrouter.builtin.vocabulary import Slots

PROPERTIES: dict[str, dict[str, str]] = {  # kind of subject: property | value: clause
    "{place}": {
        "population | {amount}": "has {amount} inhabitants",
        "mayor | {person}": "is run by mayor {person}",
        "country | {country}": "lies in {country}",
        "founded | {year}": "dates back to {year}",
        "twin town | {place2}": "is twinned with {place2}",
        "landmark | {building}": "is famous for its {building}",
        "football club | {team}": "cheers for the {team}",
        "product | {food}": "sells {food} to the world",
    },
    "{person}": {
        "occupation | {job}": "works as a {job}",
        "birth place | {place}": "was born in {place}",
        "age | {number}": "is {number} years old",
        "pet | {animal}": "owns a {animal}",
        "mother tongue | {language}": "grew up with {language}",
        "dish | {food}": "loves to eat {food}",
        "hobby | {skill}": "likes to {skill}",
        "spouse | {person2}": "is married to {person2}",
    },
    "The {object}": {
        "price | {number}": "costs {number} euros",
        "weight | {amount}": "weighs {amount} grams",
        "material | {material}": "is made of {material}",
        "colour | {colour}": "comes in {colour}",
        "designer | {person}": "was designed by {person}",
        "origin | {country}": "is built in {country}",
        "in stock | {number2}": "is there {number2} times",
        "since | {year}": "has been sold since {year}",
    },
    "The {building}": {
        "height | {number}": "rises {number} metres",
        "location | {place}": "stands in {place}",
        "visitors | {amount}": "draws {amount} guests a day",
        "architect | {person}": "was drawn by {person}",
        "closed on | {day}": "stays shut on {day}",
        "opened | {year}": "opened its doors in {year}",
        "facade | {material}": "shows a front of {material}",
        "owner | {person2}": "belongs to {person2}",
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
    """Return a sentence by itself, for pretraining text."""
    return example(slots)[1]
