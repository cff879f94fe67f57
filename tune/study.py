"""The study file: base trial, baselines, search space, algorithm, objective, ledger, where results go."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from dpsink.config import EvaluationConfig, Strict, TrialConfig, flatten, nearest, read_yaml, set_path, validate
from dpsink.errors import InputError
from dpsink.privacy.ledger import Policy, Selection
from tune import schema

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Not to be searched: which records are private, what is promised, and what the trials are compared by.
COMMON = ("data.", "privacy.target_epsilon", "privacy.delta", "evaluation.")
ROUNDING = 1e-9  # a third of a GPU, written down, is a little less or more


class Distribution(Strict):
    """One dimension of the search space: exactly one of the four keys."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = Field(default=None, alias="int")
    choice: tuple[Any, ...] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "Distribution":
        given = [value for _, value in self if value is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of uniform, log_uniform, int, choice")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("choice must list at least one value")
            return self
        low, high = self.bounds
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"[{low}, {high}] must be [low, high] with low < high, both finite")
        if self.log_uniform is not None and low <= 0:
            raise ValueError(f"log_uniform [{low}, {high}] must start above 0")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) of a numeric dimension."""
        bounds = self.uniform or self.log_uniform or self.integer
        assert bounds is not None
        return bounds

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values at the edge of the dimension, for the preflight: all choices, or both bounds."""
        return self.choice if self.choice is not None else self.bounds

    def at(self, quantile: float) -> Any:
        """The value below which that part in [0, 1) of the proposals lies."""
        if self.choice is not None:
            return self.choice[int(quantile * len(self.choice))]
        low, high = self.bounds
        if self.integer is not None:
            return int(low + quantile * (high - low + 1))
        return low * (high / low) ** quantile if self.log_uniform is not None else low + quantile * (high - low)


class Algorithm(Strict):
    """How configurations are proposed."""

    kind: Literal["random", "optuna"] = "random"
    trials: int = Field(default=10, ge=1, le=100_000, description="searched trials, besides the baselines")
    seed: int = Field(default=0, ge=0, lt=2**32)


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

    @model_validator(mode="after")
    def _fits_gpus(self) -> "Resources":
        if self.gpu > 1 and self.gpu % 1:
            raise ValueError(f"gpu={self.gpu:g} must be at most 1, or a whole number")
        if self.gpu and self.slots > self._per_gpu:
            raise ValueError(
                f"slots={self.slots} must be at most {self._per_gpu}, the trials that have a place on one GPU; "
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
        return self.slots or (self._per_gpu if self.gpu else 1)

    def fit_in(self, cpus: float, gpus: float) -> int:
        """Trials that a node has room for at a time."""
        fit = math.floor(cpus / self.cpu + ROUNDING)
        if self.gpu > 1:
            return min(fit, math.floor(gpus / self.gpu))
        if self.gpu:
            return min(fit, math.floor(gpus) * self._per_gpu)
        return min(fit, self.sharing) if self.sharing > 1 else fit

    @property
    def _per_gpu(self) -> int:
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
    trial: dict[str, Any] = Field(default_factory=dict, description="the base trial's settings")
    baselines: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="name to settings merged into the base trial; run first"
    )
    space: dict[str, Distribution] = Field(default_factory=dict, description="dotted path to distribution")
    algorithm: Algorithm = Algorithm()
    objective: str = Field(default="accuracy", description="validation metric that the search optimises")
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

    @field_validator("objective")
    @classmethod
    def _objective_exists(cls, value: str) -> str:
        if value not in schema.QUALITY:
            raise ValueError(f"unknown metric{nearest(value, schema.QUALITY)}")
        return value

    @field_validator("baselines")
    @classmethod
    def _baseline_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not NAME.fullmatch(name):
                raise ValueError(f"baseline '{name}' must be named with letters, digits, '.', '_' or '-'")
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
        if self.baselines:
            raise ValueError("baselines are no part of what release_best selects from: run them as their own study")
        return self

    @property
    def sealed(self) -> bool:
        """Whether only the winner is published, and all else about the trials stays secret."""
        return self.ledger.policy == "release_best"

    def to_yaml(self) -> str:
        """All settings, as the study's folder keeps them; of a sealed study without those that it does not have."""
        unused = {"algorithm": {"trials", "seed"}} if self.sealed else {"ledger": {"selection"}}
        return yaml.safe_dump(self.model_dump(mode="json", exclude=unused), sort_keys=False, allow_unicode=True)

    def configure(self, params: Mapping[str, Any]) -> TrialConfig:
        """The base trial with searched values put in.

        Raises:
            InputError: a path that does not exist, a value out of range.
        """
        tree = merge(self.trial, {})
        for path, value in params.items():
            set_path(tree, path, value)
        return validate(TrialConfig, tree, source=f"study {self.name}")

    def baseline(self, name: str) -> TrialConfig:
        """A baseline's trial: its settings merged into the base."""
        tree = merge(self.trial, self.baselines[name])
        return validate(TrialConfig, tree, source=f"baseline {name}")


def load_study(path: Path) -> Study:
    """Reads and checks a study file, its baselines and its space.

    Raises:
        InputError: unknown key, a search path that does not exist, a value out of range.
    """
    study = validate(Study, read_yaml(path), source=str(path))
    known = _known_paths(study)
    for dotted in study.space:
        if dotted not in known:
            raise InputError(f"{path}: space path '{dotted}' does not exist{nearest(dotted, known)}")
        if dotted.startswith(COMMON):
            raise InputError(f"{path}: space path '{dotted}' must be the same in all trials; set it in trial instead")
    first = {dotted: space.extremes[0] for dotted, space in study.space.items()}
    trials = [study.configure(first)]
    for dotted, space in study.space.items():
        trials += [study.configure({**first, dotted: value}) for value in space.extremes]
    trials += [study.baseline(name) for name in study.baselines]
    for trial in trials:
        _check_objective(study, trial)
    return study


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with changes put over them; a group of another `kind` replaces the whole group.

    Keys of `changes` may be dotted paths.
    """
    merged = {key: merge(value, {}) if isinstance(value, Mapping) else value for key, value in base.items()}
    # A `kind` comes before what it is the kind of: it replaces the group.
    for key, value in sorted(changes.items(), key=lambda change: not change[0].endswith(".kind")):
        head, _, rest = key.partition(".")
        value = {rest: value} if rest else value
        old = merged.get(head)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not _other_kind(old, value):
            merged[head] = merge(old, value)
        else:
            merged[head] = merge({}, value) if isinstance(value, Mapping) else value
    return merged


def _other_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" in new and new["kind"] != old.get("kind", "conv_cond")


def _known_paths(study: Study) -> set[str]:
    """Paths of a trial with the base's kind of generator, whatever its values are."""
    generator = study.trial.get("generator")
    kind = generator.get("kind", "conv_cond") if isinstance(generator, Mapping) else "conv_cond"
    privacy = {} if kind == "class_mean" else {"noise_multiplier": 1.0}
    shape = validate(TrialConfig, {"generator": {"kind": kind}, "privacy": privacy}, source=study.name)
    return set(flatten(shape))


def _check_objective(study: Study, trial: TrialConfig) -> None:
    """Every trial has to report what the search optimises."""
    every = EvaluationConfig().classifiers
    needed = every if study.objective == "accuracy" else [n for n in every if study.objective == f"accuracy_{n}"]
    if not needed and trial.data.validation == "private":
        raise InputError(f"study {study.name}: objective '{study.objective}' needs data.validation=public")
    if missing := [name for name in needed if name not in trial.evaluation.classifiers]:
        raise InputError(
            f"study {study.name}: objective '{study.objective}' needs evaluation.classifiers to hold "
            f"{', '.join(missing)}; add it, or choose another objective"
        )
