"""The server under many clients, some of them bad; and what each mode costs through it.

python -m benchmarks.serving soak --clients 50 --minutes 5
python -m benchmarks.serving speed --rounds 30
python -m benchmarks.serving speed --predictor runs/predictors/scene-llava

Both start `python -m scr_runtime.serve` with the embedded model in a process of its own, and ask it by the official
client. Without --predictor it has one that was never fitted, which costs the same.

soak: most requests are answered in some mode, streamed or not; the others are broken or too large images, unknown
fields, bodies that are too large, and clients that go away in the queue or in the middle of an answer. It ends with
counts and the server's memory, and with exit code 1 if anything came that should not: another status, no answer, an
answer cut short, an end of the server.

speed: one client; the modes take turns within each round. Times are a clock's; on a busy machine the processor time
that an answer took of the server, on one thread, says more. Answers have 12 tokens at most.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("what", choices=("soak", "speed"))
PARSER.add_argument("--clients", type=int, default=50)
PARSER.add_argument("--minutes", type=float, default=5.0)
PARSER.add_argument("--rounds", type=int, default=30)
PARSER.add_argument("--predictor", type=Path, help="a fitted one; otherwise one is made")
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import openai
import psutil
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from evaluation.tables import table
from scenes import CHECKPOINT
from scenes.world import render_scene
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, describe_model, save_predictor

MODES: dict[str, dict[str, Any]] = {
    "off": {"mode": "off"},
    "one-pass": {"mode": "one-pass"},
    "two-pass": {"mode": "two-pass"},
    "auto, no fallback": {"mode": "auto", "threshold": 0.0},
    "auto, all fall back": {"mode": "auto", "threshold": 1.0},
}
BAD = ("broken", "too many pixels", "unknown field", "body too large", "leaves at once", "leaves the stream")
EXPECTED = {"broken": 400, "too many pixels": 413, "unknown field": 400, "body too large": 413}


def main() -> int:
    """Runs one of the two."""
    options = PARSER.parse_args()
    with tempfile.TemporaryDirectory() as place:
        predictor = options.predictor or unfitted(Path(place) / "predictor")
        with serving(predictor) as (address, process):
            if options.what == "speed":
                return speed(address, process, options.rounds)
            return Soak(address, process).run(options.clients, options.minutes)


def unfitted(folder: Path) -> Path:
    """A predictor of the embedded model with random weights."""
    model: Any = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    torch.manual_seed(0)
    predictor = SourcePredictor(PredictorConfig(model.config.get_text_config().hidden_size)).eval()
    scr = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    return save_predictor(folder, predictor, scr=scr, model=describe_model(model, processor))


@contextmanager
def serving(predictor: Path) -> Generator[tuple[str, psutil.Process]]:
    """The server's address and its process."""
    command = [
        sys.executable,
        "-m",
        "scr_runtime.serve",
        f"model={CHECKPOINT}",
        "name=scene",
        f"predictor={predictor}",
    ]
    with tempfile.TemporaryFile("w+") as log:
        command += ["port=0", "queue=32"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            while True:
                time.sleep(0.2)
                log.seek(0)
                ready = [line for line in log if " ready: " in line]
                if ready or child.poll() is not None:
                    break
            if not ready:
                raise RuntimeError("the server did not start")
            yield ready[0].partition(" ready: ")[2].split()[0], psutil.Process(child.pid)
        finally:
            child.terminate()
            print(f"told to end, the server ended with {child.wait(60)}")


def image(number: int) -> bytes:
    """A scene, as PNG."""
    stream = io.BytesIO()
    Image.fromarray(render_scene(0, "val", number).image).save(stream, "PNG")
    return stream.getvalue()


def messages(content: bytes, text: str = "Describe the image.") -> Any:
    """One turn about one image."""
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


class Soak:
    """Many clients at once, and what they got.

    Args:
        address: Of the server.
        process: The server's.
    """

    def __init__(self, address: str, process: psutil.Process) -> None:
        self._address, self._process = address, process
        self._good = [image(number) for number in range(8)]
        stream = io.BytesIO()
        Image.new("1", (9000, 9000)).save(stream, "PNG")
        self._huge = stream.getvalue()
        self.counts: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self._lock = threading.Lock()

    def run(self, clients: int, minutes: float) -> int:
        """Prints counts and memory; 1 if anything was wrong."""
        end = time.monotonic() + 60 * minutes
        threads = [threading.Thread(target=self._client, args=(number, end)) for number in range(clients)]
        for thread in threads:
            thread.start()
        sizes: list[float] = []
        while time.monotonic() < end:
            time.sleep(min(60 * minutes / 10, max(end - time.monotonic(), 0)))
            sizes.append(self._process.memory_info().rss / 1e6)
        for thread in threads:
            thread.join(180)
        stuck = sum(thread.is_alive() for thread in threads)
        with openai.OpenAI(base_url=self._address, api_key="-") as client:
            self._ask(client, "answered", random.Random(0))  # it still serves
        print(
            f"{clients} clients, {minutes:g} minutes, seed 0 to {clients - 1}: {sum(self.counts.values()):,} requests"
        )
        print("\n".join(f"{count:8,} {name}" for name, count in self.counts.most_common()))
        print(f"memory at each tenth, MB: {' '.join(f'{size:.0f}' for size in sizes)}")
        print(f"clients that hang: {stuck}; unexpected: {dict(self.wrong) or 'nothing'}")
        return int(bool(stuck or self.wrong))

    def _client(self, seed: int, end: float) -> None:
        draw = random.Random(seed)
        with openai.OpenAI(base_url=self._address, api_key="-", max_retries=0) as client:
            while time.monotonic() < end:
                self.one(client, draw.choice(BAD) if draw.random() < 0.3 else "answered", draw)

    def one(self, client: openai.OpenAI, kind: str, draw: random.Random) -> None:
        """Sends one request, and counts what came of it."""
        try:
            got = self._ask(client, kind, draw)
        except openai.RateLimitError as error:
            got = "429"
            time.sleep(min(float(error.response.headers["retry-after"]), 5))
        except openai.APIStatusError as error:
            got = kind if EXPECTED.get(kind) == error.status_code else f"{kind}: {error.status_code}"
        except Exception as error:  # whatever else a client can see is counted as unexpected
            got = f"{kind}: {type(error).__name__}: {error}"
        with self._lock:
            (self.counts if got in (*BAD, "answered", "429") else self.wrong)[got] += 1

    def _ask(self, client: openai.OpenAI, kind: str, draw: random.Random) -> str:
        content, extra, text = draw.choice(self._good), {}, "Describe the image."
        if kind == "broken":
            content = content[: draw.randrange(len(content) - 20)]
        elif kind == "too many pixels":
            content = self._huge
        elif kind == "unknown field":
            extra = {"strength": 2}
        elif kind == "body too large":
            text = "x" * 21_000_000
        scr = draw.choice(list(MODES.values())) | extra
        given: Any = {"model": "scene", "messages": messages(content, text), "extra_body": {"scr": scr}}
        streamed = kind == "leaves the stream" or draw.random() < 0.5
        patience = draw.uniform(0.05, 0.5) if kind == "leaves at once" else 170.0
        try:
            answer: Any = client.with_options(timeout=patience).chat.completions.create(**given, stream=streamed)
            finish = _finish(answer, kind) if streamed else answer.choices[0].finish_reason
        except openai.APITimeoutError:
            if kind == "leaves at once":
                return kind
            raise
        if kind in ("leaves at once", "leaves the stream"):
            return kind
        return kind if finish in ("stop", "length") else f"{kind}: ended with {finish}"


def _finish(events: Any, kind: str) -> str | None:
    """Reads a stream to its end, or leaves it after two words."""
    last = None
    for number, event in enumerate(events):
        last = event.choices[0].finish_reason
        if kind == "leaves the stream" and number == 2:
            events.close()
            return "left"
    return last


def speed(address: str, process: psutil.Process, rounds: int) -> int:
    """Prints time to the first words and to the end for each mode, and what it cost the server's processor."""
    first: dict[str, list[float]] = {name: [] for name in MODES}
    whole: dict[str, list[float]] = {name: [] for name in MODES}
    spent: Counter[str] = Counter()
    words: Counter[str] = Counter()
    with openai.OpenAI(base_url=address, api_key="-", max_retries=0) as client:
        for number in range(-2, rounds):  # two to warm up
            asked = messages(image(number % 50))
            for name, scr in MODES.items():
                begun, busy = time.perf_counter(), sum(process.cpu_times()[:2])
                events: Any = client.chat.completions.create(
                    model="scene", messages=asked, stream=True, max_tokens=12, temperature=0, extra_body={"scr": scr}
                )
                times = [time.perf_counter() - begun for event in events if event.choices[0].delta.content]
                if number >= 0:
                    first[name].append(1000 * times[0])
                    whole[name].append(1000 * (time.perf_counter() - begun))
                    spent[name] += round(1000 * (sum(process.cpu_times()[:2]) - busy))
                    words[name] += len(times)
    rows = [["mode", "first words, ms", "quartiles", "answer, ms", "answers/s", "words/s", "processor, ms", "to off"]]
    for name in MODES:
        low, middle, high = statistics.quantiles(first[name], n=4)
        seconds = sum(whole[name]) / 1000
        rows.append([name, f"{middle:.0f}", f"{low:.0f} - {high:.0f}", f"{statistics.median(whole[name]):.0f}",
                     f"{rounds / seconds:.1f}", f"{words[name] / seconds:.0f}", f"{spent[name] / rounds:.0f}",
                     f"{spent[name] / spent['off']:.2f}"])  # fmt: skip
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
