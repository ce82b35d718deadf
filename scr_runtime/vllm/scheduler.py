"""vLLM's schedulers, with whole images in every chunk and behind every prefix hit."""
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from scr_runtime.vllm.chunks import chunk_end, hit_end
from scr_runtime.vllm.settings import KEY, request_settings


def _spans(request: Any) -> list[tuple[int, int]]:
    places = [feature.mm_position for feature in request.mm_features]
    return [(place.offset, place.offset + place.length) for place in places]


class _WholeImages(Scheduler):
    """What is added to a scheduler of vLLM."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._one_piece: bool = vllm_config.additional_config[KEY]["reads_question"]

    def add_request(self, request: Any) -> None:
        """Keeps cached blocks of requests with settings of their own apart from all others."""
        own = request_settings(request.sampling_params and request.sampling_params.extra_args)
        if own.salt is not None and request.has_encoder_inputs and request.request_id not in self.requests:
            request.cache_salt = f"{request.cache_salt or ''}/{own.salt}"
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)

    def _get_local_prefix_cache_hit(self, request: Any) -> tuple[Any, int, int, bool]:
        blocks, hit, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        end = hit_end(hit, _spans(request), self.block_size)
        if end < hit:
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, end)
        return blocks, end, boundary, diverged

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        end = chunk_end(num_computed_tokens + num_new_tokens, _spans(request))
        wanted = max(end - num_computed_tokens, 0)
        found = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, wanted, encoder_compute_budget, shift_computed_tokens
        )
        if self._one_piece and found[1] < num_new_tokens:
            return [], 0, encoder_compute_budget, [], []  # the encoder's budget is spent: in the next step
        return found


class WholeImagesScheduler(_WholeImages):
    """``Scheduler``."""


class WholeImagesAsyncScheduler(_WholeImages, AsyncScheduler):
    """``AsyncScheduler``."""
