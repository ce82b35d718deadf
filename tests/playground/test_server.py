from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from PIL import Image

from playground import server
from playground.server import Place, RefusedError, decode
from tests.playground.test_engine import ask


def request(address: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    call = urllib.request.Request(f"{address}/{path}", data=body, headers=headers)
    try:
        with urllib.request.urlopen(call) as reply:
            content, status = reply.read(), reply.status
    except urllib.error.HTTPError as error:
        with error:
            content, status = error.read(), error.code
    return status, json.loads(content) if content[:1] in (b"{", b"[") else content


def png(width: int = 40, height: int = 30) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "PNG")
    return stream.getvalue()


def test_a_dropped_picture_is_shown_as_the_model_sees_it_and_asked_about(address: str):
    status, kept = request(address, "upload?name=my cat.png".replace(" ", "%20"), png())
    assert status == 200 and kept["picture"].endswith(":my cat.png")
    status, view = request(address, f"view/{kept['picture']}".replace(" ", "%20"))
    assert status == 200 and Image.open(io.BytesIO(view)).size == (96, 96)
    status, screen = request(address, "look", ask(picture=kept["picture"]).model_dump_json().encode())
    assert status == 200 and len(screen["answers"]) == 4 and "Image.open('my cat.png')" in screen["code"]


@pytest.mark.parametrize("content", [b"", b"no picture", png()[:60]])
def test_a_broken_file_is_refused_with_a_sentence(address: str, content: bytes):
    status, reply = request(address, "upload", content)
    assert status == 422 and "could not be read as a picture, or it is cut short" in reply["error"]


def test_files_that_are_too_large_are_refused(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "MOST_BYTES", 10_000)
    status, reply = request(address, "upload", bytes(50_000))
    assert status == 422 and "the most that this page takes" in reply["error"]
    monkeypatch.setattr(server, "MOST_PIXELS", 1000)
    with pytest.raises(RefusedError, match="40 x 30 pixels"):
        decode(png())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"edit_layers": [0, 99]}, "99"), ({"strength": 9}, "strength"), ({"question": ""}, "question"),
     ({"picture": "upload-99:gone"}, "choose it again"), ({"num_sources": "many"}, "num_sources")],
)  # fmt: skip
def test_what_cannot_be_asked_is_a_sentence(address: str, changes: dict[str, Any], problem: str):
    body = json.dumps({**ask().model_dump(), **changes}).encode()
    status, reply = request(address, "look", body)
    assert status == 422 and problem in reply["error"]


def test_the_gallery_comes_in_pages_and_old_uploads_go(address: str, place: Place):
    assert request(address, "gallery?by=disagreement&start=1")[1]["entries"][0]["overlap"] == 0.5
    assert request(address, "gallery?by=size")[0] == 422
    first = place.keep(png(), "first")
    for _ in range(server.MOST_UPLOADS):
        place.keep(png(), "other")
    assert first not in place.uploads and len(place.uploads) == server.MOST_UPLOADS


def test_only_this_machine_is_served_and_nothing_is_loaded_from_elsewhere(address: str):
    assert address.startswith("http://127.0.0.1:")
    assert request(address, "facts", None, Host="evil.example")[0] == 400
    with urllib.request.urlopen(address) as reply:
        assert "default-src 'self'" in reply.headers["Content-Security-Policy"]
    for name in ("", "page.css", "page.js"):
        text = request(address, name)[1].decode()
        assert "https:" not in text and "//" not in text.replace("http://www.w3.org/2000/svg", "").replace(
            "; // as", ""
        )
