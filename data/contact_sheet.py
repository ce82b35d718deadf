"""A picture of what a harvest holds: maps over images, prompt by prompt."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from data.errors import DataError
from data.index import read_index
from data.records import Index
from data.sample import Sample
from data.shards import ShardReader

_GAP, _LINE = 14, 17  # pixels between pictures, and of a line of text
_LINES = 2  # of text under a picture, at most
_HEAD = 44  # pixels of the title and the scale of the colours
_WIDEST = 1400  # pixels: as many images side by side as fit
_INK, _PALE, _PAPER = (40, 44, 52), (122, 128, 138), (250, 250, 248)
# inferno, as in maps.png: least attended is black, most attended is light yellow
_COLOURS = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])


def contact_sheet(directory: Path, images_dir: Path, file: Path, count: int = 12, side: int = 192) -> Path:
    """Draws the maps of the first images of the test split (else of the last one) over the images.

    For each image: the part of it that the model saw, then one overlay per prompt. Each map is scaled to its own
    maximum; of an image with several grids, it is that of the grid over the whole picture.

    Args:
        directory: a finished harvest.
        images_dir: folder of its images.
        file: PNG to write.
        count: images at most.
        side: pixels of the longer side of a picture.

    Raises:
        DataError: the harvest is unfinished or damaged, or the file cannot be written.
    """
    index = read_index(directory)
    splits = list(dict.fromkeys(shard["split"] for shard in index["shards"]))
    split = "test" if "test" in splits else splits[-1]
    reader = ShardReader(directory, split)
    crops = crops_centre(image_processor(index))
    samples = [reader[row] for row in range(min(count, len(reader)))]
    width = (1 + max((len(sample.prompts) for sample in samples), default=0)) * (side + _GAP)
    height = side + _LINES * _LINE + _GAP
    beside = max(1, min(_WIDEST // (width + _GAP), len(samples)))
    sheet = Image.new("RGB", (_GAP + beside * (width + _GAP), _HEAD + -(-len(samples) // beside) * height), _PAPER)
    _draw_head(sheet, f"{len(samples)} images of {directory.name}, {split} split")
    for number, sample in enumerate(samples):
        row, column = divmod(number, beside)
        _draw_row(sheet, sample, images_dir, (_GAP + column * (width + _GAP), _HEAD + row * height), side, crops)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(file, format="PNG")
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error}): name another file with --output") from error
    return file


def image_processor(index: Index) -> str:
    """The class name of the image processor that a harvest was made with, as far as its index knows."""
    model = index["settings"].get("model")
    return str(model.get("image_processor", "unknown")) if isinstance(model, dict) else "unknown"


def crops_centre(processor: str) -> bool:
    """Whether an image processor cuts the centre out of an image; those that do not squeeze it, or keep its shape.

    The harvest keeps the name of the class, not its settings: this is the default of the class, and of an unknown
    class that it cuts.
    """
    for name in (processor, f"{processor}Pil", processor.removesuffix("Pil")):  # each back end has its own packages
        with contextlib.suppress(AttributeError, ImportError):
            return bool(getattr(getattr(importlib.import_module("transformers"), name), "do_center_crop", False))
    return True


def _draw_head(sheet: Image.Image, title: str) -> None:
    """What is shown, and the scale of the colours."""
    scale = Image.fromarray(_coloured(np.tile(np.linspace(0, 1, 120), (10, 1))))
    ImageDraw.Draw(sheet).text((_GAP, 6), title, fill=_INK, font=ImageFont.load_default(15))
    sheet.paste(scale, (_GAP, 27))
    words = "least to most attended, each map on its own scale"
    ImageDraw.Draw(sheet).text((_GAP + 128, 25), words, fill=_PALE, font=ImageFont.load_default(12))


def _draw_row(
    sheet: Image.Image, sample: Sample, images_dir: Path, place: tuple[int, int], side: int, crops: bool
) -> None:
    sample = sample.overview
    rows, columns = sample.grid
    shape = (max(1, side * columns // max(rows, columns)), max(1, side * rows // max(rows, columns)))
    picture = _picture(images_dir / sample.file, shape, crops)
    texts = [sample.file, *(str(prompt.get("text")) for prompt in sample.prompts)]
    pictures = [picture, *(_overlay(picture, attention, sample.grid) for attention in sample.attention)]
    for column, (drawn, text) in enumerate(zip(pictures, texts, strict=True)):
        left, top = place[0] + column * (side + _GAP), place[1]
        sheet.paste(drawn, (left, top))
        _write(sheet, text, (left, top + drawn.height + 2), side, _INK if column else _PALE)


def _picture(file: Path, shape: tuple[int, int], crops: bool) -> Image.Image:
    """The part of an image that the model saw, in the shape of the grid; grey if the file is not there any more."""
    try:
        with Image.open(file) as stored:
            picture = ImageOps.exif_transpose(stored).convert("RGB")
    except Exception:  # decoders raise errors of every kind
        return Image.new("RGB", shape, _PALE)
    return ImageOps.fit(picture, shape) if crops else picture.resize(shape)


def _overlay(picture: Image.Image, attention: Tensor, grid: tuple[int, int]) -> Image.Image:
    """A map over the grey picture; the least attended patches are the most transparent."""
    share = attention.double().clamp_min(0).reshape(grid).numpy()  # [r, c]
    share = share / max(float(share.max()), np.finfo(float).tiny)
    alpha = (255 * (0.15 + 0.75 * np.sqrt(share))).astype(np.uint8)
    colours = Image.fromarray(_coloured(share**0.6)).resize(picture.size, Image.Resampling.NEAREST)
    mask = Image.fromarray(alpha).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(colours, ImageOps.grayscale(picture).convert("RGB"), mask)


def _coloured(share: NDArray[Any]) -> NDArray[np.uint8]:
    """[r, c] of 0 to 1 -> [r, c, 3]."""
    stops = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(share, stops, _COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _write(sheet: Image.Image, text: str, place: tuple[int, int], width: int, colour: tuple[int, int, int]) -> None:
    """Writes whole words into a few lines; of a longer text the beginning, with an ellipsis."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    lines = wrapped(text, lambda line: draw.textlength(line, font=font) <= width, _LINES)
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * _LINE), line, fill=colour, font=font)


def wrapped(text: str, fits: Any, lines: int) -> list[str]:
    """Breaks a text between words into lines that fit, at most so many; a word that does not fit alone is cut.

    Args:
        text: the text.
        fits: whether a line fits.
        lines: how many lines there is room for.
    """
    found = [""]
    for word in text.split():
        longer = f"{found[-1]} {word}".strip()
        if fits(longer):
            found[-1] = longer
        else:
            found += [word] if found[-1] else []
            found[-1] = word
    if len(found) > lines:
        found[lines - 1 :] = [f"{found[lines - 1]} ..."]
    return [line if fits(line) else _cut(line, fits) for line in found]


def _cut(line: str, fits: Any) -> str:
    while line and not fits(f"{line}..."):
        line = line[:-1].rstrip()
    return f"{line}..."
