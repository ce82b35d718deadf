"""The entry point: with SCR_PREDICTOR set, every VllmConfig is checked, and made one that edits."""
# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

from scr_runtime.errors import ConfigurationError
from scr_runtime.vllm.settings import KEY, EngineSettings, request_settings

logger = logging.getLogger("vllm.scr")  # under vLLM's logger, so that a server prints it


def register() -> None:
    """Called by vLLM when it starts, in each of its processes. Without SCR_PREDICTOR it does nothing."""
    settings = EngineSettings.from_environment()
    if settings is None:
        return
    arguments: Any = importlib.import_module("vllm.engine.arg_utils").EngineArgs
    inputs: Any = importlib.import_module("vllm.v1.engine.input_processor").InputProcessor
    if not hasattr(arguments.create_engine_config, "__wrapped__"):
        arguments.create_engine_config = _prepared(arguments.create_engine_config)
        inputs.process_inputs = _validated(inputs.process_inputs)


def _prepared(create: Any) -> Any:
    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        settings = EngineSettings.from_environment()
        if settings is not None:
            prepare(config, settings)
        return config

    return create_engine_config


def _validated(process: Any) -> Any:
    @functools.wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            request_settings(getattr(params, "extra_args", None))
        except ConfigurationError as error:  # vLLM's own error, for which its server answers 400
            _forget_images(self.renderer.mm_processor_cache, prompt)
            raise importlib.import_module("vllm.exceptions").VLLMValidationError(str(error)) from None
        return process(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs


def _forget_images(cache: Any, prompt: Any) -> None:
    """Lets the images of a refused prompt be sent again: vLLM believes that the engine has them by now."""
    given: Any = prompt.get("mm_hashes") if isinstance(prompt, dict) else None  # pyright: ignore[reportUnknownMemberType]
    if cache is None or not given:
        return
    for item in (item for hashes in given.values() for item in hashes):
        cache.invalidate(item)


def prepare(config: Any, settings: EngineSettings) -> None:
    """Checks a ``VllmConfig``, and puts SCR's worker, scheduler and operator into it.

    Args:
        config: As vLLM made it; changed in place.
        settings: The engine's.

    Raises:
        ConfigurationError: If SCR can't serve with it; lists every reason.
        PredictorError: If the predictor can't be loaded.
    """
    from scr_runtime.artifact import load_predictor
    from scr_runtime.vllm.hazards import WORKERS, problems, refuse

    predictor = load_predictor(settings.predictor, revision=settings.revision)
    version: str = importlib.import_module("vllm").__version__
    refuse(problems(config, predictor, _image_backend(config.model_config), version), settings.predictor)
    sealed = settings.sealed(predictor.info, reads_question=predictor.config.reads_question)
    config.additional_config = {**config.additional_config, KEY: sealed.to_dict()}  # also in the compile cache's key
    config.parallel_config.worker_cls = WORKERS[config.parallel_config.worker_cls]
    name = "WholeImagesAsyncScheduler" if config.scheduler_config.async_scheduling else "WholeImagesScheduler"
    config.scheduler_config.scheduler_cls = f"scr_runtime.vllm.scheduler.{name}"
    config.scheduler_config.disable_chunked_mm_input = True  # vLLM then checks that a step can hold an image
    if config.compilation_config.splitting_ops:
        config.compilation_config.splitting_ops.append("vllm::scr_edit")
    logger.info("one-pass SCR with %r, %s", predictor, sealed)


def _image_backend(model_config: Any) -> str | None:
    """Class of the image processor that vLLM will use."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    if not model_config.is_multimodal_model:
        return None
    processor = MULTIMODAL_REGISTRY.create_processor(model_config).info.get_hf_processor()
    return type(processor.image_processor).__name__
