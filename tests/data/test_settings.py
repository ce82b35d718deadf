"""What the rooms' own settings accept; tests/configs has the same mistakes as a user of the commands meets them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from data.settings import HarvestSettings, ReadingSettings, VLMSettings


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (VLMSettings, {"hub_id": "x", "dtype": "int3"}, r"dtype\n.*'auto', 'float32'"),
        (VLMSettings, {"hub_id": "x", "device": "gpu"}, r"device\n.*no such device"),
        (ReadingSettings, {"cache": "gpu"}, r"cache\n.*'auto', 'device', 'memory', 'none' or 'stream'"),
        (ReadingSettings, {"train_images": 0}, r"train_images\n.*greater than or equal to 1"),
        (ReadingSettings, {"train_images": 2, "cache": "stream"}, "a stream takes all images"),
        (ReadingSettings, {"stream_from": "{shard}.tar"}, r"stream_from\n.*needs trainer\.cache=stream"),
        (ReadingSettings, {"stream_from": "https://host/folder", "cache": "stream"}, r"where the shard's name goes"),
        (HarvestSettings, {"states_dtype": "float64"}, r"states_dtype\n.*'float16', 'bfloat16', 'float32' or 'int8'"),
        (HarvestSettings, {"validation": 0}, r"validation\n.*greater than or equal to 1"),
        (HarvestSettings, {"workers": 2}, r"needs harvest\.engine=ray"),
    ],
)
def test_mistakes_name_the_key(section: type[BaseModel], values: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        section(**values)


def test_splits_are_those_of_every_harvest():
    settings = HarvestSettings(samples=5, validation=2, test=1)
    assert settings.splits == {"train": 5, "validation": 2, "test": 1} and settings.images == 8
