"""Asks prompts under every method: block by block, batch by batch, what is answered already is not asked again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.ranks import Rank
from data.vlm import model_identity
from evaluation.answers import Answer, AnswerStore, ImageFacts
from evaluation.batches import Batch, Row, Shared, make_batch, make_batches, make_blocks
from evaluation.decoding import Decoding, Reader, decoding_identity
from evaluation.edits import SourceEdit, edited, owned_neighbours
from evaluation.errors import UnfinishedError
from evaluation.maps import BlockMaps, ImageMap, Sources, capture_maps
from evaluation.methods import ONE_PASS, SAMPLED, TWO_PASS, FromMap, Method, Plain, Predicted
from evaluation.pictures import Pictures
from evaluation.questions import Item
from scr_runtime import SCR, SCRConfig, SourcePredictor
from scr_runtime.families import blocks_of

Stores = dict[str, AnswerStore]
_KEPT_BATCHES = 64  # of a block: their images' features stay on the device between the maps and the answers


@dataclass(frozen=True)
class Task:
    """Prompts of one kind, and how they are answered.

    Attributes:
        name: For the progress bar.
        items: The questions or requests; those of an image one after the other.
        template: Of the prompt, with {question} in it.
        decoding: How answers are made.
    """

    name: str
    items: Sequence[Item]
    template: str
    decoding: Decoding


@dataclass
class Asker:
    """One model that is asked.

    Attributes:
        model: A supported model in eval mode, without an SCR attached.
        processor: Its processor.
        scr: The method's settings.
        pictures: Where the images are.
        batch_size: Prompts per forward.
        seed: Of the controls.
        cache: Folder in which answers are kept; `None` for none.
        rank: This process among several that answer together.
    """

    model: Any
    processor: Any
    scr: SCRConfig
    pictures: Pictures
    batch_size: int
    seed: int
    cache: Path | None = None
    rank: Rank = field(default_factory=Rank)

    def __post_init__(self) -> None:
        self._identity = model_identity(self.model, self.processor)
        self._stores: dict[str, AnswerStore] = {}

    def ask(self, task: Task, methods: Sequence[Method], predictors: Mapping[str, SourcePredictor]) -> Stores:
        """Answers every prompt under every method; this rank's share of them.

        Args:
            task: The prompts.
            methods: Rows of the tables; derived ones are left out, but for auto.
            predictors: By name.

        Returns:
            Per method, its answers: all that this process and others have given so far.
        """
        run = Run(self, task, list(methods), predictors)
        blocks = self.rank.share(make_blocks(task.items, task.template))
        count = sum(len(block) for block in blocks)
        words = f"ask {task.name}" + (", predictor" if predictors else "")
        with tqdm(total=count, desc=words, unit="prompt", disable=None) as progress:
            for block in blocks:
                run.ask_block(block)
                progress.update(len(block))
        rows = [row for block in make_blocks(task.items, task.template) for row in block]
        missing = 0
        for method in run.methods:
            run.stores[method.name].refresh()
            missing += sum(run.missing(method, [row]) for row in rows)
        if missing:
            raise UnfinishedError(
                f"{self.rank}: its share is answered, and {missing} answers of other ranks are missing. The rank that "
                "finishes last continues with the report; start one again if none is running."
            )
        return run.stores

    def store(self, task: Task, method: Method, predictor: SourcePredictor | None) -> AnswerStore:
        """The answers of one method to these prompts, as far as they are known."""
        entry = method.entry.run
        sampled = isinstance(entry, Plain) and entry.sampled
        decoding = {**decoding_identity(task.decoding), "sampled": sampled}
        prompts = [[item.image, item.text] for item in task.items]
        identity: dict[str, Any] = {
            "model": self._identity,
            "prompts_sha256": _sha256(
                [task.template, prompts, self.pictures.sizes(item.image for item in task.items)]
            ),
            "batch_size": self.batch_size,
            "decoding": decoding,
            "method": method.base,
        }
        if not isinstance(entry, Plain):
            identity |= {"scr": self.scr.to_dict(), "seed": self.seed}
        if predictor is not None:
            identity |= {"predictor": predictor_sha256(predictor), "threshold": method.threshold}
        key = _sha256(identity)
        if key not in self._stores:
            self._stores[key] = AnswerStore(self.cache, identity, self.rank)
        return self._stores[key]


def threshold_of(method: Method, predictor: SourcePredictor) -> np.float32:
    """The confidence under which a row of auto falls back, as the runtime compares it: in single precision."""
    return np.float32(predictor.threshold if method.threshold is None else method.threshold)


class Run:
    """One call of `Asker.ask`."""

    def __init__(
        self, asker: Asker, task: Task, methods: list[Method], predictors: Mapping[str, SourcePredictor]
    ) -> None:
        self.asker, self.task, self.predictors = asker, task, predictors
        self.reader = Reader(asker.model, asker.processor.tokenizer, task.decoding)
        self.methods = [method for method in methods if method.asked]
        self.stores = {
            method.name: asker.store(task, method, None if method.predictor is None else predictors[method.predictor])
            for method in self.methods
        }

    def seeds(self, method: Method) -> tuple[int | None, ...]:
        """Seeds of a method's answers."""
        if method.base == SAMPLED:
            return tuple(seed for seed in self.task.decoding.seeds if seed is not None) or (0,)
        return self.task.decoding.seeds if self.task.decoding.name == "sampled" else (None,)

    def shared(self, method: Method, batch: Batch) -> Shared | None:
        """The batch with an image's tokens once for all of its prompts, where answers are margins alone."""
        return batch.shared if self.task.decoding.name == "margin" and method.base != SAMPLED else None

    def missing(self, method: Method, rows: Sequence[Row]) -> bool:
        store = self.stores[method.name]
        return any((row.item, seed) not in store for row in rows for seed in self.seeds(method))

    def ask_block(self, rows: list[Row]) -> None:
        """Asks what is missing of a block."""
        pending = [method for method in self.methods if self.missing(method, rows)]
        if not pending:
            return
        asker = self.asker
        batches = make_batches(rows, asker.batch_size)
        kept: dict[int, Batch] = {}

        def batch(number: int) -> Batch:
            made = kept.get(number)
            if made is None:
                made = make_batch(asker.model, asker.processor, asker.pictures, batches[number])
                if made.image_of is not None and len(kept) < _KEPT_BATCHES:
                    kept[number] = made
            return made

        maps: dict[int, list[ImageMap]] = {}
        if any(isinstance(method.entry.run, FromMap) for method in pending):
            for number in range(len(batches)):
                found = capture_maps(asker.model, asker.scr, batch(number))
                maps |= dict(zip((row.item for row in batches[number]), found, strict=True))
        block = BlockMaps(rows, [maps[row.item] for row in rows] if maps else [], asker.scr, asker.seed)
        for number in range(len(batches)):
            for method in pending:  # auto comes behind what it is made of
                if self.missing(method, batches[number]):
                    self.ask_batch(method, batch(number), block)

    def ask_batch(self, method: Method, batch: Batch, block: BlockMaps) -> None:
        """Asks one batch under one method, and keeps the answers."""
        run = method.entry.run
        if isinstance(run, Plain):
            answers = self._plain(method, batch)
        elif isinstance(run, FromMap):
            answers = self._from_map(method, run, batch, block)
        elif isinstance(run, Predicted):
            answers = self._predicted(method, batch)
        else:
            answers = self._auto(method, batch)
        self.stores[method.name].add(answers)

    def context(self, method: Method, batch: Batch, block: BlockMaps) -> AbstractContextManager[Any]:
        """A context in which a prefill of the batch, row by row, is the method's; for methods with an edit."""
        run, scr = method.entry.run, self.asker.scr
        if isinstance(run, Predicted):
            predictor = self.predictors[method.predictor or ""]
            return SCR(self.asker.model, config=scr, mode="one-pass", predictor=predictor)
        assert isinstance(run, FromMap)
        chosen = self._choose(run, batch, block)
        seed = block.generator("noise", batch.rows[0].item, 0).initial_seed()
        act = run.act(batch.layout, by_image(chosen, batch.images), scr, seed)
        return edited(self.asker.model, self.edit_layers(method), batch.capture[0]["input_ids"].shape[1], act)

    def edit_layers(self, method: Method) -> tuple[int, int]:
        """First and last block that a method edits."""
        run, scr = method.entry.run, self.asker.scr
        return run.edit_layers(scr, len(blocks_of(self.asker.model))) if isinstance(run, FromMap) else scr.edit_layers

    def _choose(self, run: FromMap, batch: Batch, block: BlockMaps) -> list[list[Sources]]:
        """Per row, the sources of each of its images."""
        places = block.places(batch.rows)
        return [[run.choose(block, at, image) for image in range(len(block.maps[at]))] for at in places]

    def _plain(self, method: Method, batch: Batch) -> list[Answer]:
        facts = [[ImageFacts("vanilla", [], grid, 0) for grid in grids] for grids in _grids(batch)]
        return self._answers(method, batch, self.shared(method, batch) is not None, lambda _: nullcontext(), facts)

    def _from_map(self, method: Method, run: FromMap, batch: Batch, block: BlockMaps) -> list[Answer]:
        asker, scr = self.asker, self.asker.scr
        chosen = self._choose(run, batch, block)
        facts = [
            [
                ImageFacts(method.base, sources, one.grid, run.dose(sources, one.grid, scr), None, one.entropy)
                for one, sources in zip(block.maps[at], own, strict=True)
            ]
            for at, own in zip(block.places(batch.rows), chosen, strict=True)
        ]
        shared = self.shared(method, batch) if run.per_image else None
        layout = batch.layout if shared is None else shared.prompts.layout
        length = batch.capture[0]["input_ids"].shape[1] if shared is None else shared.prompts.length
        given = by_image(chosen, batch.images) if shared is None else by_sequence(chosen, shared.sequence_of)

        def applied(turn: int) -> AbstractContextManager[Any]:
            seed = block.generator("noise", batch.rows[0].item, turn).initial_seed()
            return edited(asker.model, self.edit_layers(method), length, run.act(layout, given, scr, seed))

        return self._answers(method, batch, shared is not None, applied, facts)

    def _predicted(self, method: Method, batch: Batch) -> list[Answer]:
        predictor = self.predictors[method.predictor or ""]
        scr = SCR(self.asker.model, config=self.asker.scr, mode="one-pass", predictor=predictor)
        shared = None if predictor.config.reads_question else self.shared(method, batch)
        facts: list[list[ImageFacts]] = [[] for _ in batch.rows]
        answers = self._answers(method, batch, shared is not None, lambda _: scr, facts)
        found = [
            ImageFacts.of_report(
                report,
                owned_neighbours(report.sources, report.grid, self.asker.scr.connectivity),
                predictor.drift_limit,
            )
            for report in scr.reports
        ]
        for row, own in enumerate(facts):
            images = batch.images[row] if shared is None else [shared.sequence_of[row]]
            own.extend(found[image] for image in images)
        return answers

    def _auto(self, method: Method, batch: Batch) -> list[Answer]:
        """One-pass's answer or two-pass's; asked where a prompt has images of both kinds."""
        predictor = self.predictors[method.predictor or ""]
        limit = threshold_of(method, predictor)
        ending = "" if ":" not in method.name else ":" + method.name.split(":", 1)[1]
        one, two = self.stores[ONE_PASS + ending], self.stores[TWO_PASS]
        answers: list[Answer] = []
        mixed: list[list[ImageFacts]] = []
        for row in batch.rows:
            for seed in self.seeds(method):
                first, second = one[row.item, seed], two[row.item, seed]
                falls = [np.float32(image.confidence or 0.0) < limit for image in first.images]
                mixed.append([b if fall else a for a, b, fall in zip(first.images, second.images, falls, strict=True)])
                kept = [
                    ImageFacts(facts.provider, facts.sources, facts.grid, facts.dose, image.confidence, image.entropy)
                    for facts, image in zip(mixed[-1], first.images, strict=True)
                ]
                source = second if all(falls) else first
                answers.append(
                    Answer(row.item, seed, source.tokens, source.text, source.margin, kept, source.milliseconds)
                )
        if not any(len({image.provider for image in answer.images}) > 1 for answer in answers):
            return answers
        count = len(self.seeds(method))
        given = by_image([[image.sources for image in images] for images in mixed[::count]], batch.images)
        act = SourceEdit(batch.layout, given, self.asker.scr)
        length = batch.capture[0]["input_ids"].shape[1]
        asked = self._answers(
            method, batch, False, lambda _: edited(self.asker.model, self.asker.scr.edit_layers, length, act),
            [answer.images for answer in answers[::count]],
        )  # fmt: skip
        by_key = {(answer.item, answer.seed): answer for answer in asked}
        return [
            by_key[answer.item, answer.seed] if len({image.provider for image in answer.images}) > 1 else answer
            for answer in answers
        ]

    def _answers(
        self, method: Method, batch: Batch, shared: bool, applied: Any, facts: list[list[ImageFacts]]
    ) -> list[Answer]:
        """Runs the model on a batch inside a method's context, once per seed."""
        sampled = method.base == SAMPLED or self.task.decoding.name == "sampled"
        answers: list[Answer] = []
        for turn, seed in enumerate(self.seeds(method)):
            started = time.perf_counter()
            with applied(turn):
                if shared and batch.shared is not None:
                    margins: list[float | None] = list(self.reader.read_shared(batch.shared))
                    tokens: list[list[int]] = [[] for _ in batch.rows]
                else:
                    salts = [row.image + row.text for row in batch.rows]
                    margins, tokens = self.reader.read(batch.prompts, seed, salts, sampled)
            each = (time.perf_counter() - started) * 1e3 / len(batch.rows)
            for n, row in enumerate(batch.rows):
                text = self.reader.text(tokens[n])
                answers.append(Answer(row.item, seed, tokens[n], text, margins[n], facts[n], each))
        return answers


def _grids(batch: Batch) -> list[list[tuple[int, int]]]:
    """Per row, the grid of each of its images."""
    grid_of = {image: group.grid for group in batch.layout.groups for image in group.images}
    return [[grid_of[image] for image in images] for images in batch.images]


def by_image(chosen: Sequence[Sequence[Sources]], images: Sequence[Sequence[int]]) -> list[Sources]:
    """Sources by row and image -> by image in order of appearance over the batch."""
    found: dict[int, Sources] = {}
    for own, places in zip(chosen, images, strict=True):
        found |= zip(places, own, strict=True)
    return [found[image] for image in sorted(found)]


def by_sequence(chosen: Sequence[Sequence[Sources]], sequence_of: Sequence[int]) -> list[Sources]:
    """Sources by row, of rows with one image each -> by shared sequence: those of its first row."""
    found: dict[int, Sources] = {}
    for own, sequence in zip(chosen, sequence_of, strict=True):
        found.setdefault(sequence, own[0])
    return [found[sequence] for sequence in sorted(found)]


def predictor_sha256(predictor: SourcePredictor) -> str:
    """Checksum of everything that a predictor's scores and confidences depend on."""
    known = (predictor.config, predictor.drift_typical, predictor.drift_limit)
    digest = hashlib.sha256(repr(known).encode())
    for name, tensor in predictor.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _sha256(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=list).encode()).hexdigest()
