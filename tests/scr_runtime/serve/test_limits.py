"""Bounds in number, size and time; clients that go away; errors of the model."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import anyio
import openai
import PIL.Image
import pytest
from PIL import Image, PngImagePlugin

from tests.scr_runtime.serve.conftest import PATIENCE, QUESTION, Gate, Serve, Served, data_url, picture, turn


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixel."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    parts = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in (chunk, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def text_bomb() -> bytes:
    """A PNG whose comment unpacks to 100 MB."""
    stream, comment = io.BytesIO(), PngImagePlugin.PngInfo()
    comment.add_text("comment", "a" * 100_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(stream, "PNG", pnginfo=comment)
    return stream.getvalue()


def cut(kind: str) -> bytes:
    stream = io.BytesIO()
    picture().resize((400, 400)).save(stream, kind)
    return stream.getvalue()[: len(stream.getvalue()) // 2]


@contextmanager
def held(served: Served, *, stream: bool = False) -> Iterator[Gate]:
    """A request whose generation is held in the middle, until the end of the block."""
    gate = served.engine.gate = Gate()
    caller = threading.Thread(target=lambda: list(served.ask(stream=True)) if stream else served.ask())
    caller.start()
    try:
        assert gate.reached.acquire(timeout=PATIENCE)
        yield gate
    finally:
        served.engine.gate = None
        gate.open.set()
        caller.join(PATIENCE)
        assert not caller.is_alive()


def raw(served: Served, body: bytes, *, length: int | None = None) -> socket.socket:
    """A connection on which a request was sent."""
    host, port = served.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def asked(**more: Any) -> bytes:
    return json.dumps({"model": "scene-llava", "messages": [turn(QUESTION, data_url(picture()))]} | more).encode()


def counted(served: Served, line: str) -> float:
    text = served.service.metrics.text().decode()
    return next((float(found.split()[-1]) for found in text.splitlines() if found.startswith(line)), 0.0)


def test_a_full_queue_refuses_with_a_time_to_come_again(serve: Serve) -> None:
    with serve(queue=3) as served, ThreadPoolExecutor(2) as pool:
        with held(served):
            waiting = [pool.submit(served.ask) for _ in range(2)]
            while served.service._waiting < 2:
                time.sleep(0.002)
            assert counted(served, "scr_queue_length") == 2
            with pytest.raises(openai.RateLimitError, match="3 requests are being served or wait") as caught:
                served.ask()
            assert int(caught.value.response.headers["retry-after"]) >= 1
        assert all(one.result(PATIENCE).choices[0].finish_reason == "stop" for one in waiting)
        served.idle()
        assert served.ask(max_tokens=1).usage.completion_tokens == 1
        assert counted(served, 'scr_refused_total{code="queue_full"}') == 1
        assert counted(served, "scr_queue_length") == 0


def test_a_large_body_is_refused_however_it_comes(serve: Serve) -> None:
    with serve(max_body_mb=0.1) as served:
        with pytest.raises(openai.APIStatusError, match=r"a request has 0\.1 MB at most") as caught:
            served.ask("x" * 200_000)
        assert caught.value.status_code == 413

        def chunks() -> Iterator[bytes]:
            for _ in range(30):
                yield b" " * 10_000

        with pytest.raises(openai.APIStatusError) as caught:
            served.client.post("/chat/completions", cast_to=object, content=chunks())
        assert caught.value.status_code == 413
        served.idle()
        assert served.ask(max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize("sizes", [[(9000, 9000)], [(5000, 5000), (5000, 5000)]])
def test_pixels_are_counted_in_headers_before_anything_is_decoded(served: Served, sizes: Any) -> None:
    urls = [data_url(png_header(*size)) for size in sizes]  # to decode them would be a 400: there are no pixels
    with pytest.raises(openai.APIStatusError, match="million pixels") as caught:
        served.ask("x", *urls)
    assert caught.value.status_code == 413 and "the most is 40" in caught.value.message


def test_images_are_counted(served: Served) -> None:
    with pytest.raises(openai.APIStatusError, match="8 images at most") as caught:
        served.ask("x", *["data:image/png;base64,"] * 9)
    assert caught.value.status_code == 413


def test_an_image_that_the_processor_refuses_is_the_clients_fault(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("absolute aspect ratio must be smaller than 200")

    with monkeypatch.context() as patch:  # as Qwen's processors do
        patch.setattr(type(served.engine._processor), "__call__", refuse)
        with pytest.raises(openai.BadRequestError, match="takes no such messages: absolute aspect ratio"):
            served.ask()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png_header(60_000, 60_000), "decompression bomb"),
        (text_bomb(), "can't be read as PNG"),
        (b"", "can't be read as PNG, JPEG, WEBP, GIF"),
        (b"no picture", "can't be read as PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "can't be read as PNG"),
        (cut("PNG"), "broken or cut short"),
        (cut("JPEG"), "broken or cut short"),
        (cut("WEBP"), "can"),
        (png_header(64, 64), "broken or cut short"),
    ],
    ids=["bomb", "text-bomb", "empty", "text", "postscript", "png", "jpeg", "webp", "hollow"],
)  # fmt: skip
def test_bombs_and_broken_images_are_refused(served: Served, content: bytes, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        served.ask("x", data_url(content))


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,A", "data:image/png,abc", "data:;base64,\u00e4", "data:", "", "image.png"]
)
def test_a_url_that_is_no_data_url_is_refused(served: Served, url: str) -> None:
    with pytest.raises(openai.BadRequestError):
        served.ask("x", url)


def test_long_texts_are_refused(serve: Serve) -> None:
    with serve(max_characters=50) as served, pytest.raises(openai.APIStatusError, match="the most is 50") as caught:
        served.ask("x" * 51)
    assert caught.value.status_code == 413


@pytest.mark.parametrize("stream", [False, True])
def test_when_its_time_is_over_the_model_stops(serve: Serve, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[tuple[asyncio.AbstractEventLoop, anyio.CancelScope, float]] = []

    def deadline(seconds: float) -> anyio.CancelScope:
        scope = anyio.CancelScope()
        deadlines.append((asyncio.get_running_loop(), scope, seconds))
        return scope

    with serve(timeout=77) as served, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(anyio, "move_on_after", deadline)  # the test says when it is over
        gate = served.engine.gate = Gate()
        answer = pool.submit(lambda: list(served.ask(stream=True)) if stream else served.ask())
        assert gate.reached.acquire(timeout=PATIENCE)
        loop, scope, seconds = deadlines[0]
        loop.call_soon_threadsafe(scope.cancel)
        with pytest.raises(openai.APIError, match="not answered within 77 seconds") as caught:
            answer.result(PATIENCE)
        assert isinstance(caught.value, openai.InternalServerError) is not stream and seconds == 77
        served.idle()
        assert gate.stopped == 1
        served.engine.gate = None
        assert served.ask(max_tokens=1).usage.completion_tokens == 1
        assert counted(served, 'scr_requests_total{status="504"}') == 1


def test_a_body_that_never_comes_is_given_up(serve: Serve) -> None:
    with serve(timeout=0.3, queue=1) as served, raw(served, b"{", length=1000) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 504")
        served.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_the_model_and_frees_its_slot(served: Served, stream: bool) -> None:
    gone = counted(served, 'scr_requests_total{status="499"}')
    gate = served.engine.gate = Gate()
    connection = raw(served, asked(stream=stream))
    assert gate.reached.acquire(timeout=PATIENCE)
    if stream:
        assert b"200 OK" in connection.recv(1000)
    connection.close()
    served.idle()
    served.engine.gate = None
    assert gate.stopped == 1
    assert served.ask(max_tokens=1).usage.completion_tokens == 1
    assert counted(served, 'scr_requests_total{status="499"}') == gone + 1


def test_a_client_that_goes_away_in_the_queue_is_never_answered(served: Served) -> None:
    with held(served, stream=True) as gate:
        connection = raw(served, asked())
        while served.service._waiting == 0:
            time.sleep(0.002)
        connection.close()
        while served.service._waiting:
            time.sleep(0.002)
        images = counted(served, "scr_prefill_seconds_count")
    served.idle()
    assert gate.stopped == 0 and counted(served, 'scr_prefill_seconds_count{mode="auto"}') == images + 1


def test_a_client_that_goes_away_within_its_body_frees_its_slot(served: Served) -> None:
    with raw(served, b"{", length=1000):
        while served.service._admitted == 0:
            time.sleep(0.002)
    served.idle()


def test_a_stream_that_the_client_closes_stops_the_model(served: Served) -> None:
    gate = served.engine.gate = Gate()
    events = served.ask(stream=True)
    next(iter(events))
    assert gate.reached.acquire(timeout=PATIENCE)
    events.close()
    served.idle()
    served.engine.gate = None
    assert gate.stopped == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_model_is_a_500_with_an_id_and_no_end(
    served: Served, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    served.engine.fails = FloatingPointError("secret path /srv/weights")
    with pytest.raises(openai.InternalServerError, match=r"FloatingPointError.*request id [0-9a-f]{32}") as caught:
        served.ask(stream=stream)
    served.engine.fails = None
    name = caught.value.response.headers["x-request-id"]
    assert name in str(caught.value) and "secret" not in str(caught.value)
    assert f"request {name} failed" in caplog.text and "secret path" in caplog.text
    assert served.ask(max_tokens=1).usage.completion_tokens == 1


def test_an_error_in_the_middle_of_a_stream_ends_it_with_an_error(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = served.engine.gate = Gate()
    events = served.ask(stream=True)
    assert gate.reached.acquire(timeout=PATIENCE)
    with monkeypatch.context() as patch:
        patch.setattr("scr_runtime.serve.engine._Streamer.put", lambda *_: 1 / 0)
        gate.open.set()
        with pytest.raises(openai.APIError, match="ZeroDivisionError"):
            list(events)
        served.idle()
    served.engine.gate = None
    assert served.ask(max_tokens=1).usage.completion_tokens == 1


def test_pillow_is_asked_for_four_formats_alone() -> None:
    from scr_runtime.serve.pictures import FORMATS

    PIL.Image.init()
    assert set(FORMATS) == {"PNG", "JPEG", "WEBP", "GIF"} < set(PIL.Image.ID)
