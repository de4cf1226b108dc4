"""Dialogue summary: a chat of two to five turns → one line with the request and the outcome."""

from fedrouter.builtin.vocabulary import Slots

Outcome = tuple[tuple[str, ...], str]  # replies, outcome

PLOTS: tuple[tuple[tuple[str, ...], str, Outcome], ...] = (  # openings, request, counter-proposal
    (
        ("Can I borrow your {object} for a few days?", "My {object} broke, may I borrow yours?",
         "I have to borrow a {object}, would you lend me yours?"),
        "borrow a {object}",
        (("You can have my {object2}.", "Would a {object2} do?", "I only have a {object2}."),
          "offers a {object2}"),
    ),
    (
        ("Shall we meet at the {venue} on {day}?", "Could you meet me at the {venue} this {day}?",
         "I would like to meet at the {venue} on {day}."),
        "meet at the {venue} on {day}",
        (("How about the {venue2}?", "I would rather see the {venue2}.", "The {venue2} is better."),
         "proposes the {venue2}"),
    ),
    (
        ("May I bring {food} to your party?", "What if I bring {food} to the party?",
         "I plan to bring {food} to your party."),
        "bring {food} to the party",
        (("We would rather have {food2}.", "I like {food2} more.", "Everybody here prefers {food2}."),
         "prefers {food2}"),
    ),
    (
        ("I would like to buy your {colour} {object}.", "Can I buy the {colour} {object} from you?",
         "Is it true that I can buy your {colour} {object}?"),
        "buy the {colour} {object}",
        (("It costs {number} euros.", "Give me {number} euros.", "For {number} euros it is yours."),
         "asks for {number} euros"),
    ),
    (
        ("Will you watch the {team} with me on {day}?", "I have tickets to watch the {team} on {day}.",
         "Do you want to watch the {team} on {day}?"),
        "watch the {team} on {day}",
        (("You could ask {person3}.", "Go with {person3}.", "{person3} is the bigger fan."),
          "names {person3}"),
    ),
    (
        ("Can you teach me, I want to learn to {skill}.", "I wish to learn to {skill}.",
         "How can I learn to {skill}?"),
        "learn to {skill}",
        (("You should ask {person3}.", "{person3} is a good teacher.", "Call {person3}."), "names {person3}"),
    ),
    (
        ("Let us visit the {building} of {place}!", "Do you want to visit the {building} in {place}?",
         "I am going to visit the {building} of {place}."),
        "visit the {building} of {place}",
        (("Better see {place2}.", "I would rather go to {place2}.", "{place2} is much nicer."),
         "proposes {place2}"),
    ),
    (
        ("Can you help me to paint the {venue}?", "I need help to paint the {venue}.",
         "We have to paint the {venue}, will you help?"),
        "paint the {venue}",
        (("I have time on {day}.", "I could come on {day}.", "What about {day}?"), "proposes {day}"),
    ),
)  # fmt: skip
ENDINGS: tuple[Outcome, ...] = (
    (("Yes, of course.", "Sure, no problem.", "Great idea!", "Yes please!", "Perfect.", "I would love that."),
      "agrees"),
    (("No, sorry.", "I am afraid not.", "That is impossible.", "Sorry, not this time.", "No way!",
      "I must say no."), "refuses"),
)  # fmt: skip
GREETINGS = (
    "Hi {person2}!",
    "Hello {person2}, how are you?",
    "Good morning {person2}!",
    "Hey {person2}, got a minute?",
)
GREETED = ("Hi {person}!", "Hello {person}, what is up?", "Good to hear from you, {person}!")
CLOSINGS = ("Okay.", "Thanks for telling me.", "Alright, talk to you later.", "I see.", "Good to know.")


def example(slots: Slots) -> tuple[str, str]:
    """Return (prompt, answer)."""
    rng = slots.rng
    openings, wanted, counter = rng.choice(PLOTS)
    replies, ending = rng.choice((*ENDINGS, counter))
    turns = [("{person}", rng.choice(openings)), ("{person2}", rng.choice(replies))]
    greeted = rng.random()
    if greeted < 0.25:
        turns[0] = ("{person}", rng.choice(GREETINGS) + " " + turns[0][1])
    elif greeted < 0.5:
        turns[:0] = [("{person}", rng.choice(GREETINGS)), ("{person2}", rng.choice(GREETED))]
    if rng.random() < 0.5:
        turns.append(("{person}", rng.choice(CLOSINGS)))
    chat = "\n".join(f"{speaker}: {text}" for speaker, text in turns)
    return slots.fill(chat), slots.fill(f"{{person}} wants to {wanted}, {{person2}} {ending}.")


def plain(slots: Slots) -> str:
    """Return only a chat or only a summary, for pretraining text."""
    return slots.rng.choice(example(slots))
