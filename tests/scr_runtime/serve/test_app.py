"""Who may ask, when requests are taken, and what an operator sees."""

from __future__ import annotations

import http.client
import http.server
import logging
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file

from scenes import CHECKPOINT
from scr_runtime import SCRStats, describe_model, load_predictor, save_predictor
from scr_runtime.errors import EditNotFiredError, PredictorMismatchError
from scr_runtime.serve.app import Service
from scr_runtime.serve.engine import Engine, open_engine
from scr_runtime.serve.settings import ServeSettings
from tests.scr_runtime.serve.conftest import CONFIG, PATIENCE, HeldEngine, Serve, Served, data_url, picture
from tests.scr_runtime.serve.test_limits import counted, held, png_header


def get(served: Served, path: str, **headers: str) -> tuple[int, bytes]:
    host, port = served.address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
    connection.request("GET", path, headers=headers)
    reply = connection.getresponse()
    found = reply.status, reply.read()
    connection.close()
    return found


def test_a_key_is_asked_for_everywhere_but_at_probes(serve: Serve) -> None:
    with serve(api_key="right") as served:
        for key in ("wrong", "righ", "right2"):
            with pytest.raises(openai.AuthenticationError, match="give the key"):
                served.client.with_options(api_key=key).models.list()
        assert served.client.with_options(api_key="right").models.list().data[0].id == "scene-llava"
        assert served.client.with_options(api_key="right").chat.completions.create(
            model="scene-llava", messages=[{"role": "user", "content": "x"}], max_tokens=1
        )
        assert get(served, "/metrics")[0] == get(served, "/v1/models")[0] == get(served, "/elsewhere")[0] == 401
        assert get(served, "/metrics", Authorization="Bearer r\u00e9")[0] == 401
        assert get(served, "/metrics", Authorization="Bearer right")[0] == 200
        assert get(served, "/health")[0] == get(served, "/ready")[0] == 200


def test_other_web_pages_cannot_ask_through_a_browser(served: Served) -> None:
    assert get(served, "/health", Host="evil.example")[0] == 400
    with pytest.raises(openai.APIStatusError, match="send application/json") as caught:
        served.client.post(
            "/chat/completions", cast_to=object, content=b"{}", options={"headers": {"Content-Type": "text/plain"}}
        )
    assert caught.value.status_code == 415


def test_nothing_that_a_client_sends_reaches_a_file_or_an_address(served: Served, tmp_path: Path) -> None:
    picture().save(tmp_path / "secret.png")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        for url in (
            f"http://127.0.0.1:{port}/a.png", f"HTTP://127.0.0.1:{port}/a.png", f"ftp://127.0.0.1:{port}/a.png",
            (tmp_path / "secret.png").as_uri(), str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png",
            f"//127.0.0.1:{port}/a.png", "http://[::1", f"https://127.0.0.1:{port}/a.png",
        ):  # fmt: skip
            with pytest.raises(openai.BadRequestError, match=r"opens no other URL|can't be read"):
                served.ask("x", url)
        for key in ("path", "url", "image"):  # what transformers' own templates would open
            part = {"type": "image", key: str(tmp_path / "secret.png")}
            with pytest.raises(openai.BadRequestError):
                served.client.chat.completions.create(
                    model="scene-llava", messages=[{"role": "user", "content": [part]}]  # type: ignore[list-item]
                )  # fmt: skip
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()


@contextmanager
def pictures_at(content: bytes) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            moved = self.path == "/moved"
            self.send_response(302 if moved else 200)
            self.send_header("Location", "/picture.png") if moved else None
            self.end_headers()
            self.wfile.write(b"" if moved else content)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_images_come_from_allowed_origins_alone(serve: Serve, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with pictures_at((tmp_path / "a.png").read_bytes()) as (origin, asked), serve(image_hosts=(origin,)) as served:
        fetched = served.ask("x", f"{origin}/a.png?b=1", max_tokens=1, scr={"reports": True})
        sent = served.ask("x", data_url(picture()), max_tokens=1, scr={"reports": True})
        assert fetched.model_extra["scr"] == sent.model_extra["scr"] and asked == ["/a.png?b=1"]
        with pytest.raises(openai.BadRequestError, match="can't be fetched: status 302"):
            served.ask("x", f"{origin}/moved")
        port = origin.rpartition(":")[2]
        for url in (f"{origin}@evil.example/", f"http://user@127.0.0.1:{port}/a", f"http://localhost:{port}/a.png"):
            with pytest.raises(openai.BadRequestError, match=f"URLs of {origin}"):
                served.ask("x", url)
        assert asked == ["/a.png?b=1", "/moved"]
    with serve(image_hosts=(origin,)) as served, pytest.raises(openai.BadRequestError, match="ConnectionRefused"):
        served.ask("x", f"{origin}/a.png")
    with pictures_at(bytes(300_000)) as (origin, _), serve(image_hosts=(origin,), max_body_mb=0.2) as served:
        with pytest.raises(openai.APIStatusError, match=r"more than 0\.2 MB") as caught:
            served.ask("x", f"{origin}/large")
        assert caught.value.status_code == 413


def test_readiness_is_red_until_the_model_has_been_tested(serve: Serve, loaded: Any, folder: Path) -> None:
    may_load, may_test = threading.Event(), threading.Event()

    class Slow(HeldEngine):
        def self_test(self) -> Any:
            assert may_test.wait(PATIENCE)
            return super().self_test()

    def load(settings: ServeSettings) -> Engine:
        assert may_load.wait(PATIENCE)
        return Slow(loaded[0], loaded[1], load_predictor(folder), settings)

    with serve(load=load, wait=False) as served:
        for step in (may_load, may_test):
            while get(served, "/health")[0] != 200:
                time.sleep(0.01)
            assert get(served, "/ready") == (503, b'{"status":"loading"}')
            with pytest.raises(openai.InternalServerError, match="the server is loading") as caught:
                served.ask()
            assert caught.value.status_code == 503 and "retry-after" in caught.value.response.headers
            step.set()
        while get(served, "/ready")[0] != 200:
            time.sleep(0.01)


def engine(loaded: Any, predictor: Any, **changes: Any) -> Engine:
    given = {"model": "m", "predictor": None if predictor is None else "p"} | changes
    return Engine(loaded[0], loaded[1], predictor, ServeSettings.model_validate(given))


def test_the_self_test_needs_an_edit(loaded: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = load_predictor(folder)
    for mode in ("one-pass", "two-pass", "auto", "uniform"):
        assert engine(loaded, predictor, mode=mode).self_test().stats.edits == 3
    assert engine(loaded, predictor, mode="off").self_test().stats == SCRStats()
    monkeypatch.setattr("scr_runtime.runtime.SCR.stats", SCRStats())  # as if no edit had fired
    for mode in ("auto", "off"):  # with a predictor one-pass is tested, whatever the server's mode is
        with pytest.raises(EditNotFiredError, match="the self-test in mode 'one-pass' edited nothing"):
            engine(loaded, predictor, mode=mode).self_test()


def test_a_predictor_of_another_model_is_never_served(loaded: Any, folder: Path, tmp_path: Path) -> None:
    other = describe_model(*loaded) | {"embedding_probe": [9.0] * 32}
    save_predictor(tmp_path / "p", load_predictor(folder), scr=CONFIG, model=other)
    with pytest.raises(PredictorMismatchError, match="these are other weights"):
        engine(loaded, load_predictor(tmp_path / "p"), mode="off")


def test_a_model_without_some_of_its_weights_is_never_served(tmp_path: Path) -> None:
    place = Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))
    weights = load_file(place / "model.safetensors")
    name = next(name for name in weights if "layers.3" in name and "mlp" in name)
    save_file(
        {key: value for key, value in weights.items() if key != name}, place / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"lacks the weights .*layers\.3.*mlp"):
        open_engine(ServeSettings(model=str(place)))
    assert open_engine(ServeSettings(model=str(CHECKPOINT))).self_test().mode == "two-pass"


def test_a_server_that_cannot_load_ends(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    def load(settings: ServeSettings) -> Engine:
        raise PredictorMismatchError("the predictor is for another model")

    with caplog.at_level(logging.INFO), serve(load=load, wait=False) as served:
        until = time.monotonic() + PATIENCE
        while not served.service.failed:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert served.service.over
    assert "can't serve: PredictorMismatchError: the predictor is for another model" in caplog.text


def test_a_server_that_ends_answers_what_it_has(serve: Serve) -> None:
    with serve() as served, ThreadPoolExecutor(1) as pool, held(served):
        waiting = pool.submit(served.ask)
        while served.service._waiting == 0:
            time.sleep(0.002)
        served.service.draining = True
        assert not served.service.over and get(served, "/health")[0] == 200
        assert get(served, "/ready") == (503, b'{"status":"stopping"}')
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            served.ask()
        served.engine.gate.open.set()  # type: ignore[union-attr]
        assert waiting.result(PATIENCE).choices[0].finish_reason == "stop"
        served.idle()
        assert served.service.over


def test_metrics_count_what_reports_say(serve: Serve) -> None:
    with serve() as served:
        for mode in ("one-pass", "two-pass", "uniform", "off"):
            served.ask(max_tokens=1, scr={"mode": mode})
        (drift,) = [
            one["drift"]
            for one in served.ask(max_tokens=2, scr={"threshold": 1.0, "reports": True}).model_extra["scr"]["reports"]
        ]
        with pytest.raises(openai.APIStatusError):
            served.ask("x", data_url(png_header(9000, 9000)))
        served.idle()
        status, text = get(served, "/metrics")
        assert status == 200 and b"# TYPE scr_prefill_seconds histogram" in text
        wanted = {
            'scr_images_total{provider="one-pass"}': 1, 'scr_images_total{provider="two-pass"}': 2,
            'scr_images_total{provider="uniform"}': 1, 'scr_images_total{provider="online"}': 0,
            'scr_prefill_seconds_count{mode="off"}': 1, 'scr_prefill_seconds_count{mode="auto"}': 1,
            'scr_requests_total{status="200"}': 5, 'scr_requests_total{status="413"}': 1,
            'scr_refused_total{code="image_too_large"}': 1, "scr_queue_length": 0,
              "scr_drift_count": 2,
        }  # fmt: skip
        assert {line: counted(served, line) for line in wanted} == wanted
        fallbacks = {
            kind: counted(served, f'scr_fallbacks_total{{reason="{kind}"}}') for kind in ("low confidence", "drift")
        }
        assert sum(fallbacks.values()) == 1 and drift > 0
        assert counted(served, "scr_drift_sum") == pytest.approx(2 * drift, rel=1e-3)


def test_each_request_is_one_line_of_the_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "scr_runtime.serve"), serve() as served:
        served.ask("a secret question", max_tokens=2, scr={"mode": "two-pass"})
        list(served.ask(max_tokens=2, stream=True))
        with pytest.raises(openai.BadRequestError):
            served.ask("x", "file:///etc/passwd")
        get(served, "/nowhere%0Ax")
        get(served, "/ready")
        served.idle()
    lines = [record.getMessage() for record in caplog.records if record.name == "scr_runtime.serve"]
    ready, first, second, third, fourth = lines
    assert re.match(r"ready: .*model='scene-llava' mode=auto .*the self-test edited 3 block outputs", ready)
    said = r"mode=two-pass images=1 fallbacks=0 tokens=\d+\+2 waited_ms=\d+ prefill_ms=\d+$"
    assert re.match(r"POST '/v1/chat/completions' 200 ms=\d+ id=[0-9a-f]{32} " + said, first)
    assert " 200 " in second and "code=invalid_image" in third
    assert fourth.startswith("GET '/nowhere\\nx' 404") and "secret" not in "".join(lines)


def test_a_place_is_taken_and_given_back(loaded: Any) -> None:
    service = Service(ServeSettings(model="m", queue=1), lambda _: engine(loaded, None))
    service.engine = engine(loaded, None)
    with service.admission(), pytest.raises(Exception, match="1 requests are being served"), service.admission():
        pass
    with service.admission() as found:
        assert found is service.engine
