"""Words for COCO's 80 categories, and how they are found in a caption.

The table is this project's own. A file in the form of CHAIR's `synonyms.txt` takes its place (`evaluation.synonyms`):
a line for each category, its words separated by commas, the category's name first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from evaluation.errors import EvaluationError

_TABLE = """
person, man, woman, boy, girl, child, kid, baby, toddler, guy, lady, gentleman, adult, human, people, men, women, \
children, player, skier, snowboarder, surfer, skateboarder, rider, cyclist, biker, pedestrian, driver, passenger, \
worker, chef, cook, waiter, waitress, officer, policeman, soldier, fireman, batter, pitcher, catcher, umpire, \
referee, athlete, swimmer, farmer, bride, groom, mother, father, mom, dad, son, daughter, brother, sister, student, \
teacher, tourist, shopper, crowd
bicycle, bike
car, sedan, suv, taxi, cab, minivan, hatchback, convertible, automobile
motorcycle, motorbike, scooter, moped, dirt bike, motor bike
airplane, plane, aeroplane, jet, aircraft, jetliner, airliner, biplane
bus, minibus, double decker, coach bus
train, locomotive, tram, trolley, subway, streetcar, freight train
truck, pickup, lorry, semi, firetruck, fire engine, dump truck, tow truck, van
boat, ship, sailboat, canoe, kayak, ferry, rowboat, raft, yacht, dinghy, gondola, tugboat
traffic light, stoplight, stop light, traffic signal, street light signal
fire hydrant, hydrant
stop sign
parking meter
bench, pew
bird, duck, goose, geese, seagull, gull, pigeon, owl, parrot, swan, chicken, rooster, hen, eagle, hawk, ostrich, \
flamingo, peacock, penguin, pelican, sparrow, crow, heron, turkey bird
cat, kitten, kitty, feline
dog, puppy, pup, canine, hound, terrier, retriever, poodle, dachshund, bulldog, collie, labrador
horse, pony, foal, stallion, mare, colt
sheep, lamb, ram, ewe
cow, cattle, bull, calf, calves, ox, oxen, heifer, steer
elephant
bear, polar bear, grizzly, panda, cub
zebra
giraffe
backpack, rucksack, knapsack
umbrella, parasol
handbag, purse, tote bag, shoulder bag
tie, necktie, bow tie
suitcase, luggage, briefcase, trunk suitcase
frisbee, flying disc, disc
skis, ski
snowboard, snow board
sports ball, ball, baseball, basketball, soccer ball, football, tennis ball, volleyball
kite, parasail
baseball bat, bat
baseball glove, baseball mitt, catcher's mitt, mitt
skateboard, skate board, longboard
surfboard, surf board, paddle board, bodyboard
tennis racket, racket, racquet, tennis racquet
bottle, water bottle, beer bottle, wine bottle
wine glass, wineglass, goblet
cup, mug, teacup, coffee cup, tumbler
fork
knife, knives, blade
spoon, ladle, teaspoon
bowl
banana
apple
sandwich, burger, hamburger, cheeseburger, panini, sub sandwich, wrap sandwich
orange fruit, orange, tangerine, clementine, mandarin
broccoli
carrot
hot dog, hotdog, frankfurter, chili dog, corn dog
pizza, pepperoni pizza
donut, doughnut
cake, cupcake, cheesecake, birthday cake
chair, armchair, stool, recliner, rocking chair, highchair
couch, sofa, loveseat, settee, futon
potted plant, houseplant, house plant, pot plant, potted flower
bed, mattress, bunk bed
dining table, table, kitchen table, desk, coffee table, picnic table
toilet, urinal, commode
tv, television, tv screen, flat screen, monitor, television set
laptop, notebook computer, macbook, laptop computer
mouse, computer mouse
remote, remote control, game controller, wii remote, wiimote
keyboard, computer keyboard
cell phone, phone, cellphone, mobile phone, smartphone, iphone, telephone
microwave, microwave oven
oven, stove, stove top oven, range oven, stovetop
toaster, toaster oven
sink, basin, washbasin
refrigerator, fridge, freezer
book, novel, textbook
clock, clock tower, wristwatch
vase, flower vase
scissors, shears
teddy bear, stuffed bear, stuffed animal, teddy, plush toy
hair drier, hair dryer, hairdryer, blow dryer
toothbrush
"""
_NOT = """
toilet paper, toilet seat, car seat, dog bowl, cat food, dog food, bus stop, train station, train track, bus station, \
horse carriage, bowling ball, bat cave, mouse pad, cake pan, pizza box, pizza oven, pizza cutter, hot plate, \
bed sheet, apple pie, apple juice, orange juice, orange color, banana bread, carrot cake, table cloth, tie dye, \
boat house, bird house, dog house, truck stop, cat tail, \
phone booth, phone case, oven mitt, sink hole, clock work, bear claw, \
train set, airplane hangar, person's name
"""
"""Phrases in which a category's word does not stand for the object."""

_IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "geese": "goose",
              "knives": "knife", "calves": "calf", "oxen": "ox", "mice": "mouse", "puppies": "puppy",
              "ponies": "pony", "shelves": "shelf", "wolves": "wolf", "feet": "foot", "buses": "bus",
              "busses": "bus", "babies": "baby", "ladies": "lady", "skis": "skis", "scissors": "scissors",
              "sheep": "sheep", "glasses": "glass", "sandwiches": "sandwich", "couches": "couch",
              "benches": "bench", "toothbrushes": "toothbrush"}  # fmt: skip


class Vocabulary:
    """Finds categories in texts.

    The longest phrase at a place counts: a hot dog is no dog, a teddy bear no bear. Words are taken in singular.

    Args:
        synonyms: Category -> its words and phrases; its own name is one of them.
        excluded: Phrases that stand for no category.
    """

    def __init__(self, synonyms: Mapping[str, Iterable[str]], excluded: Iterable[str] = ()) -> None:
        self.categories = tuple(synonyms)
        self._phrases: dict[tuple[str, ...], str | None] = {tuple(singulars(text)): None for text in excluded}
        for category, texts in synonyms.items():
            for text in (category, *texts):
                self._phrases[tuple(singulars(text))] = category
        self._longest = max(map(len, self._phrases), default=1)

    def find(self, text: str) -> list[str]:
        """Categories in their order of appearance, as often as they are mentioned."""
        words, found, place = singulars(text), list[str](), 0
        while place < len(words):
            for length in range(min(self._longest, len(words) - place), 0, -1):
                phrase = tuple(words[place : place + length])
                if phrase in self._phrases:
                    category = self._phrases[phrase]
                    found += [category] if category is not None else []
                    place += length
                    break
            else:
                place += 1
        return found


def singulars(text: str) -> list[str]:
    """Words in lower case and in singular."""
    return [_singular(word) for word in re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())]


def _singular(word: str) -> str:
    word = word.removesuffix("'s")
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        for ending, singular in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss"), ("xes", "x")):
            if word.endswith(ending) and len(word) > len(ending) + 1:
                return word.removesuffix(ending) + singular
        return word[:-1]
    return word


def _rows(text: str) -> list[list[str]]:
    return [[part.strip() for part in line.split(",") if part.strip()] for line in text.strip().splitlines()]


def vocabulary(categories: Sequence[str], file: Path | None = None) -> Vocabulary:
    """The words of these categories: of the user's file, or of this project's table.

    Args:
        categories: Names as the annotations have them; one without a row has its name alone.
        file: Lines of words, the category first.

    Raises:
        EvaluationError: The file cannot be read, or names none of the categories.
    """
    if file is None:
        rows = {row[0]: row[1:] for row in _rows(_TABLE)}
        rows = {"orange" if name == "orange fruit" else name: words for name, words in rows.items()}
        return Vocabulary({name: rows.get(name, []) for name in categories}, chain.from_iterable(_rows(_NOT)))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"evaluation.synonyms: {file} cannot be read ({error})") from error
    known = {row[0].lower(): row[1:] for row in _rows(text) if row}
    if not any(name.lower() in known for name in categories):
        raise EvaluationError(
            f"evaluation.synonyms: {file} names none of the {len(categories)} categories of the annotations. A line "
            "is: category, word, word, ..."
        )
    return Vocabulary({name: known.get(name.lower(), []) for name in categories})
