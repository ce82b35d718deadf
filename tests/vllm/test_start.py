"""What stops the start of an engine: refused settings, other weights, an edit that does not fire."""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scr_runtime import SCRConfig
from scr_runtime.errors import ConfigurationError, EditNotFiredError, PredictorMismatchError, PredictorNotFoundError
from tests.vllm.engines import Reference, engine

DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
WHOLE = {"enable_prefix_caching": False, "enable_chunked_prefill": False}


@pytest.fixture
def folder(reference: Reference, engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    engines.close()
    made = reference.predictor(tmp_path / "predictor", question="bilinear")
    monkeypatch.setenv("SCR_PREDICTOR", str(made))
    return made


def test_every_reason_is_told(checkpoint: Path, folder: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        engine(checkpoint, enable_lora=True)
    for words in ("--no-enable-prefix-caching", "--no-enable-chunked-prefill", "LoRA"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative",
        ),
        ({"mm_processor_kwargs": {"backend": "pil"}}, "image_backend"),
    ],
)
def test_a_setting_of_vllm_is_refused(checkpoint: Path, folder: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        engine(checkpoint, **WHOLE, **settings)


def test_a_step_that_can_not_hold_an_image_is_refused(checkpoint: Path, reference: Reference, folder: Path) -> None:
    reference.predictor(folder, question="none")
    with pytest.raises(ValueError, match="larger than max_num_batched_tokens"):
        engine(checkpoint, max_num_batched_tokens=100, max_model_len=400)


def test_the_other_image_back_end_can_be_had(
    checkpoint: Path, reference: Reference, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    given = folder / "config.json"
    made = json.loads(given.read_text())
    assert made["model"]["image_backend"] == "CLIPImageProcessor"
    reference.predictor(folder, question="bilinear", image_backend="CLIPImageProcessorPil")
    arguments = EngineArgs(str(checkpoint), dtype="float32", **WHOLE, mm_processor_kwargs={"backend": "pil"})
    assert arguments.create_engine_config().additional_config["scr"]["predictor"] == str(folder)


def test_a_predictor_that_is_not_there_stops_the_start(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCR_PREDICTOR", "/nowhere/at/all")
    with pytest.raises(PredictorNotFoundError):
        engine(checkpoint, **WHOLE)


def test_other_weights_of_the_same_model_stop_the_start(checkpoint: Path, reference: Reference, folder: Path) -> None:
    table = reference.model.get_input_embeddings().weight
    former = table.detach().clone()
    try:
        table.data.mul_(1.5)
        reference.predictor(folder, question="bilinear")
    finally:
        table.data.copy_(former)
    with pytest.raises(PredictorMismatchError, match="these are other weights"):
        engine(checkpoint, **WHOLE)


def test_an_edit_that_does_not_fire_stops_the_start(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scr_runtime.vllm import operator

    monkeypatch.setattr(operator, "_hook", lambda layer: lambda *args: None)  # as a compiler drops it
    with pytest.raises(EditNotFiredError, match="0 of 6 blocks were edited"):
        engine(checkpoint, **WHOLE)


def test_an_edit_that_changes_nothing_stops_the_start(checkpoint: Path, reference: Reference, folder: Path) -> None:
    config = SCRConfig(num_sources=16, strength=1.0, edit_layers=(0, 5), attention_layers=(2, 4))
    reference.predictor(folder, question="bilinear", config=config)
    with pytest.raises(EditNotFiredError, match="self-test"):
        engine(checkpoint, **WHOLE)
