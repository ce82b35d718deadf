"""What a worker of vLLM does more: it attaches the editor to the loaded model, tests it, and counts."""
# pyright: reportMissingImports=false

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_tp_group

from scr_runtime.artifact import load_predictor
from scr_runtime.config import SCRConfig
from scr_runtime.errors import EditNotFiredError, PredictorMismatchError
from scr_runtime.families import FAMILIES
from scr_runtime.grids import ImageGrid
from scr_runtime.identity import embedding_differences, probe_of
from scr_runtime.vllm import operator
from scr_runtime.vllm.editor import Editor, EngineStats
from scr_runtime.vllm.images import GRID_KEYS, Feature, FlatImage, Grids, Part, StepImages, family_grids, images_of
from scr_runtime.vllm.metrics import publish
from scr_runtime.vllm.settings import KEY, EngineSettings, request_settings

logger = logging.getLogger("vllm.scr")  # under vLLM's, so that a server prints it


class Edits:
    """What is added to a worker of vLLM."""

    model_runner: Any
    vllm_config: Any
    rank: int

    def load_model(self, **kwargs: Any) -> None:
        """Loads the model, and attaches the editor."""
        super().load_model(**kwargs)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        self.scr = Attached(self.model_runner, self.vllm_config)

    def compile_or_warm_up_model(self) -> Any:
        """Warms up, and then refuses to serve if an edit changes nothing."""
        times = super().compile_or_warm_up_model()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
        self.scr.check()
        return times  # pyright: ignore[reportUnknownVariableType]

    def scr_stats(self) -> dict[str, Any]:
        """The counts, for ``llm.collective_rpc("scr_stats")``."""
        return self.scr.editor.stats().to_dict()


class Attached:
    """A predictor, attached to a loaded model.

    Args:
        runner: vLLM's model runner (V1), with its model.
        vllm_config: The engine's.
    """

    def __init__(self, runner: Any, vllm_config: Any) -> None:
        settings = EngineSettings(**vllm_config.additional_config[KEY])
        predictor = load_predictor(settings.predictor, runner.device, revision=settings.revision)
        model_config, model = vllm_config.model_config, runner.get_model()
        model_type = model_config.hf_config.model_type
        decoder: Any = model.get_language_model().model
        text = model_config.hf_text_config
        probe = probe_of(lambda ids: decoder.embed_tokens(ids.to(runner.device)), (text.vocab_size, text.hidden_size))
        other = embedding_differences(predictor.info["model"].get("embedding_probe"), probe)
        if other:
            raise PredictorMismatchError(f"the predictor is for another model: {other[0]}")
        config = SCRConfig.from_dict(predictor.info["scr"])
        self._predictor, self._settings, self._family = predictor, settings, FAMILIES[model_type]
        self._grids: Grids = family_grids(model_type, model_config.hf_config)
        self._sample = self._family.fixed_grid(model, {}) if self._family.fixed_grid else ImageGrid((8, 8))
        self._runner = runner
        self._static: dict[str, Any] = vllm_config.compilation_config.static_forward_context
        self._ranks: Any = get_tp_group()
        self.editor = Editor(predictor, config, settings, self._family, self._ranks.broadcast)
        self._unpublished, self._published = 0, EngineStats()
        blocks: nn.ModuleList = decoder.layers
        operator.insert(blocks, self.editor, self._static)
        self._watch(model)

    def _watch(self, model: Any) -> None:
        """Learns from the model's embedding of a step whether images are in it."""
        embed = model.embed_input_ids

        def embed_input_ids(input_ids: Any, multimodal_embeddings: Any = None, **kwargs: Any) -> Any:
            self._publish()
            if multimodal_embeddings is not None and len(multimodal_embeddings):
                self._begin(sum(len(item) for item in multimodal_embeddings))
                self._unpublished = 3  # steps: what only the device knows arrives behind the step
            else:
                self.editor.drop()
            return embed(input_ids, multimodal_embeddings=multimodal_embeddings, **kwargs)

        model.embed_input_ids = embed_input_ids

    def _begin(self, tokens: int) -> None:
        parts = self._parts()
        seen = sum(min(item.end, part.end) - max(item.start, part.computed) for part in parts for item in part.here())
        if seen != tokens:
            raise RuntimeError(f"vLLM embeds {tokens} visual tokens in this step, and SCR found {seen} of them")
        self.editor.begin(images_of(parts, self._grids, reads_question=self._settings.reads_question))

    def _publish(self) -> None:
        """Adds to the Prometheus counters what has happened since, without waiting for the device."""
        if self._unpublished and self._ranks.is_first_rank:
            self._unpublished -= 1
            now = self.editor.stats(wait=False)
            publish(now, self._published)
            self._published = now

    def _parts(self) -> list[Part]:
        """The requests of this step that have images, in the order of the batch."""
        runner, parts = self._runner, list[Part]()
        starts = runner.query_start_loc.np
        for index, request_id in enumerate(runner.input_batch.req_ids):
            request = runner.requests[request_id]
            if not request.mm_features or _behind(request.mm_features[-1].mm_position, request.num_computed_tokens):
                continue
            start, end = int(starts[index]), int(starts[index + 1])
            asked = request_settings(request.sampling_params and request.sampling_params.extra_args)
            parts.append(
                Part(start, request.num_computed_tokens, end - start, request.num_prompt_tokens,
                     [_feature(item) for item in request.mm_features], asked)
            )  # fmt: skip
        return parts

    def check(self) -> None:
        """Runs noise with an image in it, with and without the edit.

        Raises:
            EditNotFiredError: If both give the same, or an edit did not fire.
        """
        edits, changed, repeated = self._edited_noise()
        first, last = self.editor.config.edit_layers
        blocks = last - first + 1
        logger.info("self-test: %d blocks edited, states %.3g apart (%.3g unedited)", edits, changed, repeated)
        if edits != blocks or not changed > 10 * repeated + 1e-6:
            raise EditNotFiredError(
                f"the self-test of the edit failed: {edits} of {blocks} blocks were edited, and with the edit the "
                f"states behind the last block are {changed:.3g} away from those without ({repeated:.3g} between two "
                "runs without). Answers would not be edited. Set --enforce-eager, or unset SCR_PREDICTOR."
            )

    def _edited_noise(self) -> tuple[int, float, float]:
        """Edits of one run; how far its states are from an unedited run's, and those of two unedited runs."""
        runner, image = self._runner, self._sample
        rows = image.tokens + 4
        states = runner.inputs_embeds.gpu[:rows]
        noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
        settings = replace(self._settings, on_low_confidence="edit")
        trial = Editor(self._predictor, self.editor.config, settings, self._family, self._ranks.broadcast)

        def run() -> Tensor:
            states.copy_(noise)
            return runner._dummy_run(rows, force_attention=True)[0][:rows].float().clone()

        try:
            self._static[operator.OPERATOR] = trial
            first, second = run(), run()
            trial.begin(StepImages([FlatImage(image, 1, tuple(range(1 + image.tokens, rows)), None)]))
            edited = run()
        finally:
            self._static[operator.OPERATOR] = self.editor
        return trial.stats().edits, float((edited - first).abs().max()), float((second - first).abs().max())


def _behind(place: Any, position: int) -> bool:
    return position >= place.offset + place.length


def _feature(item: Any) -> Feature:
    place = item.mm_position
    data = None
    if item.modality == "image":
        data = {key: item.data[key].data for key in GRID_KEYS if item.data is not None and key in item.data}
    return Feature(place.offset, place.length, data)
