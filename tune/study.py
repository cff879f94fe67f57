"""The study file: base trial, baselines, space, algorithm, scheduler, objectives, ledger, where results go."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from dpsink.config import DataConfig, EvaluationConfig, Strict, TrialConfig, flatten, nearest, read_yaml, validate
from dpsink.errors import InputError
from dpsink.privacy.ledger import Policy, Selection
from tune import schema
from tune.space import Distribution, activations, active, check_conditions, grid

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Not to be searched: which records are private, what is promised, and what the trials are compared by.
COMMON = ("data.", "privacy.target_epsilon", "privacy.delta", "evaluation.")
KIND = "generator.kind"  # the one setting that decides which others there are
ROUNDING = 1e-9  # a third of a GPU, written down, is a little less or more


class Algorithm(Strict):
    """How configurations are proposed."""

    kind: Literal["random", "grid", "optuna", "listed"] = "random"
    trials: int = Field(
        default=10, ge=1, le=100_000, description="searched configurations, besides the baselines; a grid has its own"
    )
    configurations: tuple[dict[str, Any], ...] = Field(
        default=(), description="of kind listed: each a dotted path of the settings to its value"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the proposals, public")
    seeds_per_configuration: int = Field(
        default=1, ge=1, le=1000, description="trials of each configuration and baseline; they differ in their seed"
    )

    @model_validator(mode="after")
    def _seed_is_used(self) -> "Algorithm":
        if self.kind in ("grid", "listed") and self.seed:
            raise ValueError(f"seed={self.seed} has no effect with kind={self.kind}, which draws nothing: leave it out")
        return self


class Scheduler(Strict):
    """Which trials are stopped before their budget is spent."""

    kind: Literal["none", "asha"] = Field(
        default="none", description="asha: asynchronous successive halving (Li et al. 2020)"
    )
    grace: float = Field(default=0.1, ge=0.01, lt=1, description="part of its budget that every trial runs")
    reduction: int = Field(
        default=3, ge=2, le=100, description="one trial in so many goes on, and as many times further"
    )

    @model_validator(mode="after")
    def _settings_are_used(self) -> "Scheduler":
        for name in ("grace", "reduction") if self.kind == "none" else ():
            if (value := getattr(self, name)) != Scheduler.model_fields[name].default:
                raise ValueError(f"{name}={value:g} has no effect with kind=none: set kind to asha, or leave it out")
        return self


class Resources(Strict):
    """What each trial may use."""

    cpu: float = Field(default=1, gt=0, le=1024)
    gpu: float = Field(default=0, ge=0, le=1024, description="a part of one GPU, or whole ones")
    slots: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="trials that share one process; 0: as many as fit in a GPU, on CPUs one",
    )
    concurrency: int = Field(default=0, ge=0, description="trials at the same time; 0: as many as fit")
    price_per_hour: float | None = Field(
        default=None, ge=0, description="of all machines together, in any currency; for the estimate of --dry-run"
    )

    @model_validator(mode="after")
    def _fits_gpus(self) -> "Resources":
        if self.gpu > 1 and self.gpu % 1:
            raise ValueError(f"gpu={self.gpu:g} must be at most 1, or a whole number")
        if self.gpu and self.slots > self.per_gpu:
            raise ValueError(
                f"slots={self.slots} must be at most {self.per_gpu}, the trials that have a place on one GPU; "
                f"set gpu to {1 / self.slots:.4g} or less, or leave slots out"
            )
        return self

    @property
    def device(self) -> str:
        """Where trials are trained."""
        return "cuda" if self.gpu else "cpu"

    @property
    def sharing(self) -> int:
        """Trials that share one process, 1 where each has its own."""
        return self.slots or (self.per_gpu if self.gpu else 1)

    def fit_in(self, cpus: float, gpus: float) -> int:
        """Trials that a node has room for at a time."""
        fit = math.floor(cpus / self.cpu + ROUNDING)
        if self.gpu > 1:
            return min(fit, math.floor(gpus / self.gpu))
        if self.gpu:
            return min(fit, math.floor(gpus) * self.per_gpu)
        return min(fit, self.sharing) if self.sharing > 1 else fit

    @property
    def per_gpu(self) -> int:
        """Trials that have a place on one GPU."""
        return max(1, math.floor(1 / self.gpu + ROUNDING))


class SelectionConfig(Strict):
    """How the secret number of trials of `release_best` is drawn."""

    expected_trials: float = Field(gt=1, lt=1e9, description="mean; a study may run several times as many")
    shape: Literal["logarithmic", "geometric"] = Field(
        default="logarithmic", description="logarithmic costs least, geometric spreads less"
    )


class LedgerConfig(Strict):
    """The study's own privacy account."""

    policy: Policy = "compose_all"
    study_epsilon: float | None = Field(
        default=None, gt=0, description="bound for the whole study; default: the worst case that is planned"
    )
    selection: SelectionConfig | None = Field(default=None, description="of policy release_best")

    @model_validator(mode="after")
    def _goes_together(self) -> "LedgerConfig":
        if (self.selection is not None) != (self.policy == "release_best"):
            raise ValueError("policy release_best and selection go together: set both, or neither")
        if self.selection is not None and self.study_epsilon is not None:
            raise ValueError("study_epsilon follows from the selection under release_best: leave it out")
        return self

    @property
    def drawn(self) -> Selection | None:
        """The distribution of the number of trials, where it is drawn."""
        return Selection(self.selection.expected_trials, self.selection.shape) if self.selection else None


class Tracking(Strict):
    """Where runs are shown."""

    uri: str | None = Field(
        default=None, description="MLflow tracking URI; default: $MLFLOW_TRACKING_URI, or sqlite in storage"
    )
    experiment: str = "dpsink"


class Study(Strict):
    """A hyperparameter study, whole."""

    name: str
    preset: Path | None = Field(
        default=None, description="YAML of a trial that `trial` is merged into; relative to the study file's folder"
    )
    trial: dict[str, Any] = Field(default_factory=dict, description="the base trial's settings")
    baselines: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="name to settings merged into the base trial; run first. Without one of generator.kind class_mean "
        "the control is added",
    )
    space: dict[str, Distribution] = Field(default_factory=dict, description="dotted path to distribution")
    repeats: Path | None = Field(
        default=None,
        description="folder of the study whose best configurations are listed, to be trained again; its ε is added",
    )
    algorithm: Algorithm = Algorithm()
    scheduler: Scheduler = Scheduler()
    objectives: tuple[str, ...] = Field(
        default=("accuracy",), description="validation metrics that the search optimises; the first ranks"
    )
    test_samples: int = Field(default=5000, ge=20, description="samples to judge the chosen runs by")
    resources: Resources = Resources()
    ledger: LedgerConfig = LedgerConfig()
    tracking: Tracking = Tracking()
    storage: Path = Path("studies")

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("must be letters, digits, '.', '_' or '-', at most 64")
        return value

    @field_validator("storage", mode="before")
    @classmethod
    def _storage_is_a_folder(cls, value: Any) -> Any:
        if "://" in str(value):
            raise ValueError(f"must be a folder, on a cluster one that all nodes share, not '{value}': no object store")
        return value

    @field_validator("objectives", mode="before")
    @classmethod
    def _objectives_are_listed(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"must be a list, such as [{value}]")
        return value

    @field_validator("objectives")
    @classmethod
    def _objectives_exist(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one metric, such as [accuracy]")
        for name in value:
            if name not in schema.QUALITY:
                raise ValueError(f"unknown metric '{name}'{nearest(name, schema.QUALITY)}")
        if len(set(value)) < len(value):
            raise ValueError("must name each metric once")
        return value

    @field_validator("baselines")
    @classmethod
    def _baseline_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not NAME.fullmatch(name):
                raise ValueError(f"baseline '{name}' must be named with letters, digits, '.', '_' or '-'")
        return value

    @field_validator("space")
    @classmethod
    def _conditions_can_be_met(cls, value: dict[str, Distribution]) -> dict[str, Distribution]:
        check_conditions(value)
        return value

    @model_validator(mode="after")
    def _sealed_trials_are_alike(self) -> "Study":
        if not self.sealed:
            return self
        if self.algorithm.kind != "random":
            raise ValueError("algorithm.kind must be random under release_best: its trials may not learn")
        for field in ("trials", "seed"):
            if field in self.algorithm.model_fields_set:
                raise ValueError(f"algorithm.{field} is drawn in secret under release_best: leave it out")
        if self.algorithm.seeds_per_configuration > 1:
            raise ValueError("algorithm.seeds_per_configuration must be 1 under release_best: each trial is drawn anew")
        if self.scheduler.kind != "none":
            raise ValueError("scheduler.kind must be none under release_best: its trials may not know of each other")
        if len(self.objectives) > 1:
            raise ValueError("objectives must be one under release_best: it publishes one winner")
        if self.baselines:
            raise ValueError("baselines are no part of what release_best selects from: run them as their own study")
        return self

    @model_validator(mode="after")
    def _grid_is_finite(self) -> "Study":
        pointed = [path for path, dimension in self.space.items() if dimension.points is not None]
        if self.algorithm.kind != "grid":
            if pointed:
                raise ValueError(f"space.{pointed[0]}.points is for algorithm.kind=grid: leave it out")
            return self
        if "trials" in self.algorithm.model_fields_set:
            raise ValueError("algorithm.trials follows from the space of a grid: leave it out")
        if endless := [path for path, dimension in self.space.items() if not dimension.grid]:
            raise ValueError(f"space.{endless[0]} needs points, the number of its values, on a grid")
        self.configurations  # noqa: B018 (raises where they are too many)
        return self

    @model_validator(mode="after")
    def _a_list_stands_alone(self) -> "Study":
        listed = self.algorithm.configurations
        if self.algorithm.kind != "listed":
            if listed:
                raise ValueError("algorithm.configurations is for algorithm.kind=listed: leave it out")
            if self.repeats is not None:
                raise ValueError("repeats is for algorithm.kind=listed: leave it out, or use `dpsink-tune repeat`")
            return self
        if not listed:
            raise ValueError("algorithm.configurations must list at least one under algorithm.kind=listed")
        if any(one in listed[:index] for index, one in enumerate(listed)):
            raise ValueError("algorithm.configurations must differ; seeds_per_configuration trains each several times")
        if self.space:
            raise ValueError("space is for a search: leave it out under algorithm.kind=listed")
        if "trials" in self.algorithm.model_fields_set:
            raise ValueError("algorithm.trials follows from the configurations that are listed: leave it out")
        return self

    @model_validator(mode="after")
    def _stopping_is_fair(self) -> "Study":
        if self.scheduler.kind == "none":
            return self
        if len(self.objectives) > 1:
            raise ValueError("scheduler.kind must be none with several objectives: which run is worse is not decided")
        if self.algorithm.seeds_per_configuration > 1:
            raise ValueError(
                "scheduler.kind must be none with seeds_per_configuration > 1: the mean needs every seed to its end"
            )
        return self

    @property
    def objective(self) -> str:
        """The metric that ranks: the first objective."""
        return self.objectives[0]

    @property
    def sealed(self) -> bool:
        """Whether only the winner is published, and all else about the trials stays secret."""
        return self.ledger.policy == "release_best"

    @property
    def seeds(self) -> int:
        """Trials of each configuration."""
        return self.algorithm.seeds_per_configuration

    @property
    def points(self) -> list[dict[str, Any]] | None:
        """All that will be searched, where it is known beforehand: of a grid or a list; None otherwise."""
        if self.algorithm.kind == "listed":
            return [dict(one) for one in self.algorithm.configurations]
        return grid(self.space) if self.algorithm.kind == "grid" else None

    @property
    def searched(self) -> tuple[str, ...]:
        """Paths of what is searched."""
        listed = dict.fromkeys(path for one in self.algorithm.configurations for path in one)
        return (*self.space, *listed)

    @property
    def configurations(self) -> int:
        """Searched configurations; of a sealed study their number is drawn, and this one means nothing."""
        return self.algorithm.trials if self.points is None else len(self.points)

    @property
    def trials(self) -> int:
        """All trials: each configuration and each baseline with each seed."""
        return (len(self.baselines) + self.configurations) * self.seeds

    def to_yaml(self) -> str:
        """All settings as a study file: what the study's folder keeps. Settings that do not apply are left out."""
        listed = self.algorithm.kind == "listed"
        proposed = {"trials", "seed"} if self.sealed else {"trials"} if self.points is not None else set()
        unused: dict[str, Any] = {
            "preset": True,
            "repeats": self.repeats is None,
            "algorithm": proposed | (set() if listed else {"configurations"}),
            "ledger": set() if self.sealed else {"selection"},
        }
        tree = self.model_dump(mode="json", by_alias=True, exclude={key: one for key, one in unused.items() if one})
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)

    def configure(self, params: Mapping[str, Any]) -> TrialConfig:
        """The base trial with searched values put in.

        Raises:
            InputError: a path that does not exist, a value out of range.
        """
        return validate(TrialConfig, merge(self.trial, params), source=f"study {self.name}")

    def baseline(self, name: str) -> TrialConfig:
        """A baseline's trial: its settings merged into the base."""
        tree = merge(self.trial, self.baselines[name])
        return validate(TrialConfig, tree, source=f"baseline {name}")


def load_study(path: Path) -> Study:
    """Reads and checks a study file, its preset, its baselines and its space.

    Raises:
        InputError: unknown key, a search path that does not exist, a value out of range.
    """
    return checked(_with_preset(validate(Study, read_yaml(path), source=str(path)), path.parent), str(path))


def checked(study: Study, source: str) -> Study:
    """A study whose baselines, with the control among them, and whose searched trials are valid.

    Args:
        source: where it comes from, for errors.

    Raises:
        InputError: as `load_study`.
    """
    if mistakes := [mistake for dotted in study.searched if (mistake := _mistake_in_path(study, dotted))]:
        raise InputError(f"{source}: {'; '.join(mistakes)}")
    searched = [study.configure(values) for values in edges(study)]
    study = _with_control(study, searched[0])
    for trial in searched:
        _check_rungs(study, trial)
    for trial in [*searched, *(study.baseline(name) for name in study.baselines)]:
        _check_objectives(study, trial)
    return study


def edges(study: Study) -> list[dict[str, Any]]:
    """Searched values with each dimension at each edge, under each of its conditions, the others at their first; all
    that is listed."""
    if study.algorithm.kind == "listed":
        return study.points or []
    first = {dotted: space.extremes[0] for dotted, space in study.space.items()}
    return [active(study.space, first)] + [
        active(study.space, {**first, **conditions, dotted: value})
        for dotted, space in study.space.items()
        for conditions in activations(study.space, dotted)
        for value in space.extremes
    ]


def _with_preset(study: Study, folder: Path) -> Study:
    """The study with its preset in its trial, so that it stands on its own."""
    if study.preset is None:
        return study
    trial = merge(read_yaml(folder / study.preset), study.trial)
    return study.model_copy(update={"preset": None, "trial": trial})


CONTROL = "control"
# Shape and pixels of data sets that need no look at their files.
_PIXELS = {"digits": (1, 8), "mnist": (1, 28), "fashion_mnist": (1, 28)}


def _with_control(study: Study, trial: TrialConfig) -> Study:
    """The study with the class-mean control among its baselines: without it an accuracy means nothing."""
    kinds = {name: study.baseline(name).generator.kind for name in study.baselines}
    # Without privacy there is no ε to compare at; a selection has no baselines.
    if study.sealed or not trial.privacy.private or "class_mean" in kinds.values():
        return study
    if CONTROL in kinds:
        raise InputError(
            f"baseline '{CONTROL}' must be of generator.kind=class_mean, not {kinds[CONTROL]}: every study has it; "
            "give this one another name"
        )
    privacy = {"noise_multiplier": None, "steps": None, "step_limit": None, "clip_norm": _control_clip(trial.data)}
    control = {"generator": {"kind": "class_mean"}, "privacy": privacy}
    return study.model_copy(update={"baselines": {CONTROL: control, **study.baselines}})


def _control_clip(data: DataConfig) -> float:
    """√(channels) · side / 2: half the largest norm of an image with pixels in [0, 1], about that of a real one."""
    channels, side = _PIXELS.get(data.name, (3, 32))
    channels = {"grey": 1, "colour": 3, None: channels}[data.colour]
    return round(math.sqrt(channels) * (data.size or side) / 2, 2)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with changes put over them; a group of another `kind` replaces the whole group.

    Keys of `changes` may be dotted paths.

    Raises:
        InputError: a path leads through a value.
    """
    merged = {key: merge(value, {}) if isinstance(value, Mapping) else value for key, value in base.items()}
    # A `kind` comes before what it is the kind of: it replaces the group.
    for key, value in sorted(changes.items(), key=lambda change: not change[0].endswith(".kind")):
        head, _, rest = key.partition(".")
        value = {rest: value} if rest else value
        old = merged.get(head)
        if rest and old is not None and not isinstance(old, Mapping):
            raise InputError(f"'{key}': '{head}' is a value, not a group of settings")
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not _other_kind(old, value):
            merged[head] = merge(old, value)
        else:
            merged[head] = merge({}, value) if isinstance(value, Mapping) else value
    return merged


def _other_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" in new and new["kind"] != old.get("kind", "conv_cond")


def _mistake_in_path(study: Study, dotted: str) -> str | None:
    """Why a path cannot be searched, and what to do; None where it can."""
    if dotted in study.space and dotted not in (known := _known_paths(study, dotted)):
        return f"space path '{dotted}' does not exist{nearest(dotted, known)}"
    if dotted.startswith(COMMON):
        return f"path '{dotted}' must be the same in all trials; set it in trial instead"
    if dotted == "seed":
        return "path 'seed' is not searched; set algorithm.seeds_per_configuration instead"
    return None


def _known_paths(study: Study, dotted: str) -> set[str]:
    """Paths of a trial with every kind of generator with which a dimension is searched, whatever its values are."""
    generator = study.trial.get("generator")
    base = generator.get("kind", "conv_cond") if isinstance(generator, Mapping) else "conv_cond"
    kinds = {values.get(KIND, base) for values in activations(study.space, dotted, also=(KIND,))}
    return set.intersection(*(setting_paths(kind, study.name) for kind in kinds or {base}))


def setting_paths(kind: str, source: str) -> set[str]:
    """Dotted paths of a trial whose generator is of that kind.

    Raises:
        InputError: there is no such kind.
    """
    privacy = {} if kind == "class_mean" else {"noise_multiplier": 1.0}
    return set(flatten(validate(TrialConfig, {"generator": {"kind": kind}, "privacy": privacy}, source=source)))


def _check_rungs(study: Study, trial: TrialConfig) -> None:
    """A scheduler that no report but the last ever meets would stop nothing."""
    points, scheduler = trial.evaluation.points, study.scheduler
    if scheduler.kind != "none" and (points - 1) / points < scheduler.grace - 1e-9:
        needed = math.ceil(1 / (1 - scheduler.grace) - 1e-9)
        raise InputError(
            f"study {study.name}: evaluation.points={points} gives scheduler.grace={scheduler.grace:g} no report "
            f"before the end of a trial; set at least {max(2, needed)}"
        )


def _check_objectives(study: Study, trial: TrialConfig) -> None:
    """Every trial has to report what the search optimises."""
    for objective in study.objectives:
        _check_objective(study, objective, trial)


def _check_objective(study: Study, objective: str, trial: TrialConfig) -> None:
    every = EvaluationConfig().classifiers
    needed = every if objective == "accuracy" else [n for n in every if objective == f"accuracy_{n}"]
    if not needed and trial.data.validation == "private":
        raise InputError(f"study {study.name}: objective '{objective}' needs data.validation=public")
    if missing := [name for name in needed if name not in trial.evaluation.classifiers]:
        raise InputError(
            f"study {study.name}: objective '{objective}' needs evaluation.classifiers to hold "
            f"{', '.join(missing)}; add it, or choose another objective"
        )
