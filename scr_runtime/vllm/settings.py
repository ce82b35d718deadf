"""What is asked for: by environment variables for a whole engine, by ``vllm_xargs`` for one request."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scr_runtime.config import SCRConfig
from scr_runtime.errors import ConfigurationError

KEY = "scr"
"""Of the plug-in's settings in ``VllmConfig.additional_config``, where workers and the scheduler find them."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings of one engine. They travel to its processes in ``VllmConfig.additional_config``.

    Attributes:
        predictor: Where the predictor is: a folder, ``models:/NAME@ALIAS``, or a repository of the Hub.
        revision: Commit, tag or branch of a Hub repository.
        on_low_confidence: What becomes of an image under the threshold, since there is no diagnostic run to fall back
            to: it is edited all the same, or it is left as it is. Both are counted.
        threshold: Confidence under which an image counts as low; ``None`` is the predictor's own.
        digest: Of the predictor's weights and of these settings; filled by ``sealed``.
        reads_question: Whether the predictor reads the question; filled by ``sealed``.
    """

    predictor: str
    revision: str | None = None
    on_low_confidence: Literal["edit", "skip"] = "edit"
    threshold: float | None = None
    digest: str = ""
    reads_question: bool = True

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> EngineSettings | None:
        """Reads SCR_PREDICTOR, SCR_REVISION, SCR_ON_LOW_CONFIDENCE and SCR_THRESHOLD.

        Returns:
            ``None`` if SCR_PREDICTOR is not set, or empty: vLLM is then left alone.

        Raises:
            ConfigurationError: If a value is not legal.
        """
        place = environ.get("SCR_PREDICTOR")
        if not place:
            return None
        policy = environ.get("SCR_ON_LOW_CONFIDENCE", "edit")
        if policy not in ("edit", "skip"):
            raise ConfigurationError(f"SCR_ON_LOW_CONFIDENCE={policy!r}: expected 'edit' or 'skip'")
        threshold = environ.get("SCR_THRESHOLD")
        try:
            limit = None if not threshold else float(threshold)
        except ValueError:
            limit = math.nan
        if limit is not None and not math.isfinite(limit):
            raise ConfigurationError(f"SCR_THRESHOLD={threshold!r}: expected a finite number")
        return cls(place, environ.get("SCR_REVISION") or None, policy, limit)

    def sealed(self, predictor_info: Mapping[str, Any], *, reads_question: bool) -> EngineSettings:
        """These settings with the digest of what a predictor's config.json says."""
        stated = [predictor_info["weights_sha256"], predictor_info["scr"], self.on_low_confidence, self.threshold]
        digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]
        return dataclasses.replace(self, digest=digest, reads_question=reads_question)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RequestSettings:
    """What one request asks for.

    Attributes:
        edited: Whether its images are edited.
        strength: lambda of eq. (1) for its images; ``None`` is the engine's.
    """

    edited: bool = True
    strength: float | None = None

    @property
    def salt(self) -> str | None:
        """Keeps its prefix-cache entries apart from those under other settings; ``None`` for the engine's own."""
        return None if self == RequestSettings() else f"scr:{'on' if self.edited else 'off'}:{self.strength}"


def request_settings(extra_args: Mapping[str, Any] | None) -> RequestSettings:
    """Reads ``scr`` ("one-pass" or "off") and ``scr_strength`` of a request's ``vllm_xargs``.

    Raises:
        ConfigurationError: If a value is not legal, or another key begins with ``scr``.
    """
    given = {key: value for key, value in (extra_args or {}).items() if key.startswith("scr")}
    if not given:
        return RequestSettings()
    unknown = sorted(set(given) - {"scr", "scr_strength"})
    if unknown:
        raise ConfigurationError(f"vllm_xargs: unknown keys {unknown}; SCR reads 'scr' and 'scr_strength'")
    mode, strength = given.get("scr", "one-pass"), given.get("scr_strength")
    if mode not in ("one-pass", "off"):
        raise ConfigurationError(f"vllm_xargs: scr={mode!r}: expected 'one-pass' or 'off'")
    if strength is not None:
        SCRConfig(strength=strength)  # names the legal values
    if mode == "off" or strength is None:
        return RequestSettings(edited=mode != "off")
    return RequestSettings(strength=float(strength))
