"""What a client may ask: OpenAI's chat completions, as far as they are served, and nothing that is ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from scr_runtime.config import Mode

_MOST_FIELDS = 64


class RefusedError(Exception):
    """A request that is not served, as OpenAI's error body says it.

    Args:
        status: HTTP status.
        code: In a word, for programs.
        message: In a sentence, for people.
        param: The field that it is about.
        retry: Seconds after which to try again.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry = status, code, param, retry

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    """Refuses unknown keys; a null is as good as nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        items: dict[str, Any] = given  # pyright: ignore[reportUnknownVariableType]
        if len(items) > _MOST_FIELDS:  # each would be an error of its own
            raise ValueError(f"an object of {len(items):,} fields")
        return {key: value for key, value in items.items() if value is not None}


class TextPart(_Strict):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    """Where an image is: a `data:` URL, or one of an origin that the server allows."""

    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(_Strict):
    """A turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(max_length=64)

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Asked(_Strict):
    """The extra field `scr`.

    Attributes:
        mode: None takes the server's.
        threshold: Confidence under which `auto` falls back; None takes the server's, or the predictor's own.
        reports: Whether the answer says what was done to each image.
    """

    mode: Mode | None = None
    threshold: float | None = Field(default=None, ge=0, le=1)
    reports: bool = False


class StreamOptions(_Strict):
    """Of a streamed answer."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """One request. What OpenAI's interface has beyond these fields, and is no default, is refused."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    frequency_penalty: float = Field(default=0.0, ge=0, le=0)
    presence_penalty: float = Field(default=0.0, ge=0, le=0)
    scr: Asked = Asked()

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, if asked for."""
        return min(filter(None, (self.max_completion_tokens, self.max_tokens)), default=None)

    @property
    def heat(self) -> float:
        """The temperature in force: 0, which is greedy, unless sampling is asked for."""
        return self.temperature if self.temperature is not None else 0.0 if self.top_p is None else 1.0

    @property
    def text(self) -> str:
        """All texts of the conversation."""
        return "\n".join(part.text for turn in self.messages for part in turn.content if isinstance(part, TextPart))


def read_request(body: bytes) -> ChatRequest:
    """Reads a request's JSON.

    Raises:
        RefusedError: It has another form; the message has the first problems.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[:3]
        problems = {".".join(map(str, one["loc"])): _words(one["type"], one["msg"]) for one in found}
        words = "; ".join(f"{place or 'body'}: {problem}" for place, problem in problems.items())
        raise RefusedError(400, "invalid_request", words, param=next(iter(problems)) or None) from error


def _words(kind: str, message: str) -> str:
    return "this field is unknown or not supported by this server" if kind == "extra_forbidden" else message
