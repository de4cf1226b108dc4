"""Slot values of the built-in tasks; train and test share no values.

A template names its slots by kind: ``"{person} lends {person2} the {object}"``. ``Slots`` draws a value on
the first use of a name and stores it, so that prompt and answer agree.
"""

import random
from functools import cache
from typing import Literal

Split = Literal["train", "test"]

WORDS: dict[str, tuple[str, str]] = {  # kind: (train, test)
    "stem": (
        "Mar Jul Kar Vik Tor Sam Nor Wil Hel Ros Dan Ed Fel Lor Mil Os Ren Sel Tam Val Al Ber Cor Dor El "
        "Fior Gil Hed Ingr Jess Kath Leon Mat Nat Ad Agn Alb Am And Ant Ard Arm Aur Bal Bast Bea Ben Bern "
        "Bett Bj Bor Brand Bren Bruc Cam Carl Cas Cath Cedr Char Chlo Christ Clar Clem Col Con Cyr Dam "
        "Dav Deb Del Den Dim Dom Don Doug Dyl Eb Eg Eir Eli Em Er Esm Eug Ev Fab Faus Ferd Finn Flor Fran "
        "Fred Gab Gar Gen Geor Ger Gin Glor Gord Gret Gwen Hal Harr Heid Herm Hil Hor Hug Id Ign Ilk Im "
        "Ir Isab Iv Jac Jan Jas Jer Joach Jos Jud Kam Katr Kev Kim Kirst Kon Lar Laur Leop Lil Lin "
        "Lis Loth Luk Lyd Mad Magn Malc Man Marg Max Mel Mich Mir Mon Mort Nad Nic Nin Noem Norb Odil Olg "
        "Orl Osk Ott Pam Pasc Paul Pen Petr Phil Pier Quent Raf Raym Reg Reinh Rob Rod Rolf Rud Rup Sab "
        "Sand Seb Serg Sig Sim Sof Stef Sus Sylv Tab Ted Ter Theod Thom Tob Trist Urs Vend Ver Vict Viol "
        "Wald Wend Wern Yv Zach Zel",
        "Han Per Gust Ol Brig Cel Jon Luc Patr Tim Arn Vinc",
    ),
    "town": (
        "Ash Brook Cedar Dun East Fair Glen Hart Kings Lang Mill North Oak Penn Queens Red Stone Thorn "
        "West Wood Black Clay Elm Hazel Marsh Alder Apple Arrow Badger Barley Bear Beck Bell Berry "
        "Black-wood Blue Bram Brick Bridge Bright Broad Bron Buck Burn Butter Carl Castle Chapel Cherry "
        "Clear Cliff Cold Copper Corn Cran Cross Dark Deep Deer Dew Down Drift Eagle Elder Ever Fern "
        "Finch Fisher Fog Ford Fox Frost Gold Goose Grand Grass Grey Grove Half Hare Hawk Heather Hedge "
        "Herons High Hill Holly Honey Horse Hunter Isle Ivy Kestrel Kirk Lamb Lark Laurel Leaf Light Lime "
        "Linden Long Low Maple Mead Mist Moor Nettle New Night Nut Old Orchard Otter Owl Park Peach "
        "Pebble Pine Plum Pond Poplar Quarry Rain Ram Rich Ridge River Robin Rock Rose Rush Rye "
        "Salt Sand Sea Shadow Sheep Shell Shep Short Sky Snow South Spring Stag Stan Star Still Storm Sum "
        "Sun Swan Sweet Thistle Tide Timber Trout Vale Violet Walnut Water Weather Whit Wild Willow Wind "
        "Winter Wolf Wren Yarrow Yew",
        "Birch Crow Falcon Green Hollow Iron Lake Moss Raven Silver",
    ),
    "object": (
        "bicycle camera drill guitar heater jacket kettle ladder laptop lamp mirror mixer oven pillow "
        "printer radio razor saddle scooter shovel sofa suitcase table tent toaster tripod violin wallet "
        "wardrobe watch bucket carpet curtain desk freezer hammer helmet iron locker mattress notebook "
        "projector racket sewing-machine anvil armchair axe ball basket bathtub bench binoculars "
        "blanket-box bookcase bottle broom brush cabinet calculator candle canoe cart clock coat compass "
        "computer cradle crate crutch cupboard dishwasher doll drum easel fan flute fridge globe glove "
        "grill harp hat hose kayak kite knife lawnmower lens loom magnet mattock microwave motorcycle oar "
        "paddle pan parasol pencil piano plough puppet rake ring rope rug sandal saw scarf scissors scale "
        "screwdriver shelf shirt skateboard sledge spade speaker spoon stapler statue stool stove sword "
        "teapot thermometer torch towel toy trailer tray trolley tyre vase wagon wheel wrench xylophone "
        "zither",
        "umbrella backpack telescope blender cushion keyboard tractor bookshelf microscope trumpet "
        "blanket wheelbarrow thermos chainsaw",
    ),
    "food": (
        "apples bread carrots cheese chicken cookies dumplings eggs fish grapes ham honey jam lemons "
        "noodles olives onions oranges pancakes pasta peas pears pizza potatoes rice salad sausages soup "
        "spinach tea tomatoes yogurt almonds apricots asparagus bacon bananas beans beef beetroot berries "
        "biscuits broccoli butter cakes cauliflower celery chestnuts chickpeas chillies coconuts corn "
        "crabs cream cucumbers currants curry dates donuts figs garlic ginger hazelnuts herring kale lamb "
        "leeks lettuce lobsters mangoes melons mint mussels nuts oats omelettes oysters papayas parsley "
        "pears-in-wine peppers pickles pineapples plums popcorn porridge potato-cakes prawns prunes "
        "quinces radishes raisins raspberries salmon sardines shrimps steak stew strawberries toast tofu "
        "trout truffles tuna turnips wraps yams",
        "waffles cherries lentils mushrooms pumpkin walnuts cabbage peaches sandwiches muffins",
    ),
    "building": (
        "library school hospital stadium museum theatre bridge airport market tunnel station harbour "
        "prison tower factory courthouse kindergarten swimming-pool cinema gallery abbey academy aquarium "
        "archive arena armoury bakehouse barracks bathhouse cannery canteen castle-tower chapel college "
        "dairy depot distillery dormitory embassy forge fortress foundry greenhouse hangar hostel hotel "
        "laboratory laundry mill mint monastery mosque nursery office opera palace pavilion pharmacy "
        "refinery sawmill seminary shelter shipyard silo spa studio synagogue tannery temple town-hall "
        "villa watermill windmill winery",
        "cathedral brewery observatory warehouse planetarium lighthouse clinic university",
    ),
    "venue": (
        "park cafe beach gym bakery lake zoo playground church bookshop post-office corner-shop fountain "
        "bus-stop river old-mill square barn beer-garden campsite canal cemetery circus cliff courtyard "
        "crossroads deli diner dock dunes farm ferry field gate golf-course hairdresser hill hotel-bar "
        "ice-rink island jetty kiosk lagoon library-steps mall meadow monument orchard palace-gate "
        "parking-lot pond pool promenade pub quarry ruins sauna skatepark stable stage supermarket swamp "
        "tea-room tennis-court terrace toll-bridge valley wharf woods",
        "castle tavern boathouse pier arcade forest bridgehead vineyard",
    ),
    "day": (
        "Monday Tuesday Wednesday Thursday Easter Christmas June July August September October tomorrow",
        "Friday Saturday Sunday",
    ),
    "job": (
        "baker carpenter dentist driver engineer farmer gardener judge lawyer nurse painter pilot plumber "
        "singer surgeon tailor teacher waiter writer butcher miner actor accountant astronomer barber "
        "beekeeper biologist blacksmith bricklayer broker cashier chauffeur clown coach cobbler composer "
        "courier curator decorator detective diver editor economist electrician fisherman florist "
        "geologist glazier guard guide hunter interpreter jeweller jockey joiner journalist logger mason "
        "mayor midwife miller model monk notary optician pharmacist physicist poet porter postman potter "
        "programmer psychologist referee reporter roofer saddler sculptor shepherd soldier stonemason "
        "surveyor tanner translator trapper tutor undertaker vet waitress weaver welder zoologist",
        "librarian mechanic photographer sailor chemist architect locksmith dancer",
    ),
    "skill": (
        "swim draw knit juggle sail paint ski sing cook type sew dance climb surf drive skate act box "
        "bowl brew camp canoe carve crochet curl cycle debate dive dribble embroider fish flirt fly "
        "forage hike hunt iron jog jump kayak march meditate mow negotiate paddle parachute plumb pray "
        "print quilt rap read recite run scuba-dive sculpt shoot skateboard sketch sledge snorkel spin "
        "sprint swear swing tango tap-dance teach throw tile type-set vault waltz weld windsurf write",
        "whistle weave wrestle garden row yodel bake fence",
    ),
    "language": (
        "French Spanish German Italian Russian Polish Turkish Greek Danish Dutch Hindi Arabic Korean "
        "Swedish Albanian Basque Bengali Breton Bulgarian Catalan Chinese Croatian Czech Dari Estonian "
        "Farsi Flemish Frisian Gaelic Galician Georgian Hausa Hungarian Icelandic Igbo Irish Kazakh Khmer "
        "Kurdish Lao Latvian Malay Maltese Maori Mongol Nepali Norwegian Pashto Punjabi Romanian Samoan "
        "Serbian Slovak Slovene Somali Tagalog Tamil Telugu Thai Tibetan Ukrainian Urdu Uzbek Vietnamese "
        "Welsh Xhosa Yiddish Yoruba Zulu",
        "Japanese Finnish Latin Portuguese Hebrew Swahili",
    ),
    "animal": (
        "cat dog horse goat parrot rabbit hamster sheep donkey turtle snake goose pony duck pig cow "
        "alpaca ape badger bat bear beaver bee bison boar budgie bull camel chameleon chicken cobra "
        "cockatoo crab crane crocodile crow deer dolphin dove dragonfly eagle elk emu finch flamingo fox "
        "frog gazelle gecko gerbil giraffe gorilla hare hawk hedgehog hen heron hippo hyena ibex iguana "
        "jackal jaguar kangaroo koala lamb lemur leopard lion lobster lynx macaw magpie marmot mink mole "
        "monkey moose mouse newt octopus ostrich owl ox panda panther peacock pelican penguin pheasant "
        "pigeon platypus puffin puma python quail ram rat raven rhino robin rooster salamander seagull "
        "seal skunk sloth snail sparrow spider squirrel stork swallow swan tiger toad trout vole vulture "
        "walrus weasel whale wolf wombat yak zebra",
        "ferret lizard falcon llama canary otter mule raccoon",
    ),
    "material": (
        "wood steel glass leather cotton wool paper copper plastic marble clay silk brass stone alabaster "
        "aluminium amber asphalt basalt birch-bark bone brick bronze cardboard cashmere cement chalk "
        "chrome coal concrete coral cork denim ebony felt flint foam fur gold gravel hemp horn iron-ore "
        "jade jute lace latex lead limestone mahogany marzipan mud nylon oak onyx pearl pewter pine "
        "plaster polyester porcelain quartz raffia reed resin sand sandstone satin silver slate straw "
        "suede tar terracotta tin tweed vinyl walnut-wood wax wicker willow zinc",
        "bamboo granite linen rubber titanium ceramic velvet",
    ),
    "colour": (
        "red blue green yellow black white brown purple orange grey amber-coloured apricot aqua azure "
        "bronze-coloured burgundy charcoal cherry chestnut cobalt copper-coloured coral-red "
        "cream-coloured cyan ebony-black emerald fuchsia indigo jade-green khaki lavender lemon lilac "
        "lime magenta maroon mauve mint-green mustard navy ochre olive peach-coloured pink plum-coloured "
        "rose ruby rust salmon-pink sapphire scarlet silver-grey tan teal umber vermilion wine-red",
        "turquoise crimson ivory violet beige golden",
    ),
    "country": (
        "Norway Spain Canada Peru Kenya Japan Ireland Poland Egypt Chile Greece India Mexico Sweden "
        "Turkey Austria Albania Algeria Angola Argentina Armenia Australia Bahrain Barbados Belgium "
        "Belize Benin Bhutan Bolivia Botswana Bulgaria Burundi Cambodia Cameroon Chad China Colombia "
        "Congo Cuba Cyprus Denmark Dominica Ecuador Eritrea Estonia Ethiopia Fiji France Gabon Gambia "
        "Georgia Germany Ghana Grenada Guatemala Guinea Guyana Haiti Honduras Hungary Indonesia Iran Iraq "
        "Israel Italy Jamaica Kuwait Laos Latvia Lebanon Lesotho Liberia Libya Lithuania Luxembourg "
        "Malawi Malaysia Mali Malta Mauritius Moldova Monaco Mongolia Mozambique Namibia Nepal "
        "Netherlands Nicaragua Niger Nigeria Oman Pakistan Panama Paraguay Qatar Romania Russia Rwanda "
        "Samoa Senegal Serbia Singapore Slovakia Slovenia Somalia Sudan Syria Tanzania Thailand Togo "
        "Tonga Tunisia Uganda Ukraine Uruguay Yemen Zambia Zimbabwe",
        "Portugal Vietnam Morocco Finland Brazil Jordan Iceland Croatia",
    ),
    "host": (
        "web01 web02 db01 db04 cache07 mail05 node11 node14 edge08 edge10",
        "web03 db06 cache09 mail12 node33 edge27",
    ),
    "team": (
        "Lions Tigers Eagles Sharks Wolves Bears Hawks Rovers Rangers Knights Giants Comets Arrows "
        "Blazers Bobcats Broncos Bruins Bulldogs Bulls Buffaloes Cannons Cardinals Chargers Chiefs Cobras "
        "Colts Condors Cougars Cowboys Coyotes Crusaders Cyclones Dolphins Drifters Explorers Falcons "
        "Flames Flyers Gladiators Gunners Hornets Hurricanes Jaguars Jets Kestrels Kings Lancers Leopards "
        "Magpies Mariners Miners Monarchs Mustangs Outlaws Owls Patriots Pelicans Penguins Phantoms "
        "Pioneers Predators Raiders Rams Ravens Rebels Rockets Royals Saints Scorpions Seahawks Spartans "
        "Stallions Stars Stingers Storm Suns Thunder Trojans Vikings Warriors Wasps Wildcats Wizards",
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
    """Return the slot values of a kind in ``WORDS``."""
    return tuple(WORDS[kind][split == "test"].split())


class Slots(dict[str, str]):
    """Values drawn on first use; ``"{place2}"`` is a different value of kind ``place`` than ``"{place}"``."""

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
        """Draw a value of a kind; only test numbers are multiples of three."""
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
