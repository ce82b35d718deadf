"""Images in COCO layout: a folder of image files and one `instances_*.json` that lists them and their objects.

Files stay where they are and are decoded through Hugging Face `datasets`: RGB, turned upright by their EXIF tag, for
the harvest and for the evaluation alike. Annotations are parsed once: what is needed of them, 2 % of their bytes, is
kept as an index under the checksum of the file (`runs/cache`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from PIL.Image import Image as PILImage

from data.errors import AnnotationError, CorruptImageError, LockTimeoutError, NotEnoughImagesError
from data.index import canonical_json
from data.locks import exclusively
from scr_runtime.files import write_file

# which key of the configuration sets the size of a split
_SPLIT_KEYS = {
    "train": "harvest.samples",
    "validation": "harvest.validation",
    "test": "harvest.test",
    "tuning": "harvest.tuning",
}
_INDEX_VERSION = 1
_PARSING_SECONDS = 600.0  # longest wait for another process that parses the same file


@dataclass(frozen=True)
class AnnotationIndex:
    """What this project needs of a COCO `instances_*.json`.

    Attributes:
        categories: category names, by category id.
        files: file name per image id, by image id.
        present: per image with annotations, the places of its categories in `categories`.
    """

    categories: tuple[str, ...]
    files: dict[int, str]
    present: dict[int, list[int]]


class CocoImages:
    """Index of one COCO split: which images there are, where they lie, and which categories each one shows.

    A category counts as present if it has any annotation on the image, crowds included: POPE asks about presence,
    not about instances.

    Args:
        images_dir: folder that the annotations' `file_name`s are relative to.
        annotations_file: COCO `instances_*.json`.
        cache: folder for the index of the annotations; None parses them every time.

    Attributes:
        ids: image ids, ascending.
        categories: all category names of the annotations, by category id.
        annotations_sha256: checksum of the annotations file, as the data's identity.

    Raises:
        AnnotationError: no such folder or file, unreadable annotations, or images that are listed but missing.
    """

    def __init__(self, images_dir: str | Path, annotations_file: str | Path, cache: str | Path | None = None) -> None:
        self.images_dir = Path(images_dir)
        self.annotations_file = Path(annotations_file)
        if not self.images_dir.is_dir():
            raise AnnotationError(
                f"images folder {self.images_dir} does not exist. Set data.root (and data.train_images or "
                "data.eval_images, relative to it) to a folder in COCO layout."
            )
        names = _files_in(self.images_dir)
        if not self.annotations_file.is_file():
            raise AnnotationError(
                f"{images_dir} holds {len(names)} files, but its annotations {annotations_file} do not exist. "
                "Questions are made from COCO annotations: put instances_*.json there, or set data.train_annotations "
                "/ data.eval_annotations."
            )
        index, self.annotations_sha256 = read_annotations(self.annotations_file, Path(cache) if cache else None)
        self.categories: tuple[str, ...] = index.categories
        self._file_names = index.files
        self.ids: tuple[int, ...] = tuple(sorted(self._file_names))
        self._check_files(names)
        self._present = {i: frozenset(self.categories[c] for c in shown) for i, shown in index.present.items()}

        self._row = {image_id: row for row, image_id in enumerate(self.ids)}
        paths = [str(self.path(image_id)) for image_id in self.ids]
        self._files = Dataset.from_dict({"image": paths}).cast_column("image", Image(mode="RGB", decode=False))
        self._decoder = Image(mode="RGB")

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, image_id: int) -> Path:
        """File of an image."""
        return self.images_dir / self._file_names[image_id]

    def present(self, image_id: int) -> frozenset[str]:
        """Names of the categories that the annotations put on an image (empty if there are none)."""
        return self._present.get(image_id, frozenset())

    def open(self, image_id: int) -> PILImage:
        """Decodes an image to RGB.

        Raises:
            CorruptImageError: the file is truncated or not an image.
            OSError: the file cannot be read (gone, no permission, a failing disk). That is not a bad image, and must
                not be counted as one.
        """
        stored = self._files[self._row[image_id]]["image"]
        # read here: when datasets opens the file itself, a failed decoding leaves it open
        content = Path(stored["path"]).read_bytes()
        try:
            return self._decoder.decode_example({"path": None, "bytes": content})
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, bomb errors...
            reason = str(error) if type(error) is OSError else f"not an image ({type(error).__name__})"
            raise CorruptImageError(self.path(image_id), reason) from error

    def _check_files(self, names: set[str]) -> None:
        missing = [
            name
            for name in self._file_names.values()
            if name not in names and not ("/" in name and (self.images_dir / name).is_file())
        ]
        if missing:
            shown = ", ".join(sorted(missing)[:5]) + (", ..." if len(missing) > 5 else "")
            raise AnnotationError(
                f"{self.annotations_file} lists {len(self._file_names)} images, but {len(missing)} of them are not "
                f"in {self.images_dir}: {shown}. Point the images key at the folder that belongs to these "
                "annotations, or fetch the missing files."
            )


def _files_in(folder: Path) -> set[str]:
    # one scan instead of a stat per image: 82,783 files in train2014
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def read_annotations(file: Path, cache: Path | None = None) -> tuple[AnnotationIndex, str]:
    """Reads a COCO instances file, or its index if `cache` holds one for these very bytes.

    Args:
        file: `instances_*.json`.
        cache: folder of indices, named after the checksum of the annotations; a damaged one is re-created.

    Returns:
        The index, and the sha256 of the annotations file.

    Raises:
        AnnotationError: unreadable annotations, or annotations without their category.
    """
    with file.open("rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    stored = cache / f"annotations-{checksum[:32]}.json" if cache else None
    if stored is None:
        return _parse_annotations(file), checksum
    index = _load_index(stored)
    if index is None:
        try:  # of several processes that begin at once, one parses
            with exclusively(stored.with_suffix(".lock"), _PARSING_SECONDS, "reading the annotations"):
                index = _load_index(stored) or _parse_and_store(file, stored)
        except LockTimeoutError:  # a file system without locks, or a holder that hangs: parsing twice does no harm
            index = _parse_and_store(file, stored)
    return index, checksum


def _parse_and_store(file: Path, stored: Path) -> AnnotationIndex:
    index = _parse_annotations(file)
    content = canonical_json({"version": _INDEX_VERSION, **asdict(index)})
    stored.parent.mkdir(parents=True, exist_ok=True)
    write_file(stored, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    return index


def _load_index(file: Path) -> AnnotationIndex | None:
    try:
        checksum, _, content = file.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if checksum != hashlib.sha256(content).hexdigest().encode():
        return None
    record = json.loads(content)
    if record["version"] != _INDEX_VERSION:
        return None
    return AnnotationIndex(
        categories=tuple(record["categories"]),
        files={int(image_id): name for image_id, name in record["files"].items()},
        present={int(image_id): shown for image_id, shown in record["present"].items()},
    )


def _parse_annotations(file: Path) -> AnnotationIndex:
    try:
        record = json.loads(file.read_text(encoding="utf-8"), object_hook=_without_outlines)
    except ValueError as error:
        raise AnnotationError(f"{file} is not readable JSON ({error}). Fetch or write it again.") from error
    absent = [key for key in ("images", "annotations", "categories") if key not in record]
    if absent:
        raise AnnotationError(
            f"{file} is not a COCO instances file: it has no {', '.join(absent)}. Use instances_*.json "
            "(captions_*.json hold no categories)."
        )
    names = {category["id"]: category["name"] for category in record["categories"]}
    places = {category_id: place for place, category_id in enumerate(sorted(names))}
    present: dict[int, set[int]] = {}
    for annotation in record["annotations"]:
        place = places.get(annotation["category_id"])
        if place is None:
            raise AnnotationError(
                f"{file}: annotation {annotation.get('id')} has category_id {annotation['category_id']}, which its "
                "`categories` do not list."
            )
        present.setdefault(annotation["image_id"], set()).add(place)
    return AnnotationIndex(
        categories=tuple(names[category_id] for category_id in sorted(names)),
        files={image["id"]: image["file_name"] for image in record["images"]},
        present={image_id: sorted(shown) for image_id, shown in present.items()},
    )


def _without_outlines(record: dict[str, Any]) -> dict[str, Any]:
    # nine tenths of the file are outlines; dropped as they are read, they never add up in memory
    record.pop("segmentation", None)
    return record


def seeded_order(items: Iterable[Any], seed: int, salt: str = "") -> list[Any]:
    """Items in an order that depends on (seed, salt, item) alone.

    Each item is ranked by a hash, so the order is the same on any machine and Python version, and adding items
    does not move the others relative to each other.
    """
    return sorted(items, key=lambda item: (hashlib.sha256(f"{seed}:{salt}:{item}".encode()).digest(), item))


def split_ids(ids: Iterable[int], sizes: Mapping[str, int], seed: int) -> dict[str, list[int]]:
    """Disjoint splits of image ids, in seeded order.

    Args:
        ids: image ids.
        sizes: images per split, e.g. `{"train": 5000, "validation": 500, "test": 500}`; cut off the seeded order one
            after the other.
        seed: same seed and ids, same splits.

    Raises:
        NotEnoughImagesError: the sizes add up to more than there are ids.
    """
    order = seeded_order(ids, seed, "split")
    negative = {name: size for name, size in sizes.items() if size < 0}
    if negative:
        raise ValueError(f"split sizes must be 0 or more, got {negative}")
    wanted = sum(sizes.values())
    if wanted > len(order):
        parts = " + ".join(f"{size} {name}" for name, size in sizes.items())
        keys = ", ".join(_SPLIT_KEYS.get(name, name) for name in sizes)
        raise NotEnoughImagesError(
            f"{wanted} images are asked for ({parts}), but there are only {len(order)}. Lower one of {keys}, or give "
            "data.root more images (data.world.train for the embedded world)."
        )
    splits, start = {}, 0
    for name, size in sizes.items():
        splits[name] = order[start : start + size]
        start += size
    return splits
