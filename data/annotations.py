"""COCO's `instances_*.json`, checked entry by entry: what is accepted is what every later step can use.

Each entry that is wrong is named by its list, its number in it (from 0) and its key.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import AnnotationError, UnreadableFileError
from data.files import is_count, is_relative, is_text, open_regular, read_bytes, shown, unique_keys

ANNOTATION_BYTES = 1 << 32
"""Most bytes of an annotations file: ten times COCO's."""
_NAME_CHARACTERS = 200  # of a category
_MARKUP = "<>[]"  # a chat template's special tokens: <image>, <|im_end|>, [INST]
_LISTS = ("images", "annotations", "categories")


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

    @classmethod
    def from_json(cls, record: object) -> AnnotationIndex:
        """The index that was stored as a JSON object of these fields.

        Raises:
            ValueError: it is no such object.
        """
        if not isinstance(record, dict):
            raise ValueError("no object")
        categories, files, present = (record.get(key) for key in ("categories", "files", "present"))
        if not (isinstance(categories, list) and isinstance(files, dict) and isinstance(present, dict)):
            raise ValueError("other fields")
        if any(name_problem(name) for name in categories) or not all(map(is_relative, files.values())):
            raise ValueError("other names")
        places = range(len(categories))
        for image_id, shown_there in present.items():
            if image_id not in files or not isinstance(shown_there, list):
                raise ValueError(f"other objects of image {image_id}")
            if any(type(place) is not int or place not in places for place in shown_there):
                raise ValueError(f"unknown objects of image {image_id}")
        if not all(image_id.isascii() and image_id.isdecimal() for image_id in files):
            raise ValueError("image ids that are no numbers")
        return cls(
            categories=tuple(categories),
            files={int(image_id): name for image_id, name in files.items()},
            present={int(image_id): shown_there for image_id, shown_there in present.items()},
        )


def parse_annotations(file: Path) -> AnnotationIndex:
    """Reads a COCO instances file.

    Raises:
        AnnotationError: it is unreadable, or an entry of it is wrong.
    """
    record = _read(file)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for where, category in _objects(file, record, "categories"):
        category_id = _new_id(where, category, names)
        name: Any = category.get("name")
        if problem := name_problem(name):
            raise AnnotationError(f"{where}: name is {shown(name)}: {problem}. Rename the category.")
        if name in taken:
            raise AnnotationError(f"{where}: the name {name!r} comes twice. Merge the two categories.")
        taken.add(name)
        names[category_id] = name
    files: dict[int, str] = {}
    for where, image in _objects(file, record, "images"):
        image_id = _new_id(where, image, files)
        name = image.get("file_name")
        if not name or not is_relative(name):
            raise AnnotationError(
                f"{where}: file_name is {shown(name)}, expected the name of a file below the images folder (not an "
                "absolute one, none with `..`)"
            )
        files[image_id] = name
    if not files:
        raise AnnotationError(f"{file} lists no images: `images` is empty.")
    places = {category_id: place for place, category_id in enumerate(sorted(names))}
    return AnnotationIndex(
        categories=tuple(names[category_id] for category_id in sorted(names)),
        files=files,
        present=_present(file, record, files, places),
    )


def name_problem(name: object) -> str | None:
    """Why a value cannot be the name of a category, which stands in a prompt; None if it can."""
    if not isinstance(name, str) or not name.strip():
        return "expected the name of a category"
    if len(name) > _NAME_CHARACTERS:
        return f"it has {len(name)} characters, at most {_NAME_CHARACTERS} fit into a question"
    if not is_text(name) or any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in name):
        return "it has a line break or another control character, which a question must not have"
    if any(character in _MARKUP for character in name):
        return "it has one of < > [ ], and could stand for a special token of a chat template (<image>, [INST])"
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        with open_regular(file) as stream:
            head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if head and not head.startswith(b"{"):  # before all of it is read
            raise AnnotationError(f"{file} is not readable JSON: expected an object, found {shown(head[:20])}.")
        content = read_bytes(file, ANNOTATION_BYTES)
        record = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_outlines)
    except UnreadableFileError as error:
        raise AnnotationError(f"{error}. Annotations are a file: put instances_*.json there.") from error
    except (ValueError, RecursionError) as error:
        reason = str(error) or "it is nested too deeply"
        raise AnnotationError(f"{file} is not readable JSON ({reason}). Fetch or write it again.") from error
    absent = [key for key in _LISTS if key not in record]
    if absent:
        raise AnnotationError(
            f"{file} is not a COCO instances file: it has no {', '.join(absent)}. Use instances_*.json "
            "(captions_*.json hold no categories)."
        )
    for key in _LISTS:
        if not isinstance(record[key], list):
            raise AnnotationError(f"{file}: {key} is {shown(record[key])}, expected a list of objects")
    return record


def _without_outlines(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # nine tenths of the file are outlines; dropped as they are read, they never add up in memory
    record = unique_keys(pairs)
    record.pop("segmentation", None)
    return record


def _objects(file: Path, record: Mapping[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a list, each with its place for messages."""
    for number, entry in enumerate(record[key]):
        where = f"{file}: {key}[{number}]"
        if not isinstance(entry, dict):
            raise AnnotationError(f"{where} is {shown(entry)}, expected an object")
        yield where, entry


def _new_id(where: str, entry: Mapping[str, Any], known: Container[int]) -> int:
    identity = entry.get("id")
    if not is_count(identity):
        raise AnnotationError(f"{where}: id is {shown(identity)}, expected an integer from 0 on")
    if identity in known:
        raise AnnotationError(f"{where}: id {identity} comes twice. Give each entry an id of its own.")
    return identity


def _present(
    file: Path, record: Mapping[str, Any], files: Mapping[int, str], places: Mapping[int, int]
) -> dict[int, list[int]]:
    present: dict[int, set[int]] = {}
    known: set[int] = set()
    for where, annotation in _objects(file, record, "annotations"):
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        for key, value in (("image_id", image_id), ("category_id", category_id)):
            if type(value) is not int:
                raise AnnotationError(f"{where}: {key} is {shown(value)}, expected an integer")
        if image_id not in files:
            raise AnnotationError(f"{where} has image_id {image_id}, which its `images` do not list.")
        if category_id not in places:
            raise AnnotationError(f"{where} has category_id {category_id}, which its `categories` do not list.")
        if "id" in annotation:  # nothing here needs it
            known.add(_new_id(where, annotation, known))
        present.setdefault(image_id, set()).add(places[category_id])  # type: ignore[arg-type]
    return {image_id: sorted(shown_there) for image_id, shown_there in present.items()}
