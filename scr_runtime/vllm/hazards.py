"""What would drop or misplace an edit inside vLLM: found before anything is loaded, and refused with a sentence each.

This is the one place that knows vLLM's settings. It reads a ``VllmConfig`` and imports nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from scr_runtime.checks import check_grid
from scr_runtime.config import SCRConfig
from scr_runtime.errors import ConfigurationError
from scr_runtime.families import FAMILIES
from scr_runtime.identity import fact_differences
from scr_runtime.network import SourcePredictor

VERSIONS = ("0.32",)
"""Of vLLM, major and minor: those that tests/vllm has run with."""

MODELS = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")
"""Model types that tests/vllm compares with the transformers runtime."""

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "scr_runtime.vllm.cpu_worker.CPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "scr_runtime.vllm.gpu_worker.GPUWorker",
}
"""vLLM's workers and what takes their place."""


def problems(config: Any, predictor: SourcePredictor, image_backend: str | None, version: str) -> list[str]:
    """What speaks against serving with a predictor, a sentence each, with the way out.

    Args:
        config: The engine's ``VllmConfig``.
        predictor: As it was loaded.
        image_backend: Class of the image processor that vLLM uses; ``None`` if it is not known.
        version: vLLM's.
    """
    return [
        *_version(version),
        *_model(config.model_config, predictor, image_backend),
        *_parallel(config.parallel_config),
        *_features(config),
        *_graphs(config.compilation_config),
        *_prefill(config, predictor),
    ]


def _version(version: str) -> Iterator[str]:
    if not version.startswith(tuple(f"{known}." for known in VERSIONS)):
        yield f"vLLM is {version}; this plug-in was tested with {', '.join(VERSIONS)} and knows no other inside"


def found_facts(model_config: Any, image_backend: str | None) -> dict[str, Any]:
    """What a model is, as ``describe_model`` says it, from its configuration alone."""
    hf_config, text = model_config.hf_config, model_config.hf_text_config
    return {
        "name": model_config.model,
        "revision": getattr(hf_config, "_commit_hash", None),
        "family": hf_config.model_type,
        "hidden_size": text.hidden_size,
        "num_blocks": text.num_hidden_layers,
        "image_backend": image_backend,
        "embedding_probe": None,  # compared when the weights are there
    }


def _model(model_config: Any, predictor: SourcePredictor, image_backend: str | None) -> Iterator[str]:
    facts = found_facts(model_config, image_backend)
    if facts["family"] not in MODELS:
        known = "is not one that SCR knows" if facts["family"] not in FAMILIES else "was not tried inside vLLM"
        yield f"model_type {facts['family']!r} {known}; tested inside vLLM: {', '.join(MODELS)}"
        return
    differences = fact_differences(predictor.info["model"], facts)
    if differences:
        yield "the predictor is for another model: " + "; ".join(differences) + _backend_hint(differences)
        return
    settings = SCRConfig.from_dict(predictor.info["scr"])
    try:
        settings.check_depth(facts["num_blocks"])
    except ConfigurationError as error:
        yield str(error)
    try:
        check_grid(SimpleNamespace(config=model_config.hf_config), FAMILIES[facts["family"]], settings)
    except ConfigurationError as error:
        yield str(error)


def _backend_hint(differences: list[str]) -> str:
    if not any(line.startswith("image_backend") for line in differences):
        return ""
    return (
        '. Images are resized otherwise by another back end: --mm-processor-kwargs \'{"backend": "pil"}\' (or '
        '"torchvision") makes vLLM use the one that the predictor was fitted with'
    )


def _parallel(parallel: Any) -> Iterator[str]:
    if parallel.worker_cls not in WORKERS:
        yield f"worker_cls is {parallel.worker_cls!r}: SCR takes the place of {sorted(WORKERS)} only. Leave it out"
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism: only the first rank knows where images are. Set pipeline_parallel_size=1"
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name) > 1:
            yield f"context parallelism spreads a prompt's tokens over ranks. Set {name}=1"
    if parallel.enable_dbo or parallel.ubatch_size > 0:
        yield "dual batch overlap splits a step in two, and images are found in whole steps. Leave enable_dbo out"


def _features(config: Any) -> Iterator[str]:
    absent = {
        "speculative_config": "speculative decoding was not tried, and drafts are tokens of no prompt",
        "lora_config": "LoRA adapters change the states that the predictor reads",
        "kv_transfer_config": "keys and values from elsewhere may end inside an image, or be another setting's",
        "ec_transfer_config": "encoded images from elsewhere were not tried",
    }
    for name, why in absent.items():
        if getattr(config, name) is not None:
            yield f"{why}. Leave {name} out"
    if config.use_v2_model_runner:
        yield "vLLM's model runner V2 was not tried. Set VLLM_USE_V2_MODEL_RUNNER=0"
    if config.scheduler_config.scheduler_cls is not None:
        yield f"scheduler_cls is {config.scheduler_config.scheduler_cls!r}: SCR brings a scheduler. Leave it out"
    if config.cache_config.kv_sharing_fast_prefill:
        yield "kv_sharing_fast_prefill leaves tokens out of later blocks. Leave it out"
    if config.model_config.enable_prompt_embeds:
        yield "enable_prompt_embeds: images in embeddings can't be seen. Leave it out"


def _graphs(compilation: Any) -> Iterator[str]:
    if getattr(compilation.pass_config, "enable_sp", False):
        yield "sequence parallelism spreads a step's rows over ranks. Set enable_sp=false in pass_config"
    mode = compilation.cudagraph_mode
    if mode is not None and mode.mixed_mode().name == "FULL":
        yield (
            "cudagraph_mode FULL replays prefills without the edit. Set it to FULL_AND_PIECEWISE, PIECEWISE, "
            "FULL_DECODE_ONLY or NONE"
        )


def _prefill(config: Any, predictor: SourcePredictor) -> Iterator[str]:
    if config.scheduler_config.long_prefill_token_threshold > 0:
        yield "long_prefill_token_threshold: a prompt waits for ever if its image is larger. Set it to 0"
    if config.scheduler_config.max_num_scheduled_tokens is not None:
        yield "max_num_scheduled_tokens: a prompt waits for ever if its image is larger. Leave it out"
    if not predictor.config.reads_question:
        return
    way_out = "or fit a predictor that does not read it (predictor.question=none)"
    if config.cache_config.enable_prefix_caching:
        yield (
            "this predictor reads the question, and the prefix cache would give the edit for one question to another. "
            f"Set --no-enable-prefix-caching, {way_out}"
        )
    if config.scheduler_config.enable_chunked_prefill:
        yield (
            "this predictor reads the question, and a chunked prefill may end before it. Set "
            f"--no-enable-chunked-prefill, {way_out}"
        )


def refuse(found: list[str], place: Mapping[str, Any] | str) -> None:
    """Raises if there is a problem.

    Args:
        found: What ``problems`` found.
        place: The predictor's.

    Raises:
        ConfigurationError: That lists them all.
    """
    if found:
        raise ConfigurationError(f"SCR_PREDICTOR={place}: refused.\n- " + "\n- ".join(found))
