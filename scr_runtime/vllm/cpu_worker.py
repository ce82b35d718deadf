"""The worker for CPUs, in a file of its own: what it is made from can't be imported everywhere."""
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

from vllm.v1.worker import cpu_worker

from scr_runtime.vllm.worker import Edits


class CPUWorker(Edits, cpu_worker.CPUWorker):
    """``CPUWorker``, which edits."""
