"""The configuration of every entry point: the rooms' own settings as sections, and what joins them.

A value has one home: the default of its field where it suits every model and data set, else the YAML files beside
this one. The string under a field is its help text. Validators find contradictions; `configs.load` reports all of
them, with every other mistake, before any work starts.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from configs.paths import Paths, paths_of
from data.settings import FolderName, HarvestSettings, ReadingSettings, VLMSettings
from evaluation.settings import EvaluationSettings
from predictor.settings import FitSettings, PredictorSettings
from scr_runtime.config import Connectivity, SCRConfig

_SECTION = ConfigDict(
    extra="forbid",
    frozen=True,
    use_attribute_docstrings=True,
    validate_default=True,
    coerce_numbers_to_str=True,
    serialize_by_alias=True,
)


class SCRSection(BaseModel):
    """How credit is redistributed in this model: the edit of eq. (1) in arXiv 2602.22469."""

    model_config = _SECTION

    num_sources: int = Field(ge=1)
    """Sources K per image, in patches; the paper takes 32 of 24 x 24. At most half of the eligible ones."""
    source_fraction: float | None = Field(default=SCRConfig.source_fraction, gt=0, le=0.5, allow_inf_nan=False)
    """Instead of num_sources: K as a share of an image's patches, for models whose grids differ from image to image.
    The paper's 32 of 24 x 24 is 0.0556."""
    strength: float = Field(default=SCRConfig.strength, gt=1, le=2, allow_inf_nan=False)
    """Lambda of eq. (1), no unit: neighbours gain (lambda - 1) times the source, sources are divided by it.
    The paper finds 1.05 to 1.15 useful."""
    state_layer: int = Field(default=SCRConfig.state_layer, ge=0)
    """The decoder block whose output the predictor reads; edits may start there, the map's blocks lie behind it.
    The paper's is 0. Other than 0, the folder of the harvest ends in -block<n>."""
    edit_layers: list[int]
    """First and last decoder block whose output is edited, counted from 0, both included."""
    attention_layers: list[int]
    """First and last decoder block whose text-to-image attention makes the map, from 1, both included."""
    connectivity: Connectivity = SCRConfig.connectivity
    """Neighbours of a patch: 8 with diagonals (the paper's), 4 without."""
    exclude_border: bool = SCRConfig.exclude_border
    """Never take a source from the outermost rows and columns: attention sinks live there."""
    suppress_claimed: bool = SCRConfig.suppress_claimed
    """A patch that a better source claims as its neighbour can no longer be a source; claimed ones fill up where no
    other is left. An ablation of the rule "top K first, then claims"; the harvest is the same for both."""

    @field_validator("edit_layers", "attention_layers")
    @classmethod
    def _is_range(cls, value: list[int], info: ValidationInfo) -> list[int]:
        state = info.data.get("state_layer", 0)
        edits = info.field_name == "edit_layers"
        earliest = state + (not edits)
        details = {"legal": f"[first, last] with {earliest} <= first <= last", "hint": ""}
        if len(value) != 2:
            reason = f"has {len(value)} entries, a range has 2"
        elif value[0] < earliest:
            sources = f"sources are chosen from the states behind block {state}"
            maps = f"the map is made of the blocks that follow block {state}"
            reason = f"starts at {value[0]}: " + ("negative" if value[0] < 0 else sources if edits else maps)
            details["hint"] = "Or lower model.scr.state_layer." if state else ""
        elif value[0] > value[1]:
            reason, details["hint"] = "ends before it starts", "Swap the two numbers."
        else:
            return value
        raise PydanticCustomError("contradiction", "{reason}", {"reason": reason, **details})


class ModelConfig(VLMSettings):
    """The vision-language model that is harvested, and that the predictor is made for."""

    model_config = _SECTION

    name: FolderName
    """Short name: the folders under runs_dir and the MLflow experiment carry it."""
    scr: SCRSection


class WorldConfig(BaseModel):
    """The embedded world, rendered into data.root before its first use; null for real images."""

    model_config = _SECTION

    train: int = Field(default=6000, ge=1)
    """Images to render for harvesting."""
    val: int = Field(default=500, ge=1)
    """Images to render for evaluation."""
    seed: int = Field(default=0, ge=0)
    """Seed of the renderer."""
    sizes: Literal["square", "mixed"] = "square"
    """Scenes of 96 x 96 pixels, or larger ones of several sizes and aspect ratios."""


class DataConfig(BaseModel):
    """Images and annotations in COCO layout."""

    model_config = _SECTION

    name: FolderName
    """Short name: the folders under runs_dir carry it."""
    world: WorldConfig | None = None
    root: str | None = None
    """Folder of the data set; null means runs_dir/data/<data.name>, which only a rendered world may use."""
    train_images: str
    """Folder of the images to harvest, from data.root."""
    train_annotations: str | None
    """Instances file of those images, from data.root; null: there are none, every picture in the folder is taken, and
    harvest.prompts are captions and texts."""
    eval_images: str | None
    """Folder of the images to evaluate on, from data.root; null: there are none."""
    eval_annotations: str | None
    """Instances file of those images, from data.root; null: there are none, and evaluation.images has to be 0."""

    @field_validator("root")
    @classmethod
    def _is_somewhere(cls, root: str | None, info: ValidationInfo) -> str | None:
        if root is None and info.data.get("world", ...) is None:
            name = info.data.get("name", "NAME")
            hint = f"Add data.root=/path/to/{name}: the folder with data.train_images in it."
            details = {"name": name, "legal": "a folder", "hint": hint}
            raise PydanticCustomError("contradiction", "data={name} has to be on this machine", details)
        return root

    @field_validator("eval_images")
    @classmethod
    def _held_out(cls, folder: str | None, info: ValidationInfo) -> str | None:
        if folder is not None and folder == info.data.get("train_images"):
            reason = "is data.train_images too: a predictor must not be judged on images it was fitted to"
            raise PydanticCustomError("contradiction", "{reason}", {"reason": reason, "legal": "another folder"})
        return folder


class TrainerConfig(ReadingSettings, FitSettings):
    """Fitting the predictor with Lightning, and how the fit reads the shards."""

    model_config = _SECTION


class TrackingConfig(BaseModel):
    """Where MLflow keeps its records."""

    model_config = _SECTION

    uri: str | None = None
    """Tracking URI: sqlite:///FILE, http(s)://HOST:PORT, databricks or databricks://PROFILE; null means
    sqlite:///<runs_dir>/mlflow.db."""
    experiment: str | None = None
    """Name of the experiment; null takes model.name. Databricks wants a path: '/Shared/scr/${model.name}'."""
    register_as: str | None = Field(default=None, alias="register")
    """Registers the exported predictor under this name, as the version with alias latest-fit; of a sweep, the child
    with the best validation score. null registers nothing."""

    @field_validator("uri")
    @classmethod
    def _is_uri(cls, uri: str | None) -> str | None:
        if uri is None or _is_databricks(uri) or re.fullmatch(r"(?!sqlite:///*$)[a-z][a-z0-9+.-]*://[^\s]+", uri):
            return uri
        details = {
            "legal": "sqlite:///FILE | http://HOST:PORT | https://HOST | databricks | databricks://PROFILE | null"
        }
        if re.fullmatch(r"[\w.-]+:\d+/?", uri):
            details["hint"] = f"Did you mean http://{uri}?"
        elif re.fullmatch(r"[\w./~-]+\.db", uri):
            details["hint"] = f"Did you mean sqlite:///{uri}?"
        raise PydanticCustomError("contradiction", "is no tracking URI", details)

    @field_validator("experiment")
    @classmethod
    def _is_databricks_path(cls, experiment: str | None, info: ValidationInfo) -> str | None:
        if _is_databricks(info.data.get("uri")) and not (experiment or "").startswith("/"):
            hint = "Add tracking.experiment='/Shared/scr/${model.name}', or a folder under /Users/<you>."
            details = {"legal": "/PATH", "hint": hint}
            raise PydanticCustomError("contradiction", "Databricks files experiments under paths", details)
        return experiment

    @field_validator("register_as")
    @classmethod
    def _can_name_a_model(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[^/:\s][^/:]*", name):
            raise PydanticCustomError("contradiction", "can't name a model", {"legal": "text without / and :"})
        return name


def _uses(info: ValidationInfo, section: str) -> bool:
    """Whether the command that is checked for uses a section."""
    uses = (info.context or {}).get("uses")
    return uses is None or section in uses


def _is_databricks(uri: str | None) -> bool:
    return uri is not None and (uri == "databricks" or uri.startswith("databricks://"))


class TrainConfig(BaseModel):
    """All settings of harvest, fit, export and comparison; the entry points share this one class."""

    model_config = _SECTION

    runs_dir: str = "runs"
    """Folder of everything that is generated."""
    seed: int = Field(default=0, ge=0)
    """Seed of the fit: initial weights and order of the batches."""
    overwrite: bool = False
    """Delete what stands in the way: a harvest in the folder that was made with other settings, a variant that was
    fitted with others. Nothing is ever deleted without it."""
    variant: FolderName | None = None
    """Name of a fit that lies beside others of its model, under runs_dir/sweeps/<model.name>; null is the model's own
    place. A sweep names its children; with that name, export and evaluation find a child."""
    model: ModelConfig
    data: DataConfig
    harvest: HarvestSettings = HarvestSettings()
    predictor: PredictorSettings
    trainer: TrainerConfig
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: TrackingConfig

    @field_validator("runs_dir")
    @classmethod
    def _names_a_folder(cls, runs_dir: str) -> str:
        if not runs_dir.strip():
            raise PydanticCustomError("contradiction", "is empty", {"legal": "a folder"})
        return runs_dir

    @field_validator("harvest")
    @classmethod
    def _fits_the_world(cls, harvest: HarvestSettings, info: ValidationInfo) -> HarvestSettings:
        world = info.data["data"].world if "data" in info.data else None
        needed = harvest.images + harvest.tuning
        if world is None or needed <= world.train or not _uses(info, "harvest"):
            return harvest
        parts = [*harvest.splits.values()] + [harvest.tuning] * (harvest.tuning > 0)
        others = "validation, test and tuning" if harvest.tuning else "validation and test"
        sums = f"{' + '.join(map(str, parts))} = {needed} images"
        details = {
            "key": "samples",
            "value": harvest.samples,
            "reason": f"with {others}, {sums}; data.world.train renders {world.train}",
            "legal": f"at most {world.train} images in all",
            "hint": f"Lower one of them, or add data.world.train={needed}.",
        }
        raise PydanticCustomError("contradiction", "{reason}", details)

    @field_validator("evaluation")
    @classmethod
    def _has_the_images(cls, evaluation: EvaluationSettings, info: ValidationInfo) -> EvaluationSettings:
        data = info.data.get("data")
        if data is None or not _uses(info, "evaluation"):
            return evaluation
        if evaluation.images and None in (data.eval_images, data.eval_annotations):
            details = {
                "key": "images",
                "value": evaluation.images,
                "reason": f"data={data.name} has no annotated images to make questions from",
                "legal": "0",
                "hint": "Add evaluation.images=0, or set data.eval_images and data.eval_annotations.",
            }
            raise PydanticCustomError("contradiction", "{reason}", details)
        world = data.world
        if world is None or evaluation.images <= world.val:
            return evaluation
        details = {
            "key": "images",
            "value": evaluation.images,
            "reason": f"more images than data.world.val renders ({world.val})",
            "legal": f"<= {world.val}",
            "hint": f"Lower it, or add data.world.val={evaluation.images}.",
        }
        raise PydanticCustomError("contradiction", "{reason}", details)

    @field_validator("trainer")
    @classmethod
    def _streams_what_it_can(cls, trainer: TrainerConfig, info: ValidationInfo) -> TrainerConfig:
        if not _uses(info, "trainer"):
            return trainer
        if "predictor" in info.data and info.data["predictor"].target == "mean" and trainer.cache == "stream":
            details = {
                "key": "cache",
                "value": "stream",
                "legal": "device | memory | none | auto",
                "hint": "Or set predictor.target=prompt.",
            }
            raise PydanticCustomError("contradiction", "a stream has the map of each prompt alone", details)
        return trainer

    @property
    def paths(self) -> Paths:
        """Every place of this configuration."""
        return paths_of(self)

    @property
    def scr(self) -> SCRConfig:
        """`model.scr` as the runtime takes it."""
        return SCRConfig(**self.model.scr.model_dump())

    @property
    def mean_maps(self) -> bool:
        """Whether the fit is to the mean map of an image's prompts."""
        return self.predictor.target == "mean"

    @property
    def harvest_url(self) -> str | None:
        """The harvest's folder under `harvest.output`, or null."""
        return self.harvest.output and f"{self.harvest.output.rstrip('/')}/{self.paths.harvest.name}"

    @property
    def tracking_uri(self) -> str:
        """`tracking.uri`, or the SQLite file under `runs_dir`."""
        return self.tracking.uri or f"sqlite:///{self.paths.mlflow_db}"

    @property
    def experiment(self) -> str:
        """`tracking.experiment`, or the model's name."""
        return self.tracking.experiment or self.model.name

    @property
    def result_settings(self) -> dict[str, Any]:
        """The settings that decide what a fit and its comparison give on a finished harvest.

        Places, names, devices and ways of reading don't; model and harvest are identified by the harvest's own data
        fingerprint. A new key counts until it is named here.
        """
        plain = self.model_dump()
        for key in ("runs_dir", "overwrite", "variant", "tracking", "harvest"):
            del plain[key]
        plain["model"] = plain["model"]["scr"]
        del plain["data"]["root"]
        for key in ("num_workers", "cache", "stream_from", "accelerator", "devices", "resume", "trial"):
            del plain["trainer"][key]
        if not self.evaluation.asks:
            del plain["data"]
            plain["evaluation"] = {key: plain["evaluation"][key] for key in ("images", "bootstrap", "seed")}
        return plain

    @property
    def run_settings(self) -> list[Any]:
        """The settings that identify a run before its harvest exists: two runs with equal ones give equal results."""
        model, data = self.model, {**self.data.model_dump(), "root": None}
        place = [model.hub_id, model.revision, model.dtype]
        return [self.result_settings, self.harvest.model_dump(exclude={"name"}), data, place]
