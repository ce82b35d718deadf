"""The YAML files load, every kind of mistake is reported, and all mistakes are reported at once."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from configs import (
    ConfigError,
    digest,
    load_config,
    read_config,
    save_config,
)
from configs.load import CONFIGS

ROOT = CONFIGS.parent
GROUPS = ("data", "model", "predictor", "tracking", "trainer")
OPTIONS = sorted((path.parent.name, path.stem) for path in CONFIGS.glob("*/*.yaml"))
# The sizes that the mistakes below are measured against, whatever the YAML files say.
SIZES = {
    "harvest.samples": 4000,
    "harvest.validation": 400,
    "harvest.test": 400,
    "evaluation.images": 300,
    "data.world.train": 6000,
    "data.world.val": 500,
}
# What a file needs beside itself to make a complete configuration.
NEEDS = {("data", name): [f"data.root=/path/to/{name}"] for name in ("coco2014", "pictures")}


def problems(*overrides: str) -> list:
    with pytest.raises(ConfigError) as caught:
        load_config(list(overrides))
    return list(caught.value.problems)


def only_problem(*overrides: str):
    found = problems(*overrides)
    assert len(found) == 1, found
    return found[0]


# ---- the files ----


def test_every_yaml_file_is_found():
    files = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
    assert files == [
        "data/coco2014.yaml",
        "data/pictures.yaml",
        "data/scenes-next.yaml",
        "data/scenes.yaml",
        "model/chameleon-30b.yaml",
        "model/chameleon-7b.yaml",
        "model/internvl3-8b.yaml",
        "model/llava-1.5-13b.yaml",
        "model/llava-1.5-7b.yaml",
        "model/llava-next-7b.yaml",
        "model/llava-onevision-7b.yaml",
        "model/qwen2-vl-7b.yaml",
        "model/qwen2.5-vl-7b.yaml",
        "model/qwen3-vl-8b.yaml",
        "model/scene-llava.yaml",
        "model/scene-next.yaml",
        "predictor/default.yaml",
        "predictor/paper.yaml",
        "tracking/local.yaml",
        "train.yaml",
        "trainer/default.yaml",
        "trainer/quick.yaml",
    ]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_loads(group: str, option: str):
    config = load_config([f"{group}={option}", *NEEDS.get((group, option), [])])
    section = getattr(config, group)
    assert getattr(section, "name", option) == option


def test_defaults_are_the_embedded_ones():
    config = load_config()
    assert (config.model.name, config.data.name) == ("scene-llava", "scenes")
    assert config.model.scr.edit_layers == [0, 2]
    assert config.data.world is not None
    assert config.harvest.images <= config.data.world.train


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("llava-1.5-7b", 11),
        ("llava-1.5-13b", 11),
        ("llava-next-7b", 11),
        ("chameleon-7b", 15),
        ("chameleon-30b", 20),
        ("qwen2-vl-7b", 15),
    ],
)
def test_models_of_the_paper_have_its_settings(name: str, last: int):
    scr = load_config([f"model={name}"]).model.scr
    assert (scr.num_sources, scr.strength, scr.connectivity, scr.exclude_border) == (32, 1.10, 8, True)
    assert (scr.edit_layers, scr.attention_layers) == ([0, last], [8, 16])


def test_scene_next_has_the_fractions_of_the_paper():
    config = load_config(["model=scene-next", "data=scenes-next"])
    scr = config.model.scr
    assert (scr.edit_layers, scr.attention_layers, scr.source_fraction) == ([0, 5], [4, 8], 0.0556)
    assert config.data.world is not None and config.data.world.sizes == "mixed"
    assert config.paths.data == Path("runs/data/scenes-next")
    assert config.paths.harvest == Path("runs/harvest/scene-next-scenes-next")


@pytest.mark.parametrize(
    ("name", "depth"),
    [("llava-onevision-7b", 28), ("qwen2.5-vl-7b", 28), ("qwen3-vl-8b", 36), ("internvl3-8b", 28)],
)
def test_other_models_have_the_fractions_of_qwen2_vl(name: str, depth: int):
    scr = load_config([f"model={name}"]).model.scr
    assert scr.edit_layers == [0, int(16 / 28 * depth + 0.5) - 1]
    assert scr.attention_layers == [int(8 / 28 * depth), int(16 / 28 * depth)]


def test_paper_predictor_sees_states_only():
    predictor = load_config(["predictor=paper"]).predictor
    assert {predictor.position, predictor.question, predictor.context} == {"none"}
    assert predictor.components == 1


# ---- overrides ----


def test_overrides_come_last_whatever_their_order():
    overrides = [
        "model.scr.num_sources=5",
        "trainer.max_epochs=3",
        "model=llava-1.5-7b",
        "runs_dir=elsewhere",
    ]
    config = load_config(overrides)
    assert config.model.name == "llava-1.5-7b"
    assert config.model.scr.num_sources == 5
    assert config.trainer.max_epochs == 3
    assert config.runs_dir == "elsewhere"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("trainer.learning_rate=1e-3", "trainer", "learning_rate", 0.001),
        ("trainer.gradient_clip=null", "trainer", "gradient_clip", None),
        ("predictor.rank=16", "predictor", "rank", 16),
        ("harvest.engine=ray", "harvest", "engine", "ray"),
        ("data.root=/path/with=sign", "data", "root", "/path/with=sign"),
        ("data.root=${runs_dir}/mine", "data", "root", "runs/mine"),
        ("tracking.experiment=7", "tracking", "experiment", "7"),
    ],
)
def test_values_are_read_as_yaml(override: str, section: str, key: str, value: object):
    config = load_config([override])
    assert getattr(getattr(config, section), key) == value


def test_section_takes_a_mapping():
    config = load_config(["model.scr={num_sources: 4, edit_layers: [1, 2]}"])
    assert (config.model.scr.num_sources, config.model.scr.edit_layers) == (4, [1, 2])
    assert config.model.scr.attention_layers == [2, 4]


# ---- one mistake of each kind ----


@pytest.mark.parametrize(
    ("override", "key", "reason", "hint"),
    [
        ("trainer.max_epoch=3", "trainer.max_epoch", "no such key", "Did you mean trainer.max_epochs?"),
        ("max_epochs=3", "max_epochs", "no such key", "Did you mean trainer.max_epochs?"),
        ("modle=scene-llava", "modle", "no such key", "Did you mean model?"),
        ("predictor=runs/predictors/x", "predictor", "no file", "goes to evaluation.predictors=[FOLDER], or"),
        ("port=7861", "port", "no such key", "port is a setting of `python -m playground`."),
        ("lr=3", "lr", "no such key", "Did you mean trainer.learning_rate?"),
        ("trainer.lr=3", "trainer.lr", "no such key", "Did you mean trainer.learning_rate?"),
        ("seed=" + "9" * 5000, "seed", "not a YAML value", ""),
        ("harvest.name=\udc80", "harvest.name", "not a YAML value", ""),
        ("seed=" + "[" * 100_000, "seed", "not a YAML value", ""),
        ("seed=" + "[" * 90 + "]" * 90, "seed", "wrong type", ""),
        ("tracking.uri=sqlite:///", "tracking.uri", "no tracking URI", ""),
        ("model.scr.lambda=1.1", "model.scr.lambda", "no such key", ""),
        ("data.world.train.x=1", "data.world.train.x", "no such key", ""),
        (
            "model=scene-lava",
            "model",
            "no file configs/model/scene-lava.yaml",
            "Did you mean model=scene-llava?",
        ),
        (
            "model=llava",
            "model",
            "no file",
            "or model=llava-next-7b or model=llava-onevision-7b? Another model: copy",
        ),
        ("model=LLaVA-1.5", "model", "no file", "Did you mean model=llava-1.5-7b or model=llava-1.5-13b?"),
        ("model=lava", "model", "no file", "model=llava-onevision-7b or model=scene-llava?"),
        ("model=scene", "model", "no file", "Did you mean model=scene-next or model=scene-llava?"),
        ("model=", "model", "no file", ""),
        ("model=../train", "model", "no file", ""),
        ("model={name: x}", "model", "no file", ""),
        ("+trainer.max_epochs=3", "+trainer.max_epochs", 'starts with "+"', "Write trainer.max_epochs=3."),
        ("++seed=3", "++seed", 'starts with "+"', "Write seed=3."),
        ("~data.world", "~data.world", 'starts with "~"', "Write data.world=VALUE."),
        ("--max_epochs=3", "--max_epochs", 'starts with "-"', "Did you mean trainer.max_epochs?"),
        ("seed", "seed", 'has no "="', "Write seed=VALUE."),
        ("model", "model", 'has no "="', "Write model=VALUE."),
        ("trainer.max_epochs", "trainer.max_epochs", 'has no "="', "Write trainer.max_epochs=VALUE."),
        ("trainer.max_epochs=many", "trainer.max_epochs", "wrong type", ""),
        ("trainer.max_epochs=2.5", "trainer.max_epochs", "wrong type", ""),
        ("trainer.max_epochs=true", "trainer.max_epochs", "wrong type", ""),
        ("trainer.max_epochs=", "trainer.max_epochs", "can't be null", ""),
        ("predictor.question=perhaps", "predictor.question", "none of the choices", ""),
        ("model.scr.exclude_border=perhaps", "model.scr.exclude_border", "wrong type", ""),
        ("predictor.target_fidelity=0.9", "predictor.target_fidelity", "two targets", "target_fallback=null"),
        ("trainer.train_images=0", "trainer.train_images", "out of range", ""),
        ("predictor.target_fallback=null", "predictor.target_fidelity", "no target", "Set it"),
        ("model.scr.edit_layers=3", "model.scr.edit_layers", "wrong type", ""),
        ("model.scr.edit_layers=[a,b]", "model.scr.edit_layers", "wrong type", ""),
        ("model.scr.edit_layers=[0,", "model.scr.edit_layers", "not a YAML value", ""),
        ("model.scr=4", "model.scr", "is a section", ""),
        ("harvest=fast", "harvest", "is a section", ""),
        (
            "model.scr={num_source: 4}",
            "model.scr.num_source",
            "no such key",
            "Did you mean model.scr.num_sources?",
        ),
        ("model.name=${nope}", "model.name", "nope", ""),
        ("data.root=${", "data.root", "not a YAML value", ""),
        ("trainer.max_epochs=0", "trainer.max_epochs", "out of range", ""),
        ("trainer.learning_rate=nan", "trainer.learning_rate", "out of range", ""),
        ("trainer.learning_rate=0", "trainer.learning_rate", "out of range", ""),
        ("trainer.warmup_fraction=1", "trainer.warmup_fraction", "out of range", ""),
        ("trainer.gradient_clip=inf", "trainer.gradient_clip", "out of range", ""),
        ("harvest.seed=-1", "harvest.seed", "out of range", ""),
        ("harvest.batch_size=-4", "harvest.batch_size", "out of range", ""),
        ("predictor.budget=0", "predictor.budget", "out of range", ""),
        ("predictor.rank=0", "predictor.rank", "out of range", ""),
        ("predictor.target_fallback=1.5", "predictor.target_fallback", "out of range", ""),
        ("model.scr.strength=1", "model.scr.strength", "out of range", ""),
        ("model.scr.strength=2.5", "model.scr.strength", "out of range", ""),
        ("model.scr.connectivity=6", "model.scr.connectivity", "none of the choices", ""),
        ("predictor.loss=kll", "predictor.loss", "none of the choices", "Did you mean predictor.loss=kl?"),
        ("model.dtype=float61", "model.dtype", "none of the choices", "Did you mean model.dtype=float16?"),
        ("model.family=llava", "model.family", "no such key", ""),
        ("model.scr.source_fraction=0.6", "model.scr.source_fraction", "out of range", ""),
        ("model.scr.source_fraction=0", "model.scr.source_fraction", "out of range", ""),
        ("evaluation.batch_size=0", "evaluation.batch_size", "out of range", ""),
        ("model.device=gpu", "model.device", "no such device", ""),
        ("model.name=a/b", "model.name", "can't be the name of a folder", ""),
        ("runs_dir=' '", "runs_dir", "is empty", ""),
        ("model.scr.edit_layers=[0,1,2]", "model.scr.edit_layers", "has 3 entries", ""),
        ("model.scr.edit_layers=[2,1]", "model.scr.edit_layers", "ends before it starts", "Swap"),
        ("model.scr.edit_layers=[-1,2]", "model.scr.edit_layers", "negative", ""),
        ("model.scr.attention_layers=[0,4]", "model.scr.attention_layers", "follow block 0", ""),
        ("model.scr.state_layer=1", "model.scr.edit_layers", "behind block 1", "lower model.scr.state_layer"),
        ("harvest.output=bucket/scr", "harvest.output", "is no URL", ""),
        ("harvest.output=s3://bucket/[0]", "harvest.output", "is no URL", ""),
        ("evaluation.questions_per_image=5", "evaluation.questions_per_image", "half", ""),
        ("evaluation.images=501", "evaluation.images", "more images", "data.world.val=501"),
        ("harvest.samples=5201", "harvest.samples", "6001 images", "data.world.train=6001"),
        ("data.world.train=4000", "harvest.samples", "4800 images", "data.world.train=4800"),
        ("data.eval_images=train", "data.eval_images", "must not be judged", ""),
        ("data.world=null", "data.root", "has to be on this machine", "data.root=/path/to/scenes"),
        ("data=coco2014", "data.root", "has to be on this machine", "data.root=/path/to/coco2014"),
    ],
)
def test_mistake_is_reported(override: str, key: str, reason: str, hint: str):
    real_images = override in ("data=coco2014", "data.world=null")
    sizes = {} if real_images else {name: size for name, size in SIZES.items() if not override.startswith(f"{name}=")}
    problem = only_problem(override, *(f"{name}={size}" for name, size in sizes.items()))
    assert problem.key == key
    assert reason in problem.reason
    assert hint in problem.hint


def test_key_of_a_null_section_is_reported():
    problem = only_problem("data=coco2014", "data.root=/x", "data.world.train=5")
    assert (problem.key, problem.reason) == ("data.world.train", "data.world is null here")


@pytest.mark.parametrize("override", ["seed=1", "model=scene-llava"])
def test_duplicate_is_reported(override: str):
    problem = only_problem(override, override)
    assert problem.key == override.partition("=")[0]
    assert "twice" in problem.reason


def test_message_names_value_legal_values_and_way_out():
    with pytest.raises(ConfigError) as caught:
        load_config(["predictor.loss=kll"])
    assert str(caught.value).splitlines() == [
        "1 problem in the configuration",
        "  predictor.loss=kll (command line): is none of the choices",
        "      legal: kl | bce | mse_log | lambdarank",
        "      Did you mean predictor.loss=kl?",
    ]


def test_all_problems_are_reported_at_once():
    found = problems(
        "model=scene-lava",
        "trainer.max_epoch=3",
        "+seed=1",
        "trainer.batch_size=x",
        "predictor.loss=hinge",
        "model.scr.edit_layers=[3,1]",
        "harvest.samples=90000",
        "evaluation.questions_per_image=5",
        "tracking",
    )
    assert {problem.key for problem in found} == {
        "model",
        "trainer.max_epoch",
        "+seed",
        "trainer.batch_size",
        "predictor.loss",
        "model.scr.edit_layers",
        "harvest.samples",
        "evaluation.questions_per_image",
        "tracking",
    }


def test_contradiction_is_left_out_while_it_rests_on_a_wrong_value():
    assert only_problem("data.world.train=0").key == "data.world.train"


def test_a_model_chooses_its_data_set_unless_another_is_given():
    assert load_config(["model=scene-next"]).data.name == "scenes-next"
    assert load_config(["data=scenes", "model=scene-next"]).data.name == "scenes"
    assert load_config(["model=scene-llava"]).data.name == "scenes"


# ---- mistakes in YAML files ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of configs/ to make mistakes in."""
    for path in CONFIGS.rglob("*.yaml"):
        copy = tmp_path / path.relative_to(CONFIGS)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "keys"),
    [
        ("trainer/default.yaml", "max_epoch: 3", {"trainer.max_epoch"}),
        ("model/scene-llava.yaml", "scr: {strength: 9}", {"model.scr.strength"}),
        ("data/scenes.yaml", "world: 3", {"data.world"}),
        ("model/scene-llava.yaml", "groups: {data: scenes-nex}", {"data"}),
        ("model/scene-llava.yaml", "groups: {model: scene-next}", {"groups.model"}),
        ("model/scene-llava.yaml", "groups: scenes-next", {"groups"}),
        ("train.yaml", "seed: x", {"seed"}),
        ("train.yaml", "sed: 3", {"sed"}),
    ],
)
def test_mistake_in_a_file_names_the_file(folder: Path, name: str, text: str, keys: set[str]):
    path = folder / name
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(path), OmegaConf.create(text)), path)
    with pytest.raises(ConfigError) as caught:
        load_config(folder=folder)
    assert {problem.key for problem in caught.value.problems} == keys
    assert {problem.where for problem in caught.value.problems} == {str(path)}


@pytest.mark.parametrize("text", ["a: [", "name: x\nname: y", "- 1\n- 2"])
def test_unreadable_file_is_told_without_a_trail_of_missing_keys(folder: Path, text: str):
    path = folder / "model" / "scene-llava.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(["trainer.max_epochs=0"], folder=folder)
    assert [problem.key for problem in caught.value.problems] == [str(path), "trainer.max_epochs"]


def test_missing_key_is_reported(folder: Path):
    (folder / "data" / "scenes.yaml").write_text("name: scenes\nworld: {train: 6000, val: 500}", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(folder=folder)
    assert "data.train_images" in {problem.key for problem in caught.value.problems}
    assert {problem.reason for problem in caught.value.problems} == {"has no value"}


def test_missing_defaults_file_is_reported(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"train\.yaml: does not exist"):
        load_config(folder=tmp_path)


# ---- what is written ----


def test_saved_config_comes_back(tmp_path: Path):
    overrides = [
        "data=coco2014",
        "data.root=${runs_dir}/coco",
        "predictor=paper",
        "trainer.gradient_clip=null",
    ]
    config = load_config(overrides)
    save_config(config, tmp_path / "deep" / "config.yaml")
    assert read_config(tmp_path / "deep" / "config.yaml") == config
    assert "${" not in (tmp_path / "deep" / "config.yaml").read_text(encoding="utf-8")


def test_runs_dir_moves_everything(tmp_path: Path):
    config = load_config([f"runs_dir={tmp_path}"])
    paths = config.paths
    for name in paths.__dataclass_fields__:
        assert getattr(paths, name).is_relative_to(tmp_path), name
    assert config.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_places_of_the_defaults():
    config = load_config()
    paths = config.paths
    assert paths.data == Path("runs/data/scenes")
    assert paths.train_annotations == Path("runs/data/scenes/annotations/instances_train.json")
    assert paths.harvest == Path("runs/harvest/scene-llava-scenes")
    assert paths.predictor == Path("runs/predictors/scene-llava")
    assert paths.fits == Path("runs/fits/scene-llava")
    assert paths.latest == Path("runs/fits/scene-llava/latest")
    assert config.tracking_uri == "sqlite:///runs/mlflow.db"
    assert config.experiment == "scene-llava"


def test_the_copy_of_a_harvest_has_the_folders_name():
    config = load_config(["harvest.output=s3://bucket/scr/"])
    assert config.harvest_url == "s3://bucket/scr/scene-llava-scenes"
    assert load_config().harvest_url is None
    with pytest.raises(ConfigError, match="seen by one process"):
        load_config(["harvest.output=memory://x", "harvest.engine=ray"])


def test_harvests_of_other_states_have_folders_of_their_own():
    later = ["model.scr.state_layer=1", "model.scr.edit_layers=[1,2]"]
    assert load_config(later).paths.harvest == Path("runs/harvest/scene-llava-scenes-block1")
    with pytest.raises(ConfigError, match=r"(?s)attention_layers.*follow block 2.*\[first, last\] with 3 <= "):
        load_config(["model.scr.state_layer=2", "model.scr.edit_layers=[2,3]"])


def test_model_folder_is_taken_from_the_project_root():
    inside = load_config(["model.hub_id=configs"]).model.location
    outside = load_config(["model=llava-1.5-7b"]).model.location
    assert (inside, outside) == (str(ROOT / "configs"), "llava-hf/llava-1.5-7b-hf")


def test_a_saved_configuration_is_a_starting_point(tmp_path: Path):
    former = load_config(["predictor=paper", "seed=3", "trainer.max_epochs=7"])
    save_config(former, tmp_path / "config.yaml")
    for place in (tmp_path / "config.yaml", tmp_path):  # the file, or the folder of the run
        assert load_config([f"--config={place}"]) == former
    changed = load_config([f"--config={tmp_path}", "predictor=default", "seed=4"])
    assert (changed.predictor, changed.seed) == (load_config().predictor, 4)
    assert changed.trainer.max_epochs == 7
    assert only_problem(f"--config={tmp_path / 'nothing.yaml'}").reason == "does not exist"


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ("data.world.val=20", "evaluation"),  # evaluation.images=300
        ("data.world.train=120", "harvest"),  # harvest.samples=4000
        ("trainer.cache=stream", "trainer"),
    ],
)
def test_contradictions_count_for_the_commands_that_use_the_section(override: str, section: str):
    overrides = [override, *(["predictor.target=mean"] if section == "trainer" else [])]
    only_problem(*overrides)
    with pytest.raises(ConfigError):
        load_config(overrides, uses=("model", section))
    load_config(overrides, uses=("model", "data"))


def test_digest_is_stable_and_sees_every_value():
    config = load_config()
    assert digest({"b": [1, 2], "a": None}) == digest({"a": None, "b": (1, 2)})
    other = load_config(["harvest.seed=1"])
    assert digest(config.harvest, config.model) != digest(other.harvest, other.model)
    assert digest(config.harvest) == digest(load_config().harvest)


def test_loading_a_config_is_light():
    code = """
import sys
from configs import load_config

load_config()
heavy = ("torch", "numpy", "transformers", "mlflow", "pytorch_lightning")
print([name for name in heavy if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr


def test_a_data_set_sets_the_size_of_its_harvest_and_the_command_line_has_the_last_word():
    overrides = ["data=coco2014", "data.root=/x", "harvest.test=7"]
    harvest = load_config(overrides).harvest
    assert (harvest.samples, harvest.validation, harvest.test, harvest.tuning) == (5000, 500, 7, 200)
    assert load_config([]).harvest.tuning == 0


def test_prompts_are_of_known_kinds():
    assert load_config(["harvest.prompts=[caption,random]"]).harvest.prompts[0] == "caption"
    problem = only_problem("harvest.prompts=[presnt]")
    assert problem.key == "harvest.prompts" and "'presnt'" in problem.reason and "adversarial" in problem.legal
    assert only_problem("harvest.prompts=[]").reason == "is empty"
    assert only_problem("harvest.prompts=[caption]").key == "harvest.prompts_per_image"
