"""The Python that reproduces a screen of the page without it."""

from __future__ import annotations

from playground.settings import Ask
from scr_runtime import SCRConfig

_TEMPLATE = """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from scr_runtime import SCR, SCRConfig

model = AutoModelForImageTextToText.from_pretrained({model!r}, dtype={dtype!r}).eval()
processor = AutoProcessor.from_pretrained({model!r})
image = Image.open({picture!r}).convert("RGB")
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": {question!r}}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)

config = SCRConfig(
{settings}
)
for mode in {modes}:
    with SCR(model, config=config, predictor={predictor!r}, mode=mode, threshold={threshold!r}) as scr:
        tokens = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False, num_beams=1)
    print(mode, processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    for report in scr.reports:
        print("  ", report.provider, report.fallback_reason, report.confidence, report.sources)
"""


def python_of(
    ask: Ask, config: SCRConfig, *, model: str, dtype: str, picture: str, predictor: str | None, modes: tuple[str, ...]
) -> str:
    """The text.

    Args:
        ask: The screen.
        config: Its settings.
        model: Folder or hub id.
        dtype: Number format of the weights.
        picture: Path of the picture; of one that was dropped, its name.
        predictor: Its folder.
        modes: The runtime's modes to run.
    """
    default = SCRConfig()
    shown = ("num_sources", "strength", "edit_layers", "attention_layers")
    names = [name for name in config.to_dict() if name in shown or getattr(config, name) != getattr(default, name)]
    settings = "\n".join(f"    {name}={getattr(config, name)!r}," for name in names)
    return _TEMPLATE.format(
        model=model, dtype=dtype, picture=picture, question=ask.question, settings=settings, predictor=predictor,
        modes=modes, threshold=ask.threshold, tokens=ask.tokens,
    )  # fmt: skip
