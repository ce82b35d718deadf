"""The predictor in other engines: equal outputs at sizes that it was not exported with."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from export.engines import check_engines, largest_error, write_engines
from export.errors import ExportError
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, load_predictor, save_predictor

pytestmark = pytest.mark.slow

FEATURES: list[dict[str, Any]] = [
    {"question": "bilinear", "context": "both", "position": "fourier", "components": 6},
    {"question": "none", "context": "none", "position": "none", "components": 1},
]


def saved(folder: Path, **features: Any) -> Path:
    torch.manual_seed(0)
    predictor = SourcePredictor(PredictorConfig(16, rank=4, width=8, **features))
    predictor.set_statistics(torch.randn(16), torch.rand(16) + 1, torch.randn(16), torch.rand(16) + 1)
    predictor.set_calibration(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.4, 0.8]), 0.3, 1.7)
    return save_predictor(folder, predictor, scr=SCRConfig(), model={"family": "llava"})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, float]]:
    folder = saved(tmp_path_factory.mktemp("engines") / "p", **FEATURES[0])
    return folder, write_engines(folder)


def test_outputs_are_equal_at_other_sizes(exported: tuple[Path, dict[Any, float]]) -> None:
    folder, errors = exported
    assert set(errors) == {"onnx", "pt2"} and max(errors.values()) <= 1e-5
    assert check_engines(folder, load_predictor(folder)) == {"model.onnx": errors["onnx"], "model.pt2": errors["pt2"]}
    load_predictor(folder, verify=True)  # they lie beside the other files and change none


def test_without_question_position_and_mixture(tmp_path: Path) -> None:
    assert max(write_engines(saved(tmp_path / "p", **FEATURES[1])).values()) <= 1e-5


def test_nothing_of_this_machine_is_in_them(exported: tuple[Path, dict[Any, float]]) -> None:
    folder, _ = exported
    shutil.unpack_archive(folder / "model.pt2", folder.parent / "pt2", "zip")
    files = [folder / "model.onnx", *(path for path in (folder.parent / "pt2").rglob("*") if path.is_file())]
    mine = [str(folder.parent), str(Path.cwd()), str(Path.home()), socket.gethostname()]
    for file in files:
        content = str(file.relative_to(folder.parent)).encode() + file.read_bytes()
        assert not [place for place in mine if len(place) > 2 and place.encode() in content], file


def test_of_other_weights_they_are_refused(exported: tuple[Path, dict[Any, float]], tmp_path: Path) -> None:
    torch.manual_seed(1)
    predictor = load_predictor(exported[0])
    predictor.score.bias.data += 1e-3
    other = save_predictor(tmp_path / "q", predictor, scr=SCRConfig(), model={"family": "llava"})
    shutil.copy(exported[0] / "model.onnx", other)
    with pytest.raises(ExportError, match="made from other weights"):
        check_engines(other, load_predictor(other))


def test_other_outputs_are_refused(
    exported: tuple[Path, dict[Any, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(exported[0], tmp_path / "p")
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.1, tensor.name))
    onnx.save(model, folder / "model.onnx")
    predictor = load_predictor(folder)
    assert largest_error(folder / "model.onnx", predictor) > 1e-3
    with pytest.raises(ExportError, match=r"model.onnx: outputs differ from the predictor's by up to"):
        check_engines(folder, predictor)
    before = (folder / "model.pt2").read_bytes()
    monkeypatch.setattr("export.engines.MOST_ERROR", -1.0)
    with pytest.raises(ExportError, match="outputs differ"):
        write_engines(folder, ("pt2",))
    assert (folder / "model.pt2").read_bytes() == before  # a failed one takes nobody's place
