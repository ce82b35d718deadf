"""Looks at a finished harvest.

python -m data.inspect verify DIR      checks every byte
python -m data.inspect show DIR        prints a summary and writes a contact sheet of maps over images
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

from data.errors import DataError
from data.index import MANIFEST, damaged_shards, manifest_is_whole, read_index
from data.sample import Sample
from data.shards import ShardReader

_CAPTION = 16  # pixels under each picture
_ORANGE = (255, 80, 0)


def describe(directory: Path) -> str:
    """A few lines about a finished harvest: counts, bytes, shapes, prompts, entropy."""
    index = read_index(directory)
    lines = [f"{directory}: fingerprint {index['fingerprint'][:16]}"]
    for split in dict.fromkeys(shard["split"] for shard in index["shards"]):
        reader = ShardReader(directory, split)
        grids = ", ".join(f"{r} x {c}" for r, c in sorted(set(reader.grids)))
        kinds: Counter[str] = Counter()
        entropies: list[float] = []
        for sample in reader:
            kinds.update(f"{prompt['strategy']}" for prompt in sample.prompts)
            entropies += sample.entropy
        first = reader.stored(0).states
        lines += [
            f"  {split}: {len(reader):,} images, {sum(reader.prompts):,} maps, {reader.nbytes / 1e6:,.1f} MB in "
            f"{len(reader.names)} shards",
            f"    states {tuple(first.shape)} {str(first.dtype).removeprefix('torch.')}, grids {grids}",
            f"    prompts {dict(sorted(kinds.items()))}",
            f"    entropy {min(entropies):.3f} .. {max(entropies):.3f} nats, mean {statistics.fmean(entropies):.3f}",
        ]
    lines.append(f"  skipped images: {len(index['skipped'])}")
    lines += [f"    {bad['file']}: {bad['reason']}" for bad in index["skipped"][:10]]
    return "\n".join(lines)


def contact_sheet(directory: Path, images_dir: Path, file: Path, count: int = 12, side: int = 192) -> Path:
    """Draws the maps of the first images of the test split (else of the last one) over the images.

    One row of the sheet per image: the image, then one overlay per prompt, each map scaled to its own maximum.

    Args:
        directory: a finished harvest.
        images_dir: folder of its images.
        file: PNG to write.
        count: images at most.
        side: pixels per picture.
    """
    splits = list(dict.fromkeys(shard["split"] for shard in read_index(directory)["shards"]))
    reader = ShardReader(directory, "test" if "test" in splits else splits[-1])
    count = min(count, len(reader))
    columns = 1 + max(reader.prompts[:count])
    sheet = Image.new("RGB", (side * columns, (side + _CAPTION) * count), "white")
    for row in range(count):
        _draw_row(sheet, reader[row], images_dir, row * (side + _CAPTION), side)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    return file


def _draw_row(sheet: Image.Image, sample: Sample, images_dir: Path, top: int, side: int) -> None:
    draw = ImageDraw.Draw(sheet)
    with Image.open(images_dir / sample.file) as stored:
        picture = ImageOps.exif_transpose(stored).convert("RGB").resize((side, side))
    sheet.paste(picture, (0, top))
    draw.text((4, top + side + 2), sample.file[-28:], fill="black")
    for column, (attention, prompt) in enumerate(zip(sample.attention, sample.prompts, strict=True), start=1):
        heat = (attention / attention.max().clamp_min(1e-12) * 200).to(torch.uint8).reshape(sample.grid)  # [r, c]
        mask = Image.fromarray(heat.numpy()).resize((side, side), Image.Resampling.NEAREST)
        dimmed = Image.blend(picture, Image.new("RGB", picture.size), 0.5)
        overlay = Image.composite(Image.new("RGB", picture.size, _ORANGE), dimmed, mask)
        sheet.paste(overlay, (column * side, top))
        draw.text((column * side + 4, top + side + 2), str(prompt["text"])[:34], fill="black")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m data.inspect`."""
    parser = argparse.ArgumentParser(prog="python -m data.inspect", description="Looks at a finished harvest.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check every byte")
    verify.add_argument("directory", type=Path)
    show = commands.add_parser("show", help="print a summary, write a contact sheet of maps over images")
    show.add_argument("directory", type=Path)
    show.add_argument("--images", type=Path, help="folder of the images (default: where they were harvested from)")
    show.add_argument("--output", type=Path, help="PNG to write (default: DIR/contact-sheet.png)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "verify":
            return _verify(arguments.directory)
        return _show(arguments.directory, arguments.images, arguments.output)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2


def _verify(directory: Path) -> int:
    problems = [str(problem) for problem in damaged_shards(directory)]
    if not manifest_is_whole(directory, read_index(directory)):
        problems.append(f"{MANIFEST} is missing or was changed. Run the harvest again: it re-creates it.")
    for problem in problems:
        print(problem)
    print(f"{directory}: " + (f"{len(problems)} problems" if problems else "every byte is as written"))
    return 1 if problems else 0


def _show(directory: Path, images: Path | None, output: Path | None) -> int:
    print(describe(directory))
    images_dir = images or Path(read_index(directory)["provenance"]["images_dir"])
    if not images_dir.is_dir():
        print(f"no contact sheet: {images_dir} does not exist, give the images folder with --images")
        return 0
    print(f"maps over images: {contact_sheet(directory, images_dir, output or directory / 'contact-sheet.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
