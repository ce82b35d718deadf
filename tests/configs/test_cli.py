"""Help and problems of the command line, and what they cost."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import help_text, load_config, parse_cli, parse_sweep, save_config
from configs.load import CONFIGS, KEYS

OPTIONS = sorted((path.parent.name, path.stem) for path in CONFIGS.glob("*/*.yaml"))
ROOT = CONFIGS.parent


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_sweep(list(arguments), "python x.py", ["Does it.", "python x.py seed=1   an example"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_all_help_lists_every_key_with_its_meaning_and_every_option():
    text = help_text()
    for key in KEYS.values():
        assert key.doc, f"{key.path} has no docstring under its field"
        assert (f"\n{key.path}: " if key.section else f"\n  {key.path}=") in text
    for group, option in OPTIONS:
        found = re.search(rf"\n  {group} (.*?)\n(?:  \S|\n)", text, re.DOTALL)  # wrapped where it is long
        assert found is not None and option in found[1].replace("*", "").split()


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_help_is_one_screen_and_fits_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = printed(capsys, "trainer.nonsense=1", "--help")
    assert out.startswith("usage: python x.py [group=option ...]") and "Does it." in out
    assert len(out.splitlines()) <= (30 if columns == 80 else 25)
    assert max(map(len, out.splitlines()[2:])) <= columns
    assert all(f"\n  {name} " in out for name in ("general", "model", "harvest", "trainer", "evaluation"))


def test_help_of_a_section_of_a_key_and_of_all(capsys: pytest.CaptureFixture[str]):
    for arguments in (("--help", "trainer"), ("--help=trainer",), ("trainer", "-h")):
        out = printed(capsys, *arguments)
        assert out.startswith("trainer: ") and "trainer.max_epochs=" in out and "harvest." not in out.split("\n  ")[1]
    assert printed(capsys, "--help", "seed").startswith("  seed=0")
    with pytest.raises(SystemExit) as caught:
        parse_cli(["--help", "lr"], "python x.py", [])
    assert caught.value.code == 2 and "Did you mean trainer.learning_rate?" in capsys.readouterr().err
    said = " ".join(printed(capsys, "--help", "all").split())
    assert "are a sweep over all their combinations" in said and "trainer.max_epochs=" in said


def test_problems_leave_with_status_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        parse_cli(["seed=x", "runs=y"], "python x.py", [])
    assert caught.value.code == 2
    streams = capsys.readouterr()
    assert not streams.out
    assert "2 problems in the configuration" in streams.err
    assert "`python x.py --help SECTION` lists a section's keys." in streams.err


def test_a_saved_configuration_is_named_in_two_words_or_one(tmp_path: Path):
    save_config(load_config(["seed=3"]), tmp_path / "config.yaml")
    for arguments in (["--config", str(tmp_path)], [f"--config={tmp_path}"]):
        assert parse_cli([*arguments, "trainer.max_epochs=2"], "python x.py", []).seed == 3
    model = tmp_path / "fits" / "scene-llava"
    (model / "2").mkdir(parents=True)
    save_config(load_config(["seed=4"]), model / "2" / "config.yaml")
    (model / "latest").symlink_to("2")
    assert parse_cli(["--config", str(model)], "python x.py", []).seed == 4  # the newest run's


@pytest.mark.parametrize(
    "command", [["train.py"], ["-m", "data.harvest"], ["-m", "export"], ["-m", "evaluation"]], ids=" ".join
)
@pytest.mark.parametrize("argument", ["--help", "trainer.lr=1"])
def test_help_and_typos_import_nothing_heavy(command: list[str], argument: str):
    arguments = [sys.executable, "-X", "importtime", *command, argument]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == (0 if argument == "--help" else 2), run.stderr[-500:]
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert "configs" in names
    assert not names & {"torch", "transformers", "mlflow", "pytorch_lightning", "numpy", "matplotlib", "datasets"}


@pytest.mark.parametrize(
    "command",
    [
        "playground --help", "export card --help", "export card", "export promote --help", "export promote name=m",
        "export verify", "evaluation compare --help", "evaluation compare", "pipeline.ui --help",
        "tests.versions --help", "data.inspect --help", "data.inspect verify nowhere", "scenes --help",
        "scr_runtime.serve --help",
    ],
)  # fmt: skip
def test_help_and_slips_of_the_other_commands_import_no_framework(command: str):
    arguments = [sys.executable, "-X", "importtime", "-m", *command.split()]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if "--help" in command:
        assert run.returncode == 0 and len(run.stdout.splitlines()) >= 2
    else:
        assert run.returncode in (1, 2) and "Traceback" not in run.stderr
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert not names & {"torch", "transformers", "mlflow", "pytorch_lightning", "matplotlib", "datasets"}


@pytest.mark.parametrize(
    "file", [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "PARSER" in path.read_text("utf-8")],
    ids=lambda path: path.stem,
)  # fmt: skip
def test_benchmarks_read_their_options_before_the_imports_that_take_seconds(file: Path):
    body = ast.parse(file.read_text(encoding="utf-8")).body
    asked = next(place for place, node in enumerate(body) if isinstance(node, ast.If))
    assert ast.unparse(body[asked]).startswith("if __name__ == '__main__':\n    PARSER.parse_args()")
    modules = {alias.name for node in body[:asked] if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in body[:asked] if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in modules} <= sys.stdlib_module_names


def test_help_into_a_pipe_that_is_closed():
    command = f'{sys.executable} -c \'from train import main; main(["--help", "all"])\' | true'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
