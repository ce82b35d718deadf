"""The web application: who may ask, how many at a time, for how long; and OpenAI's formats."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import anyio
from anyio.abc import ObjectReceiveStream
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scr_runtime.serve.engine import Answer, Engine, Question
from scr_runtime.serve.metrics import Metrics
from scr_runtime.serve.pictures import check_size, open_picture
from scr_runtime.serve.request import ImagePart, RefusedError, read_request
from scr_runtime.serve.settings import LOOPBACK, ServeSettings

logger = logging.getLogger("scr_runtime.serve")

_GONE = 499  # as nginx logs a client that went away
_PROBES = ("/health", "/ready", "/metrics")
_LAST_WORDS = 2.0  # seconds to tell a client that its time is over


class Service:
    """The state of one server. Everything but the engine runs in the event loop.

    Args:
        settings: The operator's.
        load: Makes the engine; called in the model's thread.

    Attributes:
        draining: Whether it ends as soon as the requests that it has are answered.
        failed: Whether the engine could not be made.
    """

    def __init__(self, settings: ServeSettings, load: Callable[[ServeSettings], Engine]) -> None:
        self.settings, self._load = settings, load
        self.engine: Engine | None = None
        self.draining = self.failed = False
        self.address = ""  # for the log
        self._admitted = self._waiting = 0
        self._pace = 1.0  # seconds that a request takes
        self._model_thread = ThreadPoolExecutor(1, "model")  # one: graphs of torch.compile belong to a thread
        self._turn = anyio.Lock()  # in order of arrival; who leaves the line is forgotten at once
        self.metrics = Metrics(lambda: self._waiting, lambda: self.state == "ready")

    @property
    def state(self) -> str:
        """In a word."""
        return "stopping" if self.draining else "loading" if self.engine is None else "ready"

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
        return self.failed or (self.draining and not self._admitted)

    async def open(self) -> None:
        """Loads the model, and proves that it is edited; only then requests are taken."""
        loop = asyncio.get_running_loop()
        try:
            engine = await loop.run_in_executor(self._model_thread, self._load, self.settings)
            proof = await loop.run_in_executor(self._model_thread, engine.self_test)
        except Exception as error:
            self.failed = True
            logger.error(
                "can't serve: %s: %s", type(error).__name__, error, exc_info=logger.isEnabledFor(logging.DEBUG)
            )
            return
        self.engine = engine
        logger.info(
            "ready: %s model=%r mode=%s modes=%s; the self-test edited %d block outputs in %.0f ms", self.address,
            self.settings.served_name, proof.mode, ",".join(engine.modes), proof.stats.edits,
            1000 * proof.prefill_seconds,
        )  # fmt: skip

    @contextmanager
    def admission(self) -> Iterator[Engine]:
        """A place in the server, for one request.

        Raises:
            RefusedError: There is none, or requests are not taken now.
        """
        if self.engine is None or self.draining:
            raise RefusedError(503, self.state, f"the server is {self.state}", retry=1)
        if self._admitted >= self.settings.queue:
            retry = max(1, round(self._pace * self._admitted))
            raise RefusedError(429, "queue_full", f"{self._admitted} requests are being served or wait", retry=retry)
        self._admitted += 1
        try:
            yield self.engine
        finally:
            self._admitted -= 1

    async def generate(self, engine: Engine, question: Question, say: Callable[[str], None]) -> tuple[Answer, float]:
        """An answer, and the seconds that it waited for its turn. If it is cancelled, the model stops first."""
        begun, stop = time.monotonic(), threading.Event()
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            waited = time.monotonic() - begun
            work = asyncio.get_running_loop().run_in_executor(self._model_thread, engine.answer, question, say, stop)
            try:
                answer = await asyncio.shield(work)
            except asyncio.CancelledError:
                stop.set()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([work])
                    work.exception()  # StoppedError, and nobody else asks
                raise
            self._pace += 0.2 * (time.monotonic() - begun - waited - self._pace)
            return answer, waited
        finally:
            self._turn.release()


class Chat:
    """POST /v1/chat/completions."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, reply = Request(scope, receive), Reply(self._service, scope, receive, send)
        settings = self._service.settings
        with self._service.admission() as engine:
            with anyio.move_on_after(settings.timeout) as time_left:
                body = await _body(request, int(settings.max_body_mb * 1e6))
                question = await anyio.to_thread.run_sync(
                    partial(_question, body, settings, engine), abandon_on_cancel=True
                )
                del body
                async with anyio.create_task_group() as group:
                    group.start_soon(_until_gone, receive, group.cancel_scope, reply)
                    say, heard = anyio.create_memory_object_stream[str | Answer | Exception](float("inf"))
                    group.start_soon(self._work, engine, question, say.send_nowait, reply)
                    await reply.send(question, heard)
                    group.cancel_scope.cancel()
            if time_left.cancelled_caught and not reply.complete:
                error = RefusedError(504, "timeout", f"not answered within {settings.timeout:g} seconds")
                with anyio.move_on_after(_LAST_WORDS):
                    await reply.fail(error)

    async def _work(
        self, engine: Engine, question: Question, put: Callable[[str | Answer | Exception], None], reply: Reply
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            answer, waited = await self._service.generate(engine, question, partial(loop.call_soon_threadsafe, put))
            self._service.metrics.add(answer, waited)
            reply.note(answer, waited)
            put(answer)
        except RefusedError as error:
            put(error)
        except Exception as error:
            logger.exception("request %s failed", reply.id)
            put(RefusedError(500, "model_error", f"the model failed ({type(error).__name__}); request id {reply.id}"))


class Reply:
    """The answer to one request, in OpenAI's formats."""

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        self._service, self._scope, self._receive, self._send = service, scope, receive, send
        self._log: dict[str, Any] = scope["state"]["log"]
        self._streams = False
        self.complete = False
        self.id: str = self._log["id"]

    async def send(self, question: Question, heard: ObjectReceiveStream[str | Answer | Exception]) -> None:
        """Sends it as it comes, or at once."""
        asked = question.asked
        item = await heard.receive()
        while not asked.stream and isinstance(item, str):
            item = await heard.receive()
        if isinstance(item, Exception):
            await self.fail(item)
        elif not asked.stream:
            assert isinstance(item, Answer)
            choice = {"message": {"role": "assistant", "content": item.text}, "finish_reason": item.finish}
            body = self._object("chat.completion", choice) | {"usage": _usage(item)} | _did(question, item)
            await self._respond(JSONResponse(body))
        else:
            await self._stream(question, item, heard)

    async def _stream(
        self, question: Question, item: str | Answer | Exception, heard: ObjectReceiveStream[str | Answer | Exception]
    ) -> None:
        self._streams = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._event(self._chunk({"role": "assistant", "content": ""}))
        while isinstance(item, str):
            await self._event(self._chunk({"content": item}))
            item = await heard.receive()
        if isinstance(item, Exception):
            await self.fail(item)
            return
        await self._event(self._chunk({}, item.finish) | _did(question, item))
        if question.asked.stream_options.include_usage:
            await self._event(self._chunk({}) | {"choices": [], "usage": _usage(item)})
        await self._end()

    async def fail(self, error: Exception) -> None:
        """Says that there is no answer, or no more of it."""
        assert isinstance(error, RefusedError)
        self._log["code"] = error.code
        self._service.metrics.refused.labels(error.code).inc()
        if self._streams:
            self._log["status"] = error.status
            await self._event(error.body)
            await self._end()
        else:
            await self._respond(refusal(error))

    def gone(self) -> None:
        """Notes that the client went away, if it still waited for something."""
        if not self.complete:
            self._log["status"] = _GONE

    def note(self, answer: Answer, waited: float) -> None:
        """Keeps what the log says of an answer."""
        self._log |= {
            "mode": answer.mode, "images": answer.stats.images, "fallbacks": sum(answer.stats.fallbacks.values()),
            "tokens": f"{answer.prompt_tokens}+{answer.completion_tokens}", "waited_ms": round(1000 * waited),
            "prefill_ms": round(1000 * answer.prefill_seconds),
        }  # fmt: skip

    def _object(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id}", "object": kind, "created": int(time.time()),
            "model": self._service.settings.served_name, "choices": [{"index": 0, **choice}],
        }  # fmt: skip

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        return self._object("chat.completion.chunk", {"delta": delta, "finish_reason": finish})

    async def _event(self, body: dict[str, Any]) -> None:
        await self._send({"type": "http.response.body", "body": b"data: %s\n\n" % _json(body), "more_body": True})

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        self.complete = True

    async def _respond(self, response: Response) -> None:
        await response(self._scope, self._receive, self._send)
        self.complete = True


class Guard:
    """In front of everything: an id, the key, and a line of the log for each request."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        log: dict[str, Any] = {"id": uuid.uuid4().hex, "status": None}
        scope.setdefault("state", {})["log"] = log
        begun = time.monotonic()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                log["status"] = log["status"] or message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", log["id"].encode())]
            await send(message)

        try:
            if self._is_allowed(Request(scope)):
                await self._app(scope, receive, noted)
            else:
                error = RefusedError(401, "invalid_api_key", "give the server's key: Authorization: Bearer KEY")
                self._service.metrics.refused.labels(error.code).inc()
                await refusal(error)(scope, receive, noted)
        except ClientDisconnect:
            log["status"] = _GONE
        finally:
            self._write(scope, log, time.monotonic() - begun)

    def _is_allowed(self, request: Request) -> bool:
        key = self._service.settings.api_key
        if key is None or request.url.path in ("/health", "/ready"):
            return True
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), key.encode())

    def _write(self, scope: Scope, log: dict[str, Any], seconds: float) -> None:
        if scope["path"] in _PROBES:
            return
        status = log.pop("status") or 500
        self._service.metrics.requests.labels(str(status)).inc()
        details = " ".join(f"{key}={value}" for key, value in log.items())
        logger.info("%s %r %s ms=%.0f %s", scope["method"], scope["path"], status, 1000 * seconds, details)


def application(service: Service) -> Starlette:
    """The server as an ASGI application."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(request: Request) -> Response:
        return JSONResponse({"status": service.state}, 200 if service.state == "ready" else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> Response:
        engine = service.engine
        scr = {} if engine is None else {"mode": service.settings.default_mode, "modes": engine.modes}
        model = {
            "id": service.settings.served_name,
            "object": "model",
            "created": 0,
            "owned_by": "scr_runtime",
            "scr": scr,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        request.scope["state"]["log"]["code"] = error.code
        service.metrics.refused.labels(error.code).inc()
        return refusal(error)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refusal(
            RefusedError(error.status_code, "unknown_url", f"{error.detail}: {request.method} {request.url.path}")
        )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        opening = asyncio.create_task(service.open())
        yield
        opening.cancel()

    local = service.settings.host in LOOPBACK
    return Starlette(
        routes=[
            Route("/health", health), Route("/ready", ready), Route("/metrics", metrics), Route("/v1/models", models),
            Route("/v1/chat/completions", Chat(service), methods=["POST"]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK if local else ["*"]),
            Middleware(Guard, service=service),
        ],
        exception_handlers={RefusedError: refuse, HTTPException: unknown},
        lifespan=lifespan,
    )  # fmt: skip


def refusal(error: RefusedError) -> Response:
    """OpenAI's error body with its status."""
    headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
    return JSONResponse(error.body, error.status, headers)


async def _body(request: Request, most: int) -> bytes:
    """A request's bytes, as many as are allowed."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise RefusedError(415, "unsupported_media_type", "send application/json")  # no web page can, unasked
    claimed, body = request.headers.get("content-length", "0"), bytearray()
    if not (claimed.isdecimal() and int(claimed) > most):
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                break
        else:
            return bytes(body)
    raise RefusedError(413, "body_too_large", f"a request has {most / 1e6:g} MB at most")


def _question(body: bytes, settings: ServeSettings, engine: Engine) -> Question:
    """Reads a request, and the headers of its pictures."""
    asked = read_request(body)
    engine.check(asked)
    parts = [part for turn in asked.messages for part in turn.content if isinstance(part, ImagePart)]
    pictures = [open_picture(part.image_url.url, settings) for part in parts]
    check_size(pictures, settings)
    return Question(asked, pictures)


async def _until_gone(receive: Receive, scope: anyio.CancelScope, reply: Reply) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reply.gone()
    scope.cancel()


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.completion_tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": total,
    }


def _did(question: Question, answer: Answer) -> dict[str, Any]:
    """The field `scr` of an answer, if it was asked for."""
    if not question.asked.scr.reports:
        return {}
    return {"scr": {"mode": answer.mode, "reports": [asdict(report) for report in answer.reports]}}


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
