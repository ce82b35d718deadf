from __future__ import annotations

from typing import Any

from data.folder import FoundShards, difference, shards_to_retry


def test_the_difference_of_settings_has_dotted_keys_and_both_values():
    old = {"splits": {"train": 20, "validation": 6}, "attention_layers": [1, 2], "seed": 0}
    assert difference(old, {"splits": {"train": 10}, "attention_layers": (1, 2), "seed": 0}) == {
        "splits.train": (20, 10),
        "splits.validation": (6, None),
    }


def test_a_harvest_without_a_state_layer_is_one_of_block_0():
    assert difference({"seed": 0}, {"seed": 0, "state_layer": 0}) == {}
    assert difference({"seed": 0}, {"seed": 0, "state_layer": 1}) == {"state_layer": (0, 1)}
    assert difference({"seed": 0, "state_layer": 1}, {"seed": 0}) == {"state_layer": (1, 0)}


def test_shards_with_bad_images_at_the_url_are_tried_again_if_there_were_too_many():
    skipped: dict[str, Any] = {"train-00000": [{}], "test-00000": [{}], "x": []}
    remote: Any = {name: {"skipped": bad} for name, bad in skipped.items()}
    found = FoundShards(remote=remote)
    job: Any = type("Job", (), {"allowed_bad": 1})
    assert shards_to_retry(job, found) == {"train-00000", "test-00000"}
    job.allowed_bad = 2
    assert shards_to_retry(job, found) == frozenset()
