"""The schema speaks the language of the rooms: what it calls legal is what the code there knows."""

import dataclasses

import pytest

from configs import ConfigError, TrainConfig, load_config, schema
from configs.load import CONFIGS
from configs.schema import Rule
from data import datamodule, questions, shards, vlm
from predictor import fit
from predictor.losses import LOSSES
from scr_runtime import PredictorConfig, SCRConfig
from scr_runtime.families import FAMILIES


def test_families_are_those_of_the_runtime():
    assert set(schema.FAMILIES) == set(FAMILIES)


def test_losses_are_those_of_the_predictor():
    assert set(schema.LOSSES) == set(LOSSES)


def test_number_formats_are_those_of_the_data():
    assert set(schema.STATES_DTYPES) == set(shards.STATES_DTYPES)
    assert set(schema.DTYPES) == {"auto", *vlm.DTYPES}


def test_prompts_and_caches_are_those_of_the_data():
    assert schema.PROMPT_KINDS == questions.PROMPT_KINDS
    assert tuple(schema.HarvestConfig().prompts) == questions.DEFAULT_MIX
    assert schema.CACHES == datamodule.CACHES


def test_precisions_are_those_of_the_fit():
    assert schema.PRECISIONS == fit.PRECISIONS


@pytest.mark.parametrize("model", sorted(path.stem for path in CONFIGS.glob("model/*.yaml")))
def test_scr_settings_are_those_of_the_runtime(model: str):
    section = dataclasses.asdict(load_config(TrainConfig, overrides=[f"model={model}"]).model.scr)
    config = SCRConfig.from_dict(section)
    assert config.to_dict() == section | {"source_fraction": None}  # K of a fit is a number
    defaults = {field.name: field.default for field in dataclasses.fields(schema.SCRSection)}
    for name in ("strength", "connectivity", "exclude_border", "suppress_claimed"):
        assert defaults[name] == getattr(SCRConfig(), name)


def test_predictor_settings_are_those_of_the_runtime():
    known = {field.name for field in dataclasses.fields(PredictorConfig)}
    section = {field.name for field in dataclasses.fields(schema.PredictorSection)}
    assert section - known == {"loss", "target", "target_fallback", "target_fidelity"}
    assert known - section == {"hidden_size"}


@pytest.mark.parametrize(
    ("rule", "legal", "illegal", "text"),
    [
        (Rule(low=1), [1, 2.5, None], [0, float("nan"), float("inf")], ">= 1"),
        (Rule(above=1, high=2), [1.1, 2], [1, 2.1], "> 1 and <= 2"),
        (Rule(low=0, below=1), [0, 0.99], [1, -1], ">= 0 and < 1"),
        (Rule(choices=("a", "b")), ["a", None], ["c", 1], "a | b"),
        (Rule(), [1, "text", [1], None], [float("nan")], ""),
    ],
)
def test_rule(rule: Rule, legal: list, illegal: list, text: str):
    assert all(rule.admits(value) for value in legal)
    assert not any(rule.admits(value) for value in illegal)
    assert str(rule) == text


def test_workers_are_rays():
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, overrides=["harvest.workers=8", "harvest.gpus_per_worker=1"])
    assert [problem.key for problem in caught.value.problems] == ["harvest.workers", "harvest.gpus_per_worker"]
    assert "needs harvest.engine=ray" in str(caught.value) and "torchrun" in str(caught.value)
    config = load_config(TrainConfig, overrides=["harvest.engine=ray", "harvest.workers=8"])
    assert (config.harvest.workers, config.harvest.gpus_per_worker, config.harvest.max_retries) == (8, None, 2)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["trainer.stream_from=https://host/{shard}.tar"], "needs trainer.cache=stream"),
        (["trainer.cache=stream", "trainer.stream_from=https://host/"], "does not say where the shard's name goes"),
    ],
)
def test_a_source_belongs_to_a_stream_and_names_its_shards(settings: list[str], reason: str):
    with pytest.raises(ConfigError, match=f"trainer.stream_from.*{reason}"):
        load_config(TrainConfig, overrides=settings)
    fine = load_config(TrainConfig, overrides=["trainer.cache=stream", "trainer.stream_from=https://host/{shard}.tar"])
    assert fine.trainer.stream_from == "https://host/{shard}.tar"
