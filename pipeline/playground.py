"""The command `python -m playground`: a local page that shows one picture and one question under every mode.

python -m playground                                                the embedded model and its newest predictor
python -m playground model=llava-1.5-7b predictor=FOLDER port=7861
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from pathlib import Path

import uvicorn

from configs import TrainConfig
from data.vlm import load_vlm
from evaluation.tables import paragraph
from pipeline.checks import check_all
from pipeline.errors import RunError
from pipeline.exits import TerminatedError
from pipeline.harvest import held_out_images
from playground.engine import Engine
from playground.gallery import read_gallery
from playground.server import Place, application
from scr_runtime import load_predictor

_LOOPBACK = "127.0.0.1"


def serve(config: TrainConfig, port: str) -> int:
    """Loads the model and serves its page."""
    number = port.partition("=")[2]
    if not number.isdecimal() or int(number) > 65535:
        raise RunError(f"{port}: expected a number up to 65535; 0 takes any that is free")
    place = open_place(config)
    listening = bind(int(number))
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    print(f"\nplayground: http://{_LOOPBACK}:{listening.getsockname()[1]}   (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt, TerminatedError):  # Ctrl-C and SIGTERM are how it ends
        uvicorn.Server(uvicorn.Config(application(place), access_log=False, log_level="warning")).run([listening])
    return 0


def open_place(config: TrainConfig) -> Place:
    """Loads what the page is about: the model, its predictor if there is one, held-out images and their answers."""
    given = config.evaluation.predictors
    folder = Path(given[0]).expanduser() if given else config.paths.predictor
    found = bool(given) or folder.exists()
    asked = config.evaluation.model_copy(update={"predictors": [str(folder)] if found else []})
    check_all([config.model_copy(update={"evaluation": asked})], ["evaluation"])
    model, processor = load_vlm(config.model)
    engine = Engine(model, processor, config.scr, load_predictor(folder) if found else None)
    images = held_out_images(config) if config.paths.eval_images is not None else None  # which may have to be rendered
    without = (
        f"one-pass and auto need a predictor, and {folder} does not exist: `python train.py "
        f"model={config.model.name}` makes one (the embedded model's takes some minutes)."
    )
    if not found:
        print(paragraph(without))
    return Place(
        engine=engine,
        name=config.model.name,
        model=config.model.location,
        dtype=str(model.dtype).removeprefix("torch."),
        predictor=os.path.relpath(folder.resolve()) if found else None,  # of which run, which a link does not say
        without="" if found else without,
        images=images,
        entries=read_gallery(folder.resolve().parent / "reports" / "answers.jsonl") if images is not None else [],
    )


def bind(port: int) -> socket.socket:
    """A listening socket on the loopback interface alone, at another port if this one is taken."""
    for number in (port, 0):
        taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((_LOOPBACK, number))
            return taken
        except OSError:
            taken.close()
            print(f"port {number} is taken: another one is used")
    raise RunError(f"no port of {_LOOPBACK} can be used")
