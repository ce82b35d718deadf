"""Yes/no questions about objects, as POPE asks them (Li et al. 2023, arXiv 2305.10355), under every method.

The answer is read from the first token after the prompt: the yes margin is the logit of "yes" minus that of "no".
Greedy decoding would say "yes" where it is positive; the margin itself also shows shifts too small to flip an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from data.chat import chat_inputs
from data.images import CocoImages
from data.questions import STRATEGIES, Question, count_objects, pope_questions
from evaluation.answers import AnswerLog
from evaluation.errors import EvaluationError
from evaluation.methods import VANILLA, Methods
from evaluation.settings import EvaluationSettings
from predictor.metrics import Interval, bootstrap_interval
from scr_runtime import ImageReport

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """Every question of a comparison, asked once under each method.

    Attributes:
        image: [Q] image id.
        truth: [Q] whether the object is there.
        splits: Strategy -> indices of its questions. Present objects belong to all strategies.
        margins: Method -> [Q] yes margin.
        entropy: [Q] normalised credit entropy of the image, before any edit.
        confidence: [Q] the predictor's expected share of true sources; zero where its drift guard trips.
        fallback: Share of the questions that ``auto`` hands to the diagnostic run.
    """

    image: NDArray[np.int64]
    truth: NDArray[np.bool_]
    splits: dict[str, NDArray[np.int64]]
    margins: dict[str, Floats]
    entropy: Floats
    confidence: Floats
    fallback: float


@dataclass(frozen=True)
class Score:
    """One method on one split.

    Attributes:
        hr: Hallucination rate FP / (FP + TN): "yes" to absent objects.
        tpr: "yes" to present objects.
        accuracy: Share of right answers.
        auc: Area under the ROC curve of the yes margin.
        hr_change: HR minus vanilla's, with a paired bootstrap interval over images; ``None`` for vanilla.
    """

    hr: float
    tpr: float
    accuracy: float
    auc: float
    hr_change: Interval | None


def yes_no_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids that start the answers "yes" and "no", in any case, with or without a space before.

    Raises:
        EvaluationError: If the tokenizer has no single token for one of them.
    """
    found: list[list[int]] = []
    for word in ("yes", "no"):
        ids = set()
        for form in (word, word.capitalize(), word.upper(), f" {word}", f" {word.capitalize()}"):
            tokens = tokenizer.encode(form, add_special_tokens=False)
            if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id:
                ids.add(tokens[0])
        if not ids:
            raise EvaluationError(
                f"this model's tokenizer has no single token for {word!r}, so that yes and no can't be compared; "
                "evaluation.images=0 skips the comparison"
            )
        found.append(sorted(ids))
    return found[0], found[1]


@dataclass(frozen=True)
class Quiz:
    """Which questions are asked.

    Attributes:
        questions: Each once, in an order in which neighbours are about different images.
        splits: Strategy -> indices of its questions. Present objects belong to all strategies.
    """

    questions: list[Question]
    splits: dict[str, NDArray[np.int64]]

    @property
    def image(self) -> NDArray[np.int64]:
        """[Q] image id."""
        return np.array([question.image_id for question in self.questions])

    @property
    def truth(self) -> NDArray[np.bool_]:
        """[Q] whether the object is there."""
        return np.array([question.label == "yes" for question in self.questions])


def make_quiz(images: CocoImages, image_ids: Sequence[int], settings: EvaluationSettings) -> Quiz:
    """Random, popular and adversarial questions, as many per image as the settings say.

    Args:
        images: Held-out images with annotations.
        image_ids: Which of them.
        settings: Questions per image, and the seed that chooses them.

    Raises:
        EvaluationError: If the questions are about fewer than two images.
    """
    counts = count_objects(images)
    asked: dict[tuple[int, str], Question] = {}
    members: dict[str, list[tuple[int, str]]] = {}
    for strategy in STRATEGIES:
        listed = pope_questions(images, image_ids, strategy, settings.questions_per_image, settings.seed, counts)
        members[strategy] = [(question.image_id, question.text) for question in listed]
        asked |= {(question.image_id, question.text): question for question in listed}
    questions = _alternate_images(list(asked.values()))
    place = {(question.image_id, question.text): index for index, question in enumerate(questions)}
    return Quiz(questions, {name: np.array([place[key] for key in keys]) for name, keys in members.items()})


def ask(
    model: Any,
    processor: Any,
    methods: Methods,
    names: Sequence[str],
    images: CocoImages,
    quiz: Quiz,
    batch_size: int,
    log: AnswerLog | None = None,
) -> tuple[dict[str, Floats], dict[str, list[ImageReport]]]:
    """Asks every question under the named methods, batch by batch, methods interleaved.

    Args:
        model: A supported model in eval mode.
        processor: Its processor.
        methods: What can be compared.
        names: Which of them are.
        images: Held-out images with annotations.
        quiz: The questions.
        batch_size: Questions per forward, at least 2.
        log: Answers of an earlier, interrupted call: these are not asked again, and new ones are added.

    Returns:
        Per method, the [Q] yes margins, and the report of each question's image; none for vanilla.
    """
    yes, no = yes_no_tokens(processor.tokenizer)
    log = log or AnswerLog(None, {})
    margins: dict[str, list[float]] = {name: [] for name in names}
    reports: dict[str, list[ImageReport]] = {name: [] for name in names}
    title = "evaluate" if len(names) > 1 else f"evaluate {names[0]}"
    with tqdm(total=len(quiz.questions), desc=title, unit="question") as progress:
        for start in range(0, len(quiz.questions), batch_size):
            batch = quiz.questions[start : start + batch_size]
            answers = log.get(start, tuple(names))
            if answers is None:
                inputs = _inputs(model, processor, images, batch)
                logits, found = methods.logits(model, inputs, names)
                answers = {}
                for name, values in logits.items():
                    margin = values[:, yes].amax(-1) - values[:, no].amax(-1)
                    answers[name] = margin.double().tolist(), found[name]
                    log.add(start, name, *answers[name])
            for name, (margin, found_reports) in answers.items():
                margins[name] += margin
                reports[name] += found_reports
            progress.update(len(batch))
    return {name: np.array(values) for name, values in margins.items()}, reports


def _inputs(model: Any, processor: Any, images: CocoImages, batch: Sequence[Question]) -> Any:
    """The batch as the model takes it; each image is decoded once."""
    pictures = {question.image_id: images.open(question.image_id) for question in batch}
    inputs = chat_inputs(processor, [pictures[q.image_id] for q in batch], [question.text for question in batch])
    return inputs.to(model.device, dtype=model.dtype)


def score(answers: Answers, method: str, split: str, settings: EvaluationSettings) -> Score:
    """Scores one method on one split.

    Args:
        answers: All answers.
        method: A method of ``answers.margins``.
        split: A strategy of ``answers.splits``.
        settings: Resamples of the images behind the interval, and their seed.
    """
    rows = answers.splits[split]
    truth, image = answers.truth[rows], answers.image[rows]
    margin = answers.margins[method][rows]
    affirmed, absent = margin > 0, ~truth
    change = None
    if method != VANILLA:
        before = answers.margins[VANILLA][rows] > 0
        hallucinated = affirmed[absent].astype(float) - before[absent]
        change = bootstrap_interval(hallucinated, image[absent], settings.bootstrap, settings.seed)
    return Score(
        hr=float(affirmed[absent].mean()),
        tpr=float(affirmed[truth].mean()),
        accuracy=float((affirmed == truth).mean()),
        auc=float(roc_auc_score(truth, margin)),
        hr_change=change,
    )


def _alternate_images(questions: list[Question]) -> list[Question]:
    """Orders questions so that neighbours are about different images, as the swapped control needs."""
    by_image: dict[int, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.image_id, []).append(question)
    if len(by_image) < 2:
        raise EvaluationError(
            f"a comparison needs questions about at least 2 images, and there are {len(by_image)}: "
            "raise evaluation.images"
        )
    rounds = max(map(len, by_image.values()))
    return [own[turn] for turn in range(rounds) for own in by_image.values() if turn < len(own)]
