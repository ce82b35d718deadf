"""Predictor folders of any content: what is read is what was written, or an error of PredictorError's family."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scr_runtime import (
    SCR,
    PredictorConfig,
    SCRConfig,
    SourcePredictor,
    errors,
    load_predictor,
    save_predictor,
)
from scr_runtime.reading import FORMAT_VERSION, PROBE, checksum
from tests.conftest import make_tiny_llava
from tests.scr_runtime.folders import (
    CONFIG,
    FUZZ,
    Written,
    auto_runs_two_pass,
    flipped,
    places,
    replaced,
    resident,
    small,
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


# -- flips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_flipped_bit_is_refused_or_changes_nothing(written: Written, name: str) -> None:
    """R9: a flip in ``scr``, in a threshold or in the name of a key used to load."""
    content = written.config if name == "config.json" else written.weights
    path = written.folder / name
    refused = 0
    draw = random.Random(9)
    bits = draw.sample(range(8 * len(content)), 400)
    for bit in bits:
        path.write_bytes(flipped(content, bit))
        try:
            predictor = load_predictor(written.folder)
        except errors.PredictorError:
            refused += 1
        else:
            assert written.is_same(predictor), bit
    assert refused > 300


@pytest.mark.slow
def test_every_flipped_bit_of_the_config(written: Written) -> None:
    path = written.folder / "config.json"
    for bit in range(8 * len(written.config)):
        path.write_bytes(flipped(written.config, bit))
        try:
            assert written.is_same(load_predictor(written.folder)), bit
        except errors.PredictorError:
            continue


@FUZZ
@given(data=st.data())
def test_cut_and_stretched_files(written: Written, data: Any) -> None:
    for name, content in (("config.json", written.config), ("model.safetensors", written.weights)):
        place = data.draw(st.integers(0, len(content)))
        middle = data.draw(st.binary(max_size=12))
        drop = data.draw(st.integers(0, 40))
        changed = content[:place] + middle + content[place + drop :]
        (written.folder / name).write_bytes(changed)
        with contextlib.suppress(errors.PredictorError):
            assert written.is_same(load_predictor(written.folder))
        written.restore()


# -- values ----------------------------------------------------------------------------------------------------------


@FUZZ
@given(data=st.data())
def test_any_json_value_at_any_place(written: Written, data: Any) -> None:
    """R7, with a checksum that fits: in both formats, at every key, errors of one family."""
    record = written.record
    if data.draw(st.booleans()):
        record = {key: value for key, value in record.items() if key != "checksum"} | {"format_version": 2}
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(list(places(record))))
        record = replaced(record, place, data.draw(values))
        if not isinstance(record, dict):
            break
    try:
        written.write_record(record)
    except (ValueError, UnicodeEncodeError):
        return
    written.refused_or_usable()


NUMBERS = ["high", None, True, [], {}, [0.3], math.nan, math.inf, -math.inf, 10**400, "0.3"]
BAD: list[tuple[str, Any]] = [
    *[("threshold", value) for value in NUMBERS],
    *[("weights_sha256", value) for value in (None, 5, "", "f" * 63, "F" * 64, "g" * 64, ["f" * 64], {})],
    *[("checksum", value) for value in (None, 5, "", "0" * 64, [])],
    *[("format_version", value) for value in (None, "3", 3.0, True, [3], {}, 0, 1, -1, 4, 10**30)],
    *[("model", value) for value in (None, 5, "llava", [], [1], {"family": 5}, {"family": None})],
    *[("model", {"family": "llava", "hidden_size": size, "num_blocks": 6, "embedding_probe": [0.0] * PROBE})
      for size in ("32", 32.5, 0, -1, True, None)],
    *[("model", {"family": "llava", "hidden_size": 32, "num_blocks": 6, "embedding_probe": probe})
      for probe in (None, [], "x", 5, {}, [0.0] * 31, [0.0] * 33, ["a"] * PROBE, [math.nan] * PROBE, [[0.0]] * PROBE,
                    [math.inf] * PROBE, [10**400] * PROBE, [True] * PROBE)],
    *[("model", {"family": "llava", "hidden_size": 32, "num_blocks": 6, "embedding_prove": [0.0] * PROBE})],
    *[("network", value) for value in (None, [], 5, "x", {}, {"hidden_size": 32})],
    *[("scr", value) for value in (None, [], 5, "x", {"num_sources": 2.5}, {"num_sources": "5"}, {"num_sources": 0},
                                   {"exclude_border": []}, {"edit_layers": "01"}, {"edit_layers": [0, 1, 2]},
                                   {"edit_layers": [[0], [1]]}, {"connectivity": "8"}, {"source_fraction": "x"},
                                   {"suppress_claimed": 1}, {"state_layer": True}, {"strength": math.nan})],
    *[("drift_limit", value) for value in NUMBERS if value is not None],
    *[("drift_typical", value) for value in [*NUMBERS, 0, -1.0]],
    *[("metrics", value) for value in ([], 5, "x")],
    *[("provenance", value) for value in ([], 5, "x")],
    ("parameters", 5), ("parameters", "x"), ("parameters", None), ("parameters", 10**400),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD)
def test_a_value_that_was_never_written(written: Written, key: str, value: Any) -> None:
    """R7, R8: by name, in the format with a checksum; ``auto`` warns, with and without settings."""
    record = written.record | {key: value}
    text = json.dumps(record)
    if key != "checksum" and isinstance(record["format_version"], int):
        record = json.loads(text)
        text = json.dumps(record | {"checksum": checksum(record)})
    (written.folder / "config.json").write_text(text)
    with pytest.raises(errors.PredictorError) as caught:
        load_predictor(written.folder)
    assert isinstance(caught.value, errors.PredictorCorruptError | errors.PredictorVersionError)
    with pytest.raises(errors.PredictorError):
        SCR(written.model, config=CONFIG, predictor=written.folder, mode="one-pass")
    with pytest.warns(RuntimeWarning, match="two-pass"):
        SCR(written.model, predictor=written.folder, mode="auto")


SIZES = [("hidden_size", 10**8), ("hidden_size", 10**9), ("components", 10**8), ("width", 10**9), ("rank", 10**9),
         ("hidden_size", 10**30), ("components", 10**400), ("width", 2**62)]  # fmt: skip


@pytest.mark.parametrize(("key", "size"), SIZES)
def test_sizes_are_refused_before_anything_is_allocated(written: Written, key: str, size: int) -> None:
    written.write_record(written.record | {"network": written.record["network"] | {key: size}})
    tracemalloc.start()
    before = resident()
    try:
        with pytest.raises(errors.PredictorError):
            load_predictor(written.folder)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert resident() - before < 64 * 2**20


# -- texts that are no config.json -----------------------------------------------------------------------------------

TEXTS: dict[str, bytes | Callable[[Written], bytes]] = {
    "empty": b"",
    "null": b"null",
    "number": b"3",
    "list": b"[]",
    "string": b'"config"',
    "zeros": b"\0" * 100,
    "not UTF-8": b'{"format_version": "\xff"}',
    "UTF-16": lambda written: written.config.decode().encode("utf-16"),
    "byte order mark": lambda written: b"\xef\xbb\xbf" + written.config,
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep in a value": lambda w: json.dumps(w.record | {"provenance": {"a": 0}}).replace(
        '{"a": 0}', '{"a":' + "[" * 900 + "]" * 900 + "}").encode(),
    "many digits": lambda w: json.dumps(w.record | {"threshold": 0}).replace(
        '"threshold": 0', '"threshold": ' + "9" * 5000).encode(),
    "NaN": lambda w: json.dumps(w.record | {"threshold": math.nan}).encode(),
    "infinity": lambda w: json.dumps(w.record | {"threshold": math.inf}).encode(),
    "a float of infinity": lambda w: json.dumps(w.record | {"threshold": 0}).replace(
        '"threshold": 0', '"threshold": 1e999').encode(),
    "a key twice": lambda w: w.config.replace(b'"threshold"', b'"threshold": 0.9,\n  "threshold"', 1),
    "lone surrogate": lambda w: json.dumps(w.record | {"provenance": {"\ud800": "\udfff"}}).encode(),
    "trailing": lambda w: w.config + b"{}",
    "comment": lambda w: b"// no\n" + w.config,
    "large": lambda w: w.config + b" " * 2**20,
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_that_are_no_config(written: Written, kind: str) -> None:
    content = TEXTS[kind]
    (written.folder / "config.json").write_bytes(content(written) if callable(content) else content)
    with pytest.raises(errors.PredictorError):
        load_predictor(written.folder)
    scr = auto_runs_two_pass(written)
    assert scr.config == SCRConfig.for_depth(6)
    assert auto_runs_two_pass(written, config=CONFIG).config == CONFIG


# -- formats ---------------------------------------------------------------------------------------------------------


def test_format_2_has_no_checksum_and_3_needs_one(written: Written) -> None:
    assert FORMAT_VERSION == written.record["format_version"] == 3
    old = {key: value for key, value in written.record.items() if key != "checksum"} | {"format_version": 2}
    written.write_record(old)
    loaded = load_predictor(written.folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), written.loaded.parameters(), strict=True))
    assert (loaded.threshold, loaded.drift_limit) == (0.3, 1.7)
    for key in ("drift_typical", "drift_limit", "metrics", "provenance", "parameters"):
        del old[key]  # what the first folders of format 2 did not have
    written.write_record(old)
    assert load_predictor(written.folder).drift_limit is None
    for record, words in (
        (written.record | {"format_version": 2}, "format_version=2 with a checksum"),
        (old | {"format_version": 3}, r"missing keys \['checksum'\]"),
    ):
        (written.folder / "config.json").write_text(json.dumps(record))
        with pytest.raises(errors.PredictorCorruptError, match=words):
            load_predictor(written.folder)


def test_layout_is_not_covered_by_the_checksum(written: Written) -> None:
    """Spaces and the order of keys may change; a value may not, to the last digit."""
    record = dict(reversed(list(written.record.items())))
    (written.folder / "config.json").write_text(json.dumps(record, separators=(",", ":"), ensure_ascii=False))
    assert written.is_same(load_predictor(written.folder))
    record["threshold"] = math.nextafter(record["threshold"], 1)
    (written.folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(errors.PredictorCorruptError, match="a value was changed"):
        load_predictor(written.folder)


def test_a_pair_of_files_of_two_exports_is_refused(written: Written, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = save_predictor(
        tmp_path / "q",
        SourcePredictor(PredictorConfig(32, rank=4, width=8)),
        scr=CONFIG,
        model=written.record["model"],
    )
    shutil.copy(other / "model.safetensors", written.folder)
    with pytest.raises(errors.PredictorCorruptError, match="sha256"):
        load_predictor(written.folder)


def test_a_reader_beside_a_writer_never_sees_a_mixture(written: Written, tmp_path: Path) -> None:
    """While a folder is saved again and again, a load gives one of the two predictors, or an error."""
    predictors = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        predictor = small(32)
        predictor.set_calibration(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), seed / 10)
        predictors.append(predictor)
    folder = tmp_path / "both"
    done = threading.Event()

    def write() -> None:
        for turn in range(25):
            save_predictor(folder, predictors[turn % 2], scr=CONFIG, model=written.record["model"])
        done.set()

    save_predictor(folder, predictors[0], scr=CONFIG, model=written.record["model"])
    thread = threading.Thread(target=write)
    thread.start()
    loads = 0
    while not done.is_set():
        try:
            found = load_predictor(folder)
        except errors.PredictorError:
            continue
        expected = predictors[round(found.threshold * 10) - 1]
        assert torch.equal(found.project.weight, expected.project.weight)
        loads += 1
    thread.join()
    assert loads


# -- what never passes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["temperature", "calibration_raw", "calibration_expected"])
@pytest.mark.parametrize("threshold", [1.1, 0.0, -5.0])
def test_a_confidence_of_nan_never_passes(written: Written, damage: str, threshold: float) -> None:
    """R8: of a predictor that was loaded from nowhere, and so never checked."""
    predictor = load_predictor(written.folder)
    getattr(predictor, damage).fill_(math.nan)
    predictor.drift_limit = None
    with torch.no_grad(), SCR(written.model, predictor=predictor, mode="auto", threshold=threshold) as scr:
        written.model(**written.inputs)
    assert scr.reports[0].provider == "two-pass"
    assert "confidence nan" in str(scr.reports[0].fallback_reason)
    assert (scr.stats.fallbacks["low confidence"], scr.stats.mean_confidence) == (1, None)


def test_settings_that_do_not_fit_the_depth_are_not_taken(written: Written) -> None:
    """R6: a folder for a deeper model: ``auto`` scales the paper's settings, and says so."""
    deep = SCRConfig(num_sources=4, edit_layers=(0, 11), attention_layers=(8, 16))
    written.write_record(written.record | {"scr": deep.to_dict(), "threshold": "no"})
    assert auto_runs_two_pass(written).config == SCRConfig.for_depth(6)
    written.write_record(written.record | {"scr": deep.to_dict()})
    with pytest.raises(errors.PredictorMismatchError, match="has 6 decoder blocks"):
        SCR(written.model, predictor=written.folder, mode="one-pass")
    assert auto_runs_two_pass(written).config == SCRConfig.for_depth(6)
    with pytest.warns(RuntimeWarning, match=r"edit_layers is \[0, 2\], was \[0, 11\]"):
        SCR(written.model, predictor=written.folder, mode="one-pass", config=CONFIG)  # settings that fit


def test_a_network_of_another_width_than_its_model(written: Written, tmp_path: Path) -> None:
    """The model section fits, the network doesn't: found when the SCR is made, and not in the prefill."""
    folder = save_predictor(
        tmp_path / "q",
        SourcePredictor(PredictorConfig(16, rank=4, width=8)),
        scr=CONFIG,
        model=written.record["model"],
    )
    with pytest.raises(errors.PredictorMismatchError, match="hidden_size is 32, the predictor expects 16"):
        SCR(written.model, predictor=folder, mode="one-pass")
    with pytest.warns(RuntimeWarning, match="two-pass with the folder's settings"):
        scr = SCR(written.model, predictor=folder, mode="auto")
    with torch.no_grad(), scr:
        written.model(**written.inputs)
    assert scr.reports[0].provider == "two-pass"


def test_settings_for_another_depth_are_not_taken(written: Written) -> None:
    """Layers 0 to 2 of 6 blocks are not those of a model with 12."""
    deeper = make_tiny_llava(0, layers=12)
    for place in (written.folder, written.loaded):
        with pytest.warns(RuntimeWarning, match="the paper's settings .* scaled to 12 blocks"):
            scr = SCR(deeper, predictor=place, mode="auto")
        assert scr.config == SCRConfig.for_depth(12)
