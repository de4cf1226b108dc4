"""Slot values of the built-in tasks; train and test share none.

A template names its slots by kind: ``"{person} lends {person2} the {object}"``. ``Slots`` draws a
value for each name when it is first used and keeps it, so that prompt and answer agree.
"""

import random
from functools import cache
from typing import Literal

Split = Literal["train", "test"]

WORDS: dict[str, tuple[str, str]] = {  # kind: (train, test)
    "stem": (
        "Mar Jul Kar Vik Tor Sam Nor Wil Hel Ros Dan Ed Fel Lor Mil Os Ren Sel Tam Val Al Ber Cor Dor "
        "El Fior Gil Hed Ingr Jess Kath Leon Mat Nat",
        "Han Per Gust Ol Brig Cel Jon Luc Patr Tim Arn Vinc",
    ),
    "town": (
        "Ash Brook Cedar Dun East Fair Glen Hart Kings Lang Mill North Oak Penn Queens Red Stone Thorn "
        "West Wood Black Clay Elm Hazel Marsh",
        "Birch Crow Falcon Green Hollow Iron Lake Moss Raven Silver",
    ),
    "object": (
        "bicycle camera drill guitar heater jacket kettle ladder laptop lamp mirror mixer oven pillow "
        "printer radio razor saddle scooter shovel sofa suitcase table tent toaster tripod violin "
        "wallet wardrobe watch bucket carpet curtain desk freezer hammer helmet iron locker mattress "
        "notebook projector racket sewing-machine",
        "umbrella backpack telescope blender cushion keyboard tractor bookshelf microscope trumpet "
        "blanket wheelbarrow thermos chainsaw",
    ),
    "food": (
        "apples bread carrots cheese chicken cookies dumplings eggs fish grapes ham honey jam lemons "
        "noodles olives onions oranges pancakes pasta peas pears pizza potatoes rice salad sausages "
        "soup spinach tea tomatoes yogurt",
        "waffles cherries lentils mushrooms pumpkin walnuts cabbage peaches sandwiches muffins",
    ),
    "building": (
        "library school hospital stadium museum theatre bridge airport market tunnel station harbour "
        "prison tower factory courthouse kindergarten swimming-pool cinema gallery",
        "cathedral brewery observatory warehouse planetarium lighthouse clinic university",
    ),
    "venue": (
        "park cafe beach gym bakery lake zoo playground church bookshop post-office corner-shop garden "
        "fountain bus-stop river old-mill square",
        "castle tavern boathouse pier arcade forest bridgehead vineyard",
    ),
    "day": (
        "Monday Tuesday Wednesday Thursday",
        "Friday Saturday Sunday",
    ),
    "job": (
        "baker carpenter dentist driver engineer farmer gardener judge lawyer nurse painter pilot "
        "plumber singer surgeon tailor teacher waiter writer butcher miner actor",
        "librarian mechanic photographer sailor chemist architect locksmith dancer",
    ),
    "skill": (
        "swim draw knit juggle sail paint ski sing cook type sew dance climb surf drive skate",
        "whistle weave wrestle garden row yodel bake fence",
    ),
    "language": (
        "French Spanish German Italian Russian Polish Turkish Greek Danish Dutch Hindi Arabic Korean Swedish",
        "Japanese Finnish Latin Portuguese Hebrew Swahili",
    ),
    "animal": (
        "cat dog horse goat parrot rabbit hamster sheep donkey turtle snake goose pony duck pig cow",
        "ferret lizard falcon llama canary otter mule raccoon",
    ),
    "material": (
        "wood steel glass leather cotton wool paper copper plastic marble clay silk brass stone",
        "bamboo granite linen rubber titanium ceramic velvet",
    ),
    "colour": (
        "red blue green yellow black white brown purple orange grey",
        "turquoise crimson ivory violet beige golden",
    ),
    "country": (
        "Norway Spain Canada Peru Kenya Japan Ireland Poland Egypt Chile Greece India Mexico Sweden "
        "Turkey Austria",
        "Portugal Vietnam Morocco Finland Brazil Jordan Iceland Croatia",
    ),
    "host": (
        "web01 web02 db01 db04 cache07 mail05 node11 node14 edge08 edge10",
        "web03 db06 cache09 mail12 node33 edge27",
    ),
    "team": (
        "Lions Tigers Eagles Sharks Wolves Bears Hawks Rovers Rangers Knights Giants Comets",
        "Panthers Dragons Foxes Titans Pirates Badgers",
    ),
}
COMPOSED = {  # kind: (kind of its first part, endings)
    "person": ("stem", ("a", "en", "ia", "ie", "on", "us", "ina", "ette", "ard", "o")),
    "place": (
        "town",
        ("ford", "field", "ton", "bury", "ham", "dale", "mouth", "wick", "port", "stead", "bridge", "well"),
    ),
}
RANGES = {"number": (3, 99), "amount": (100, 9999), "year": (1700, 2023), "date": (3, 27)}


@cache
def words(kind: str, split: Split) -> tuple[str, ...]:
    """Return the slot values of a worded kind."""
    return tuple(WORDS[kind][split == "test"].split())


class Slots(dict[str, str]):
    """Values drawn on first use: ``"{place}"``, and ``"{place2}"`` for a different one of that kind."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        super().__init__()
        self.rng = rng
        self.split = split

    def __missing__(self, name: str) -> str:
        kind = name.rstrip("0123456789")
        value = self.draw(kind)
        while value in self.values():
            value = self.draw(kind)
        self[name] = value
        return value

    def draw(self, kind: str) -> str:
        """Draw one value of a kind; train numbers are no multiples of three, test numbers are."""
        if kind in COMPOSED:
            first, endings = COMPOSED[kind]
            return self.rng.choice(words(first, self.split)) + self.rng.choice(endings)
        if kind in RANGES:
            low, high = RANGES[kind]
            number = self.rng.randrange(low, high) // 3 * 3
            return str(number if self.split == "test" else number + self.rng.choice((1, 2)))
        return self.rng.choice(words(kind, self.split))

    def fill(self, template: str) -> str:
        """Fill a template's slots."""
        return template.format_map(self)
