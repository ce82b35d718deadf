"""The worker for GPUs, in a file of its own: what it is made from can't be imported everywhere."""
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

from vllm.v1.worker import gpu_worker

from scr_runtime.vllm.worker import Edits


class GPUWorker(Edits, gpu_worker.Worker):
    """``Worker``, which edits."""
