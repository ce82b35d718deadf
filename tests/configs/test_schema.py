"""One owner of each value: what the sections call legal, and their defaults, are what the rooms' code knows."""

import dataclasses
from typing import get_args

import pytest

from configs import ConfigError, SCRSection, TrainConfig, load_config
from configs.load import CONFIGS, KEYS
from configs.schema import WorldConfig
from data import settings
from data.questions import PROMPT_KINDS
from data.sample import STATES_DTYPES
from data.settings import HarvestSettings, ReadingSettings
from data.vlm import DTYPES
from predictor.losses import LOSSES
from predictor.settings import FitSettings, LossName, PredictorSettings
from scenes.drawing import LOOKS, Sizes
from scr_runtime import PredictorConfig, SCRConfig


def test_losses_are_those_of_the_predictor():
    assert set(get_args(LossName)) == set(LOSSES)


def test_number_formats_are_those_of_the_data():
    assert set(get_args(settings.StatesDtype)) == set(STATES_DTYPES)
    assert set(get_args(settings.Dtype)) == {"auto", *DTYPES}


def test_sizes_of_a_world_are_the_looks_of_scenes():
    assert get_args(WorldConfig.model_fields["sizes"].annotation) == get_args(Sizes) == tuple(LOOKS)


def test_prompts_are_those_of_the_data():
    assert get_args(settings.PromptKind) == PROMPT_KINDS


@pytest.mark.parametrize("model", sorted(path.stem for path in CONFIGS.glob("model/*.yaml")))
def test_scr_settings_are_those_of_the_runtime(model: str):
    config = load_config([f"model={model}"] if model.startswith("scene-") else [f"model={model}", "data.root=/x"])
    section = config.model.scr.model_dump()
    assert config.scr == SCRConfig.from_dict(section)
    assert config.scr.to_dict() == section


def test_scr_section_has_every_setting_and_default_of_the_runtime():
    runtime = {field.name: field.default for field in dataclasses.fields(SCRConfig)}
    assert set(SCRSection.model_fields) == set(runtime)
    for name, field in SCRSection.model_fields.items():
        assert field.is_required() or field.default == runtime[name], name


def test_predictor_section_has_every_setting_and_default_of_the_runtime():
    runtime = {field.name: field.default for field in dataclasses.fields(PredictorConfig)} | {"hidden_size": None}
    assert set(PredictorSettings.model_fields) - set(runtime) == {
        "loss", "target", "target_fallback", "target_fidelity",
    }  # fmt: skip
    assert set(runtime) - set(PredictorSettings.model_fields) == {"hidden_size"}
    assert PredictorSettings().network(512) == PredictorConfig(512)


def test_the_rooms_defaults_are_those_of_train():
    config = load_config()
    assert config.predictor == PredictorSettings()
    assert config.trainer.model_dump() == {**FitSettings().model_dump(), **ReadingSettings().model_dump()}
    assert config.harvest == HarvestSettings()


def test_a_section_is_the_rooms_own_settings_object():
    config = load_config()
    assert isinstance(config.trainer, FitSettings) and isinstance(config.trainer, ReadingSettings)
    assert isinstance(config.model, settings.VLMSettings) and type(config.harvest) is HarvestSettings


@pytest.mark.parametrize(
    ("path", "legal"),
    [
        ("trainer.max_epochs", "integer, >= 1"),
        ("model.scr.strength", "number, > 1 and <= 2"),
        ("trainer.warmup_fraction", "number, >= 0 and < 1"),
        ("predictor.loss", "kl | bce | mse_log | lambdarank"),
        ("model.scr.connectivity", "8 | 4" if SCRConfig.connectivity == 4 else "4 | 8"),
        ("harvest.batch_tokens", "integer or null, >= 1"),
        ("harvest.prompts", "list of texts"),
        ("tracking.register", "text or null"),
        ("model.scr.exclude_border", "true or false"),
    ],
)
def test_legal_values_are_read_off_the_models(path: str, legal: str):
    assert KEYS[path].legal == legal


def test_workers_are_rays():
    with pytest.raises(ConfigError) as caught:
        load_config(["harvest.workers=8", "harvest.gpus_per_worker=1"])
    assert [problem.key for problem in caught.value.problems] == ["harvest.workers", "harvest.gpus_per_worker"]
    assert "needs harvest.engine=ray" in str(caught.value) and "torchrun" in str(caught.value)
    config = load_config(["harvest.engine=ray", "harvest.workers=8"])
    assert (config.harvest.workers, config.harvest.gpus_per_worker, config.harvest.max_retries) == (8, None, 2)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["trainer.stream_from=https://host/{shard}.tar"], "needs trainer.cache=stream"),
        (["trainer.cache=stream", "trainer.stream_from=https://host/"], "does not say where the shard's name goes"),
    ],
)
def test_a_source_belongs_to_a_stream_and_names_its_shards(given: list[str], reason: str):
    with pytest.raises(ConfigError, match=f"trainer.stream_from.*{reason}"):
        load_config(given)
    fine = load_config(["trainer.cache=stream", "trainer.stream_from=https://host/{shard}.tar"])
    assert fine.trainer.stream_from == "https://host/{shard}.tar"


def test_a_stream_takes_all_images_and_the_map_of_each_prompt():
    with pytest.raises(ConfigError, match=r"trainer.train_images=100 .*a stream takes all images"):
        load_config(["trainer.cache=stream", "trainer.train_images=100"])
    with pytest.raises(ConfigError, match=r"trainer.cache=stream .*map of each prompt alone"):
        load_config(["trainer.cache=stream", "predictor.target=mean"])


def test_settings_are_frozen():
    config: TrainConfig = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.harvest.samples = 3  # type: ignore[misc]
