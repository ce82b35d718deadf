"""The model card of a predictor folder: README.md with the Hub's metadata, made from config.json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from scr_runtime import SCRConfig
from scr_runtime.artifact import CARD_NAME, CONFIG_NAME
from scr_runtime.files import write_file
from scr_runtime.places import is_hub_id

LICENCE = "apache-2.0"
"""Of the predictor's weights, which this project's code made; edit README.md for another, no checksum covers it."""
_SHOWN = ("recall", "ndcg", "mass", "spearman", "iou")
_FLOORS = ("random", "position", "norm", "negative_norm", "other_prompts")
_MEANINGS = {
    "recall": "share of two-pass's sources that are found", "ndcg": "ranking of the patches",
    "mass": "attention on the chosen patches, of the best K's", "spearman": "rank correlation of the map",
    "iou": "overlap of what is edited",
}  # fmt: skip


def write_card(folder: Path, evaluation: Mapping[str, str] | None) -> Path:
    """Rewrites the card of a folder; nothing else of the folder changes."""
    record = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    write_file(folder / CARD_NAME, model_card(record, evaluation).encode())
    return folder / CARD_NAME


def model_card(record: Mapping[str, Any], evaluation: Mapping[str, str] | None = None) -> str:
    """Writes the card of a predictor.

    Args:
        record: Its config.json.
        evaluation: ``sentence`` and ``reason`` of the evaluation's verdict; ``None`` if there is none yet.
    """
    name = record["model"].get("name", "a vision-language model")
    verdict = (
        f"**{evaluation['sentence']}** {evaluation['reason']}"
        if evaluation
        else "Not evaluated: whether answers get better is not known. `python -m evaluation` measures it."
    )
    return f"""---
{_metadata(record).to_yaml()}
---

# One-pass SCR source predictor for {name}

A network of {record["parameters"]:,} parameters. It reads the hidden states of the model behind its block
{record["scr"].get("state_layer", 0)} and chooses the image patches whose activation Spatial Credit Redistribution
(arXiv 2602.22469) passes on to their neighbours, without the diagnostic run that the method needs otherwise.

## Use

```python
{_example(name)}
```

## Verdict of the evaluation

{verdict}

## The fit

{_table(record["metrics"])}

## What was used

{_used(record)}

## Limits

- It belongs to this model and revision, with this image processor's back end. `mode="one-pass"` refuses others;
  `mode="auto"` falls back to two-pass and says why.
- It was fitted to two-pass's choice of patches. How near it comes to that choice says nothing about hallucinations.
- Threshold and metrics hold for images and questions like those of the fit. The drift guard of `auto` notices gross
  differences only.
- A model tuned with its input embeddings unchanged (LoRA) is not told apart from the base model: evaluate it again.
"""


def _metadata(record: Mapping[str, Any]) -> ModelCardData:
    name, metrics = record["model"].get("name", ""), record["metrics"]
    data = str(record["provenance"].get("data_name", "unknown"))
    results = [
        EvalResult(
            task_type="image-text-to-text", dataset_type=data, dataset_name=f"{data}, test split",
            metric_type=kind, metric_name=f"test/{kind}", metric_value=round(metrics[f"test/{kind}"], 6),
        )
        for kind in _SHOWN if f"test/{kind}" in metrics
    ]  # fmt: skip
    return ModelCardData(
        license=LICENCE,
        base_model=name if is_hub_id(name) else None,
        base_model_relation="adapter" if is_hub_id(name) else None,
        library_name="scr-runtime",
        pipeline_tag="image-text-to-text",
        tags=["vision-language-model", "hallucination", "spatial-credit-redistribution", record["model"]["family"]],
        datasets=[data],
        model_name=f"scr-{name.split('/')[-1].lower()}" if results else None,
        eval_results=results or None,
    )


def _example(name: str) -> str:
    model = name if is_hub_id(name) else f"path/to/{name.rsplit('-', 1)[0]}"
    return f"""from PIL import Image
from scr_runtime import SCR
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{model}").eval()
processor = AutoProcessor.from_pretrained("{model}")
content = [{{"type": "image", "image": Image.open("picture.png")}},
           {{"type": "text", "text": "Is there a dog in the image?"}}]
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
with SCR(model, predictor="this/folder", mode="auto", processor=processor) as scr:
    tokens = model.generate(**inputs, max_new_tokens=32)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True), scr.reports)"""


def _table(metrics: Mapping[str, float]) -> str:
    """Predictor, floors and reference on the test split, with intervals where they are known."""
    shown = [name for name in _SHOWN if f"test/{name}" in metrics]
    if not shown:
        return "No metrics were stored."
    lines = ["| scores from | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
    rows = {"this predictor": "test", **{floor.replace("_", " "): f"test/{floor}" for floor in _FLOORS}}
    for label, start in rows.items():
        if f"{start}/{shown[0]}" in metrics:
            lines.append(f"| {label} | " + " | ".join(_cell(metrics, f"{start}/{name}") for name in shown) + " |")
    meanings = "; ".join(f"{name}: {_MEANINGS[name]}" for name in shown)
    return "\n".join(lines) + f"\n\nOn the test split, 95 % intervals over images. {meanings}."


def _cell(metrics: Mapping[str, float], key: str) -> str:
    if key not in metrics:
        return "-"
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    return f"{metrics[key]:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def _used(record: Mapping[str, Any]) -> str:
    scr, metrics = SCRConfig.from_dict(record["scr"]), record["metrics"]
    asked = scr.sources_in_words
    fewest, most = metrics.get("test/k_min"), metrics.get("test/k_max")
    if fewest is not None and most is not None:
        asked += f" asked for, {fewest:g} used" if fewest == most else f" asked for, {fewest:g} to {most:g} used"
    model, used = record["model"], record["provenance"].get("used", {})
    facts = {
        "sources": asked,
        "strength": f"{scr.strength:g}",
        "edited blocks": f"{scr.edit_layers[0]}-{scr.edit_layers[1]} of {model.get('num_blocks', '?')}",
        "attention of blocks": f"{scr.attention_layers[0]}-{scr.attention_layers[1]}",
        "model": f"{model.get('name', 'unknown')}, revision {model.get('revision') or 'none (a local folder)'}",
        "family": f"{model['family']}, hidden size {model.get('hidden_size', '?')}",
        "image processor": str(model.get("image_backend") or "not recorded"),
        "threshold of auto": f"{record['threshold']:.4f}",
        "data fingerprint": str(record["provenance"].get("data_fingerprint", "not recorded")),
        **{key.replace("_", " "): str(value) for key, value in used.items()},
    }
    return "\n".join(f"- {key}: {value}" for key, value in facts.items())
