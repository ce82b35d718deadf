"""The written schema of config.json says what the code says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scr_runtime import PredictorConfig, SCRConfig, errors, load_predictor
from scr_runtime.config import Connectivity, ContextFeatures, PositionFeatures, QuestionFeatures
from scr_runtime.reading import _ADDED_IN_3, _MODEL_KEYS, _READ_VERSIONS, _REQUIRED, PROBE
from tests.scr_runtime.folders import FUZZ, Written, places, replaced, values

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "scr_runtime" / "config.schema.json"
SCHEMA: dict[str, Any] = json.loads(FILE.read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("schema") / "p")


def test_the_copy_in_docs_is_the_package_s() -> None:
    assert (ROOT / "docs" / FILE.name).read_bytes() == FILE.read_bytes()


def test_it_names_the_code_s_keys_and_values() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    sections = SCHEMA["properties"]
    assert tuple(sections["format_version"]["enum"]) == _READ_VERSIONS
    assert tuple(SCHEMA["required"]) == _REQUIRED
    assert tuple(SCHEMA["allOf"][0]["then"]["required"]) == _ADDED_IN_3
    for name, settings in (("network", PredictorConfig), ("scr", SCRConfig)):
        assert list(sections[name]["properties"]) == [field.name for field in dataclasses.fields(settings)]
    assert sections["network"]["required"] == list(sections["network"]["properties"])
    choices = {"position": PositionFeatures, "question": QuestionFeatures, "context": ContextFeatures}
    for name, legal in choices.items():
        assert tuple(sections["network"]["properties"][name]["enum"]) == get_args(legal)
    assert set(sections["scr"]["properties"]["connectivity"]["enum"]) == set(get_args(Connectivity))
    assert set(_MODEL_KEYS) < set(sections["model"]["properties"])
    assert sections["model"]["properties"]["embedding_probe"]["minItems"] == PROBE


def test_what_is_written_fits_and_has_no_key_that_it_does_not_name(written: Written) -> None:
    VALIDATOR.validate(written.record)
    assert set(written.record) == set(SCHEMA["properties"])
    assert set(written.record["model"]) == set(SCHEMA["properties"]["model"]["properties"])


@FUZZ
@given(data=st.data())
def test_what_the_schema_refuses_is_refused_by_the_loader(written: Written, data: Any) -> None:
    place = data.draw(st.sampled_from([one for one in places(written.record) if one != ("checksum",)]))
    record = replaced(written.record, place, data.draw(values))
    if json.loads(json.dumps(record)) != record or VALIDATOR.is_valid(record):
        return
    written.write_record(record)
    with pytest.raises(errors.PredictorError):
        load_predictor(written.folder)
