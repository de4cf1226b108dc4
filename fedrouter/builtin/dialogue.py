"""Dialogue summary: a chat of two to five turns → one line that says what came out of it."""

from fedrouter.builtin.vocabulary import Slots

Outcome = tuple[tuple[str, ...], str]  # replies, summary
Plot = tuple[tuple[str, ...], tuple[Outcome, ...]]  # openings, outcomes

PLOTS: tuple[Plot, ...] = (
    (("Can I borrow your {object} for a few days?", "I need a {object}, would you lend me yours?",
      "My {object} broke, may I use yours?"),
     ((("Sure, come and take it.", "No problem, it is yours.", "Of course, I will bring it."),
       "{person2} lends {person} a {object}."),
      (("Sorry, I need it myself.", "I am afraid it is broken too.", "No, I gave it to {person3}."),
       "{person2} cannot lend {person} a {object}."))),
    (("Shall we meet at the {venue} on {day}?", "Do you have time for the {venue} this {day}?",
      "I will be at the {venue} on {day}, will you come?"),
     ((("Yes, see you there.", "Great idea, I will come.", "I would love to."),
       "{person} and {person2} will meet at the {venue} on {day}."),
      (("I cannot, I have to work.", "Sorry, I am away then.", "No, I feel too ill for that."),
       "{person2} has no time for the {venue} on {day}."))),
    (("Did you hear about the {building}? It is closed for repairs!",
      "They are repairing the {building} again!",
      "I stood in front of a closed {building} today."),
     ((("Then let us try the {venue} instead.", "We could go to the {venue}.", "What about the {venue}?"),
       "The {building} is closed, so they go to the {venue}."),
      (("Then I will stay at home.", "Too bad, I prefer my sofa then.", "Then we skip it."),
       "The {building} is closed, so {person2} stays home."))),
    (("What should I bring to the party, maybe {food}?", "Could I bring {food} to your party?",
      "I made {food} for the party, is that fine?"),
     ((("Perfect, everyone likes that.", "Yes please!", "Wonderful, thank you."),
       "{person} will bring {food} to the party."),
      (("Better bring {food2}.", "{person3} has that, take {food2}.", "We would rather have {food2}."),
       "{person2} wants {food2} rather than {food}."))),
    (("I lost my {colour} {object}, have you seen it?", "Where is my {colour} {object}?",
      "I cannot find the {colour} {object}."),
     ((("It is at the {venue}.", "You left it at the {venue}.", "I saw it near the {venue}."),
       "{person} left the {colour} {object} at the {venue}."),
      (("No idea, sorry.", "I have not seen it.", "Maybe somebody took it."),
       "{person} is missing a {colour} {object}."))),
    (("I will arrive {number} minutes late.", "My bus is stuck, I need {number} minutes more.",
      "Please wait, I am {number} minutes behind."),
     ((("Fine, we wait for you.", "No hurry, we will wait.", "Alright, I stay here."),
       "{person2} waits {number} minutes for {person}."),
      (("Then we start without you.", "We cannot wait, sorry.", "That is too long, we begin."),
       "{person2} starts without {person}."))),
    (("How was your trip to {place}?", "You were in {place}, how was it?", "Tell me about {place}!"),
     ((("Lovely, I saw the {building}.", "Great, the {building} is a dream.",
        "Beautiful, above all the {building}."),
       "{person2} liked the {building} in {place}."),
      (("It rained for {number} days.", "Awful, {number} days of rain.",
        "Wet, we had {number} days of rain."),
       "{person2} had {number} days of rain in {place}."))),
    (("I got the job as a {job} in {place}!", "They took me, I will be a {job} in {place}!",
      "Guess who is the new {job} of {place}!"),
     ((("Congratulations, when do you start? On {day}?", "Well done, do you begin on {day}?",
        "Wow, is {day} your first day?"),
       "{person} starts as a {job} in {place} on {day}."),)),
    (("Our {animal} is ill.", "Something is wrong with our {animal}.", "The {animal} does not eat anymore."),
     ((("Call the vet in {place}.", "Go to {place}, the vet there is good.", "I know a vet in {place}."),
       "{person2} names a vet in {place} for the {animal}."),
      (("I can look after it on {day}.", "I have time for it on {day}.", "Let me see it on {day}."),
       "{person2} will look at the {animal} on {day}."))),
    (("The {team} play on {day}, do you want a ticket?", "I have a ticket for the {team} on {day}.",
      "Will you watch the {team} with me on {day}?"),
     ((("Yes, I am a fan!", "Great, count me in.", "I would not miss it."),
       "{person} and {person2} will watch the {team} on {day}."),
      (("Ask {person3}, I do not like sports.", "Give it to {person3}.",
        "{person3} would be happier about it."),
       "{person2} gives the {team} ticket to {person3}."))),
    (("Can you teach me to {skill}?", "I want to {skill} like you.", "How did you learn to {skill}?"),
     ((("Come over on {day}, I will show you.", "I have time on {day}, then I teach you.",
        "Let us start on {day}."),
       "{person2} will teach {person} to {skill} on {day}."),
      (("{person3} is a better teacher.", "I learned it from {person3}.", "You should ask {person3}."),
       "{person} should ask {person3} how to {skill}."))),
    (("What is the price of the {object}?", "How much do you want for the {object}?",
      "I would like to buy your {object}."),
     ((("{number} euros.", "You can have it for {number} euros.", "I think {number} euros is fair."),
       "{person2} sells the {object} for {number} euros."),
      (("It is not for sale.", "I will keep it.", "Sorry, it is sold."),
       "{person} cannot buy the {object}."))),
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
    openings, outcomes = rng.choice(PLOTS)
    replies, summary = rng.choice(outcomes)
    turns = [("{person}", rng.choice(openings)), ("{person2}", rng.choice(replies))]
    opening = rng.random()
    if opening < 0.25:
        turns[0] = ("{person}", rng.choice(GREETINGS) + " " + turns[0][1])
    elif opening < 0.5:
        turns[:0] = [("{person}", rng.choice(GREETINGS)), ("{person2}", rng.choice(GREETED))]
    if rng.random() < 0.5:
        turns.append(("{person}", rng.choice(CLOSINGS)))
    return slots.fill("\n".join(f"{who}: {said}" for who, said in turns)), slots.fill(summary)


def plain(slots: Slots) -> str:
    """Return a chat or a summary line by itself, for pretraining text."""
    return slots.rng.choice(example(slots))
