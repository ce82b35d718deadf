"""Push, pull and pinned commits, through huggingface_hub and a stand-in for the Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, load_predictor, save_predictor
from tests.export.hub_server import TOKEN, Hub, serving

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # processes of their own
SCR = SCRConfig(num_sources=2, edit_layers=(0, 1), attention_layers=(1, 2))
SCRIPT = """
import json, sys
from pathlib import Path
from export import hub
from export.errors import PublishError
from scr_runtime import errors, load_predictor

first, second, place = (Path(text) for text in sys.argv[1:])
pushes = ((first, "org/scr", False), (second, "org/scr", False), (first, "org/hidden", True))
found = {"commits": [hub.push(folder, name, private=private) for folder, name, private in pushes]}
one, two, hidden = found["commits"]
found["thresholds"] = [
    load_predictor("org/scr", verify=True).threshold,
    load_predictor("org/scr", revision=one).threshold,
    load_predictor("org/scr", revision=one, local_files_only=True).threshold,
    load_predictor("org/hidden").threshold,
    load_predictor(hub.pull("org/scr", place / "pulled", one)).threshold,
]
try:
    hub.pull("org/scr", place / "pulled")
except PublishError as error:
    found["exists"] = str(error)
for name, revision in (("org/none", None), ("org/scr", "v9")):
    try:
        load_predictor(name, revision=revision)
    except errors.PredictorNotFoundError as error:
        found[f"{name}@{revision}"] = str(error)
(first / "model.safetensors").write_bytes(b"")
try:
    hub.push(first, "org/scr")
except errors.PredictorCorruptError as error:
    found["damaged"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    with serving() as running:
        yield running


def saved(folder: Path, threshold: float) -> Path:
    torch.manual_seed(0)
    predictor = SourcePredictor(PredictorConfig(16, rank=4, width=8))
    predictor.threshold = threshold
    return save_predictor(folder, predictor, scr=SCR, model={"family": "llava"}, card="# a card\n")


def script(
    code: str, address: str, place: Path, token: str | None, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its address and its cache when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(place / "home"), "PYTHONPATH": str(ROOT), "NO_PROXY": "*",
                    "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=120)


def test_there_and_back(hub: tuple[Hub, str], tmp_path: Path) -> None:
    first, second = saved(tmp_path / "first", 0.25), saved(tmp_path / "second", 0.75)
    run = script(SCRIPT, hub[1], tmp_path, TOKEN, str(first), str(second), str(tmp_path))
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["thresholds"] == [0.75, 0.25, 0.25, 0.25, 0.25]
    assert found["commits"][0] != found["commits"][1] and hub[0].private == {"org/hidden"}
    pushed = hub[0].at("org/scr", found["commits"][1])
    assert pushed is not None and pushed[1] == {path.name: path.read_bytes() for path in second.iterdir()}
    assert load_predictor(tmp_path / "pulled", verify=True).threshold == 0.25
    assert "choose another folder" in found["exists"] and "sha256" in found["damaged"]
    for name in ("org/none@None", "org/scr@v9"):
        assert "the Hub gave no repository" in found[name] and "models:/NAME@ALIAS" in found[name]


def test_without_a_login(hub: tuple[Hub, str], tmp_path: Path) -> None:
    folder = saved(tmp_path / "p", 0.5)
    hub[0].repositories["org/hidden"] = [("1" * 40, {path.name: path.read_bytes() for path in folder.iterdir()})]
    hub[0].private.add("org/hidden")
    load = "from scr_runtime import load_predictor; print(load_predictor('org/hidden').threshold)"
    refused = script(load, hub[1], tmp_path, None)
    assert refused.returncode == 1 and "PredictorNotFoundError" in refused.stderr
    push = f"from pathlib import Path; from export import hub; hub.push(Path({str(folder)!r}), 'org/new')"
    refused = script(push, hub[1], tmp_path, None)
    assert (
        "PublishError" in refused.stderr and "hf auth login" in refused.stderr and "org/new" not in hub[0].repositories
    )
    assert script(load, hub[1], tmp_path, TOKEN).stdout.split() == ["0.5"]
