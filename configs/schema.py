"""Every setting of the project: its type, its legal values, and what it means.

A key has a default here only where one value suits every model and data set (``device: auto``, the paper's
strength). All other values stand in the YAML files beside this one, so that each number has one home.
A string under a field says what it means and its unit; ``--help`` prints it. A ``check`` method yields the
contradictions between keys; ``configs.load`` runs all of them before any work starts and tells them together.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parents[1]

FAMILIES = (
    "chameleon", "internvl", "llava", "llava_next", "llava_onevision", "qwen", "qwen2_5_vl", "qwen2_vl", "qwen3_vl",
)  # fmt: skip
DTYPES = ("auto", "float32", "bfloat16", "float16")
STATES_DTYPES = ("float16", "bfloat16", "float32", "int8")
PROMPT_KINDS = ("present", "random", "popular", "adversarial", "caption")
CACHES = ("auto", "device", "memory", "none", "stream")
ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
CONNECTIVITIES = (4, 8)
TARGETS = ("prompt", "mean")
LOSSES = ("kl", "bce", "mse_log", "lambdarank")
POSITIONS = ("none", "linear", "fourier")
QUESTIONS = ("none", "concat", "bilinear")
CONTEXTS = ("none", "mean", "neighbourhood", "both")
ENGINES = ("local", "ray")
ACCELERATORS = ("auto", "cpu", "gpu", "mps")
PRECISIONS = ("auto", "32-true", "bf16-mixed")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration, and the way out of it."""

    key: str
    """Dotted key; relative to its section inside a ``check`` method, absolute in a ``ConfigError``."""
    value: Any
    """What was given."""
    reason: str
    """Why it can't be used."""
    legal: str = ""
    """The values that can be."""
    hint: str = ""
    """What to do next."""
    involves: tuple[str, ...] = ()
    """Other keys (absolute) that this contradiction rests on; it is not told while one of them is wrong."""
    where: str = ""
    """The file that gave the value, or "command line"."""


@dataclass(frozen=True)
class Rule:
    """The legal values of one key, beyond its type."""

    low: float = -math.inf
    above: float = -math.inf
    high: float = math.inf
    below: float = math.inf
    choices: tuple[Any, ...] = ()

    def admits(self, value: Any) -> bool:
        """Tell whether ``value`` is legal; nan and infinity never are."""
        if self.choices and value is not None:
            return value in self.choices
        if not isinstance(value, int | float):
            return True
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        """Write the rule as a user reads it: ``>= 1``, ``> 1 and <= 2``, ``kl | bce``."""
        if self.choices:
            return " | ".join(str(choice) for choice in self.choices)
        bounds = ((">=", self.low), (">", self.above), ("<=", self.high), ("<", self.below))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if not math.isinf(bound))


_REQUIRED: Any = dataclasses.MISSING


def _key(
    default: Any = _REQUIRED,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    below: float = math.inf,
    choices: tuple[Any, ...] = (),
) -> Any:
    """Make a dataclass field with a `Rule`; without a default, a YAML file has to give the value."""
    return field(default=default, metadata={"rule": Rule(low, above, high, below, choices)})


def _count(default: Any = _REQUIRED) -> Any:
    return _key(default, low=1)


@dataclass(kw_only=True)
class SCRSection:
    """How credit is redistributed in this model: the edit of eq. (1) in arXiv 2602.22469."""

    num_sources: int = _count()
    """Sources K per image, in patches; the paper takes 32 of 24 x 24. At most half of the eligible ones."""
    strength: float = _key(1.10, above=1, high=2)
    """Lambda of eq. (1), no unit: neighbours gain (lambda - 1) times the source, sources are divided by it.
    The paper finds 1.05 to 1.15 useful."""
    edit_layers: list[int]
    """First and last decoder block whose output is edited, counted from 0, both included."""
    attention_layers: list[int]
    """First and last decoder block whose text-to-image attention makes the map, from 1, both included."""
    connectivity: int = _key(8, choices=CONNECTIVITIES)
    """Neighbours of a patch: 8 with diagonals (the paper's), 4 without."""
    exclude_border: bool = True
    """Never take a source from the outermost rows and columns: attention sinks live there."""
    state_layer: int = _key(0, low=0)
    """The decoder block whose output the predictor reads; edits may start there, the map's blocks lie behind it.
    The paper's is 0. Other than 0, the folder of the harvest ends in -block<n>."""
    suppress_claimed: bool = False
    """A patch that a better source claims as its neighbour can't be a source any more; claimed ones fill up where no
    other is left. An ablation of the rule "top K first, then claims"; the harvest is the same for both."""

    def check(self) -> Iterator[Problem]:
        """Both ranges are [first, last]; sources are chosen when the state layer is over."""
        for key, first_legal in (("edit_layers", self.state_layer), ("attention_layers", self.state_layer + 1)):
            value: list[int] = getattr(self, key)
            legal = f"[first, last] with {first_legal} <= first <= last"
            if len(value) != 2:
                yield Problem(key, value, f"has {len(value)} entries, a range has 2", legal)
            elif value[0] < first_legal:
                why = (
                    "negative"
                    if value[0] < 0
                    else f"sources are chosen from the states behind block {self.state_layer}"
                    if key == "edit_layers"
                    else f"the map is made of the blocks that follow block {self.state_layer}"
                )
                hint = "Or lower model.scr.state_layer." if self.state_layer else ""
                yield Problem(key, value, f"starts at {value[0]}: {why}", legal, hint, ("model.scr.state_layer",))
            elif value[0] > value[1]:
                yield Problem(key, value, "ends before it starts", legal, "Swap the two numbers.")


@dataclass(kw_only=True)
class ModelConfig:
    """The vision-language model that is harvested, and that the predictor is made for."""

    name: str
    """Short name: the folders under runs_dir and the MLflow experiment carry it."""
    hub_id: str
    """Hugging Face hub id, or a folder; a relative folder is taken from the project root."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null takes the newest."""
    family: str = _key("llava", choices=FAMILIES)
    """Which row of scr_runtime/families.py tells where the blocks, the visual tokens and the grid are."""
    dtype: str = _key("auto", choices=DTYPES)
    """Number format of the weights; auto takes the checkpoint's own, float32 on a CPU."""
    attn_implementation: str = _key("sdpa", choices=ATTENTION_IMPLEMENTATIONS)
    """Attention kernel of transformers."""
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:N or mps; auto takes an accelerator if there is one."""
    scr: SCRSection

    def check(self) -> Iterator[Problem]:
        """Names become folders; devices have a form of their own."""
        yield from _check_name(self.name)
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            yield Problem("device", self.device, "no such device", "auto | cpu | cuda | cuda:N | mps")

    @property
    def loading(self) -> dict[str, Any]:
        """Keyword arguments of `data.vlm.load_vlm`."""
        return {
            "hub_id": self.location,
            "revision": self.revision,
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "device": self.device,
        }

    @property
    def location(self) -> str:
        """`hub_id` as transformers wants it: an absolute path if it is a folder, else the hub id."""
        folder = PROJECT_ROOT / Path(self.hub_id).expanduser()
        return str(folder) if folder.is_dir() else self.hub_id


@dataclass(kw_only=True)
class WorldConfig:
    """The embedded world, rendered into data.root before its first use; null for real images."""

    train: int = _count()
    """Images to render for harvesting."""
    val: int = _count()
    """Images to render for evaluation."""
    seed: int = _key(0, low=0)
    """Seed of the renderer."""


@dataclass(kw_only=True)
class DataConfig:
    """Images and annotations in COCO layout."""

    name: str
    """Short name: the folders under runs_dir carry it."""
    root: str | None = None
    """Folder of the data set; null means runs_dir/data/<data.name>, which only a rendered world may use."""
    train_images: str
    """Folder of the images to harvest, from data.root."""
    train_annotations: str
    """Instances file of those images, from data.root."""
    eval_images: str
    """Folder of the images to evaluate on, from data.root."""
    eval_annotations: str
    """Instances file of those images, from data.root."""
    world: WorldConfig | None = None

    def check(self) -> Iterator[Problem]:
        """Real images have to be somewhere; harvest and evaluation must not share a folder of images."""
        yield from _check_name(self.name)
        if self.root is None and self.world is None:
            hint = f"Add data.root=/path/to/{self.name}: the folder with {self.train_images}/ in it."
            reason = f"data={self.name} has to be on this machine"
            yield Problem("root", None, reason, "a folder", hint, involves=("data.world",))
        if self.eval_images == self.train_images:
            reason = "is data.train_images too: a predictor must not be judged on images it was fitted to"
            yield Problem("eval_images", self.eval_images, reason, "another folder", involves=("data.train_images",))


@dataclass(kw_only=True)
class HarvestConfig:
    """Running the diagnostic on train images and keeping states and attention maps as shards."""

    samples: int = _count(4000)
    """Images to fit on."""
    validation: int = _count(400)
    """Images to choose the best epoch on."""
    test: int = _count(400)
    """Images to report the fit on."""
    tuning: int = _key(0, low=0)
    """Images set aside for choosing SCR's hyper-parameters: not harvested, never in another split, listed in the
    harvest's index.json. The paper takes 200."""
    prompts_per_image: int = _count(2)
    """Prompts per image; each gives one attention map."""
    prompts: list[str] = field(
        default_factory=lambda: ["present", "random", "present", "popular", "present", "adversarial"]
    )
    """Kinds of prompts, dealt out to each image in turn from a seeded start: questions about a present object, about
    an absent one chosen as POPE does (random, popular, adversarial), or one caption."""
    batch_size: int = _count(32)
    """Prompts per forward; the prompts of an image stay together, and share its pixels."""
    batch_tokens: int | None = _key(None, low=1)
    """Instead of batch_size: tokens per forward, visual and text, padding counted, one row per prompt. For models
    whose grids differ from image to image. An image that has more alone makes a batch of its own."""
    shard_size: int = _count(50)
    """Images per shard: what is lost at most when a harvest is interrupted."""
    states_dtype: str = _key("float16", choices=STATES_DTYPES)
    """Number format of the states at rest; int8 has one scale per token, and half the bytes of float16."""
    seed: int = _key(0, low=0)
    """Seed of the split and of the questions."""
    output: str | None = None
    """URL (s3://bucket/prefix, file:///..., any that fsspec knows) under which the harvest's folder has a copy:
    finished shards go there, and those that are there are fetched instead of made. null keeps them in runs_dir."""
    engine: str = _key("local", choices=ENGINES)
    """Who makes the shards: local, this process (one of several under torchrun or Slurm); ray, the actors of a Ray
    cluster, which RAY_ADDRESS names, or of this machine."""
    workers: int = _count(1)
    """Ray actors, each with a model of its own; only with engine=ray."""
    gpus_per_worker: float | None = _key(None, low=0)
    """GPUs that each Ray actor reserves; null takes 1 where the cluster has any, else 0. Only with engine=ray."""
    max_retries: int = _key(2, low=0)
    """How often a shard is tried again after its Ray actor died or failed, before it is given up."""
    name: str | None = None
    """Name of the folder under runs_dir/harvest; null means <model.name>-<data.name>. A sweep over settings of the
    harvest names one for each."""

    def check(self) -> Iterator[Problem]:
        """Workers are Ray's; prompts are of known kinds, and a caption is asked for once per image."""
        if self.name is not None:
            yield from _check_name(self.name)
        for key, plain in (("workers", 1), ("gpus_per_worker", None)):
            if self.engine == "local" and getattr(self, key) != plain:
                hint = "Add harvest.engine=ray, or start several processes with torchrun or Slurm (docs/harvest.md)."
                yield Problem(key, getattr(self, key), "needs harvest.engine=ray", hint=hint)
        legal = "a URL such as s3://bucket/prefix or file:///folder, without wildcards"
        if self.output is not None and not re.fullmatch(r"[a-z][a-z0-9+.-]*:/{2,3}[^*?\[\]]*", self.output):
            yield Problem("output", self.output, "is no URL of a folder", legal)
        elif self.engine == "ray" and (self.output or "").startswith("memory:"):
            yield Problem("output", self.output, "is seen by one process, and Ray has several", legal)
        unknown = [kind for kind in self.prompts if kind not in PROMPT_KINDS]
        if unknown or not self.prompts:
            reason = f"has no kind of prompt {unknown[0]!r}" if unknown else "is empty"
            yield Problem("prompts", self.prompts, reason, "a list of " + " | ".join(PROMPT_KINDS))
        elif set(self.prompts) == {"caption"} and self.prompts_per_image > 1:
            reason = "there is one caption prompt per image"
            hint = "Lower it to 1, or add questions to harvest.prompts."
            yield Problem("prompts_per_image", self.prompts_per_image, reason, "1", hint, ("harvest.prompts",))

    @property
    def images(self) -> int:
        """Images harvested in all."""
        return self.samples + self.validation + self.test


@dataclass(kw_only=True)
class PredictorSection:
    """The source predictor and its objective."""

    rank: int | None = _key(low=1)
    """Width of the first, factorised layer; null takes the one whose parameter count is nearest to the budget."""
    width: int = _count()
    """Hidden units of the second layer."""
    budget: int = _count()
    """Trainable parameters to aim at."""
    position: str = _key(choices=POSITIONS)
    """What the predictor is told of a patch's place: none; linear: row, column and distance to the border; fourier:
    their sines and cosines too."""
    question: str = _key(choices=QUESTIONS)
    """How the pooled states of the question enter: none; concat: beside the patch's; bilinear: as a gate on it."""
    context: str = _key(choices=CONTEXTS)
    """What is told of the other patches: none, the mean of the image, that of the 3 x 3 neighbourhood, or both."""
    components: int = _count()
    """Softmaxes whose mixture is the predicted map, as a real one is a mean over layers and heads; 1: a plain one."""
    target: str = _key(choices=TARGETS)
    """What is fitted to: prompt, the map of the row's own prompt; mean, the mean over the prompts of its image.
    Validation and test are always against the own map."""
    loss: str = _key(choices=LOSSES)
    """Objective: kl to the attention map (listwise), bce on top-K membership, mse_log on its logarithm, lambdarank
    on the order of its top K."""
    target_fallback: float | None = _key(low=0, high=1)
    """Share of the maps, those of lowest confidence, that mode "auto" hands to the diagnostic run; null if
    target_fidelity decides."""
    target_fidelity: float | None = _key(None, low=0, high=1)
    """Instead of target_fallback: expected share of true sources that the maps which stay one-pass have on average."""

    def check(self) -> Iterator[Problem]:
        """One target chooses auto's threshold."""
        if (self.target_fallback is None) == (self.target_fidelity is None):
            both = self.target_fallback is not None
            reason = "with target_fallback set too, there are two targets" if both else "there is no target"
            hint = "Add predictor.target_fallback=null." if both else "Set it, or predictor.target_fallback."
            involved = ("predictor.target_fallback",)
            yield Problem("target_fidelity", self.target_fidelity, reason, hint=hint, involves=involved)


@dataclass(kw_only=True)
class TrainerConfig:
    """Fitting the predictor with Lightning."""

    max_epochs: int = _count()
    """Passes over the harvest at most."""
    train_images: int | None = _key(None, low=1)
    """Images of the harvest to fit to, the first of its seeded order; null takes all. For learning curves."""
    batch_size: int = _count()
    """Attention maps per step."""
    learning_rate: float = _key(above=0, high=1)
    """Peak learning rate of AdamW."""
    weight_decay: float = _key(low=0, high=1)
    """Weight decay of AdamW."""
    warmup_fraction: float = _key(low=0, below=1)
    """Share of all steps over which the learning rate rises from 0."""
    patience: int = _count()
    """Epochs without a better validation score before the fit stops."""
    gradient_clip: float | None = _key(above=0)
    """Largest gradient norm; null never clips."""
    num_workers: int = _key(low=0)
    """Processes that read shards; 0 reads in the main process."""
    cache: str = _key("auto", choices=CACHES)
    """Where shards are kept during the fit: on the device, in memory, or none: read from disk batch by batch. auto
    takes the first that they fit into, and says why. stream reads the train split tar by tar, in an order of its
    own: for sets that no disk of this machine holds."""
    stream_from: str | None = None
    """Where the train tars of a stream are, with {shard} for a shard's name: a path, an http(s) URL, or pipe: and a
    command; null means the harvest's folder, where index, sidecars and the other splits are in any case."""
    accelerator: str = _key(choices=ACCELERATORS)
    """Where the fit runs, in Lightning's words."""
    devices: int = _count(1)
    """Processes of the fit, each with a device of its own; they share each batch, so that results stay the same."""
    precision: str = _key("auto", choices=PRECISIONS)
    """Number format of the fit: 32-true, float32; bf16-mixed, bfloat16 where torch's autocast allows it; auto takes
    bf16-mixed where the processor multiplies bfloat16 by itself, and says so."""
    resume: bool = True
    """Go on with an interrupted fit of the same settings, data and seed; false starts it anew. A fit that came to its
    end is always fitted anew."""

    def check(self) -> Iterator[Problem]:
        """A source belongs to a stream, and names its shards."""
        if self.stream_from is not None and self.cache != "stream":
            yield Problem(
                "stream_from", self.stream_from, "needs trainer.cache=stream", hint="Add trainer.cache=stream."
            )
        elif self.cache == "stream" and self.train_images is not None:
            yield Problem("train_images", self.train_images, "a stream takes all images", hint="Choose another cache.")
        elif self.stream_from is not None and "{shard}" not in self.stream_from:
            legal = "for instance https://host/folder/{shard}.tar"
            yield Problem("stream_from", self.stream_from, "does not say where the shard's name goes", legal)


@dataclass(kw_only=True)
class EvaluationConfig:
    """Comparing the modes of SCR on held-out images."""

    images: int = _key(300, low=0)
    """Images asked about; 0 compares no answers: train.py then ends with the fit's own metrics."""
    questions_per_image: int = _key(6, low=2)
    """Questions per image and strategy, half about present, half about absent objects, as POPE asks."""
    batch_size: int = _count(32)
    """Questions per forward."""
    bootstrap: int = _count(2000)
    """Resamples of the images behind each confidence interval."""
    latency_repeats: int = _count(20)
    """Prefills timed per mode."""
    seed: int = _key(0, low=0)
    """Seed of the questions and of the resamples."""

    def check(self) -> Iterator[Problem]:
        """POPE asks as many absent as present objects."""
        if self.questions_per_image % 2:
            reason = "half of the questions are about absent objects"
            yield Problem("questions_per_image", self.questions_per_image, reason, "an even number")


@dataclass(kw_only=True)
class TrackingConfig:
    """Where MLflow keeps its records."""

    uri: str | None = None
    """Tracking URI: sqlite:///FILE, http(s)://HOST:PORT, databricks or databricks://PROFILE; null means
    sqlite:///<runs_dir>/mlflow.db."""
    experiment: str | None = None
    """Name of the experiment; null takes model.name. Databricks wants a path: '/Shared/scr/${model.name}'."""
    register: str | None = None
    """Registers the exported predictor under this name, as the version with alias latest-fit; of a sweep, the child
    with the best validation score. null registers nothing."""

    def check(self) -> Iterator[Problem]:
        """A URI has a scheme and a place; Databricks files experiments under paths."""
        uri = self.uri
        databricks = uri is not None and (uri == "databricks" or uri.startswith("databricks://"))
        if uri is not None and not databricks and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s]+", uri):
            legal = "sqlite:///FILE | http://HOST:PORT | https://HOST | databricks | databricks://PROFILE | null"
            hint = ""
            if re.fullmatch(r"[\w.-]+:\d+/?", uri):
                hint = f"Did you mean http://{uri}?"
            elif re.fullmatch(r"[\w./~-]+\.db", uri):
                hint = f"Did you mean sqlite:///{uri}?"
            yield Problem("uri", uri, "is no tracking URI", legal, hint)
        if databricks and not (self.experiment or "").startswith("/"):
            hint = "Add tracking.experiment='/Shared/scr/${model.name}', or a folder under /Users/<you>."
            yield Problem("experiment", self.experiment, "Databricks files experiments under paths", "/PATH", hint)
        if self.register is not None and not re.fullmatch(r"[^/:\s][^/:]*", self.register):
            yield Problem("register", self.register, "can't name a model", "text without / and :")


@dataclass(frozen=True)
class Paths:
    """Every place that is read or generated, made by `TrainConfig.paths`."""

    data: Path
    """Root of the data set: data.root, or runs/data/<data.name>."""
    train_images: Path
    train_annotations: Path
    eval_images: Path
    eval_annotations: Path
    harvest: Path
    """Shards: runs/harvest/<model>-<data>, and -block<n> behind it where model.scr.state_layer is not 0."""
    checkpoints: Path
    """Lightning checkpoints: runs/checkpoints/<model>; of a variant runs/sweeps/<model>/<variant>/checkpoints."""
    predictor: Path
    """The exported predictor: runs/predictors/<model>; of a variant runs/sweeps/<model>/<variant>/predictor."""
    cache: Path
    """What is derived from inputs and can be made again: runs/cache."""
    sweeps: Path
    """Children of sweeps, and the summaries: runs/sweeps/<model>."""
    reports: Path
    """Tables and figures: runs/reports/<model>; of a variant runs/sweeps/<model>/<variant>/reports."""
    config: Path
    """The resolved config of the last run: config.yaml in `reports`."""
    mlflow_db: Path
    """runs/mlflow.db."""
    mlflow_artifacts: Path
    """runs/mlflow."""


@dataclass(kw_only=True)
class TrainConfig:
    """All settings of harvest, fit, export and comparison; the entry points share this one class."""

    runs_dir: str = "runs"
    """Folder of everything that is generated."""
    seed: int = _key(0, low=0)
    """Seed of the fit: initial weights and order of the batches."""
    variant: str | None = None
    """Name of a fit that lies beside others of its model, under runs_dir/sweeps/<model.name>; null is the model's own
    place. A sweep names its children; with that name, export and evaluation find a child."""
    model: ModelConfig
    data: DataConfig
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    predictor: PredictorSection
    trainer: TrainerConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig

    def check(self) -> Iterator[Problem]:
        """Names become folders; the rendered world has to hold the images that harvest and evaluation ask for."""
        if self.variant is not None:
            yield from _check_name(self.variant, "variant")
        if not self.runs_dir.strip():
            yield Problem("runs_dir", self.runs_dir, "is empty", "a folder")
        if self.predictor.target == "mean" and self.trainer.cache == "stream":
            reason = "a stream has the map of each prompt alone"
            yield Problem("predictor.target", "mean", reason, "prompt", "Or choose another trainer.cache.")
        world, harvest, evaluation = self.data.world, self.harvest, self.evaluation
        if world is None:
            return
        needed = harvest.images + harvest.tuning
        if needed > world.train:
            parts = [harvest.samples, harvest.validation, harvest.test] + [harvest.tuning] * (harvest.tuning > 0)
            others = "validation, test and tuning" if harvest.tuning else "validation and test"
            yield Problem(
                "harvest.samples",
                harvest.samples,
                f"with {others}, {' + '.join(map(str, parts))} = {needed} images; data.world.train renders "
                f"{world.train}",
                f"at most {world.train} images in all",
                f"Lower one of them, or add data.world.train={needed}.",
                involves=("harvest.validation", "harvest.test", "harvest.tuning", "data.world.train"),
            )
        if evaluation.images > world.val:
            yield Problem(
                "evaluation.images",
                evaluation.images,
                f"more images than data.world.val renders ({world.val})",
                f"<= {world.val}",
                f"Lower it, or add data.world.val={evaluation.images}.",
                involves=("data.world.val",),
            )

    @property
    def paths(self) -> Paths:
        """Every place of this configuration; all that is generated lies under `runs_dir`."""
        runs = Path(self.runs_dir).expanduser()
        data = Path(self.data.root).expanduser() if self.data.root else runs / "data" / self.data.name
        sweeps = runs / "sweeps" / self.model.name
        own = sweeps / self.variant if self.variant else None
        reports = own / "reports" if own else runs / "reports" / self.model.name
        layer = self.model.scr.state_layer
        harvest = f"{self.model.name}-{self.data.name}" + (f"-block{layer}" if layer else "")
        return Paths(
            data=data,
            train_images=data / self.data.train_images,
            train_annotations=data / self.data.train_annotations,
            eval_images=data / self.data.eval_images,
            eval_annotations=data / self.data.eval_annotations,
            harvest=runs / "harvest" / (self.harvest.name or harvest),
            checkpoints=own / "checkpoints" if own else runs / "checkpoints" / self.model.name,
            predictor=own / "predictor" if own else runs / "predictors" / self.model.name,
            cache=runs / "cache",
            sweeps=sweeps,
            reports=reports,
            config=reports / "config.yaml",
            mlflow_db=runs / "mlflow.db",
            mlflow_artifacts=runs / "mlflow",
        )

    @property
    def harvest_url(self) -> str | None:
        """The harvest's folder under `harvest.output`, or null."""
        return self.harvest.output and f"{self.harvest.output.rstrip('/')}/{self.paths.harvest.name}"

    @property
    def tracking_uri(self) -> str:
        """`tracking.uri`, or the SQLite file under `runs_dir`."""
        return self.tracking.uri or f"sqlite:///{self.paths.mlflow_db}"

    @property
    def fitting(self) -> dict[str, Any]:
        """Keyword arguments of `predictor.module.SourceModule`, all but the width of the states."""
        network = ("rank", "width", "budget", "position", "question", "context", "components", "loss")
        schedule = ("learning_rate", "weight_decay", "warmup_fraction")
        return {
            **{key: getattr(self.predictor, key) for key in network},
            **{key: getattr(self.trainer, key) for key in schedule},
            "num_sources": self.model.scr.num_sources,
            "exclude_border": self.model.scr.exclude_border,
            "connectivity": self.model.scr.connectivity,
            "suppress_claimed": self.model.scr.suppress_claimed,
        }

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide what a fit and its comparison give on a finished harvest.

        Places, names, devices and the ways of reading do not; model and harvest are told by the harvest's own
        fingerprint. A key that is new counts until it is named here.
        """
        plain = dataclasses.asdict(self)
        for key in ("runs_dir", "variant", "tracking", "harvest"):
            del plain[key]
        plain["model"] = plain["model"]["scr"]
        del plain["data"]["root"]
        for key in ("num_workers", "cache", "stream_from", "accelerator", "devices", "resume"):
            del plain["trainer"][key]
        if not self.evaluation.images:  # no answers are compared
            del plain["data"]
            plain["evaluation"] = {key: plain["evaluation"][key] for key in ("images", "bootstrap", "seed")}
        return plain

    @property
    def experiment(self) -> str:
        """`tracking.experiment`, or the model's name."""
        return self.tracking.experiment or self.model.name


def _check_name(name: str, key: str = "name") -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        legal = "letters, digits, dots, hyphens and underscores, starting with a letter or a digit"
        yield Problem(key, name, "can't be the name of a folder", legal)
