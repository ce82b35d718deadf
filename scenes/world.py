"""The embedded world: writes rendered scenes in COCO's own layout.

Every scene depends on (seed, stream, index) and on its look alone, so a longer world begins with the shorter one, and
the streams never meet (`scenes.drawing`).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data.errors import DataError, SettingsError
from data.log import log
from scenes.categories import CATEGORIES
from scenes.drawing import LOOKS, SIZE, SQUARE, Look, Scene, SceneObject, Sizes, caption, render_scene
from scenes.marker import WAY_OUT, NoWorldError, holds_world, remove_dead, with_fingerprint, write_marker
from scenes.marker import WorldMismatchError as WorldMismatchError
from scenes.sprites import SHEET
from scr_runtime.files import sync_folder, temporary_path, write_file

WORLD_VERSION = 1  # raise it when a rendered pixel, an annotation or a caption changes
VAL_ID_OFFSET = 1_000_000  # image ids: train from 1, val from 1,000,001

_SPLITS = ("train", "val")
_PNG_END = b"IEND\xaeB`\x82"
_KINDS = ("instances", "captions")
_LICENCE = {"name": "SIL Open Font License 1.1 (glyphs of Noto Color Emoji)", "url": "https://openfontlicense.org"}


def ensure_world(
    root: Path, train: int, val: int, seed: int = 0, sizes: Sizes = "square", *, quiet: bool = False
) -> Path:
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
        sizes: "square" for scenes of 96 x 96 pixels, "mixed" for larger ones of several sizes and aspect ratios.
        quiet: Whether nothing is said of a finished world that is reused.

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
    if sizes not in LOOKS:
        raise SettingsError(f"sizes={sizes}: a world has one of {', '.join(LOOKS)}")
    settings = _settings(train, val, seed, sizes)
    with _usable(root):
        place = root.resolve()  # what a link points to is what is renamed
        if holds_world(place, settings):
            _repair(place, settings)
            if not quiet:
                log("scenes", f"reusing the finished world at {root} ({train:,} train, {val:,} val, seed {seed})")
        else:
            log("scenes", f"rendering {train + val:,} scenes into {root} (none there yet)")
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
                write_stream(partial, split, settings[split], settings["seed"], progress, look=_look(settings))
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
        log("scenes", f"{', '.join(what)} missing in {root}: rendered again")
        (root / split).mkdir(exist_ok=True)
        for index in missing:
            scene = render_scene(settings["seed"], split, index, _look(settings))
            write_file(root / split / _image_name(split, index), _png(scene))
        if lost:
            annotations.mkdir(exist_ok=True)
            look = _look(settings)
            scenes = (render_scene(settings["seed"], split, index, look) for index in range(settings[split]))
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


def _settings(train: int, val: int, seed: int, sizes: Sizes) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "version": WORLD_VERSION,
        "train": train,
        "val": val,
        "seed": seed,
        "size": SIZE if sizes == "square" else sizes,
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


def _look(settings: Mapping[str, Any]) -> Look:
    return SQUARE if settings["size"] == SIZE else LOOKS[settings["size"]]


def write_stream(
    root: Path, stream: str, count: int, seed: int, progress: tqdm[Any] | None = None, *, look: Look = SQUARE
) -> None:
    """Writes the first scenes of a stream in COCO layout: its images, then its two annotation files.

    Args:
        root: Folder of a world, which need not exist: gets `<stream>/*.png` and
            `annotations/{instances,captions}_<stream>.json`.
        stream: A key of `STREAMS`.
        count: Number of scenes.
        seed: The world's seed.
        progress: Counts the images, if given.
        look: What the scenes look like.
    """
    (root / stream).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)

    def scenes() -> Iterator[Scene]:
        for index in range(count):
            scene = render_scene(seed, stream, index, look)
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
        height, width = scene.labels.shape
        images.append({"id": image_id, "file_name": name, "width": width, "height": height, "license": 1})
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
