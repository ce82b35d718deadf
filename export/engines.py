"""A predictor for engines that are not PyTorch: model.onnx and model.pt2 (torch.export) beside its weights.

Both take ``states`` [B, rows, columns, d] and, if the network reads it, ``question`` [B, d], all float32, and give
``scores`` [B, rows * columns] and ``spread`` [B] as ``SourcePredictor.score_and_spread`` does. B, rows and columns are
free. What follows from the scores (K, neighbours, confidence) is left to the engine.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.export import Dim

from export.errors import ExportError
from scr_runtime import SourcePredictor, load_predictor
from scr_runtime.files import replace_file
from scr_runtime.network import position_features
from scr_runtime.redistribute import Grid

Engine = Literal["onnx", "pt2"]
MOST_ERROR = 1e-5
_SIZES = ((1, 3, 3), (2, 6, 8), (3, 24, 24), (1, 40, 17))  # batch, rows, columns that outputs are compared on
_SEAL = "weights_sha256"


class Portable(SourcePredictor):
    """A predictor whose grid is the shape of its states, and that keeps nothing between calls."""

    def forward(self, states: Tensor, question: Tensor | None = None) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[B, rows, columns, d] and [B, d] -> scores [B, rows * columns] and spread [B]."""
        _, rows, columns, _ = states.shape
        return self.score_and_spread(states.flatten(1, 2), (rows, columns), question)

    def _places(self, grid: Grid, device: torch.device) -> Tensor:
        rows, columns = (_places_of_side(side, device) for side in grid)
        return position_features(rows, columns, self.config.position)

    def _fold(self) -> Any:
        return self._make_fold()


def _places_of_side(side: int, device: torch.device) -> Tensor:
    """``torch.linspace(-1, 1, side)``, which torch.export takes for a constant; from both ends, as that does it."""
    place = torch.arange(side, device=device, dtype=torch.float32)
    step = 2 / (side - 1)
    return torch.where(2 * place < side, step * place - 1, 1 - step * (side - 1 - place))


def write_engines(folder: Path, engines: tuple[Engine, ...] = get_args(Engine)) -> dict[Engine, float]:
    """Writes a predictor for other engines into its folder, once its outputs have been compared.

    Args:
        folder: A predictor folder.
        engines: Which.

    Returns:
        Engine -> largest difference of an output from the predictor's, over several sizes.

    Raises:
        ExportError: If a package is missing, or outputs differ by more than ``MOST_ERROR``.
    """
    predictor = load_predictor(folder, verify=True)
    portable = Portable(predictor.config).eval().requires_grad_(False)
    for name in ("calibration_raw", "calibration_expected"):
        setattr(portable, name, getattr(predictor, name))
    portable.load_state_dict(predictor.state_dict())
    program = _exported(portable)
    errors: dict[Engine, float] = {}
    for engine in engines:
        path = folder / f"model.{engine}"
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
            written = Path(place) / path.name  # the name is in the file
            _write(program, written, engine, str(predictor.info[_SEAL]))
            errors[engine] = _checked_error(written, predictor)
            replace_file(written, path)
    return errors


def check_engines(folder: Path, predictor: SourcePredictor) -> dict[str, float]:
    """Compares the engines' files that a folder has with its predictor.

    Returns:
        File name -> largest difference of an output.

    Raises:
        ExportError: If one was made from other weights, or outputs differ by more than ``MOST_ERROR``.
    """
    errors: dict[str, float] = {}
    for engine in get_args(Engine):
        path = folder / f"model.{engine}"
        if not path.is_file():
            continue
        if _seal(path) != predictor.info[_SEAL]:
            raise ExportError(f"{path}: was made from other weights. Make it again: python -m export engines {folder}")
        errors[path.name] = _checked_error(path, predictor)
    return errors


def _checked_error(path: Path, predictor: SourcePredictor) -> float:
    error = largest_error(path, predictor)
    if not error <= MOST_ERROR:  # NaN is not
        raise ExportError(f"{path}: outputs differ from the predictor's by up to {error:.3g}, at most {MOST_ERROR}")
    return error


@torch.inference_mode()
def largest_error(path: Path, predictor: SourcePredictor) -> float:
    """Largest difference between an engine's outputs and the predictor's, over several sizes."""
    run, worst = _runner(path), 0.0
    generator = torch.Generator().manual_seed(0)
    for batch, rows, columns in _SIZES:
        states, question = _inputs(predictor, batch, rows, columns, generator)
        expected = predictor.score_and_spread(states.flatten(1, 2), (rows, columns), question)
        given = (states, question) if predictor.config.reads_question else (states,)
        for one, other in zip(run(given), expected, strict=True):
            worst = max(worst, float((one - other).abs().max()))
    return worst


def _inputs(
    predictor: SourcePredictor, batch: int, rows: int, columns: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    size = predictor.config.hidden_size
    states = torch.randn(batch, rows, columns, size, generator=generator) * predictor.state_std + predictor.state_mean
    question = torch.randn(batch, size, generator=generator) * predictor.question_std + predictor.question_mean
    return states, question


def _exported(portable: Portable) -> torch.export.ExportedProgram:
    states, question = _inputs(
        portable, 2, 6, 8, torch.Generator().manual_seed(0)
    )  # sizes over 1: those are kept free
    batch = Dim("batch", min=1, max=4096)
    shapes: list[dict[int, Dim]] = [{0: batch, 1: Dim("rows", min=2, max=512), 2: Dim("columns", min=2, max=512)}]
    given = (states,)
    if portable.config.reads_question:
        given, shapes = (states, question), [*shapes, {0: batch}]
    program = torch.export.export(portable, given, dynamic_shapes=tuple(shapes))
    program._example_inputs = None  # they would be pickled into the file
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _write(program: torch.export.ExportedProgram, path: Path, engine: Engine, seal: str) -> None:
    if engine == "pt2":
        with _quiet():
            torch.export.save(program, path, extra_files={_SEAL: seal})
        return
    try:
        import onnx
        import onnxscript  # noqa: F401  # what torch.onnx stands on
    except ImportError as error:
        raise ExportError(f"{error}: install the extra, pip install -e '.[onnx]'") from error
    with _quiet():
        made = torch.onnx.export(program, (), dynamo=True, output_names=["scores", "spread"], verbose=False)
    assert made is not None
    model = made.model_proto
    for node in model.graph.node:  # traces of the code that made them: paths of this machine
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.helper.set_model_props(model, {_SEAL: seal})
    onnx.save(model, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's notices of its own parts: a deprecated check, and torchvision that is not installed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _seal(path: Path) -> str:
    """The weights that a file says it was made from."""
    if path.suffix == ".pt2":
        files: dict[str, Any] = {_SEAL: ""}
        torch.export.load(path, extra_files=files)
        return str(files[_SEAL])
    import onnx

    return next((prop.value for prop in onnx.load(path).metadata_props if prop.key == _SEAL), "")


def _runner(path: Path) -> Any:
    """A function of the inputs that runs a file in its own engine."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return lambda given: program(*given)
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(f"{error}: install the extra, pip install -e '.[onnx]'") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda given: [
        torch.from_numpy(value)
        for value in session.run(None, {name: one.numpy() for name, one in zip(names, given, strict=True)})
    ]
