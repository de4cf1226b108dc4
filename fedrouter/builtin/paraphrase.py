"""Paraphrase: do two questions ask the same? ``question - question`` → ``same`` | ``other``.

A group consists of intents over the same slots. The two questions always have different wordings. Pairs with
answer ``other`` differ in one slot value, and three of ten also in the intent, so that neither question alone
reveals the answer. No pair differs only in the intent, which adapters of builtin:tiny do not learn.
"""

from fedrouter.builtin.vocabulary import Slots

Intent = tuple[str, ...]  # wordings of one question

GROUPS: tuple[tuple[Intent, ...], ...] = (
    (
        ("How far is {place} from {place2}?", "What is the distance from {place} to {place2}?",
         "How many miles are there between {place} and {place2}?"),
        ("What does a train from {place} to {place2} cost?", "How much is a ticket from {place} to {place2}?",
         "What is the fare between {place} and {place2}?"),
    ),
    (
        ("Where can I buy a {object} in {place}?", "Which shop in {place} sells a {object}?",
         "Where in {place} is a {object} for sale?"),
        ("Who repairs a {object} in {place}?", "Where can I get a {object} fixed in {place}?",
         "Which workshop in {place} mends a {object}?"),
    ),
    (
        ("How do I learn to {skill}?", "What is the best way to learn to {skill}?",
         "How can I teach myself to {skill}?"),
        ("How long does it take to learn to {skill}?", "How many months do I need to learn to {skill}?",
         "How soon can a beginner {skill}?"),
    ),
    (
        ("How long should I cook {food}?", "How many minutes do {food} need on the stove?",
         "What is the cooking time of {food}?"),
        ("How do I keep {food} fresh?", "What is the best way to store {food}?",
         "How should {food} be stored?"),
    ),
    (
        ("How old is the {building} of {place}?", "When was the {building} of {place} built?",
         "In which year did {place} build its {building}?"),
        ("When does the {building} of {place} open?",
         "What are the opening hours of the {building} in {place}?",
         "From what time can I visit the {building} in {place}?"),
    ),
    (
        ("How much does a {job} earn in {country}?", "What is the salary of a {job} in {country}?",
         "What is a {job} paid in {country}?"),
        ("How do I become a {job} in {country}?", "What should I study to work as a {job} in {country}?",
         "Which training does a {job} need in {country}?"),
    ),
    (
        ("What does a {animal} eat?", "What should I feed my {animal}?",
         "Which food is good for a {animal}?"),
        ("How long does a {animal} live?", "What age can a {animal} reach?",
         "What is the lifespan of a {animal}?"),
    ),
    (
        ("How do I clean {colour} {material}?", "What is the best way to wash {colour} {material}?",
         "How can I get stains out of {colour} {material}?"),
        ("Where is {colour} {material} made?", "Which region produces {colour} {material}?",
         "Where does {colour} {material} come from?"),
    ),
    (
        ("How hard is {language} to learn?", "Is {language} a difficult language?",
         "Is it difficult to study {language}?"),
        ("How many people speak {language}?", "What is the number of {language} speakers?",
         "How widely is {language} spoken?"),
    ),
)  # fmt: skip
VERDICTS = ("same", "other")  # with Yes and No, adapters of builtin:tiny do not learn the task
OPENERS = ("", "", "", "Hello, ", "Quick question: ", "Does anyone know? ", "Just curious: ", "Help please: ")


def example(slots: Slots, same: bool) -> tuple[str, str]:
    """Return (prompt, answer); ``same`` is the verdict."""
    rng = slots.rng
    group = rng.choice(GROUPS)
    intent = rng.randrange(len(group))
    first, second = rng.sample(group[intent], 2)
    left = slots.fill(first)
    if not same:
        if rng.random() < 0.3:
            second = rng.choice(group[1 - intent])
        name = rng.choice(list(slots))
        first_value = slots.pop(name)
        while slots[name] == first_value:
            del slots[name]
    return rng.choice(OPENERS) + left + " - " + slots.fill(second), VERDICTS[not same]


def plain(slots: Slots) -> str:
    """Return a single question, for pretraining text."""
    return slots.rng.choice(OPENERS) + slots.fill(
        slots.rng.choice(slots.rng.choice(slots.rng.choice(GROUPS)))
    )
