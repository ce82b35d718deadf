"""Many clients of the OpenAI server for minutes, some of which leave early: every answer compared, all counts told.

.venv-vllm/bin/python -m tests.vllm.soak --clients 32 --minutes 4             # preemptions, no prefix cache
.venv-vllm/bin/python -m tests.vllm.soak --clients 32 --minutes 4 --cached

Chunks of 400 tokens. Preemptions come from few blocks for keys and values; not together with the prefix cache, where
vLLM 0.32 itself stops ("Encoder cache miss", docs/vllm.md). A tenth of the requests are aborted while they stream, a
tenth switch the edit off; answers have to be those of the transformers runtime, log-probabilities to 1e-3 (batches of
other sizes round differently).
"""

from __future__ import annotations

import argparse
import collections
import random
import tempfile
import threading
import time
import urllib.error
from pathlib import Path

from tests.vllm.conftest import SETTINGS
from tests.vllm.engines import MIXED, Answer, Question, Reference, write_checkpoint
from tests.vllm.test_exact import LONG
from tests.vllm.test_server import Server

QUESTIONS = [*MIXED, *LONG]
TOLERANCE = 1e-3


class Soak:
    """The server, what it should answer, and what happened."""

    def __init__(self, server: Server, expected: dict[str, list[Answer]], seconds: float) -> None:
        self.server, self.expected, self.end = server, expected, time.monotonic() + seconds
        self.counts: collections.Counter[str] = collections.Counter()
        self.worst = 0.0
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        """One client: request after request until the time is over."""
        draw = random.Random(seed)
        while time.monotonic() < self.end:
            index, kind = draw.randrange(len(QUESTIONS)), draw.random()
            try:
                happened = self.leave(QUESTIONS[index], draw) if kind < 0.1 else self.ask(index, off=kind < 0.2)
            except (OSError, urllib.error.HTTPError) as error:
                happened = f"failed: {type(error).__name__} {error}"
            with self._lock:
                self.counts[happened] += 1

    def ask(self, index: int, *, off: bool) -> str:
        """A request whose answer is compared."""
        extra = {"vllm_xargs": {"scr": "off"}} if off else {}
        made = self.server.logprobs(QUESTIONS[index], **extra)
        wanted = self.expected["off" if off else "edited"][index].logprobs
        apart = max(abs(a - b) for a, b in zip(made, wanted, strict=True))
        with self._lock:
            self.worst = max(self.worst, apart)
        return ("off" if off else "edited") + (", as expected" if apart <= TOLERANCE else ", OTHER ANSWER")

    def leave(self, question: Question, draw: random.Random) -> str:
        """A request whose client hangs up while tokens arrive."""
        with self.server.stream(question) as answer:
            for _ in range(draw.randrange(6)):
                answer.readline()
        return "aborted"


def main() -> None:
    """Prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--cached", action="store_true", help="the prefix cache, and enough blocks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "model")
        reference = Reference(checkpoint)
        predictor = reference.predictor(folder / "predictor", question="none")
        expected = {
            kind: [reference.answer(question, place) for question in QUESTIONS]
            for kind, place in (("edited", predictor), ("off", None))
        }
        tight = ("--num-gpu-blocks-override", "60", "--no-enable-prefix-caching")
        blocks = ("--num-gpu-blocks-override", "600") if options.cached else tight
        server = Server(checkpoint, predictor, folder / "server", "--max-num-batched-tokens", "400", *blocks)
        try:
            server.wait()
            soak = Soak(server, expected, 60 * options.minutes)
            clients = [threading.Thread(target=soak.client, args=(seed,)) for seed in range(options.clients)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            if server.process.poll() is not None:
                print(server.log.read_text())
            tell(soak)
        finally:
            server.close()


def tell(soak: Soak) -> None:
    """Prints what happened, and what the server counted."""
    for happened, count in sorted(soak.counts.items()):
        print(f"{count:6} {happened}")
    print(f"largest difference of a log-probability: {soak.worst:.2g}")
    time.sleep(2)
    names = ("scr_images", "scr_edits", "scr_switched_off", "scr_left_out", "scr_not_finite", "vllm:num_preemptions")
    for name in names:
        print(f"{soak.server.counter(name):8.0f} {name}")
    print(f"{soak.server.gauge('vllm:num_requests_running'):8.0f} requests still running")


if __name__ == "__main__":
    assert SETTINGS  # the environment that vLLM reads was set by importing it
    main()
