"""The web application: who may ask, how many at a time, for how long; and OpenAI's formats."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import anyio
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

Heard = asyncio.Queue[str | Answer | RefusedError]
"""What comes of a request: pieces of its answer, and then the answer or an error."""

_GONE = 499  # as nginx logs a client that went away
_LAST_WORDS = 2.0  # seconds to tell a client that its time is over


class Service:
    """The state of one server. Everything but the engine runs in the event loop.

    Args:
        settings: The operator's.
        load: Makes the engine; called in the model's thread.

    Attributes:
        draining: Whether it ends as soon as the requests that it has are answered.
        failed: Whether the engine could not be made.
        address: For the log.
        readers: How many requests are read at a time.
    """

    def __init__(self, settings: ServeSettings, load: Callable[[ServeSettings], Engine]) -> None:
        self.settings, self._load = settings, load
        self.engine: Engine | None = None
        self.draining = self.failed = False
        self.address = ""
        self._admitted = self._waiting = 0
        self._pace = 1.0  # seconds that a request takes
        self._model_thread = ThreadPoolExecutor(1, "model")  # one: graphs of torch.compile belong to a thread
        self._turn = anyio.Lock()  # in order of arrival; who leaves the line is forgotten at once
        self.readers = anyio.CapacityLimiter(2)  # a body of 20 MB of brackets takes 0.5 GB to read
        self.metrics = Metrics(lambda: self._waiting)

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
            logger.error("can't serve: %s: %s", type(error).__name__, error)
            return
        self.engine = engine
        words = "ready: %s model=%r mode=%s modes=%s; the self-test edited %d block outputs"
        modes = ",".join(engine.modes)
        logger.info(words, self.address, self.settings.served_name, proof.mode, modes, proof.stats.edits)

    @contextmanager
    def admission(self) -> Generator[Engine]:
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

    async def generate(self, engine: Engine, question: Question, say: Callable[[str], Any]) -> tuple[Answer, float]:
        """An answer, and the seconds that it waited for its turn. If it is cancelled, the model stops first."""
        begun, stop = time.monotonic(), threading.Event()
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            started = time.monotonic()
            run = asyncio.get_running_loop().run_in_executor
            work = run(self._model_thread, engine.answer, question, say, stop)
            try:
                answer = await asyncio.shield(work)
            except asyncio.CancelledError:
                stop.set()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([work])
                    work.exception()  # StoppedError, which nobody else asks for
                raise
            self._pace += 0.2 * (time.monotonic() - started - self._pace)
            return answer, started - begun
        finally:
            self._turn.release()


class Chat:
    """POST /v1/chat/completions. What is in flight belongs to one call of this, and ends with it."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings, reply = self._service.settings, Reply(self._service, scope, receive, send)
        with self._service.admission() as engine:
            with anyio.move_on_after(settings.timeout) as time_left:
                body = await _body(Request(scope, receive), int(settings.max_body_mb * 1e6))
                read = partial(_question, body, settings, engine)
                question = await anyio.to_thread.run_sync(read, abandon_on_cancel=True, limiter=self._service.readers)
                del body, read
                heard: Heard = asyncio.Queue()
                async with anyio.create_task_group() as group:
                    group.start_soon(self._work, engine, question, heard, reply)
                    group.start_soon(_until_gone, receive, group.cancel_scope, reply)
                    await reply.send(question, heard)
                    group.cancel_scope.cancel()
            if time_left.cancelled_caught and not reply.complete:
                with anyio.move_on_after(_LAST_WORDS):
                    await reply.fail(RefusedError(504, "timeout", f"not answered within {settings.timeout:g} seconds"))

    async def _work(self, engine: Engine, question: Question, heard: Heard, reply: Reply) -> None:
        say = partial(asyncio.get_running_loop().call_soon_threadsafe, heard.put_nowait)
        try:
            answer, waited = await self._service.generate(engine, question, say)
            self._service.metrics.add(answer)
            reply.note(answer, waited)
            heard.put_nowait(answer)
        except RefusedError as error:
            heard.put_nowait(error)
        except Exception as error:
            logger.exception("request %s failed", reply.id)
            message = f"the model failed ({type(error).__name__}); request id {reply.id}"
            heard.put_nowait(RefusedError(500, "model_error", message))


class Reply:
    """The answer to one request, in OpenAI's formats.

    Attributes:
        id: Of the request.
        complete: Whether all of it has been sent.
    """

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        self._service, self._scope, self._receive, self._send = service, scope, receive, send
        self._log: dict[str, Any] = scope["state"]["log"]
        self.id: str = self._log["id"]
        self._streams = self.complete = False

    async def send(self, question: Question, heard: Heard) -> None:
        """Sends it as it comes, or at once."""
        asked, item = question.asked, await heard.get()
        if asked.stream and not isinstance(item, RefusedError):
            await self._begin_stream()
        while isinstance(item, str):
            if asked.stream:
                await self._chunk({"content": item})
            item = await heard.get()
        if isinstance(item, RefusedError):
            await self.fail(item)
            return
        did = {"mode": item.mode, "reports": [asdict(report) for report in item.reports]}
        more: dict[str, Any] = {"scr": did} if asked.scr.reports else {}
        if asked.stream:
            await self._chunk({}, item.finish, **more)
            if asked.stream_options.include_usage:
                await self._event(self._body("chat.completion.chunk", [], usage=item.usage))
            await self._end_stream()
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": item.text}, "finish_reason": item.finish}
            await self._respond(JSONResponse(self._body("chat.completion", [choice], usage=item.usage, **more)))

    async def fail(self, error: RefusedError) -> None:
        """Says that there is no answer, or no more of it."""
        self._service.metrics.refused.labels(error.code).inc()
        self._log["code"] = error.code
        if self._streams:
            self._log["status"] = error.status
            await self._event(error.body)
            await self._end_stream()
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

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": f"chatcmpl-{self.id}", "object": kind, "created": int(time.time())}
        return head | {"model": self._service.settings.served_name, "choices": choices} | more

    async def _respond(self, response: Response) -> None:
        await response(self._scope, self._receive, self._send)
        self.complete = True

    async def _begin_stream(self) -> None:
        self._streams = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._chunk({"role": "assistant", "content": ""})

    async def _chunk(self, delta: dict[str, str], finish: str | None = None, **more: Any) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        await self._event(self._body("chat.completion.chunk", [choice], **more))

    async def _event(self, body: dict[str, Any]) -> None:
        content = b"data: %s\n\n" % json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        await self._send({"type": "http.response.body", "body": content, "more_body": True})

    async def _end_stream(self) -> None:
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
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
            allowed = self._is_allowed(Request(scope))
            await (self._app if allowed else _without_key)(scope, receive, noted)
        except ClientDisconnect:
            log["status"] = _GONE
        finally:
            status = log.pop("status") or 500
            if scope["path"] not in ("/health", "/ready", "/metrics"):
                self._service.metrics.requests.labels(str(status)).inc()
                details = " ".join(f"{key}={value}" for key, value in log.items())
                milliseconds = 1000 * (time.monotonic() - begun)
                logger.info("%s %r %s ms=%.0f %s", scope["method"], scope["path"], status, milliseconds, details)

    def _is_allowed(self, request: Request) -> bool:
        key = self._service.settings.api_key
        if key is None or request.url.path in ("/health", "/ready"):
            return True
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), key.encode())


def application(service: Service) -> Starlette:
    """The server as an ASGI application."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(request: Request) -> Response:
        return JSONResponse({"status": service.state}, 200 if service.state == "ready" else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> Response:
        model: dict[str, Any] = {"id": service.settings.served_name, "object": "model", "created": 0}
        if service.engine is not None:
            model["scr"] = {"mode": service.settings.default_mode, "modes": service.engine.modes}
        return JSONResponse({"object": "list", "data": [model | {"owned_by": "scr_runtime"}]})

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            words = f"{error.detail}: {request.method} {request.url.path}"
            error = RefusedError(error.status_code, "unknown_url", words)
        assert isinstance(error, RefusedError)
        request.scope["state"]["log"]["code"] = error.code
        service.metrics.refused.labels(error.code).inc()
        return refusal(error)

    async def broken(request: Request, error: Exception) -> Response:
        words = f"the server failed ({type(error).__name__}); request id {request.scope['state']['log']['id']}"
        return refusal(RefusedError(500, "server_error", words))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        opening = asyncio.create_task(service.open())
        yield
        opening.cancel()

    hosts = LOOPBACK if service.settings.host in LOOPBACK else ["*"]
    return Starlette(
        routes=[
            Route("/health", health), Route("/ready", ready), Route("/metrics", metrics), Route("/v1/models", models),
            Route("/v1/chat/completions", Chat(service), methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(Guard, service=service)],
        exception_handlers={RefusedError: refuse, HTTPException: refuse, Exception: broken},
        lifespan=lifespan,
    )  # fmt: skip


def refusal(error: RefusedError) -> Response:
    """OpenAI's error body with its status."""
    headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
    return JSONResponse(error.body, error.status, headers)


async def _without_key(scope: Scope, receive: Receive, send: Send) -> None:
    await refusal(RefusedError(401, "invalid_api_key", "give the key: Authorization: Bearer KEY"))(
        scope, receive, send
    )


async def _body(request: Request, most: int) -> bytes:
    """A request's bytes, as many as are allowed."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise RefusedError(415, "unsupported_media_type", "send application/json")  # no web page can, unasked
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise RefusedError(413, "body_too_large", f"a request has {most / 1e6:g} MB at most")
    return bytes(body)


def _question(body: bytes, settings: ServeSettings, engine: Engine) -> Question:
    """Reads a request, and the headers of its pictures."""
    asked = read_request(body)
    engine.check(asked)
    parts = [part for turn in asked.messages for part in turn.content if isinstance(part, ImagePart)]
    if len(parts) > settings.max_images:
        raise RefusedError(
            413, "too_many_images", f"a request has {settings.max_images} images at most", param="messages"
        )
    pictures = [open_picture(part.image_url.url, settings) for part in parts]
    check_size(pictures, settings)
    return Question(asked, pictures)


async def _until_gone(receive: Receive, scope: anyio.CancelScope, reply: Reply) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reply.gone()
    scope.cancel()
