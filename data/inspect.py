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

from data.errors import DataError
from data.index import MANIFEST, damaged_shards, manifest_is_whole, read_index


def describe(directory: Path) -> str:
    """A few lines about a finished harvest: counts, bytes, shapes, prompts, entropy; every byte is read.

    Raises:
        DataError: it is unfinished, or damaged.
    """
    from data.shards import ShardReader  # takes seconds: it needs torch

    index = read_index(directory)
    lines = [f"{directory}: fingerprint {index['fingerprint'][:16]}"]
    for split in dict.fromkeys(shard["split"] for shard in index["shards"]):
        reader = ShardReader(directory, split)
        lines.append(
            f"  {split}: {len(reader):,} images, {sum(reader.prompts):,} maps, {reader.nbytes / 1e6:,.1f} MB in "
            f"{len(reader.names)} shard{'s' * (len(reader.names) != 1)}"
        )
        if not len(reader):
            continue
        grids = ", ".join(f"{r} x {c}" for r, c in sorted({grid for of_one in reader.grids for grid in of_one}))
        kinds: Counter[str] = Counter()
        entropies: list[float] = []
        for sample in reader:
            kinds.update(f"{prompt.get('strategy')}" for prompt in sample.prompts)
            entropies += sample.entropy
        first = reader.stored(0).states
        lines += [
            f"    states {tuple(first.shape)} {str(first.dtype).removeprefix('torch.')}, grids {grids}",
            f"    prompts {dict(sorted(kinds.items()))}",
            f"    entropy {min(entropies):.3f} .. {max(entropies):.3f} nats, mean {statistics.fmean(entropies):.3f}",
        ]
    lines.append(f"  skipped images: {len(index['skipped'])}")
    lines += [f"    {bad['file']}: {bad['reason']}" for bad in index["skipped"][:10]]
    return "\n".join(lines)


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
    from data.contact_sheet import contact_sheet, crops_centre, image_processor  # take seconds

    print(describe(directory))
    index = read_index(directory)
    images_dir = images or index["provenance"].get("images_dir")
    if not isinstance(images_dir, str | Path) or not Path(images_dir).is_dir():
        print(f"no contact sheet: {images_dir} does not exist, give the images folder with --images")
        return 0
    print(f"maps over images: {contact_sheet(directory, Path(images_dir), output or directory / 'contact-sheet.png')}")
    processor = image_processor(index)
    part = "the centre of each image" if crops_centre(processor) else "each whole image"
    print(f"  they cover {part}, the default of {processor}; harvests do not keep the settings of a processor")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
