"""Every setting of vLLM that would drop or misplace an edit: found in a made-up VllmConfig."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, describe_model, load_predictor, save_predictor
from scr_runtime.errors import ConfigurationError
from scr_runtime.vllm.hazards import MODELS, problems, refuse
from tests.conftest import make_tiny_llava
from tests.scr_runtime.folders import CONFIG

CPU = "vllm.v1.worker.cpu_worker.CPUWorker"


class Mode(SimpleNamespace):
    """One of vLLM's CUDA graph modes, by what it does with mixed batches."""

    def mixed_mode(self) -> Any:
        return SimpleNamespace(name=self.mixed)


def vllm_config(model: Any, **changes: Any) -> Any:
    """What vLLM's defaults are for a model, but for prefix caching and chunked prefill, which are off."""
    values: dict[str, Any] = {
        "model_config": {
            "hf_config": model.config, "hf_text_config": model.config.text_config, "model": "org/name",
            "enable_prompt_embeds": False,
        },
        "parallel_config": {
            "worker_cls": CPU, "pipeline_parallel_size": 1, "tensor_parallel_size": 1,
            "prefill_context_parallel_size": 1, "decode_context_parallel_size": 1, "enable_dbo": False,
            "ubatch_size": 0,
        },
        "scheduler_config": {
            "scheduler_cls": None, "enable_chunked_prefill": False, "long_prefill_token_threshold": 0,
            "max_num_scheduled_tokens": None,
        },
        "cache_config": {"enable_prefix_caching": False, "kv_sharing_fast_prefill": False},
        "compilation_config": {"cudagraph_mode": Mode(mixed="PIECEWISE"), "pass_config": SimpleNamespace()},
    }  # fmt: skip
    for place, value in changes.items():
        part, _, name = place.partition("__")
        if name:
            values[part][name] = value
    absent: dict[str, Any] = dict.fromkeys(
        ("speculative_config", "lora_config", "kv_transfer_config", "ec_transfer_config")
    )
    given = {name: value for name, value in changes.items() if "__" not in name}
    parts = {name: SimpleNamespace(**value) for name, value in values.items()}
    return SimpleNamespace(**{"use_v2_model_runner": False, **absent, **parts, **given})


def made(folder: Path, model: Any, *, question: Any = "bilinear", scr: SCRConfig = CONFIG) -> SourcePredictor:
    predictor = SourcePredictor(
        PredictorConfig(model.config.text_config.hidden_size, rank=4, width=8, question=question)
    )
    return load_predictor(save_predictor(folder, predictor, scr=scr, model=describe_model(model)))


@pytest.fixture(scope="module")
def model() -> Any:
    return make_tiny_llava(0)


@pytest.fixture(scope="module")
def asking(model: Any, tmp_path_factory: pytest.TempPathFactory) -> SourcePredictor:
    return made(tmp_path_factory.mktemp("asking"), model)


def test_the_defaults_of_these_tests_are_served(model: Any, asking: SourcePredictor) -> None:
    for name in ("PIECEWISE", "NONE"):
        config = vllm_config(model, compilation_config__cudagraph_mode=Mode(mixed=name))
        assert problems(config, asking, None, "0.32.0") == []
    refuse([], "somewhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache_config__enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        ({"scheduler_config__enable_chunked_prefill": True}, "--no-enable-chunked-prefill"),
        ({"scheduler_config__long_prefill_token_threshold": 64}, "long_prefill_token_threshold"),
        ({"scheduler_config__max_num_scheduled_tokens": 64}, "max_num_scheduled_tokens"),
        ({"scheduler_config__scheduler_cls": "mine.Scheduler"}, "scheduler_cls is 'mine.Scheduler'"),
        ({"parallel_config__worker_cls": "mine.Worker"}, "worker_cls is 'mine.Worker'"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size=1"),
        ({"compilation_config__pass_config": SimpleNamespace(enable_sp=True)}, "enable_sp=false"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size=1"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size=1"),
        ({"parallel_config__enable_dbo": True}, "dual batch overlap"),
        ({"parallel_config__ubatch_size": 2}, "dual batch overlap"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA"),
        ({"kv_transfer_config": object()}, "kv_transfer_config"),
        ({"ec_transfer_config": object()}, "ec_transfer_config"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"model_config__enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"compilation_config__cudagraph_mode": Mode(mixed="FULL")}, "cudagraph_mode FULL"),
    ],
)
def test_each_hazard_is_a_sentence(model: Any, asking: SourcePredictor, changes: dict[str, Any], words: str) -> None:
    found = problems(vllm_config(model, **changes), asking, None, "0.32.0")
    assert len(found) == 1 and words in found[0]
    with pytest.raises(ConfigurationError, match="SCR_PREDICTOR=org/p: refused"):
        refuse(found, "org/p")


def test_without_the_question_prompts_may_be_cached_and_chunked(model: Any, tmp_path: Path) -> None:
    config = vllm_config(
        model, cache_config__enable_prefix_caching=True, scheduler_config__enable_chunked_prefill=True
    )  # fmt: skip
    assert problems(config, made(tmp_path, model, question="none"), None, "0.32.0") == []


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "0.320.0", "dev"])
def test_other_versions_are_refused(model: Any, asking: SourcePredictor, version: str) -> None:
    (found,) = problems(vllm_config(model), asking, None, version)
    assert found.startswith(f"vLLM is {version}") and "0.32" in found


def test_another_model_is_refused(model: Any, asking: SourcePredictor) -> None:
    (found,) = problems(vllm_config(make_tiny_llava(0, layers=7)), asking, None, "0.32.0")
    assert "num_blocks is 7, the predictor expects 6" in found


def test_layers_beyond_the_depth_are_refused(model: Any, tmp_path: Path) -> None:
    deep = SCRConfig(num_sources=4, edit_layers=(0, 11), attention_layers=(2, 4))
    (found,) = problems(vllm_config(model), made(tmp_path, model, scr=deep), None, "0.32.0")
    assert "edit_layers ends at block 11, but the model has 6 decoder blocks" in found


def test_a_grid_without_sources_is_refused(tmp_path: Path) -> None:
    narrow = make_tiny_llava(0, side=2)
    (found,) = problems(vllm_config(narrow), made(tmp_path, narrow), None, "0.32.0")
    assert "2 x 2 patches has no patch off its border" in found


def test_another_image_back_end_is_refused_with_the_way_out(model: Any, asking: SourcePredictor) -> None:
    asking.info["model"]["image_backend"] = "CLIPImageProcessorPil"
    try:
        (found,) = problems(vllm_config(model), asking, "CLIPImageProcessor", "0.32.0")
        assert '{"backend": "pil"}' in found
        assert problems(vllm_config(model), asking, "CLIPImageProcessorPil", "0.32.0") == []
    finally:
        asking.info["model"]["image_backend"] = None


@pytest.mark.parametrize(
    ("kind", "words"), [("chameleon", "was not tried inside vLLM"), ("llama", "not one that SCR")]
)
def test_other_families_are_refused_by_name(model: Any, asking: SourcePredictor, kind: str, words: str) -> None:
    assert kind not in MODELS
    config = vllm_config(model)
    config.model_config.hf_config = SimpleNamespace(model_type=kind)
    (found,) = problems(config, asking, None, "0.32.0")
    assert words in found and repr(kind) in found
