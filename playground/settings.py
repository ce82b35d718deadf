"""What the page asks for: a picture, a question, and the settings of its sliders. Nothing here imports torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

CAPTION_TOKENS, ANSWER_TOKENS = 40, 12
QUESTION_CHARACTERS = 400


class AskError(ValueError):
    """What a page sent is no screen."""


class Ask(BaseModel):
    """One screen of the page."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    picture: str
    question: str = Field(min_length=1, max_length=QUESTION_CHARACTERS)
    caption: bool = False
    strength: float = Field(ge=1, le=2)
    num_sources: int | None = Field(default=None, ge=1)
    """K; null: as the predictor's settings have it, which may be a share of the patches."""
    edit_layers: tuple[int, int]
    attention_layers: tuple[int, int]
    threshold: float = Field(ge=0, le=1)

    @classmethod
    def read(cls, content: bytes) -> Ask:
        """Reads what a page sent.

        Raises:
            AskError: With every problem.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            raise AskError("; ".join(problems)) from error

    @property
    def tokens(self) -> int:
        """Longest answer."""
        return CAPTION_TOKENS if self.caption else ANSWER_TOKENS
