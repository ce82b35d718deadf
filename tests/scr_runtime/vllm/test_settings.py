"""What the environment and a request may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from scr_runtime.errors import ConfigurationError
from scr_runtime.vllm.settings import EngineSettings, RequestSettings, request_settings


@pytest.mark.parametrize("environ", [{}, {"SCR_PREDICTOR": ""}, {"SCR_ON_LOW_CONFIDENCE": "skip"}])
def test_without_a_predictor_nothing_is_asked_for(environ: dict[str, str]) -> None:
    assert EngineSettings.from_environment(environ) is None


def test_the_environment_is_read() -> None:
    read = EngineSettings.from_environment(
        {"SCR_PREDICTOR": "org/p", "SCR_REVISION": "main", "SCR_ON_LOW_CONFIDENCE": "skip", "SCR_THRESHOLD": "0.7"}
    )
    assert read == EngineSettings("org/p", "main", "skip", 0.7)
    assert EngineSettings.from_environment({"SCR_PREDICTOR": "p", "SCR_THRESHOLD": ""}) == EngineSettings("p")


@pytest.mark.parametrize(
    ("name", "value"),
    [("SCR_ON_LOW_CONFIDENCE", "drop"), ("SCR_THRESHOLD", "high"), ("SCR_THRESHOLD", "nan"), ("SCR_THRESHOLD", "inf")],
)
def test_other_values_are_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}='{value}': expected"):
        EngineSettings.from_environment({"SCR_PREDICTOR": "p", name: value})


def test_the_digest_is_of_the_weights_and_of_the_settings() -> None:
    info = {"weights_sha256": "0" * 64, "scr": {"strength": 1.1}}
    plain = EngineSettings("here").sealed(info, reads_question=False)
    assert not plain.reads_question and len(plain.digest) == 16
    assert EngineSettings(**plain.to_dict()) == plain
    assert EngineSettings("elsewhere").sealed(info, reads_question=False).digest == plain.digest
    others = [
        EngineSettings("here").sealed(info | {"weights_sha256": "1" * 64}, reads_question=False),
        EngineSettings("here").sealed(info | {"scr": {"strength": 1.2}}, reads_question=False),
        EngineSettings("here", on_low_confidence="skip").sealed(info, reads_question=False),
        EngineSettings("here", threshold=0.7).sealed(info, reads_question=False),
    ]
    assert len({plain.digest, *(other.digest for other in others)}) == 5


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, RequestSettings()),
        ({"kv_transfer_params": 1}, RequestSettings()),
        ({"scr": "one-pass"}, RequestSettings()),
        ({"scr": "off"}, RequestSettings(edited=False)),
        ({"scr": "off", "scr_strength": 1.2}, RequestSettings(edited=False)),
        ({"scr_strength": 1.2}, RequestSettings(strength=1.2)),
    ],
)
def test_a_request_is_read(given: Any, read: RequestSettings) -> None:
    assert request_settings(given) == read


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scr": "of"}, "scr='of'"),
        ({"scr": 0}, "scr=0"),
        ({"scr": "auto"}, "expected 'one-pass' or 'off'"),
        ({"scr_strength": 9.0}, "strength=9.0: expected 1.0 to 2.0"),
        ({"scr_strength": "1.1"}, "strength='1.1': expected a number"),
        ({"scr_stregth": 1.1}, "unknown keys"),
    ],
)
def test_a_mistake_in_a_request_is_an_error(given: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        request_settings(given)


def test_only_settings_of_its_own_keep_a_request_apart() -> None:
    kinds = [{}, {"scr": "off"}, {"scr_strength": 1.2}, {"scr_strength": 1.3}]
    salts = [request_settings(kind).salt for kind in kinds]
    assert salts[0] is None and len(set(salts)) == 4
