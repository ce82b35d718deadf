from __future__ import annotations

import pytest

from scr_runtime.serve.settings import ServeSettings, SettingsError, help_text, parse


def test_keys_are_written_as_elsewhere_or_as_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCR_API_KEY", raising=False)
    settings = parse(
        [
            "model=a/b",
            "mode=one-pass",
            "port=0",
            "--max-megapixels=2.5",
            "--api-key=k",
            "image_hosts=https://a,https://b",
        ]
    )
    assert (settings.model, settings.mode, settings.port, settings.max_megapixels) == ("a/b", "one-pass", 0, 2.5)
    assert settings.api_key == "k" and "k" not in repr(settings).replace("key", "").replace("tokens", "").split("'")
    assert settings.image_hosts == ("https://a", "https://b") and settings.host == "127.0.0.1"
    assert settings.served_name == "a/b"


def test_the_key_comes_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCR_API_KEY", "from there")
    assert parse(["model=m"]).api_key == "from there" and parse(["model=m", "api_key=here"]).api_key == "here"
    monkeypatch.setenv("SCR_API_KEY", "")
    with pytest.raises(SettingsError, match="api_key: String should have at least 1 character"):
        parse(["model=m"])  # an empty variable is a mistake, and no open server


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "model: Field required"),
        (["model=m", "prot=1"], r"prot=1: no such key; did you mean port=\.\.\."),
        (["modle=m"], r"modle=m: no such key; did you mean mode=\.\.\. or model=\.\.\.\?"),
        (["model=m", "serve"], "serve: expected key=value"),
        (["model=m", "port=70000"], "port: Input should be less than or equal to 65535"),
        (["model=m", "mode=both", "queue=0"], "(?s)mode: Input should be 'one-pass'.*queue: Input should be greater"),
        (["model=m", "timeout=nan"], "timeout"),
    ],
)  # fmt: skip
def test_every_mistake_is_named(arguments: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        parse(arguments)
    assert "--help lists the keys" in str(caught.value)


def test_a_folders_path_is_no_name(tmp_path: object) -> None:
    assert ServeSettings(model=str(tmp_path)).served_name == str(tmp_path).rpartition("/")[2]
    assert ServeSettings(model=str(tmp_path), name="mine").served_name == "mine"
    assert ServeSettings(model="m").default_mode == "two-pass"
    assert ServeSettings(model="m", predictor="p").default_mode == "auto"


def test_help_has_every_key() -> None:
    text = help_text()
    assert all(f"\n  {key}=" in text for key in ServeSettings.model_fields)
    assert max(map(len, text.splitlines())) <= 119
