"""Images in COCO layout: a folder of image files and one `instances_*.json` that lists them and their objects.

Files stay where they are and are decoded through Hugging Face `datasets` (RGB, EXIF rotation applied).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from PIL.Image import Image as PILImage

from data.errors import AnnotationError, CorruptImageError, NotEnoughImagesError

# which key of the configuration sets the size of a split
_SPLIT_KEYS = {"train": "harvest.samples", "validation": "harvest.validation", "test": "harvest.test"}


class CocoImages:
    """Index of one COCO split: which images there are, where they lie, and which categories each one shows.

    A category counts as present if it has any annotation on the image, crowds included: POPE asks about presence,
    not about instances.

    Args:
        images_dir: folder that the annotations' `file_name`s are relative to.
        annotations_file: COCO `instances_*.json`.

    Attributes:
        ids: image ids, ascending.
        categories: all category names of the annotations, by category id.
        annotations_sha256: checksum of the annotations file, as the data's identity.

    Raises:
        AnnotationError: no such folder or file, unreadable annotations, or images that are listed but missing.
    """

    def __init__(self, images_dir: str | Path, annotations_file: str | Path) -> None:
        self.images_dir = Path(images_dir)
        self.annotations_file = Path(annotations_file)
        if not self.images_dir.is_dir():
            raise AnnotationError(
                f"images folder {self.images_dir} does not exist. Set data.root (and data.train_images or "
                "data.eval_images, relative to it) to a folder in COCO layout."
            )
        names = _files_in(self.images_dir)
        record, self.annotations_sha256 = _read_annotations(self.annotations_file, self.images_dir, len(names))

        self._category_names: dict[int, str] = {c["id"]: c["name"] for c in record["categories"]}
        self.categories: tuple[str, ...] = tuple(self._category_names[c] for c in sorted(self._category_names))
        self._file_names: dict[int, str] = {image["id"]: image["file_name"] for image in record["images"]}
        self.ids: tuple[int, ...] = tuple(sorted(self._file_names))
        self._check_files(names)

        present: dict[int, set[str]] = {}
        for annotation in record["annotations"]:
            name = self._category_names.get(annotation["category_id"])
            if name is None:
                raise AnnotationError(
                    f"{self.annotations_file}: annotation {annotation.get('id')} has category_id "
                    f"{annotation['category_id']}, which its `categories` do not list."
                )
            present.setdefault(annotation["image_id"], set()).add(name)
        self._present = {image_id: frozenset(names) for image_id, names in present.items()}

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
            OSError: the file cannot be read (gone, no permission, a failing disk). That is not the image's fault, and
                must not be counted as a bad image.
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


def _read_annotations(file: Path, images_dir: Path, files: int) -> tuple[dict[str, Any], str]:
    if not file.is_file():
        raise AnnotationError(
            f"{images_dir} holds {files} files, but its annotations {file} do not exist. Questions are made from COCO "
            "annotations: put instances_*.json there, or set data.train_annotations / data.eval_annotations."
        )
    content = file.read_bytes()
    try:
        record = json.loads(content)
    except ValueError as error:
        raise AnnotationError(f"{file} is not readable JSON ({error}). Fetch or write it again.") from error
    absent = [key for key in ("images", "annotations", "categories") if key not in record]
    if absent:
        raise AnnotationError(
            f"{file} is not a COCO instances file: it has no {', '.join(absent)}. Use instances_*.json "
            "(captions_*.json hold no categories)."
        )
    return record, hashlib.sha256(content).hexdigest()


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
