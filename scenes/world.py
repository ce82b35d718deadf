"""The embedded world: renders scenes of 96 x 96 pixels and writes them in COCO's own layout.

A scene is drawn from one of five contexts, so that objects that belong together appear together: that is
what a model trained on such scenes can lean on, and hallucinate from. Every scene depends on (seed, stream,
index) alone, so a longer world begins with the shorter one, and the streams never meet.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data.errors import DataError, SettingsError
from data.wording import with_article
from scenes.categories import CATEGORIES, CONTEXT_SIZE, CONTEXTS
from scenes.marker import WAY_OUT, NoWorldError, holds_world, remove_dead, with_fingerprint, write_marker
from scenes.marker import WorldMismatchError as WorldMismatchError
from scenes.sprites import SHEET, load_sprites
from scr_runtime.files import sync_folder, temporary_path, write_file

SIZE = 96  # pixels a side
WORLD_VERSION = 1  # raise it when a rendered pixel, an annotation or a caption changes
STREAMS = {
    "train": 1,
    "val": 2,
    "fit": 3,
    "fit-check": 4,
}  # the VLM is fitted on "fit" alone, so it never saw a world
VAL_ID_OFFSET = 1_000_000  # image ids: train from 1, val from 1,000,001

OBJECTS = (3, 7)  # objects drawn in an image, both ends included
OBJECT_SIZE = (0.13, 0.36)  # longest side as a share of the image
MAX_ANGLE = 25.0  # degrees
OUT_OF_CONTEXT = 0.12  # probability that an object comes from another context
PERSON_EVERYWHERE = 0.30  # probability that one object of any scene is replaced by a person
MIN_VISIBLE = 0.20  # an object of which less is seen leaves the ground truth
BACKGROUND_FOLLOWS_CONTEXT = 0.5  # otherwise the ground is drawn uniformly
NOISE = 6.0  # standard deviation of the pixel noise, of 255
MAX_SAME = 2  # objects of one category in an image
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
_SPLITS = ("train", "val")
_PNG_END = b"IEND\xaeB`\x82"
_KINDS = ("instances", "captions")
_LICENCE = {"name": "SIL Open Font License 1.1 (glyphs of Noto Color Emoji)", "url": "https://openfontlicense.org"}


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
    """Visible share of the whole object, 0.2 to 1."""


@dataclass(frozen=True)
class Scene:
    """One rendered scene with its ground truth."""

    image: NDArray[np.uint8]
    """[96, 96, 3] RGB."""
    labels: NDArray[np.uint8]
    """[96, 96]: 0 where no object of the ground truth is seen, else 1 + category index."""
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


def render_scene(seed: int, stream: str, index: int) -> Scene:
    """Renders one scene.

    Args:
        seed: The world's seed.
        stream: A key of `STREAMS`.
        index: Number of the scene within its stream, from 0.

    Returns:
        The scene; it depends on the three arguments alone, and shows at least one object.
    """
    rng = np.random.default_rng([seed, STREAMS[stream], index])
    while True:  # a scene whose every object is hidden is drawn again: practically never
        scene = _draw_scene(rng)
        if scene.objects:
            return scene


def _draw_scene(rng: np.random.Generator) -> Scene:
    context = int(rng.integers(len(_CONTEXT_NAMES)))
    ground_of = context if rng.random() < BACKGROUND_FOLLOWS_CONTEXT else int(rng.integers(len(_CONTEXT_NAMES)))
    ground, colour = GROUNDS[_CONTEXT_NAMES[ground_of]]
    canvas = _draw_ground(rng, colour)  # [96, 96, 3] float32
    owner = np.zeros((SIZE, SIZE), np.uint8)  # 0: nothing, n: the n-th object
    for _ in range(int(rng.integers(1, 5))):
        _draw_clutter(rng, canvas, owner, largest=26)
    chosen = _choose_categories(rng, context)
    whole = [_draw_object(rng, canvas, owner, category, number + 1) for number, category in enumerate(chosen)]
    for _ in range(int(rng.integers(0, 3))):
        _draw_clutter(rng, canvas, owner, largest=14)
    canvas += rng.normal(0.0, NOISE, canvas.shape).astype(np.float32)
    image = canvas.clip(0, 255).astype(np.uint8)

    labels = np.zeros((SIZE, SIZE), np.uint8)
    objects = []
    for number, (category, pixels) in enumerate(zip(chosen, whole, strict=True), start=1):
        mask = owner == number
        area = int(mask.sum())
        if area < MIN_VISIBLE * pixels or area == 0:
            continue
        labels[mask] = category + 1
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1))
        objects.append(SceneObject(category, box, area, area / pixels))
    objects.sort(key=lambda thing: -thing.area)
    return Scene(image, labels, tuple(objects), _CONTEXT_NAMES[context], ground)


def _choose_categories(rng: np.random.Generator, context: int) -> list[int]:
    wanted = int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))
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


def _draw_ground(rng: np.random.Generator, colour: tuple[int, int, int]) -> NDArray[np.float32]:
    """A ground of uneven colour under a slightly different upper part, [96, 96, 3] of 0 to 255."""
    base = np.asarray(colour, np.float32) + rng.normal(0, 12, 3).astype(np.float32)
    cells = int(rng.integers(3, 13))
    rough = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    texture = np.asarray(rough.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) / 255 - 0.5
    canvas = base + texture[..., None] * float(rng.uniform(15, 50))
    horizon = int(rng.integers(10, 45))
    canvas[:horizon] += rng.normal(0, 16, 3).astype(np.float32)
    return canvas.astype(np.float32)


def _draw_clutter(
    rng: np.random.Generator, canvas: NDArray[np.float32], owner: NDArray[np.uint8], largest: int
) -> None:
    """A plain ellipse or box that means nothing, over whatever was drawn before."""
    height, width = (int(v) for v in rng.integers(4, largest, 2))
    top, left = int(rng.integers(0, SIZE - height)), int(rng.integers(0, SIZE - width))
    shape = np.ones((height, width), bool)
    if rng.random() < 0.5:
        y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        shape = x * x + y * y <= 1.0
    part = np.s_[top : top + height, left : left + width]
    canvas[part][shape] = rng.uniform(30, 225, 3).astype(np.float32)
    owner[part][shape] = 0


def _draw_object(
    rng: np.random.Generator,
    canvas: NDArray[np.float32],
    owner: NDArray[np.uint8],
    category: int,
    number: int,
) -> int:
    """Draws a sprite over the canvas and marks it as `number` in `owner`; returns its pixels, hidden or not."""
    sprite = load_sprites()[category]
    scale = float(rng.uniform(*OBJECT_SIZE)) * SIZE / max(sprite.size)
    shape = (max(3, round(sprite.width * scale)), max(3, round(sprite.height * scale)))
    sprite = sprite.resize(shape, Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = float(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
    sprite = sprite.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    pixels = np.asarray(sprite, np.float32)
    height, width = pixels.shape[:2]
    overhang = 0.15  # up to this share of the object may lie outside the image
    left = int(rng.uniform(-overhang * width, SIZE - (1 - overhang) * width))
    top = int(rng.uniform(-overhang * height, SIZE - (1 - overhang) * height))
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, SIZE), min(top + height, SIZE)
    seen = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = seen[..., 3:] / 255
    tint = rng.uniform(0.82, 1.12) * rng.uniform(0.94, 1.06, 3)
    part = np.s_[y0:y1, x0:x1]
    canvas[part] = canvas[part] * (1 - alpha) + seen[..., :3] * tint.astype(np.float32) * alpha
    owner[part][alpha[..., 0] > 0.5] = number
    return int((pixels[..., 3] > 127).sum())


def ensure_world(root: Path, train: int, val: int, seed: int = 0) -> Path:
    """Renders a world in COCO layout into `root`, unless a finished one is there already.

    Writes `train/000000000001.png` .., `val/000001000001.png` .., and in `annotations/` the files
    `instances_{train,val}.json` and `captions_{train,val}.json`. The world is built beside `root` and renamed
    when it is whole, so `root` never holds half a world. A world of other settings is never replaced; one that lost
    files gets these files again, and the others are not touched.

    Args:
        root: Folder of the world.
        train: Number of training images, 1 to 1,000,000.
        val: Number of validation images, from 1.
        seed: Seed of every scene.

    Returns:
        `root`.

    Raises:
        SettingsError: A count is out of range, or the seed is negative.
        WorldMismatchError: `root` holds a world of other settings.
        NoWorldError: `root` holds something else, or cannot be used.
    """
    root = Path(root)
    if not 1 <= train <= VAL_ID_OFFSET:
        raise SettingsError(f"train={train}: a world has 1 to {VAL_ID_OFFSET:,} training images")
    if val < 1:
        raise SettingsError(f"val={val}: a world has at least 1 validation image")
    if seed < 0:
        raise SettingsError(f"seed={seed}: a seed is 0 or greater")
    settings = _settings(train, val, seed)
    with _usable(root):
        place = root.resolve()  # what a link points to is what is renamed
        if holds_world(place, settings):
            _repair(place, settings)
            tqdm.write(f"scenes: reusing the finished world at {root} ({train:,} train, {val:,} val, seed {seed})")
        else:
            tqdm.write(f"scenes: rendering {train + val:,} scenes into {root} (none there yet)")
            _render(place, settings)
    return root


@contextmanager
def _usable(root: Path) -> Iterator[None]:
    """Turns what the system says about a folder into a NoWorldError; a full disk is reported as it is."""
    try:
        os.stat(root)  # a loop of links, a null byte
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise NoWorldError(f"{root} cannot be used for a world ({error}). {WAY_OUT}") from error
    try:
        yield
    except OSError as error:
        if isinstance(error, DataError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoWorldError(f"{root} cannot be used for a world ({error}). {WAY_OUT}") from error


def _render(root: Path, settings: dict[str, Any]) -> None:
    """Builds a world beside its place, and renames it."""
    partial = root.with_name(f".{temporary_path(root).name}")
    remove_dead(root)
    try:
        with tqdm(total=settings["train"] + settings["val"], desc="render scenes", unit="image") as progress:
            for split in _SPLITS:
                write_stream(partial, split, settings[split], settings["seed"], progress)
        write_marker(partial, settings)
        try:
            partial.rename(root)
        except OSError:
            if not holds_world(root, settings):  # without locks, another process may have been faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(root.parent)


def _repair(root: Path, settings: dict[str, Any]) -> None:
    """Renders again what a world has lost, and what was cut; all else stays as it is."""
    for split in _SPLITS:
        present = {file.name for file in _files_in(root / split) if _ends_with(file, _PNG_END)}
        missing = [index for index in range(settings[split]) if _image_name(split, index) not in present]
        annotations = root / "annotations"
        lost = [kind for kind in _KINDS if not _ends_with(annotations / f"{kind}_{split}.json", b"}")]
        if not missing and not lost:
            continue
        what = [f"{len(missing):,} images of {split}/"] * bool(missing)
        what += [f"annotations/{kind}_{split}.json" for kind in lost]
        tqdm.write(f"scenes: {', '.join(what)} missing in {root}: rendered again")
        (root / split).mkdir(exist_ok=True)
        for index in missing:
            write_file(root / split / _image_name(split, index), _png(render_scene(settings["seed"], split, index)))
        if lost:
            annotations.mkdir(exist_ok=True)
            scenes = (render_scene(settings["seed"], split, index) for index in range(settings[split]))
            contents = _annotations(split, scenes)
            for kind in lost:
                write_file(annotations / f"{kind}_{split}.json", contents[kind])


def replace_folder(written: Path, folder: Path) -> None:
    """Renames a finished folder to its place; what lay there is removed afterwards."""
    retired = folder.with_name(f".{folder.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)
    if folder.exists():
        folder.rename(retired)
    written.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)


def _settings(train: int, val: int, seed: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "version": WORLD_VERSION,
        "train": train,
        "val": val,
        "seed": seed,
        "size": SIZE,
    }
    settings["sprites_sha256"] = hashlib.sha256(SHEET.read_bytes()).hexdigest()
    return with_fingerprint(settings)


def _files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _ends_with(file: Path, ending: bytes) -> bool:
    """Whether a file is there to its end."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            return False
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(descriptor, len(ending), max(0, status.st_size - len(ending))) == ending
        finally:
            os.close(descriptor)
    except OSError:
        return False


def write_stream(root: Path, stream: str, count: int, seed: int, progress: tqdm[Any] | None = None) -> None:
    """Writes the first scenes of a stream in COCO layout: its images, then its two annotation files.

    Args:
        root: Folder of a world, which need not exist: gets `<stream>/*.png` and
            `annotations/{instances,captions}_<stream>.json`.
        stream: A key of `STREAMS`.
        count: Number of scenes.
        seed: The world's seed.
        progress: Counts the images, if given.
    """
    (root / stream).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)

    def scenes() -> Iterator[Scene]:
        for index in range(count):
            scene = render_scene(seed, stream, index)
            (root / stream / _image_name(stream, index)).write_bytes(_png(scene))
            yield scene
            if progress is not None:
                progress.update()

    for kind, content in _annotations(stream, scenes()).items():
        (root / "annotations" / f"{kind}_{stream}.json").write_bytes(content)


def _image_name(stream: str, index: int) -> str:
    return f"{_image_id(stream, index):012d}.png"


def _image_id(stream: str, index: int) -> int:
    return (VAL_ID_OFFSET if stream == "val" else 0) + index + 1


def _png(scene: Scene) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(scene.image).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def _annotations(stream: str, scenes: Iterable[Scene]) -> dict[str, bytes]:
    """The two annotation files of a stream, all of whose scenes are given in order."""
    first = _image_id(stream, 0) - 1
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        image_id, name = _image_id(stream, index), _image_name(stream, index)
        images.append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE, "license": 1})
        captions.append({"id": image_id, "image_id": image_id, "caption": caption(scene)})
        for thing in scene.objects:
            # an image has at most 7 objects, so the ids of "train" and "val" never meet
            instances.append({"id": first * 10 + len(instances) + 1, "image_id": image_id, **_annotation(thing)})
    shared = {
        "info": {"description": f"Embedded scene world, {stream}", "version": str(WORLD_VERSION), "year": 2025},
        "licenses": [{"id": 1, **_LICENCE}],
        "images": images,
    }
    categories = [{"id": c.coco_id, "name": c.name, "supercategory": c.context} for c in CATEGORIES]
    contents = {
        "instances": {**shared, "annotations": instances, "categories": categories},
        "captions": {**shared, "annotations": captions},
    }
    return {kind: json.dumps(content).encode() for kind, content in contents.items()}


def _annotation(thing: SceneObject) -> dict[str, Any]:
    """An object as COCO describes it, with its box for an outline."""
    x, y, width, height = thing.box
    return {
        "category_id": CATEGORIES[thing.category].coco_id,
        "bbox": [x, y, width, height],
        "area": thing.area,
        "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
        "iscrowd": 0,
    }
