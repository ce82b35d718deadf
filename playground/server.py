"""The page's server: loopback only, nothing from elsewhere, and every problem as a sentence on the page."""

from __future__ import annotations

import io
import itertools
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
from PIL.Image import Image as PILImage
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from data.chat import unprocessed
from data.images import CocoImages
from data.wording import CAPTION_PROMPT
from playground.engine import MODES, Engine
from playground.gallery import ORDERS, Entry, ordered
from playground.settings import QUESTION_CHARACTERS, Ask, AskError
from playground.snippet import python_of
from scr_runtime.errors import SCRError

MOST_BYTES, MOST_PIXELS, MOST_UPLOADS = 20_000_000, 40_000_000, 16
PAGE = 14  # entries of the gallery at a time
_HERE = Path(__file__).parent
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}


class RefusedError(Exception):
    """What the page shows as a message."""


@dataclass
class Place:
    """What the page is about.

    Attributes:
        engine: The model.
        name: Its short name.
        model: Its folder or hub id.
        dtype: Number format of its weights.
        predictor: Folder of the predictor; None if there is none.
        without: Why there is none, and how to make one.
        images: Held-out images; None if there are none.
        entries: Their questions.
    """

    engine: Engine
    name: str
    model: str
    dtype: str
    predictor: str | None
    without: str
    images: CocoImages | None
    entries: Sequence[Entry]
    uploads: OrderedDict[str, PILImage] = field(default_factory=OrderedDict[str, PILImage])

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        self._sorted = {by: ordered(self.entries, by) for by in ORDERS}

    def picture(self, key: str) -> PILImage:
        """A dropped picture, or a held-out image by its id."""
        if key in self.uploads:
            return self.uploads[key]
        if self.images is not None and key.isdecimal() and int(key) in self.images.ids:
            return self.images.open(int(key))
        raise RefusedError("this picture is not here any more: choose it again")

    def file(self, key: str) -> str:
        """The picture's file, for the Python."""
        return key.partition(":")[2] if key in self.uploads or self.images is None else str(self.images.path(int(key)))

    def keep(self, content: bytes, name: str) -> str:
        """Decodes a dropped file and returns its key."""
        picture = decode(content)
        key = f"upload-{next(self._numbers)}:{name}"
        self.uploads[key] = picture
        while len(self.uploads) > MOST_UPLOADS:
            self.uploads.popitem(last=False)
        return key

    def facts(self) -> dict[str, Any]:
        """What the page needs once."""
        scr, predictor = self.engine.scr, self.engine.predictor
        return {
            "name": self.name, "depth": self.engine.depth, "modes": self.engine.modes, "predictor": self.predictor,
            "without": self.without, "num_sources": scr.num_sources,
            "source_fraction": scr.source_fraction, "strength": scr.strength,
            "edit_layers": scr.edit_layers, "attention_layers": scr.attention_layers, "state_layer": scr.state_layer,
            "threshold": predictor.threshold if predictor else 0.0, "caption": CAPTION_PROMPT,
            "orders": ORDERS, "page": PAGE, "entries": len(self._sorted["entropy"]), "most_bytes": MOST_BYTES,
            "question_characters": QUESTION_CHARACTERS,
            "scenes": [str(number) for number in self.images.ids[:PAGE]] if self.images else [],
        }  # fmt: skip

    def gallery(self, by: str, start: int) -> dict[str, Any]:
        """Some entries of the gallery."""
        if by not in self._sorted:
            raise RefusedError(f"the gallery can't be sorted by {by}: {', '.join(ORDERS)}")
        return {"entries": [entry.plain for entry in self._sorted[by][start : start + PAGE]]}

    def look(self, ask: Ask) -> dict[str, Any]:
        """One screen."""
        found = self.engine.look(self.picture(ask.picture), ask)
        modes = tuple(MODES[name] for name in self.engine.modes)
        found["code"] = python_of(
            ask, self.engine.settings(ask), model=self.model, dtype=self.dtype, picture=self.file(ask.picture),
            predictor=self.predictor, modes=modes,
        )  # fmt: skip
        return found

    def view(self, key: str) -> bytes:
        """A picture as the model sees it, as PNG."""
        stream = io.BytesIO()
        PIL.Image.fromarray(unprocessed(self.engine.processor, self.picture(key))).save(stream, "PNG")
        return stream.getvalue()


def decode(content: bytes) -> PILImage:
    """An upright RGB picture.

    Raises:
        RefusedError: It is no picture, cut short, or too large.
    """
    if len(content) > MOST_BYTES:
        raise RefusedError(f"the file has more than {MOST_BYTES // 10**6} MB, the most that this page takes")
    try:
        with PIL.Image.open(io.BytesIO(content)) as found:
            if found.width * found.height > MOST_PIXELS:
                size = f"{found.width} x {found.height} pixels"
                raise RefusedError(f"the picture has {size}; the most is {MOST_PIXELS // 10**6} million")
            return PIL.ImageOps.exif_transpose(found).convert("RGB")
    except RefusedError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, bomb errors...
        raise RefusedError(
            f"this file is no picture that can be read, or it is cut short ({type(error).__name__})"
        ) from error


def application(place: Place) -> Starlette:
    """The page as an ASGI application."""

    async def facts(request: Request) -> Response:
        return JSONResponse(place.facts())

    async def gallery(request: Request) -> Response:
        start = request.query_params.get("start", "0")
        return JSONResponse(place.gallery(request.query_params.get("by", ""), int(start) if start.isdecimal() else 0))

    async def upload(request: Request) -> Response:
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MOST_BYTES:
                break  # `decode` refuses it
        name = request.query_params.get("name", "picture")[-80:]
        return JSONResponse({"picture": await run_in_threadpool(place.keep, bytes(content), name)})

    async def view(request: Request) -> Response:
        content = await run_in_threadpool(place.view, request.path_params["key"])
        return Response(content, media_type="image/png")

    async def look(request: Request) -> Response:
        ask = Ask.read(await request.body())
        return JSONResponse(await run_in_threadpool(place.look, ask))

    async def cost(request: Request) -> Response:
        ask = Ask.read(await request.body())
        picture = place.picture(ask.picture)
        return JSONResponse({"costs": await run_in_threadpool(place.engine.cost, picture, ask)})

    def static(name: str) -> Callable[[Request], Awaitable[Response]]:
        async def send(request: Request) -> Response:
            return FileResponse(_HERE / name, headers=_HEADERS)

        return send

    return Starlette(
        routes=[
            Route("/", static("page.html")),
            *(Route(f"/{name}", static(name)) for name in ("page.css", "page.js")),
            Route("/facts", facts), Route("/gallery", gallery), Route("/upload", upload, methods=["POST"]),
            Route("/view/{key:path}", view), Route("/look", look, methods=["POST"]),
            Route("/cost", cost, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers={RefusedError: _refused, SCRError: _refused, AskError: _refused},
    )  # fmt: skip


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=422)
