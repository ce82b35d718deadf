"""A command line with several values becomes a grid; every combination is checked, each problem reported once."""

import pytest

from configs import ConfigError, load_config, load_sweep, parse_cli
from configs.grid import short_names
from configs.load import split_values


def problems(*overrides: str) -> list:
    with pytest.raises(ConfigError) as caught:
        load_sweep(overrides)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("kl", ["kl"]),
        ("kl,bce", ["kl", "bce"]),
        ("1e-3, 3e-3", ["1e-3", "3e-3"]),
        ("[a,b]", ["[a,b]"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("{num_sources: 4, edit_layers: [1, 2]},null", ["{num_sources: 4, edit_layers: [1, 2]}", "null"]),
        ("'a,b'", ["'a,b'"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("['a],b',c]", ["['a],b',c]"]),
        ("it's,that", ["it's", "that"]),
        ("${oc.env:A,b}", ["${oc.env:A,b}"]),
        ("0,", ["0", ""]),
        ("[0,", ["[0,"]),
        ("", [""]),
    ],
)
def test_commas_split_outside_of_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_one_value_each_is_no_sweep() -> None:
    sweep = load_sweep(["seed=3", "harvest.prompts=[present,random]", "tracking.experiment='a,b'"])
    assert sweep.keys == () and len(sweep.children) == 1
    config = sweep.children[0].config
    assert config.variant is None and config.seed == 3 and config.tracking.experiment == "a,b"
    assert config == load_config(["seed=3", "harvest.prompts=[present,random]",
                                                         "tracking.experiment='a,b'"])  # fmt: skip


def test_the_grid_runs_its_last_key_fastest() -> None:
    sweep = load_sweep(["predictor.loss=kl,bce,mse_log", "trainer.max_epochs=3", "seed=0,1"])
    assert sweep.keys == ("predictor.loss", "seed")
    found = [(child.config.predictor.loss, child.config.seed) for child in sweep.children]
    assert found == [(loss, seed) for loss in ("kl", "bce", "mse_log") for seed in (0, 1)]
    assert all(child.config.trainer.max_epochs == 3 for child in sweep.children)
    assert sweep.children[3].label == "predictor.loss=bce seed=1"
    assert sweep.children[3].short_label == "loss=bce seed=1"


def test_groups_and_lists_are_swept() -> None:
    sweep = load_sweep(["predictor=default,paper", "model.scr.edit_layers=[0,2],[1,2]"])
    found = [(child.config.predictor.question, child.config.model.scr.edit_layers) for child in sweep.children]
    assert found == [("bilinear", [0, 2]), ("bilinear", [1, 2]), ("none", [0, 2]), ("none", [1, 2])]
    assert [child.groups["predictor"] for child in sweep.children] == ["default", "default", "paper", "paper"]


def test_children_have_folders_of_their_own_beside_those_of_a_plain_run() -> None:
    sweep = load_sweep(["predictor.loss=kl,bce", "seed=0,1"])
    plain = load_config().paths
    for place in ("latest", "predictor"):
        own = {getattr(child.config.paths, place) for child in sweep.children}
        assert len(own) == 4
        for path in own:
            assert path.is_relative_to("runs/sweeps/scene-llava")
            assert not path.is_relative_to(getattr(plain, place))
    assert {child.config.paths.harvest for child in sweep.children} == {plain.harvest}
    places = ["runs_dir=elsewhere", "trainer.cache=none", "model.device=cpu", "tracking.register=x"]
    again = load_sweep(["predictor.loss=kl,bce", "seed=0,1", *places])
    assert [child.config.variant for child in again.children] == [child.config.variant for child in sweep.children]
    longer = load_sweep(["predictor.loss=kl,bce", "seed=0,1", "trainer.max_epochs=3"])
    assert not {c.config.variant for c in longer.children} & {c.config.variant for c in sweep.children}


@pytest.mark.parametrize(
    ("override", "harvests"),
    [("harvest.samples=100,200", 2), ("model.scr.attention_layers=[2,3],[2,4]", 2), ("model.scr.num_sources=4,8", 1)],
)
def test_settings_of_the_harvest_give_harvests_of_their_own(override: str, harvests: int) -> None:
    children = load_sweep([override, "seed=0,1"]).children
    assert len({child.config.paths.harvest for child in children}) == harvests


def test_models_have_experiments_and_harvests_of_their_own() -> None:
    sweep = load_sweep(["model=scene-llava,llava-1.5-7b"])
    assert [child.config.experiment for child in sweep.children] == ["scene-llava", "llava-1.5-7b"]
    assert sweep.children[1].config.paths.harvest.name == "llava-1.5-7b-scenes"


def test_all_problems_of_all_combinations_are_reported_once() -> None:
    found = problems("predictor.loss=kl,bcee", "seed=0,0,1", "evaluation.images=90000", "trainer.max_epoch=1,2")
    assert sorted((problem.key, str(problem.value)) for problem in found) == [
        ("evaluation.images", "90000"),
        ("predictor.loss", "bcee"),
        ("seed", "0,0,1"),
        ("trainer.max_epoch", "1"),
        ("trainer.max_epoch", "2"),
    ]


@pytest.mark.parametrize(
    ("override", "reason", "hint"),
    [
        ("seed=0,", "has an empty value", ""),
        ("seed=1,1", "has the value 1 twice", "Keep one"),
        ("runs_dir=a,b", "can't be swept", "one command for each"),
        ("tracking.uri=http://a,http://b", "can't be swept", ""),
        ("model.scr.edit_layers=0,2", "lists have brackets", "Write model.scr.edit_layers=[0,2]."),
        ("trainer.learning_rate=1e-3,0.001", "has the same settings as trainer.learning_rate=1e-3", ""),
    ],
)
def test_mistake_in_a_sweep_is_told(override: str, reason: str, hint: str) -> None:
    (problem,) = problems(override)
    assert reason in problem.reason and hint in problem.hint


def test_a_typo_inside_missing_brackets_is_told_with_them() -> None:
    missing, typo = problems("evaluation.methods=two-pass,onepass")
    assert "lists have brackets" in missing.reason
    assert typo.value == ["two-pass", "onepass"] and "Did you mean one-pass" in typo.hint


def test_combination_that_contradicts_is_reported_before_any_other_runs() -> None:
    (problem,) = problems("harvest.samples=100,5900", "seed=0,1,2")
    assert problem.key == "harvest.samples" and problem.value == 5900


def test_other_commands_refuse_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_cli(["seed=0,1", "predictor.loss=bcee"], "python -m export", [])
    assert caught.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "seed=0,1 (command line): holds several values, and only `python train.py` runs a sweep" in said
    assert "seed='\"0,1\"'" in said and "predictor.loss=bcee" in said


def test_keys_are_called_by_their_last_word_unless_two_share_it() -> None:
    keys = ["trainer.batch_size", "harvest.batch_size", "seed"]
    assert list(short_names(keys).values()) == ["trainer.batch_size", "harvest.batch_size", "seed"]


def test_what_decides_a_result_leaves_out_where_it_lies() -> None:
    plain = load_config()
    same = ["runs_dir=x", "trainer.cache=none", "trainer.num_workers=2", "tracking.experiment=y", "model.device=cpu",
            "data.root=/elsewhere", "variant=z"]  # fmt: skip
    assert load_config(same).result_settings == plain.result_settings
    for override in ("seed=1", "predictor.width=64", "trainer.batch_size=32", "evaluation.images=5",
                     "model.scr.num_sources=4"):  # fmt: skip
        assert load_config([override]).result_settings != plain.result_settings, override
    silent = load_config(["evaluation.images=0"])
    assert load_config(["evaluation.images=0", "data.world.val=400"]).result_settings == silent.result_settings
    assert set(plain.result_settings) >= {"seed", "predictor", "trainer", "evaluation", "model"}


@pytest.mark.parametrize(
    ("overrides", "key", "hint"),
    [
        (["tracking.uri=localhost:5000"], "tracking.uri", "http://localhost:5000"),
        (["tracking.uri=runs/mlflow.db"], "tracking.uri", "sqlite:///runs/mlflow.db"),
        (["tracking.uri=http:/host"], "tracking.uri", ""),
        (["tracking.uri=http://"], "tracking.uri", ""),
        (["tracking.uri=databricks"], "tracking.experiment", "/Shared/scr/${model.name}"),
        (["tracking.register=a/b"], "tracking.register", ""),
        (["variant=a/b"], "variant", ""),
        (["harvest.name=../x"], "harvest.name", ""),
    ],
)
def test_tracking_and_names_are_checked(overrides: list[str], key: str, hint: str) -> None:
    (problem,) = problems(*overrides)
    assert problem.key == key and hint in problem.hint


def test_databricks_takes_a_path_with_the_models_name() -> None:
    sweep = load_sweep(["model=scene-llava,llava-1.5-7b", "tracking.uri=databricks",
                        "tracking.experiment=/Shared/scr/${model.name}"])  # fmt: skip
    assert [child.config.experiment for child in sweep.children] == ["/Shared/scr/scene-llava",
                                                                     "/Shared/scr/llava-1.5-7b"]  # fmt: skip


def test_a_childs_name_finds_its_folder_again() -> None:
    child = load_sweep(["predictor.loss=kl,bce"]).children[1].config
    again = load_config(["predictor.loss=bce", f"variant={child.variant}"])
    assert again.paths == child.paths
    assert again.model_copy(update={"variant": None}) == load_config(["predictor.loss=bce"])
