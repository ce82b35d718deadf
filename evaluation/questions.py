"""Yes/no questions in POPE's own form (Li et al. 2023, arXiv 2305.10355): one reader for every origin.

    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a dog in the image?", "label": "no"}

The official files are of this form, and so are RePOPE's (arXiv 2504.15707) and those made for GQA and A-OKVQA.
Questions that are made from annotations, of the embedded world or of COCO, are written in it and read back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.images import CocoImages
from data.questions import STRATEGIES, count_objects, pope_questions
from evaluation.errors import EvaluationError
from evaluation.settings import EvaluationSettings
from scr_runtime.files import write_file

_LABELS = {"yes": True, "no": False}
_SHOWN = 5  # of a list in a message


@dataclass(frozen=True)
class PopeLine:
    """One line of a question file.

    Attributes:
        question_id: Its number within the file.
        image: File name of the image, relative to the images folder.
        text: The question.
        label: Whether the answer is yes.
    """

    question_id: int
    image: str
    text: str
    label: bool


def read_questions(file: Path) -> list[PopeLine]:
    """Reads a question file, and checks every line.

    Raises:
        EvaluationError: The file cannot be read or is empty, a line is cut or has other keys, a label is neither yes
            nor no, a question id comes twice, or a question has two labels. The line is named.
    """
    if file.exists() and not file.is_file():
        raise EvaluationError(f"{file} is no file: give a file of questions, such as coco_pope_adversarial.json")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise EvaluationError(f"questions {file} cannot be read ({reason})") from error
    return parse_questions(text, str(file))


def parse_questions(text: str, name: str) -> list[PopeLine]:
    """Reads the text of a question file; `name` stands in messages. Errors are those of `read_questions`."""
    lines: list[PopeLine] = []
    places: dict[int, int] = {}
    labels: dict[tuple[str, str], tuple[bool, int]] = {}
    for number, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        line = _parse_line(content, f"{name}, line {number}")
        if line.question_id in places:
            first = places[line.question_id]
            raise EvaluationError(f"{name}, line {number}: question_id {line.question_id} is that of line {first} too")
        label, first = labels.setdefault((line.image, line.text), (line.label, number))
        if label != line.label:
            raise EvaluationError(f"{name}, line {number}: line {first} asks the same with the other label")
        places[line.question_id] = number
        lines.append(line)
    if not lines:
        raise EvaluationError(f"{name} has no questions: it is empty")
    return lines


def _parse_line(content: str, where: str) -> PopeLine:
    try:
        record: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where} is no whole JSON object (cut short?): {content[:60]!r}") from error
    if not isinstance(record, dict):
        raise EvaluationError(f"{where} is {content[:60]!r}, expected an object with question_id, image, text, label")
    missing = [key for key in ("question_id", "image", "text", "label") if key not in record]
    if missing:
        raise EvaluationError(f"{where} has no {', '.join(missing)}: expected question_id, image, text and label")
    number, image, text, label = (record[key] for key in ("question_id", "image", "text", "label"))
    if type(number) is not int:
        raise EvaluationError(f"{where}: question_id is {number!r}, expected a whole number")
    if not isinstance(image, str) or not _is_below(image):
        raise EvaluationError(f"{where}: image is {image!r}, expected a file name below the images folder")
    if not isinstance(text, str) or not text.strip():
        raise EvaluationError(f"{where}: text is {text!r}, expected a question")
    if not isinstance(label, str) or label.strip().lower() not in _LABELS:
        raise EvaluationError(f"{where}: label is {label!r}, expected yes or no")
    return PopeLine(number, image, text, _LABELS[label.strip().lower()])


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name.strip()) and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def to_text(lines: Iterable[PopeLine]) -> str:
    """Questions as the text of a file, in the official key order."""
    return "".join(
        json.dumps(
            {
                "question_id": line.question_id,
                "image": line.image,
                "text": line.text,
                "label": "yes" if line.label else "no",
            },
            ensure_ascii=False,
        )
        + "\n"
        for line in lines
    )


def relabel(lines: Sequence[PopeLine], labels: Mapping[tuple[str, str], bool]) -> tuple[list[PopeLine], int, int]:
    """Takes the labels of other files, as RePOPE gives them.

    Args:
        lines: Questions.
        labels: (image, text) -> label; questions that are not in it have no clear answer.

    Returns:
        The questions that are in `labels`, how many of them changed their label, and how many questions are left out.
    """
    kept = [line for line in lines if (line.image, line.text) in labels]
    new = [PopeLine(one.question_id, one.image, one.text, labels[one.image, one.text]) for one in kept]
    changed = sum(before.label != after.label for before, after in zip(kept, new, strict=True))
    return new, changed, len(lines) - len(kept)


@dataclass(frozen=True)
class Item:
    """One prompt about one image, as it is asked once for all splits that hold it.

    Attributes:
        image: File name of the image.
        text: The question or request, before a prompt's template is put around it.
    """

    image: str
    text: str


@dataclass(frozen=True)
class Split:
    """Questions that are scored together.

    Attributes:
        rows: [Q] places of its questions among the items.
        truth: [Q] whether the answer is yes.
        ids: [Q] question ids in its file.
        origin: Where they come from, in words.
        sha256: Checksum of the question file's text.
    """

    rows: NDArray[np.int64]
    truth: NDArray[np.bool_]
    ids: list[int]
    origin: str
    sha256: str


@dataclass(frozen=True)
class Quiz:
    """Which questions are asked.

    Attributes:
        items: Each once; the questions of an image come one after the other.
        splits: Name -> its questions, easiest first: the last is the headline. Empty where no answer is known to be
            right: then nothing is answered, and edits and costs alone are compared.
        notes: What a reader of the result should know, such as questions that were left out.
    """

    items: list[Item]
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list[str])

    @property
    def images(self) -> list[str]:
        """File names, each once, in their order."""
        return list(dict.fromkeys(item.image for item in self.items))

    @property
    def headline(self) -> str:
        """The split that the verdict is about: the adversarial one, else the last."""
        return next((name for name in self.splits if "adversarial" in name), list(self.splits)[-1])


def make_quiz(parts: Mapping[str, tuple[Sequence[PopeLine], str]], notes: Sequence[str] = ()) -> Quiz:
    """Joins splits into one quiz in which every question is asked once.

    Args:
        parts: Name of the split -> its questions, and their origin in words.
        notes: For the report.
    """
    by_image: dict[str, dict[str, None]] = {}
    for lines, _ in parts.values():
        for line in lines:
            by_image.setdefault(line.image, {})[line.text] = None
    items = [Item(image, text) for image, texts in by_image.items() for text in texts]
    place = {(item.image, item.text): index for index, item in enumerate(items)}
    splits = {
        name: Split(
            rows=np.array([place[line.image, line.text] for line in lines], dtype=np.int64),
            truth=np.array([line.label for line in lines]),
            ids=[line.question_id for line in lines],
            origin=origin,
            sha256=hashlib.sha256(to_text(lines).encode()).hexdigest(),
        )
        for name, (lines, origin) in parts.items()
    }
    return Quiz(items, splits, list(notes))


def quiz_from_files(files: Sequence[str | Path], label_files: Sequence[str | Path] = ()) -> Quiz:
    """Reads question files, one split each, named by the file; other labels replace theirs where given.

    Raises:
        EvaluationError: As `read_questions`; or the labels are of none of a file's questions.
    """
    labels: dict[tuple[str, str], bool] = {}
    for file in map(Path, label_files):
        for line in read_questions(file):
            if labels.setdefault((line.image, line.text), line.label) != line.label:
                raise EvaluationError(f"{file}: {line.text!r} about {line.image} has another label in another file")
    parts: dict[str, tuple[list[PopeLine], str]] = {}
    notes: list[str] = []
    for file in map(Path, files):
        name, lines, origin = _split_name(file), read_questions(file), str(file)
        if name in parts:
            raise EvaluationError(f"two question files are called {name}: rename one of them")
        if label_files:
            total = len(lines)
            lines, changed, left_out = relabel(lines, labels)
            if not lines:
                raise EvaluationError(f"evaluation.pope_labels has none of the questions of {file}")
            notes.append(
                f"{name}: labels of {', '.join(Path(label).name for label in label_files)}; {changed} of {total} "
                f"changed, {left_out} left out for want of a clear answer."
            )
        parts[name] = lines, origin
    return make_quiz(dict(sorted(parts.items(), key=lambda part: _difficulty(part[0]))), notes)


def quiz_from_annotations(
    images: CocoImages, image_ids: Sequence[int], settings: EvaluationSettings, folder: Path | None = None
) -> Quiz:
    """Makes random, popular and adversarial questions from annotations, as POPE makes them.

    Args:
        images: Held-out images with annotations.
        image_ids: Which of them.
        settings: Questions per image, and the seed that chooses them.
        folder: Where the three files are written, in the official form; `None` writes none.
    """
    counts = count_objects(images)
    parts: dict[str, tuple[list[PopeLine], str]] = {}
    for strategy in STRATEGIES:
        asked = pope_questions(images, image_ids, strategy, settings.questions_per_image, settings.seed, counts)
        names = [images.path(question.image_id).relative_to(images.images_dir).as_posix() for question in asked]
        made = [
            PopeLine(n, name, q.text, q.label == "yes")
            for n, (name, q) in enumerate(zip(names, asked, strict=True), 1)
        ]
        text, name = to_text(made), f"{strategy} questions"
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / f"pope_{strategy}.json", text.encode())
        origin = f"made from {images.annotations_file.name}, seed {settings.seed}"
        parts[strategy] = parse_questions(text, name) if made else [], origin
    if not any(lines for lines, _ in parts.values()):
        raise EvaluationError("the images show no objects, so there is nothing to ask about; raise evaluation.images")
    return make_quiz(parts)


def _split_name(file: Path) -> str:
    """`coco_pope_adversarial.json` -> `adversarial`; other names stay."""
    name = file.name.removesuffix(".jsonl").removesuffix(".json")
    found = [strategy for strategy in STRATEGIES if name == f"coco_pope_{strategy}"]
    return found[0] if found else name


def _difficulty(name: str) -> int:
    return next((place for place, strategy in enumerate(STRATEGIES) if strategy in name), -1)


def listed(names: Sequence[str]) -> str:
    """The first few of a list of names, and how many there are."""
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")
