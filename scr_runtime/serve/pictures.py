"""Images of a request: where they may come from, how large they may be, and how they are decoded."""

from __future__ import annotations

import base64
import http.client
import io
import time
from urllib.parse import urlsplit

import PIL.Image
import PIL.ImageOps
from PIL.Image import Image as PILImage

from scr_runtime.serve.request import RefusedError
from scr_runtime.serve.settings import ServeSettings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_CHUNK = 1 << 16


def open_picture(url: str, settings: ServeSettings) -> PILImage:
    """A picture whose header has been read, and no pixel.

    Raises:
        RefusedError: The URL may not be read, or it holds no picture.
    """
    head, comma, data = url.partition(",")
    if head[:5].lower() == "data:":
        if not comma or not head.lower().endswith(";base64"):
            raise _refused("an image's data: URL has to be data:image/png;base64,...")
        try:
            content = base64.b64decode(data, validate=True)
        except ValueError as error:
            raise _refused(f"an image's base64 can't be read: {error}") from error
    else:
        content = _fetch(url, settings)
    try:
        return PIL.Image.open(io.BytesIO(content), formats=FORMATS)
    except PIL.Image.DecompressionBombError as error:
        raise _refused("an image claims so many pixels that it looks like a decompression bomb") from error
    except Exception as error:  # plug-ins raise OSError, SyntaxError, ValueError, struct.error ...
        raise _refused(f"an image can't be read as {', '.join(FORMATS)}: {type(error).__name__}") from error


def check_size(pictures: list[PILImage], settings: ServeSettings) -> None:
    """Checks the pixels that the headers claim.

    Raises:
        RefusedError: With status 413.
    """
    pixels = sum(picture.width * picture.height for picture in pictures)
    if pixels > settings.max_megapixels * 1e6:
        sizes = ", ".join(f"{picture.width} x {picture.height}" for picture in pictures[:8])
        message = (
            f"the images have {pixels / 1e6:.1f} million pixels ({sizes}); the most is {settings.max_megapixels:g}"
        )
        raise RefusedError(413, "image_too_large", message, param="messages")


def decoded(picture: PILImage) -> PILImage:
    """The upright RGB picture.

    Raises:
        RefusedError: It is cut short or broken.
    """
    try:
        return PIL.ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # as above
        raise _refused(f"an image is broken or cut short: {type(error).__name__}") from error


def _fetch(url: str, settings: ServeSettings) -> bytes:
    """What a URL of an allowed origin holds. No redirect is followed, no proxy asked, no credential sent."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _refused("an image's URL can't be read") from error
    if f"{parts.scheme}://{parts.netloc}" not in settings.image_hosts or parts.scheme not in ("http", "https"):
        allowed = f", or URLs of {', '.join(settings.image_hosts)}" if settings.image_hosts else ""
        raise _refused(f"images are taken as data: URLs{allowed}; this server opens no other URL and no file")
    secure = parts.scheme == "https"
    connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    most, until = int(settings.max_body_mb * 1e6), time.monotonic() + settings.timeout
    content = bytearray()
    connection = connect(parts.netloc, timeout=min(10.0, settings.timeout))
    try:
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        reply = connection.getresponse()
        while reply.status == 200 and len(content) <= most and time.monotonic() < until:
            chunk = reply.read1(_CHUNK)
            if not chunk:
                return bytes(content)
            content += chunk
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _refused(f"an image can't be fetched: {type(error).__name__}") from error
    finally:
        connection.close()
    if len(content) > most:
        raise RefusedError(
            413, "image_too_large", f"an image has more than {settings.max_body_mb:g} MB", param="messages"
        )
    raise _refused(f"an image can't be fetched: status {reply.status}")


def _refused(message: str) -> RefusedError:
    return RefusedError(400, "invalid_image", message, param="messages")
