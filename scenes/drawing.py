"""Renders one scene: objects of one context before a ground, with clutter, noise and the ground truth.

A scene is drawn from one of five contexts, so that objects that belong together appear together: that is
what a model trained on such scenes can lean on, and hallucinate from. Every scene depends on (seed, stream,
index) and its look alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.wording import with_article
from scenes.categories import CATEGORIES, CONTEXT_SIZE, CONTEXTS
from scenes.sprites import load_sprites

Sizes = Literal["square", "mixed"]

SIZE = 96  # pixels a side of a square scene
STREAMS = {
    "train": 1,
    "val": 2,
    "fit": 3,
    "fit-check": 4,
}  # the VLM is fitted on "fit" alone, so it never saw a world

MAX_ANGLE = 25.0  # degrees
OUT_OF_CONTEXT = 0.12  # probability that an object comes from another context
PERSON_EVERYWHERE = 0.30  # probability that one object of any scene is replaced by a person
BACKGROUND_FOLLOWS_CONTEXT = 0.5  # otherwise the ground is drawn uniformly
MAX_SAME = 2  # objects of one category in an image
HORIZON = (10 / 96, 45 / 96)  # where the upper part of the ground ends, as a share of the height
LONGEST_UNIT = 1.3  # an object's size counts in sqrt(width * height), at most so many shorter sides
GROUNDS = {  # context -> name of its ground, RGB
    "street": ("asphalt", (118, 120, 126)),
    "kitchen": ("wood", (176, 136, 96)),
    "sports": ("sand", (214, 194, 150)),
    "animals": ("grass", (116, 158, 86)),
    "office": ("carpet", (134, 142, 172)),
}

_CONTEXT_NAMES = tuple(CONTEXTS)
_PERSON = next(i for i, c in enumerate(CATEGORIES) if c.name == "person")
_ZIPF = 1.0 / np.arange(1, CONTEXT_SIZE + 1)
_ZIPF = _ZIPF / _ZIPF.sum()


@dataclass(frozen=True)
class Look:
    """What the scenes of a world look like.

    Attributes:
        sizes: (width, height) in pixels; a scene has one of them.
        area: Pixels of a scene whose clutter is counted by `behind` and `before`; others have more or less of it.
        objects: Objects drawn in an image, both ends included.
        object_size: Longest side of an object as a share of the image's.
        overhang: Up to this share of an object may lie outside the image.
        min_visible: An object of which less is seen leaves the ground truth.
        behind: Plain shapes behind the objects, from and below.
        behind_side: Their sides in pixels, from and below.
        before: Plain shapes before the objects, from and below.
        before_side: Their sides in pixels, from and below.
        tint: Brightness of an object, from and to.
        channel: Brightness of each of its colour channels beside that, from and to.
        coarse: Standard deviation of the noise of 6 x 6 pixels, of 255.
        noise: Standard deviation of the pixel noise, of 255.
    """

    sizes: tuple[tuple[int, int], ...] = ((SIZE, SIZE),)
    area: int = SIZE * SIZE
    objects: tuple[int, int] = (3, 7)
    object_size: tuple[float, float] = (0.13, 0.36)
    overhang: float = 0.15
    min_visible: float = 0.20
    behind: tuple[int, int] = (1, 5)
    behind_side: tuple[int, int] = (4, 26)
    before: tuple[int, int] = (0, 3)
    before_side: tuple[int, int] = (4, 14)
    tint: tuple[float, float] = (0.82, 1.12)
    channel: tuple[float, float] = (0.94, 1.06)
    coarse: float = 0.0
    noise: float = 6.0


SQUARE = Look()
MIXED = Look(
    sizes=((192, 144), (144, 192), (128, 192), (150, 150), (288, 96), (192, 192)),
    area=192 * 144,
    objects=(3, 6),
    object_size=(0.30, 0.62),
    overhang=0.20,
    min_visible=0.25,
    behind_side=(8, 48),
    before=(8, 21),
    before_side=(6, 22),
    tint=(0.75, 1.15),
    channel=(0.88, 1.12),
    coarse=10.0,
    noise=12.0,
)
LOOKS: dict[Sizes, Look] = {"square": SQUARE, "mixed": MIXED}


@dataclass(frozen=True)
class SceneObject:
    """One object that can be seen."""

    category: int
    """Index into `CATEGORIES`."""
    box: tuple[int, int, int, int]
    """x, y, width, height of its visible pixels."""
    area: int
    """Visible pixels."""
    visible: float
    """Visible share of the whole object, `Look.min_visible` to 1."""


@dataclass(frozen=True)
class Scene:
    """One rendered scene with its ground truth."""

    image: NDArray[np.uint8]
    """[H, W, 3] RGB."""
    labels: NDArray[np.uint8]
    """[H, W]: 0 where no object of the ground truth is seen, else 1 + category index."""
    objects: tuple[SceneObject, ...]
    """The ground truth, largest visible area first."""
    context: str
    ground: str

    @property
    def present(self) -> list[int]:
        """Category indices in the ground truth, each once, largest first."""
        return list(dict.fromkeys(thing.category for thing in self.objects))


def caption(scene: Scene) -> str:
    """One sentence with every category of the ground truth: "A dog, a cat and an apple on grass."."""
    names = [with_article(CATEGORIES[index].name) for index in scene.present]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed[0].upper()}{listed[1:]} on {scene.ground}."


def render_scene(
    seed: int, stream: str, index: int, look: Look = SQUARE, size: tuple[int, int] | None = None
) -> Scene:
    """Renders one scene.

    Args:
        seed: The world's seed.
        stream: A key of `STREAMS`.
        index: Number of the scene within its stream, from 0.
        look: What the scenes look like.
        size: (width, height) instead of one that is drawn from the look's.

    Returns:
        The scene; it depends on the arguments alone, and shows at least one object.
    """
    rng = np.random.default_rng([seed, STREAMS[stream], index])
    if size is None:
        sizes = look.sizes
        size = sizes[0] if len(sizes) == 1 else sizes[int(rng.integers(len(sizes)))]
    while True:  # a scene whose every object is hidden is drawn again: practically never
        scene = _draw_scene(rng, look, size)
        if scene.objects:
            return scene


def _draw_scene(rng: np.random.Generator, look: Look, size: tuple[int, int]) -> Scene:
    width, height = size
    share = width * height / look.area
    context = int(rng.integers(len(_CONTEXT_NAMES)))
    ground_of = context if rng.random() < BACKGROUND_FOLLOWS_CONTEXT else int(rng.integers(len(_CONTEXT_NAMES)))
    ground, colour = GROUNDS[_CONTEXT_NAMES[ground_of]]
    canvas = _draw_ground(rng, colour, size)  # [H, W, 3] float32
    owner = np.zeros((height, width), np.uint8)  # 0: nothing, n: the n-th object
    for _ in range(round(int(rng.integers(*look.behind)) * share)):
        _draw_clutter(rng, canvas, owner, look.behind_side)
    chosen = _choose_categories(rng, context, look.objects)
    whole = [_draw_object(rng, look, canvas, owner, (category, number + 1)) for number, category in enumerate(chosen)]
    for _ in range(round(int(rng.integers(*look.before)) * share)):
        _draw_clutter(rng, canvas, owner, look.before_side)
    if look.coarse:
        canvas += _coarse_noise(rng, look.coarse, size)
    canvas += rng.normal(0.0, look.noise, canvas.shape).astype(np.float32)
    image = canvas.clip(0, 255).astype(np.uint8)

    labels = np.zeros((height, width), np.uint8)
    objects = []
    for number, (category, pixels) in enumerate(zip(chosen, whole, strict=True), start=1):
        mask = owner == number
        area = int(mask.sum())
        if area < look.min_visible * pixels or area == 0:
            continue
        labels[mask] = category + 1
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1))
        objects.append(SceneObject(category, box, area, area / pixels))
    objects.sort(key=lambda thing: -thing.area)
    return Scene(image, labels, tuple(objects), _CONTEXT_NAMES[context], ground)


def _choose_categories(rng: np.random.Generator, context: int, objects: tuple[int, int]) -> list[int]:
    wanted = int(rng.integers(objects[0], objects[1] + 1))
    chosen: list[int] = []
    while len(chosen) < wanted:
        home = context
        if rng.random() < OUT_OF_CONTEXT:
            home = (context + int(rng.integers(1, len(_CONTEXT_NAMES)))) % len(_CONTEXT_NAMES)
        category = home * CONTEXT_SIZE + int(rng.choice(CONTEXT_SIZE, p=_ZIPF))
        if chosen.count(category) < MAX_SAME:
            chosen.append(category)
    if rng.random() < PERSON_EVERYWHERE and chosen.count(_PERSON) < MAX_SAME:
        chosen[int(rng.integers(wanted))] = _PERSON
    return chosen


def _draw_ground(rng: np.random.Generator, colour: tuple[int, int, int], size: tuple[int, int]) -> NDArray[np.float32]:
    """A ground of uneven colour under a slightly different upper part, [H, W, 3] of 0 to 255."""
    base = np.asarray(colour, np.float32) + rng.normal(0, 12, 3).astype(np.float32)
    cells = int(rng.integers(3, 13))
    rough = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    texture = np.asarray(rough.resize(size, Image.Resampling.BICUBIC), np.float32) / 255 - 0.5
    canvas = base + texture[..., None] * float(rng.uniform(15, 50))
    highest, lowest = (round(share * size[1]) for share in HORIZON)
    horizon = int(rng.integers(highest, lowest))
    canvas[:horizon] += rng.normal(0, 16, 3).astype(np.float32)
    return canvas.astype(np.float32)


def _coarse_noise(rng: np.random.Generator, deviation: float, size: tuple[int, int]) -> NDArray[np.float32]:
    """Noise in squares of 6 x 6 pixels, [H, W, 3]: unlike pixel noise it does not average out within a patch."""
    width, height = size
    cells = rng.normal(0.0, deviation, (-(-height // 6), -(-width // 6), 3)).astype(np.float32)
    return cells.repeat(6, axis=0).repeat(6, axis=1)[:height, :width]


def _draw_clutter(
    rng: np.random.Generator, canvas: NDArray[np.float32], owner: NDArray[np.uint8], side: tuple[int, int]
) -> None:
    """A plain ellipse or box that means nothing, over whatever was drawn before."""
    height, width = (int(v) for v in rng.integers(*side, 2))
    top, left = int(rng.integers(0, owner.shape[0] - height)), int(rng.integers(0, owner.shape[1] - width))
    shape = np.ones((height, width), bool)
    if rng.random() < 0.5:
        y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        shape = x * x + y * y <= 1.0
    part = np.s_[top : top + height, left : left + width]
    canvas[part][shape] = rng.uniform(30, 225, 3).astype(np.float32)
    owner[part][shape] = 0


def _draw_object(
    rng: np.random.Generator,
    look: Look,
    canvas: NDArray[np.float32],
    owner: NDArray[np.uint8],
    thing: tuple[int, int],
) -> int:
    """Draws (category, number): a sprite over the canvas, marked in `owner`; returns its pixels, hidden or not."""
    category, number = thing
    rows, columns = owner.shape
    sprite = load_sprites()[category]
    unit = min(math.sqrt(rows * columns), LONGEST_UNIT * min(rows, columns))
    scale = float(rng.uniform(*look.object_size)) * unit / max(sprite.size)
    shape = (max(3, round(sprite.width * scale)), max(3, round(sprite.height * scale)))
    sprite = sprite.resize(shape, Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = float(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
    sprite = sprite.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    pixels = np.asarray(sprite, np.float32)
    height, width = pixels.shape[:2]
    over = look.overhang
    left = int(rng.uniform(-over * width, max(columns - (1 - over) * width, 1)))
    top = int(rng.uniform(-over * height, max(rows - (1 - over) * height, 1)))
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, columns), min(top + height, rows)
    seen = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = seen[..., 3:] / 255
    tint = rng.uniform(*look.tint) * rng.uniform(*look.channel, 3)
    part = np.s_[y0:y1, x0:x1]
    canvas[part] = canvas[part] * (1 - alpha) + seen[..., :3] * tint.astype(np.float32) * alpha
    owner[part][alpha[..., 0] > 0.5] = number
    return int((pixels[..., 3] > 127).sum())
