"""The command `python -m evaluation tune`: settings chosen on the tuning images, as a model file."""

from __future__ import annotations

import json
from dataclasses import asdict

import yaml

from configs import TrainConfig
from data.plan import set_aside
from data.vlm import load_vlm
from evaluation.tables import bullets, paragraph, table
from evaluation.tune import candidates, tune_settings, tuned_rows
from pipeline.folders import new_folder
from pipeline.harvest import training_images
from pipeline.places import check_places, tuned_file
from scr_runtime.files import write_file

_FEW = 50


def tune(config: TrainConfig) -> int:
    """Tries every setting, prints all, and writes the best as a file that `model=` can take.

    Raises:
        RunError: There are no images to choose by, or a file of the result's name, which is not replaced unasked.
    """
    check_places([config], ["tuning"])
    settings = config.evaluation.for_training
    images = training_images(config)
    ids = list(set_aside(images.ids, config.harvest))
    model, processor = load_vlm(config.model)
    depth = int(model.config.get_text_config().num_hidden_layers)
    tried = candidates(config.scr, settings, depth)
    tuned = tune_settings(model, processor, tried, images, ids, settings, config.paths.cache)
    best = tuned.trials[0]
    print(table(tuned_rows(tuned)))
    gain = best.auc - tuned.vanilla.auc
    lines = [
        f"{len(tried)} settings tried on {tuned.images} tuning images, {tuned.questions} questions, at TPR "
        f"{tuned.tpr:.3f}. "
        f"The best of {len(tried)} looks better than it is: judge it with python -m evaluation, on other images.",
        f"Best: AUC {gain:+.4f} against vanilla."
        + (" That is no gain: leave the settings as they are." if gain <= 0 else ""),
    ]
    if tuned.images < _FEW:
        lines.append(f"{tuned.images} images are too few to choose by; the paper takes 200.")
    print("\n" + bullets(lines))
    file = tuned_file(config.model.name)
    name = file.stem
    content = config.model.model_dump()
    content["name"] = name
    content["scr"] |= {
        key: list(value) if isinstance(value, tuple) else value for key, value in best.scr.to_dict().items()
    }
    head = f"# {config.model.name}, tuned by python -m evaluation tune: the best of {len(tried)} settings on "
    head += f"{tuned.images} tuning images.\n"
    record = {"tried": [asdict(one) for one in tuned.trials], "vanilla": asdict(tuned.vanilla), "number": len(tried),
              "images": tuned.images, "image_ids": ids, "questions": tuned.questions, "tpr": tuned.tpr}  # fmt: skip
    folder = new_folder(config.paths.fits / "tuning")
    write_file(folder / "tuning.json", json.dumps(record, indent=1).encode())
    write_file(file, (head + yaml.safe_dump(content, sort_keys=False)).encode())
    print(f"\n{paragraph(f'all settings: {folder}/tuning.json')}\n{paragraph(f'use it: model={name} ({file})')}")
    return 0
