"""Images in COCO layout: a folder of image files and one `instances_*.json` that lists them and their objects.

Without annotations the folder itself is the list: nothing is known of the objects, so prompts are captions and texts.

Files stay where they are and are decoded through Hugging Face `datasets`: RGB, turned upright by their EXIF tag, for
the harvest and for the evaluation alike. Annotations are parsed once: what is needed of them, 2 % of their bytes, is
kept as an index under the checksum of the file (`runs/cache`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import Image
from PIL.Image import Image as PILImage

from data.annotations import ANNOTATION_BYTES, AnnotationIndex
from data.annotations import parse_annotations as _parse_annotations
from data.errors import (
    AnnotationError,
    CorruptImageError,
    ImageFileError,
    LockTimeoutError,
    MissingImageError,
    NotEnoughImagesError,
    UnreadableFileError,
)
from data.files import open_regular, parse_json, read_bytes
from data.index import canonical_json
from data.locks import exclusively
from data.log import log
from scr_runtime.files import write_file

# which key of the configuration sets the size of a split
_SPLIT_KEYS = {
    "train": "harvest.samples",
    "validation": "harvest.validation",
    "test": "harvest.test",
    "tuning": "harvest.tuning",
}
_INDEX_VERSION = 2  # raised when other annotations are accepted: an index must not let in what parsing rejects
_INDEX_BYTES = 1 << 29
_IMAGE_BYTES = 1 << 30
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 exchange width and height
_PARSING_SECONDS = 600.0  # longest wait for another process that parses the same file


class CocoImages:
    """Index of one COCO split: which images there are, where they lie, and which categories each one shows.

    A category counts as present if it has any annotation on the image, crowds included: POPE asks about presence,
    not about instances.

    Args:
        images_dir: folder that the annotations' `file_name`s are relative to.
        annotations_file: COCO `instances_*.json`; None takes every picture in the folder and in those below it.
        cache: folder for the index of the annotations; None parses them every time.

    Attributes:
        annotated: whether there are annotations; without them, `annotations_file` is the folder.
        ids: image ids, ascending.
        categories: all category names of the annotations, by category id.
        annotations_sha256: checksum of the annotations file, as the data's identity; without one, of the names and
            sizes of the pictures.

    Raises:
        AnnotationError: no such folder or file, unreadable annotations, or images that are listed but missing.
    """

    def __init__(
        self, images_dir: str | Path, annotations_file: str | Path | None, cache: str | Path | None = None
    ) -> None:
        self.images_dir = Path(images_dir)
        self.annotated = annotations_file is not None
        self.annotations_file = Path(images_dir if annotations_file is None else annotations_file)
        names = _files_in(self.images_dir)
        if not self.annotated:
            index, self.annotations_sha256 = list_pictures(self.images_dir)
        elif _exists(self.annotations_file):
            index, self.annotations_sha256 = read_annotations(self.annotations_file, Path(cache) if cache else None)
        else:
            raise AnnotationError(
                f"{images_dir} holds {len(names)} files, but its annotations {annotations_file} do not exist. "
                "Questions are made from COCO annotations: put instances_*.json there, set data.train_annotations "
                "/ data.eval_annotations, or do without them: data=pictures."
            )
        self.categories: tuple[str, ...] = index.categories
        self._file_names = index.files
        self.ids: tuple[int, ...] = tuple(sorted(self._file_names))
        self._check_files(names)
        self._present = {i: frozenset(self.categories[c] for c in shown) for i, shown in index.present.items()}
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
            CorruptImageError: the file is truncated, not an image, or too large for one.
            ImageFileError: the file cannot be read (gone, no permission, a failing disk). That is not a bad image,
                and is not counted as one.
        """
        path = self.path(image_id)
        with _reading(path):
            # read here: when datasets opens the file itself, a failed decoding leaves it open
            content = read_bytes(path, _IMAGE_BYTES)
        with _decoding(path):
            return self._decoder.decode_example({"path": None, "bytes": content})

    def size(self, image_id: int) -> tuple[int, int]:
        """Width and height of an image as `open` would decode it, read from the head of the file.

        Raises:
            CorruptImageError: the file is not an image.
            ImageFileError: the file cannot be read.
        """
        path = self.path(image_id)
        with _reading(path), open_regular(path) as stream, _decoding(path), PIL.Image.open(stream) as picture:
            width, height = picture.size
            turned = picture.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
            return (height, width) if turned else (width, height)

    def _check_files(self, names: set[str]) -> None:
        missing = [
            name
            for name in self._file_names.values()
            if name not in names and not ("/" in name and _is_file(self.images_dir / name))
        ]
        if missing:
            shown = ", ".join(sorted(missing)[:5]) + (", ..." if len(missing) > 5 else "")
            raise AnnotationError(
                f"{self.annotations_file} lists {len(self._file_names)} images, but {len(missing)} of them are not "
                f"in {self.images_dir}: {shown}. Point the images key at the folder that belongs to these "
                "annotations, or fetch the missing files."
            )


def list_pictures(folder: Path) -> tuple[AnnotationIndex, str]:
    """Lists the pictures of a folder and of those below it, numbered by name from 0.

    Returns:
        An index without categories, and the sha256 of names and sizes.

    Raises:
        AnnotationError: there is none.
    """
    found = sorted(
        (path.relative_to(folder).as_posix(), path.stat().st_size)
        for path in folder.rglob("*")
        if path.suffix.lower() in _PICTURES and _is_file(path)
    )
    if not found:
        raise AnnotationError(
            f"{folder} holds no pictures ({' '.join(_PICTURES)}): set data.root to a folder of them."
        )
    files = {number: name for number, (name, _) in enumerate(found)}
    return AnnotationIndex((), files, {}), hashlib.sha256(canonical_json(found)).hexdigest()


def _files_in(folder: Path) -> set[str]:
    # one scan instead of a stat per image: 82,783 files in train2014
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if _is_file(entry)}
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise AnnotationError(
            f"images folder {folder} {'does not exist' if missing else f'cannot be read ({error})'}. Set data.root "
            "(and data.train_images or data.eval_images, relative to it) to a folder in COCO layout."
        ) from error


def _is_file(entry: Path | os.DirEntry[str]) -> bool:
    """Whether it is a regular file, or a link to one; a loop of links and what may not be looked at are none."""
    try:
        return entry.is_file()
    except (OSError, ValueError):
        return False


def _exists(file: Path) -> bool:
    try:
        return os.path.lexists(file)
    except ValueError:  # a name with a null byte
        return False


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnreadableFileError as error:
        if not os.path.exists(path):
            raise MissingImageError(f"{path} has vanished: put it back, or remove it from the annotations.") from error
        if error.failed:
            raise ImageFileError(f"{error}. Start again once it can be read.") from error
        raise CorruptImageError(path, error.reason) from error


@contextlib.contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, bomb errors...
        reason = str(error) if type(error) is OSError else f"not an image ({type(error).__name__})"
        raise CorruptImageError(path, reason) from error


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
    checksum = _checksum(file)
    stored = cache / f"annotations-{checksum[:32]}.json" if cache else None
    if stored is None:
        return _parse_annotations(file), checksum
    index = _load_index(stored)
    if index is None:
        try:  # of several processes that begin at once, one parses
            with exclusively(stored.with_suffix(".lock"), _PARSING_SECONDS, "reading the annotations"):
                index = _load_index(stored) or _parse_and_store(file, stored, checksum)
        except LockTimeoutError:  # a holder that hangs: parsing twice does no harm
            index = _parse_and_store(file, stored, checksum)
    return index, checksum


def _checksum(file: Path) -> str:
    try:
        with open_regular(file) as stream:
            if os.fstat(stream.fileno()).st_size > ANNOTATION_BYTES:
                raise AnnotationError(f"{file} has more than {ANNOTATION_BYTES:,} bytes: split it")
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (UnreadableFileError, OSError) as error:
        raise AnnotationError(f"annotations {file} cannot be read ({error}): put instances_*.json there.") from error


def _parse_and_store(file: Path, stored: Path, checksum: str) -> AnnotationIndex:
    index = _parse_annotations(file)
    if _checksum(file) != checksum:
        raise AnnotationError(f"{file} was changed while it was read: start again.")
    content = canonical_json({"version": _INDEX_VERSION, **asdict(index)})
    try:
        stored.parent.mkdir(parents=True, exist_ok=True)
        write_file(stored, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    except OSError as error:  # without it, the annotations are parsed every time
        log("annotations", f"their index cannot be kept in {stored} ({error.strerror})")
    return index


def _load_index(file: Path) -> AnnotationIndex | None:
    try:
        checksum, _, content = read_bytes(file, _INDEX_BYTES).partition(b"\n")
        if checksum != hashlib.sha256(content).hexdigest().encode():
            return None
        record = parse_json(content)
        return AnnotationIndex.from_json(record) if record["version"] == _INDEX_VERSION else None
    except (UnreadableFileError, ValueError, KeyError, TypeError):
        return None


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
