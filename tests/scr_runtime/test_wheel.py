"""The wheel: built, installed into an empty environment, and used end to end there."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from scenes import CHECKPOINT
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, describe_model, save_predictor
from tests.scr_runtime.wheel import ROOT, build_wheel, make_environment, run

pytestmark = pytest.mark.slow
SCRIPT = """
import json, sys
from pathlib import Path
import scr_runtime
assert Path(scr_runtime.__file__).is_relative_to(sys.prefix), scr_runtime.__file__
for name in ("export", "predictor", "data", "configs"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported")
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from scr_runtime import SCR, load_predictor
checkpoint, folder = sys.argv[1:]
schema = json.loads(Path(scr_runtime.__file__).with_name("config.schema.json").read_text())
assert set(json.loads((Path(folder) / "config.json").read_text())) == set(schema["properties"])
load_predictor(folder, verify=True)
model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
processor = AutoProcessor.from_pretrained(checkpoint)
content = [{"type": "image", "image": Image.new("RGB", (96, 96), "green")}, {"type": "text", "text": "A dog?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
with SCR(model, predictor=folder, mode="auto", processor=processor) as scr:
    tokens = model.generate(**inputs, max_new_tokens=4)
assert scr.stats.one_pass == 1 and scr.reports[0].layers_edited == (0, 1, 2), scr.stats
print(scr_runtime.__version__, repr(scr), repr(scr.stats), sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_it_holds_the_runtime_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    package = ROOT / "scr_runtime"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert set(names) == {f"scr_runtime/{name}" for name in files if "__pycache__" not in name}
    assert {"config.schema.json", "py.typed", "runtime.py", "serve/__main__.py", "vllm/plugin.py"} <= files


def test_it_works_where_nothing_of_the_project_is(wheel: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    torch.manual_seed(0)
    predictor = SourcePredictor(PredictorConfig(model.config.text_config.hidden_size))
    scr = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))
    folder = save_predictor(tmp_path / "p", predictor, scr=scr, model=describe_model(model, processor))
    python = make_environment(tmp_path / "environment", wheel)
    assert "predictor=" in run([python, "-I", "-m", "scr_runtime.serve", "--help"], cwd=tmp_path)
    printed = run([python, "-I", "-c", SCRIPT, CHECKPOINT, folder], cwd=tmp_path).splitlines()
    assert printed[0] == wheel.name.split("-")[1]
    assert printed[1].startswith("<SCR, not attached to LlavaForConditionalGeneration")
    assert printed[2].startswith("<SCRStats: 1 prefill, 1 image (1 one-pass; mean confidence")
