"""Pretraining text of the built-in base: a seeded, endless generator.

There are two sources. *Plain* text consists of single sentences, questions, chats and headlines from the
grammars of the built-in tasks: only a prompt or only an answer, never both of one example. *Generic* formats
(repeat, list, look-up, marked span, membership, same or other, fill in, reorder, quote, reword) use invented
words and statements about invented names, so that copying and comparing generalise to unknown words. No
format is one of the tasks, asks the same question twice or uses the chat template.
"""

import random
from collections.abc import Callable, Iterator

from fedrouter.builtin import data_to_text, dialogue, headline, paraphrase
from fedrouter.builtin.headline import capitalise
from fedrouter.builtin.vocabulary import COMPOSED, WORDS, Slots, words


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _wordings(line: str) -> tuple[str, ...]:
    return tuple(line.split(" / "))


ONSETS = _split("b c d f g h j k l m n p r s t v w z br cr dr fl gl gr kl pl pr sh sl st th tr ch sw qu")
VOWELS = _split("a e i o u a e i o ai ea ee oa ou y io")
CODAS = _split("b d g k l m n p r s t x ck ld ll nd ng nt rd rk rn rt ss st th sh rm lt") + ("",) * 12
FAMILIAR = tuple(word for kind in WORDS if kind != "host" for word in words(kind, "train"))
MARKS = ("->", "=>", "=", ":", "|", "is", "gives", "then", "...", "//")
LITTLE = _split("what how where which is are does do can the a of to in for from and with my much many best")
COMMON = tuple(sorted({
    part for group in paraphrase.GROUPS for intent in group for wording in intent
    for part in wording.lower().rstrip("?").split() if "{" not in part
}))  # fmt: skip
JOINTS = ("the", "of", "to", "in", "and", "has", "is")
VERDICTS = (("same", "other"), ("equal", "unequal"), ("match", "differ"))
FACTS = tuple(_wordings(line) for line in """
{person} works as a {job} / {person} is a {job} / the {job} is called {person}
{place} lies in {country} / {place} is a town in {country} / one town of {country} is {place}
the {object} is made of {material} / {material} was used for the {object}
{person} has a {animal} / the {animal} belongs to {person} / a {animal} lives with {person}
the {object} costs {number} euros / you pay {number} euros for the {object}
{person} speaks {language} / {language} is what {person} speaks / we heard {person} talk in {language}
{person} likes {food} / {food} make {person} happy / there is nothing better than {food} for {person}
the {team} play on {day} / on {day} you can see the {team} / {day} is when the {team} play
I met {person} at the {venue} / at the {venue} I ran into {person} / {person} was at the {venue} when I came
my {colour} {object} is gone / somebody took my {colour} {object} / I cannot find the {colour} {object}
{person} can {skill} / to {skill} is easy for {person} / {person} knows how to {skill}
the {building} of {place} is {number} metres high / {place} has a {building} of {number} metres
{person} moved from {place} to {place2} / {person} left {place} for {place2}
the {animal} broke the {colour} {object} / the {colour} {object} was broken by the {animal}
""".strip().splitlines())  # fmt: skip
PLAIN = (paraphrase.plain, data_to_text.plain, dialogue.plain, headline.plain)


def made_up(rng: random.Random, capital: bool = False) -> str:
    """Return an invented word of one to three syllables."""
    syllables = rng.choices((1, 2, 3), (3, 5, 2))[0]
    word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))
    return word.capitalize() if capital else word


class InventedSlots(Slots):
    """Training slot values, half of them replaced by invented words or arbitrary numbers."""

    def draw(self, kind: str) -> str:
        """Draw one value of a kind."""
        if self.rng.random() < 0.5:
            return super().draw(kind)
        if kind in ("number", "amount", "year"):
            return str(self.rng.randrange(3, 10 ** self.rng.randint(1, 4) + 4))
        named = kind in COMPOSED or words(kind, "train")[0][0].isupper()
        return made_up(self.rng, capital=named)


def word(rng: random.Random) -> str:
    """Return an invented word, an invented name, a familiar word or a number."""
    kind = rng.random()
    if kind < 0.6:
        return made_up(rng, capital=kind < 0.3)
    return rng.choice(FAMILIAR) if kind < 0.9 else str(rng.randrange(10 ** rng.randint(1, 4)))


def some(rng: random.Random, low: int, high: int) -> list[str]:
    """Return up to ``high`` distinct words."""
    return list(dict.fromkeys(word(rng) for _ in range(rng.randint(low, high))))


def plain(rng: random.Random) -> str:
    return rng.choice(PLAIN)(InventedSlots(rng, "train"))


def repeat(rng: random.Random) -> str:
    text = plain(rng) if rng.random() < 0.3 else " ".join(some(rng, 1, 9))
    return f"{text}{rng.choice((' ', chr(10)))}{rng.choice(MARKS)} {text}"


def listed(rng: random.Random) -> str:
    items = some(rng, 2, 6)
    left, right = rng.sample((", ", "; ", " and ", "\n", " | ", " - ", "\n- "), 2)
    return f"{left.join(items)}{rng.choice(MARKS)} {right.join(items)}"


def look_up(rng: random.Random) -> str:
    keys = some(rng, 2, 6)
    values = {key: " ".join(some(rng, 1, 2)) for key in keys}
    mark, between = rng.choice((": ", " | ", " = ", " is ")), rng.choice(("\n", ", ", "; "))
    asked = rng.sample(keys, rng.randint(1, len(keys)))
    table = between.join(f"{key}{mark}{value}" for key, value in values.items())
    return table + "\n" + " ".join(f"{key}? {values[key]}" for key in asked)


def span(rng: random.Random) -> str:
    brackets = rng.choice(("[]", "()", "{}", "<>", "**", '""', "__"))
    before, marked, after = (" ".join(some(rng, low, 4)) for low in (0, 1, 0))
    return f"{before} {brackets[0]}{marked}{brackets[1]} {after} {rng.choice(MARKS)} {marked}"


def member(rng: random.Random) -> str:
    items = some(rng, 2, 8)
    asked = [rng.choice(items) if rng.random() < 0.5 else word(rng) for _ in range(rng.randint(1, 4))]
    yes, no = rng.choice((("in", "out"), ("here", "missing"), ("old", "new")))
    return " ".join(items) + "\n" + " ".join(f"{ask}: {yes if ask in items else no}" for ask in asked)


def same(rng: random.Random) -> str:
    items = some(rng, 1, 4)
    other = list(items)
    if rng.random() < 0.5:
        other[rng.randrange(len(other))] = word(rng)
    frames = [" ".join(some(rng, 0, 2)) for _ in range(2)] if rng.random() < 0.4 else ["", ""]
    verdicts = rng.choice(VERDICTS)
    left, right = (
        " ".join(filter(None, (frame, *part))) for frame, part in zip(frames, (items, other), strict=True)
    )
    between = rng.choice((" / ", " & ", "\n", " ~ "))
    return f"{left}{between}{right} {rng.choice(MARKS)} {verdicts[items != other]}"


def judge(rng: random.Random) -> str:
    """Return one to three comparisons in one layout, with the values among common words of questions."""
    heads = f"### {word(rng)}:\n{{}}\n\n### {word(rng)}:\n {{}}\n"
    layout = heads if rng.random() < 0.7 else f"{{}} {rng.choice(MARKS)} {{}}"
    between = rng.choice((" - ", " - ", " - ", " / ", "\n", " & ", "; ", " | "))
    texts = []
    for _ in range(rng.randint(1, 3)):
        items = list(
            dict.fromkeys(rng.choice(FAMILIAR) if rng.random() < 0.5 else word(rng) for _ in range(3))
        )
        items = items[: rng.randint(1, 3)]
        other = list(items)
        if rng.random() < 0.5:
            other[rng.randrange(len(other))] = rng.choice(FAMILIAR) if rng.random() < 0.5 else word(rng)
        lines = []
        for values in (items, other):
            line = rng.choices(COMMON, k=rng.randint(1, 8)) + values
            rng.shuffle(line)
            lines.append(" ".join(line))
        texts.append(layout.format(between.join(lines), VERDICTS[0][items != other]))
    return "\n".join(texts)


def statements(rng: random.Random) -> tuple[str, str]:
    """Return two wordings of one statement: a fact, a news sentence, or clauses in another order."""
    kind = rng.random()
    if kind < 0.45:
        first, second = rng.sample(rng.choice(FACTS), 2)
    elif kind < 0.8:
        first, second = rng.sample(rng.choice(headline.STORIES)[0], 2)
    else:
        subject = rng.choice(list(data_to_text.PROPERTIES))
        one, two = rng.sample(list(data_to_text.PROPERTIES[subject].values()), 2)
        first, second = f"{subject} {one} and {two}", f"{subject} {two} and {one}"
    return first, second


def reports(rng: random.Random) -> str:
    """Return two to four pairs of statements, each with a verdict whether the two have the same meaning.

    If not, one value was replaced, or the second statement is unrelated. The verdicts are common words, or
    any two words, whose meaning the earlier pairs show.
    """
    verdicts = rng.choice(VERDICTS) if rng.random() < 0.8 else some(rng, 2, 2)
    if len(verdicts) < 2:
        verdicts = VERDICTS[0]
    mark = rng.choice(MARKS)
    heads = f"### {word(rng)}:\n{{}}\n\n### {word(rng)}:\n{rng.choice(('', ' '))}{{}}\n"
    layout = heads if rng.random() < 0.6 else f"{{}} {mark} {{}}"
    between = rng.choice((" - ", " - ", " / ", "\n", " & ", "; ", " | "))
    texts = []
    for _ in range(rng.randint(2, 4)):
        slots = InventedSlots(rng, "train")
        first, second = statements(rng)
        left, how = slots.fill(first), rng.random()
        if how < 0.4:
            name = rng.choice(list(slots))
            first_value = slots.pop(name)
            while slots[name] == first_value:
                del slots[name]
        elif how < 0.5:
            second = statements(rng)[1]
        pair = [left, slots.fill(second)]
        if rng.random() < 0.5:
            pair = [capitalise(text) for text in pair]
        texts.append(layout.format(between.join(pair), verdicts[how < 0.5]))
    return "\n".join(texts)


def reword(rng: random.Random) -> str:
    """Return statements with another wording, or pairs of statements with one of them, in one layout."""
    picks = rng.random() < 0.4
    between = rng.choice((" - ", " / ", "\n", " & ", "; ", " | "))
    heads = f"### {word(rng)}:\n{{}}\n\n### {word(rng)}:\n{{}}\n"
    layout = heads if rng.random() < 0.6 else f"{{}} {rng.choice(MARKS)} {{}}"
    which, texts = rng.randrange(2), []
    for _ in range(rng.randint(1, 3)):
        slots = InventedSlots(rng, "train")
        first, second = (capitalise(slots.fill(text)) for text in statements(rng))
        if picks:
            pair = (first, capitalise(slots.fill(statements(rng)[0])))
            first, second = between.join(pair), pair[which]
        texts.append(layout.format(first, second))
    return "\n".join(texts)


def mapping(rng: random.Random) -> str:
    """Return two to five examples of an invented rewriting that moves values from one frame to another."""
    slots = [f"{{{index}}}" for index in range(rng.randint(1, 4))]
    frames = []
    for used in (slots, rng.sample(slots, rng.randint(1, len(slots)))):
        small = [rng.choice(LITTLE) if rng.random() < 0.5 else rng.choice(FAMILIAR) if rng.random() < 0.7
                 else made_up(rng) for _ in range(rng.randint(1, 6))]  # fmt: skip
        frame = small + used
        rng.shuffle(frame)
        frames.append(rng.choice((" ", " ", " ", " | ", ", ")).join(frame))
    marks = rng.choice((*MARKS, "\n"))
    layout = (
        f"### {word(rng)}:\n{{}}\n\n### {word(rng)}:\n{{}}\n" if rng.random() < 0.6 else f"{{}} {marks} {{}}"
    )
    lines = []
    for _ in range(rng.randint(2, 5)):
        values = [" ".join(some(rng, 1, 2)) for _ in slots]
        lines.append(layout.format(*(frame.format(*values) for frame in frames)))
    return "\n".join(lines)


def related(rng: random.Random) -> str:
    """Return texts from the grammars of two different tasks about the same names and things."""
    slots = InventedSlots(rng, "train")
    first, second = (source(slots) for source in rng.sample(PLAIN, 2))
    if rng.random() < 0.3:
        return f"{first}\n{second}"
    return f"### {word(rng)}:\n{first}\n\n### {word(rng)}:\n{second}"


def fill_in(rng: random.Random) -> str:
    names = rng.sample("ABCDXYZ", rng.randint(1, 3))
    values = dict(zip(names, (" ".join(some(rng, 1, 2)) for _ in names), strict=True))
    joints = rng.randint(1, 5)
    frame = [*names, *(made_up(rng) if rng.random() < 0.6 else rng.choice(JOINTS) for _ in range(joints))]
    rng.shuffle(frame)
    known = rng.choice((", ", "; ", "\n")).join(f"{name} = {value}" for name, value in values.items())
    return f"{known}\n{' '.join(frame)}\n{' '.join(values.get(part, part) for part in frame)}"


def reorder(rng: random.Random) -> str:
    items = some(rng, 2, 5)
    how, result = rng.choice((("backwards", items[::-1]), ("first", items[:1]), ("last", items[-1:]),
                              ("second", items[1:2]), ("rest", items[1:])))  # fmt: skip
    return f"{' '.join(items)} {rng.choice(MARKS)} {how} {' '.join(result)}"


def quote(rng: random.Random) -> str:
    text = " ".join(some(rng, 1, 5))
    who, other = made_up(rng, capital=True), made_up(rng, capital=True)
    return rng.choice((f'{who}: "{text}"\n{other}: did {who} say "{text}"?',
                       f"{who}: {text}\n{other}: {word(rng)}\n{who} said {text}",
                       f"{who}: {word(rng)}\n{other}: {text}\n{other} told {who} {text}"))  # fmt: skip


def section(rng: random.Random) -> str:
    return f"### {word(rng)}:\n{' '.join(some(rng, 1, 5))}\n\n### {word(rng)}:\n{' '.join(some(rng, 1, 5))}"


Mix = dict[Callable[[random.Random], str], float]
COPYING: Mix = {
    plain: 5.0, repeat: 2.0, listed: 1.0, look_up: 1.5, span: 0.7, member: 1.5, same: 2.0, fill_in: 1.5,
    reorder: 0.5, quote: 1.0, section: 0.3,
}  # fmt: skip
JOINING: Mix = {
    plain: 2.5, related: 3.0, reports: 7.0, reword: 3.0, judge: 2.5, mapping: 3.5, repeat: 1.0, listed: 0.4,
    look_up: 1.0, span: 0.3, member: 0.7, same: 0.7, fill_in: 0.6, reorder: 0.2, quote: 0.5, section: 0.1,
}  # fmt: skip


def documents(seed: str, mix: Mix) -> Iterator[str]:
    """Yield documents endlessly; short generic formats are repeated one to four times in a document."""
    rng = random.Random(seed)
    formats, weights = list(mix), list(mix.values())
    while True:
        chosen = rng.choices(formats, weights)[0]
        times = 1 if chosen in (plain, mapping, judge, related, reports, reword) else rng.randint(1, 4)
        yield "\n".join(chosen(rng) for _ in range(times))
