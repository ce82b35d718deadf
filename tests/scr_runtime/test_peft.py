"""The real peft: a model with adapters is found, edited, and told apart as far as docs/deploy.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scr_runtime import SCR, SCRConfig, describe_model, save_predictor
from tests.scr_runtime.reference import make_predictor

# peft asks transformers by a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
CONFIG = SCRConfig(num_sources=4, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


@pytest.fixture
def tuned(tiny_llava: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny_llava(0), adapters).eval()


def test_adapters_are_edited_like_the_merged_model(tuned: Any, llava_inputs: Any) -> None:
    model = tuned.get_base_model()
    inputs = llava_inputs(model, [1, 1])
    with torch.no_grad():
        vanilla = tuned(**inputs).logits
        with SCR(tuned, config=CONFIG, mode="two-pass") as scr:
            edited, sources = tuned(**inputs).logits, [report.sources for report in scr.reports]
            tokens = tuned.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert scr.model is model and not torch.allclose(edited, vanilla, atol=1e-3)
        assert torch.equal(tuned(**inputs).logits, vanilla)
        merged = tuned.merge_and_unload()
        with SCR(merged, config=CONFIG, mode="two-pass") as scr:
            assert torch.allclose(merged(**inputs).logits, edited, atol=1e-4)
            assert [report.sources for report in scr.reports] == sources
            assert torch.equal(merged.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)


def test_it_is_the_same_model_while_its_embeddings_are(
    tuned: Any, tiny_llava: Any, llava_inputs: Any, tmp_path: Path
) -> None:
    base = tiny_llava(0)
    predictor = make_predictor(base)
    folder = save_predictor(tmp_path / "p", predictor, scr=CONFIG, model=describe_model(base))
    inputs = llava_inputs(base, [1])
    with torch.no_grad(), SCR(tuned, predictor=folder, mode="one-pass") as scr:
        tuned(**inputs)
        assert scr.reports[0].provider == "one-pass"
    assert describe_model(tuned)["embedding_probe"] == describe_model(base)["embedding_probe"]
