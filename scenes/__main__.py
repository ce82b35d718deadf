"""`python -m scenes {render,world,fit,evaluate,sprites}`: the embedded world and the models trained on it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data.errors import DataError
from scenes import CHECKPOINT, ensure_world
from scenes.drawing import LOOKS

_OUT = {"scene-llava": "runs/scenes/checkpoint", "scene-next": "runs/scenes/checkpoint-next"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scenes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        return commands.add_parser(name, help=text, description=text, formatter_class=formatter)

    render = command("render", "Write scenes and a contact sheet with the ground truth under each.")
    render.add_argument("--out", type=Path, default=Path("runs/scenes/render"), help="folder to write to")
    render.add_argument("--count", type=int, default=12, help="number of scenes")
    render.add_argument("--seed", type=int, default=0, help="seed of the world")
    render.add_argument("--columns", type=int, default=6, help="scenes in a row of the contact sheet")
    render.add_argument("--sizes", choices=LOOKS, default="square", help="sizes of the scenes")

    world = command("world", "Render a world in COCO layout, or reuse the one that is there.")
    world.add_argument("--out", type=Path, default=Path("runs/scenes/world"), help="folder of the world")
    world.add_argument("--train", type=int, default=2000, help="training images")
    world.add_argument("--val", type=int, default=500, help="validation images")
    world.add_argument("--seed", type=int, default=0, help="seed of the world")
    world.add_argument("--sizes", choices=LOOKS, default="square", help="sizes of the scenes")

    fit = command("fit", "Train a scene model from nothing and measure it; minutes on 2 idle cores.")
    fit.add_argument("--model", choices=_OUT, default="scene-llava", help="which model")
    fit.add_argument(
        "--out", type=Path, help=f"folder of the checkpoint; by default one of {', '.join(_OUT.values())}"
    )
    fit.add_argument("--seed", type=int, default=0, help="seed of weights and scenes")
    fit.add_argument("--steps-scale", type=float, default=1.0, help="factor on the steps of every stage")
    fit.add_argument("--check", type=int, default=500, help="held-out scenes of the evaluation")
    fit.add_argument("--threads", type=int, default=2, help="threads of torch")

    evaluate = command("evaluate", "Measure a checkpoint on held-out scenes: accuracy, HR, TPR, AUC, CHAIR.")
    evaluate.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    evaluate.add_argument("--check", type=int, default=500, help="held-out scenes")

    sprites = command("sprites", "Draw the sprite sheet again from a colour font (needed only to change it).")
    sprites.add_argument(
        "--font",
        type=Path,
        default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
        help="CBDT font",
    )
    sprites.add_argument("--out", type=Path, default=None, help="PNG file; default: the sheet of the package")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (DataError, ValueError, OSError) as error:
        print(f"python -m scenes {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _fit(options: argparse.Namespace) -> None:
    import torch

    from scenes.measure import as_text, measure

    torch.set_num_threads(options.threads)
    out = options.out or Path(_OUT[options.model])
    if options.model == "scene-next":
        from scenes.next_fit import NextRecipe, fit_next

        fit_next(out, options.seed, NextRecipe().scaled(options.steps_scale))
    else:
        from scenes.fit import Recipe, fit

        fit(out, options.seed, Recipe().scaled(options.steps_scale))
    print("the figures below are of the saved model, loaded again, run in fp32")
    print(as_text(measure(out, options.seed, options.check)))
    print(f"\ncheckpoint: {out}")


def _run(options: argparse.Namespace) -> None:
    if options.command == "render":
        from scenes.show import write_scenes

        sheet = write_scenes(options.out, options.count, options.seed, columns=options.columns, sizes=options.sizes)
        print(f"{options.count} scenes in {options.out}, contact sheet: {sheet}")
    elif options.command == "world":
        root = ensure_world(options.out, options.train, options.val, options.seed, options.sizes)
        print(f"world: {root}")
    elif options.command == "fit":
        _fit(options)
    elif options.command == "evaluate":
        from scenes.measure import as_text, measure

        if not (options.checkpoint / "config.json").is_file():
            raise ValueError(f"no checkpoint at {options.checkpoint}: give --checkpoint the folder that `fit` wrote")
        print(as_text(measure(options.checkpoint, options.seed, options.check)))
    else:
        from scenes.sprites import SHEET, make_sheet

        print(f"sprite sheet: {make_sheet(options.font, options.out or SHEET)}")


if __name__ == "__main__":
    sys.exit(main())
