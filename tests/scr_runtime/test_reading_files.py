"""Files of a predictor folder that are none, and weights of any content."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from scr_runtime import (
    SCR,
    SCRConfig,
    errors,
    load_predictor,
)
from tests.scr_runtime.folders import (
    CONFIG,
    FUZZ,
    Written,
    auto_runs_two_pass,
    flipped,
    places,
    replaced,
    resident,
    values,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:32 sources are asked for")  # the paper's K, on 36 patches


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("predictor") / "p")


@pytest.fixture(autouse=True)
def _restored(written: Written) -> Iterator[None]:
    written.restore()
    yield
    written.restore()


# -- things that are no files ----------------------------------------------------------------------------------------


def _no_permission(path: Path) -> None:
    path.chmod(0)


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def _sparse(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(2**40)


FILES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "a directory": _replace(Path.mkdir),
    "a FIFO": _replace(os.mkfifo),
    "a dangling link": _replace(lambda path: path.symlink_to("nowhere")),
    "a link loop": _loop,
    "/dev/zero": _replace(lambda path: path.symlink_to("/dev/zero")),
    "/dev/null": _replace(lambda path: path.symlink_to("/dev/null")),
    "/proc/self/mem": _replace(lambda path: path.symlink_to("/proc/self/mem")),
    "a link to a directory": _replace(lambda path: path.symlink_to("/")),
    "a link to a FIFO": _replace(lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe"))),
    "a terabyte": _sparse,
    "empty": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"{"),
    "no permission": _no_permission,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", FILES)
def test_things_that_are_no_files(written: Written, kind: str, name: str) -> None:
    """R7: a FIFO hung, /dev/zero was a MemoryError."""
    if kind == "no permission" and os.geteuid() == 0:
        pytest.skip("root may read anything")
    path = written.folder / name
    FILES[kind](path)
    before = resident()
    try:
        with pytest.raises(errors.PredictorError):
            load_predictor(written.folder)
        with pytest.raises(errors.PredictorError):
            SCR(written.model, config=CONFIG, predictor=written.folder, mode="one-pass")
        scr = auto_runs_two_pass(written)
        assert scr.config == (CONFIG if name == "model.safetensors" else SCRConfig.for_depth(6))
    finally:
        Path(f"{path}.pipe").unlink(missing_ok=True)
    assert resident() - before < 128 * 2**20


@pytest.mark.parametrize("folder", ["/nowhere", "/dev/null", "/dev/zero", "", "a\0b", "x" * 5000, "/proc/self/mem/a"])
def test_folders_that_are_none(written: Written, folder: str) -> None:
    """R6: ``auto`` needs no config to fall back."""
    with pytest.raises(errors.PredictorNotFoundError):
        load_predictor(folder)
    with pytest.raises(errors.PredictorNotFoundError):
        SCR(written.model, predictor=folder, mode="one-pass")
    with pytest.warns(RuntimeWarning, match="two-pass with the paper's settings .* scaled to 6 blocks"):
        scr = SCR(written.model, predictor=folder, mode="auto")
    with torch.no_grad(), scr:
        written.model(**written.inputs)
    assert scr.reports[0].provider == "two-pass"


def test_a_pipe_with_a_writer_does_not_hang(written: Written) -> None:
    """Not even where somebody writes into it."""
    path = written.folder / "config.json"
    path.unlink()
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR)
    try:
        os.write(reader, b"{")
        with pytest.raises(errors.PredictorError):
            load_predictor(written.folder)
    finally:
        os.close(reader)


def test_links_to_files_are_followed(written: Written, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(written.folder / name, tmp_path / f"{name}.real")
        (written.folder / name).unlink()
        (written.folder / name).symlink_to(tmp_path / f"{name}.real")
    link = tmp_path / "folder"
    link.symlink_to(written.folder)
    assert written.is_same(load_predictor(link))
    assert stat.S_ISLNK(os.lstat(link).st_mode)


# -- weights ---------------------------------------------------------------------------------------------------------


def _header(weights: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def _joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _with(weights: bytes, name: str, **entry: Any) -> bytes:
    header, body = _header(weights)
    return _joined(header | {name: header.get(name, {}) | entry}, body)


CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda weights: b"",
    "no header": lambda weights: weights[:4],
    "half a header": lambda weights: weights[:40],
    "cut": lambda weights: weights[:-4],
    "longer": lambda weights: weights + b"\0" * 4,
    "a header of terabytes": lambda weights: struct.pack("<Q", 2**42) + weights[8:],
    "a header of 2**64 - 1": lambda weights: b"\xff" * 8 + weights[8:],
    "an empty header": lambda weights: struct.pack("<Q", 0),
    "header null": lambda weights: _joined(None, weights),
    "header []": lambda weights: _joined([], weights),
    "deep header": lambda weights: _joined(b"[" * 30_000, b""),
    "no UTF-8": lambda weights: _joined(b"{\xff}", b""),
    "a tensor of terabytes": lambda weights: _with(weights, "score.bias", shape=[2**40], data_offsets=[0, 2**42]),
    "huge shape": lambda weights: _with(weights, "score.bias", shape=[2**62, 2**62]),
    "shape of 400 digits": lambda weights: _with(weights, "score.bias", shape=[10**400]),
    "negative shape": lambda weights: _with(weights, "score.bias", shape=[-1]),
    "unknown dtype": lambda weights: _with(weights, "score.bias", dtype="F31"),
    "narrow dtype": lambda weights: _with(weights, "score.bias", dtype="F4"),
    "null dtype": lambda weights: _with(weights, "score.bias", dtype=None),
    "backward offsets": lambda weights: _with(weights, "score.bias", data_offsets=[8, 0]),
    "overlapping": lambda weights: _with(weights, "score.bias", data_offsets=[0, 4]),
    "pickle": lambda weights: b"\x80\x04K\x01.",
    "zip": lambda weights: b"PK\x03\x04" + b"\0" * 500,
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("signed", [True, False], ids=["sha256 fits", "sha256 differs"])
def test_weights_that_are_no_safetensors(written: Written, kind: str, signed: bool) -> None:
    """R7: 1,715 unreadable files with a right sha256 were SafetensorErrors."""
    content = CONTENTS[kind](written.weights)
    if signed:
        written.write_weights(content)
    else:
        (written.folder / "model.safetensors").write_bytes(content)
    before = resident()
    with pytest.raises(errors.PredictorCorruptError):
        load_predictor(written.folder)
    auto_runs_two_pass(written)
    assert resident() - before < 64 * 2**20


@FUZZ
@given(data=st.data())
def test_any_header_with_a_right_sha256(written: Written, data: Any) -> None:
    header, body = _header(written.weights)
    place = data.draw(st.sampled_from(list(places(header))))
    try:
        content = _joined(replaced(header, place, data.draw(values)), body)
    except (ValueError, UnicodeEncodeError):
        return
    written.write_weights(content)
    written.refused_or_usable()


@FUZZ
@given(bit=st.integers(0, 10**9), byte=st.integers(0, 255))
def test_damaged_weights_with_a_right_sha256(written: Written, bit: int, byte: int) -> None:
    content = bytearray(flipped(written.weights, bit % (8 * len(written.weights))))
    content[(bit * 7919) % min(len(content), 900)] = byte
    written.write_weights(bytes(content))
    written.refused_or_usable()


Tensors = dict[str, torch.Tensor]


def knots(value: torch.Tensor) -> Tensors:
    """The same in both halves of the calibration."""
    return {"calibration_raw": value.clone(), "calibration_expected": value.clone()}


TENSORS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "float16": (lambda t: {name: value.half() for name, value in t.items()}, "float16, expected torch.float32"),
    "float64": (lambda t: {name: value.double() for name, value in t.items()}, "expected torch.float32"),
    "int64": (lambda t: t | {"score.bias": t["score.bias"].long()}, "int64, expected"),
    "bool": (lambda t: t | {"state_mean": t["state_mean"] > 0}, "bool, expected"),
    "NaN weight": (lambda t: t | {"score.bias": t["score.bias"] * math.nan}, "score.bias holds NaN"),
    "infinite weight": (lambda t: t | {"project.weight": t["project.weight"] / 0}, "project.weight holds NaN or inf"),
    "NaN temperature": (lambda t: t | {"temperature": torch.tensor(math.nan)}, "temperature holds NaN"),
    "temperature 0": (lambda t: t | {"temperature": torch.tensor(0.0)}, "temperature 0.0: expected a number over 0"),
    "temperature -1": (lambda t: t | {"temperature": torch.tensor(-1.0)}, "expected a number over 0"),
    "temperature [1]": (lambda t: t | {"temperature": torch.tensor([1.0])}, "temperature has shape"),
    "NaN knot": (lambda t: t | {"calibration_raw": torch.tensor([0.1, math.nan, 0.9])}, "calibration_raw holds NaN"),
    "NaN share": (lambda t: t | {"calibration_expected": torch.tensor([0.1, math.nan, 0.9])}, "holds NaN"),
    "unsorted knots": (lambda t: t | {"calibration_raw": torch.tensor([0.5, 0.1, 0.9])}, "must be ascending"),
    "equal knots": (lambda t: t | {"calibration_raw": torch.tensor([0.1, 0.1, 0.9])}, "must be ascending"),
    "falling shares": (lambda t: t | {"calibration_expected": torch.tensor([0.5, 0.4, 0.9])}, "non-decreasing"),
    "one knot": (
        lambda t: t | {k: torch.tensor([0.5]) for k in ("calibration_raw", "calibration_expected")},
        "M >= 2",
    ),
    "no knot": (lambda t: t | {k: torch.tensor([]) for k in ("calibration_raw", "calibration_expected")}, "M >= 2"),
    "other lengths": (lambda t: t | {"calibration_raw": torch.tensor([0.1, 0.2])}, r"shapes \(2,\) and \(3,\)"),
    "square knots": (lambda t: t | knots(torch.eye(2)), "M"),
    "scalar knots": (lambda t: t | knots(torch.tensor(1.0)), "M"),
    "negative deviation": (lambda t: t | {"state_std": -t["state_std"]}, "deviations that are not over 0"),
    "no deviation": (lambda t: t | {"question_std": torch.zeros(32)}, "deviations that are not over 0"),
    "one more": (lambda t: t | {"more": torch.zeros(1)}, "more is unexpected"),
    "one less": (lambda t: {k: v for k, v in t.items() if k != "gate.bias"}, "gate.bias is missing"),
    "a scalar": (lambda t: t | {"score.bias": torch.tensor(0.0)}, "score.bias has shape"),
    "an empty tensor": (lambda t: t | {"state_mean": torch.zeros(0)}, "state_mean has shape"),
    "none at all": (lambda t: {}, "is missing"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_no_fit_makes(written: Written, kind: str) -> None:
    """R7, R8, R9: knots of unequal length, NaN, other float types."""
    change, words = TENSORS[kind]
    tensors = load_file(written.folder / "model.safetensors")
    written.write_weights(save_tensors(change(tensors)))
    with pytest.raises(errors.PredictorCorruptError, match=words):
        load_predictor(written.folder)
    assert auto_runs_two_pass(written).config == CONFIG
