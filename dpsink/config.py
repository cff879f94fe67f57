"""The one description of a trial: a frozen tree of pydantic models, read from YAML and overrides.

Everything that can change a trial's result is in `TrialConfig`; where it runs and how fast
(`Performance`) and where the data lie are not, so the same file gives the same trial anywhere.
"""

import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dpsink.errors import InputError

Model = TypeVar("Model", bound=BaseModel)

TOLD = 5  # mistakes at once

BUILT_IN = ("digits", "mnist", "fashion_mnist", "cifar10", "svhn", "celeba")
OWN = ("folder:", "npz:")
# Without a validation_size: 0, the paper's protocol.
DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"validation_size": 180},
    "celeba": {"size": 32, "attribute": "Male"},
}


class Strict(BaseModel):
    """Base of every settings model: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="constants")


class DataConfig(Strict):
    """Which images are private, which may be looked at, and what form they are brought to (docs/data.md)."""

    name: str = Field(
        default="digits", description="a built-in data set; or folder:PATH or npz:PATH, below the data root or absolute"
    )
    validation_size: int = Field(
        default=0,
        ge=0,
        description="images to select on: of the data's own validation part, or out of the training part",
    )
    test_size: int = Field(
        default=0, ge=0, description="test images held out of the training part, where own data bring none"
    )
    validation: Literal["public", "private"] = Field(
        default="public", description="who may see the validation split; private: noisy accuracies only"
    )
    test: Literal["public"] = Field(default="public", description="who may see the test split")
    size: int | None = Field(default=None, ge=4, le=512, description="resize to size × size pixels; null: as stored")
    colour: Literal["grey", "colour"] | None = Field(default=None, description="1 or 3 channels; null: as stored")
    attribute: str | None = Field(default=None, description="celeba only: the attribute that is the label")
    classes: int | None = Field(default=None, ge=2, le=10_000, description="npz only: the number of classes, public")
    skip_bad: bool = Field(
        default=False, description="train without images that cannot be read; N stays what is listed"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_name(cls, values: Any) -> Any:
        name = values.get("name", "digits") if isinstance(values, dict) else None
        return {**DATA_DEFAULTS.get(name, {}), **values} if isinstance(name, str) else values

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, value: str) -> str:
        if value not in BUILT_IN and not value.startswith(OWN):
            known = ", ".join(f"'{name}'" for name in BUILT_IN)
            raise ValueError(f"must be {known}, 'folder:PATH' or 'npz:PATH'")
        if value in OWN:
            raise ValueError(f"needs a path, such as {value}faces")
        return value

    @model_validator(mode="after")
    def _settings_fit_the_source(self) -> "DataConfig":
        own = self.path is not None
        silent = sorted({"validation", "test"} - self.model_fields_set)
        if own and silent:
            raise ValueError(
                f"own data have no default for who may see them: set {' and '.join(silent)} (docs/data.md)"
            )
        if self.test_size and not own:
            raise ValueError(f"test_size={self.test_size} is for own data; {self.name} brings its own test images")
        if self.attribute is not None and self.name != "celeba":
            raise ValueError(f"attribute={self.attribute} is for celeba, not for {self.name}")
        if (self.classes is not None) != self.name.startswith("npz:"):
            raise ValueError(
                "classes must be set for npz: data, and for no other: it is public, and not read from labels"
            )
        return self

    @property
    def path(self) -> Path | None:
        """The place of the user's own data, None for built-in data sets."""
        return Path(self.name.partition(":")[2]) if self.name.startswith(OWN) else None


class ConvCondConfig(Strict):
    """Transposed-convolution generator of the paper, conditioned on the label."""

    kind: Literal["conv_cond"] = "conv_cond"
    latent_dim: int = Field(default=16, ge=1)
    hidden_dim: int = Field(default=64, ge=1)
    embed_dim: int = Field(default=8, ge=1)
    conditional: bool = Field(default=True, description="whether the label enters the generator")


class CondBigganConfig(Strict):
    """BigGAN's generator with class-conditional batch norm and spectral norm."""

    kind: Literal["cond_biggan"] = "cond_biggan"
    latent_dim: int = Field(default=32, ge=1)
    hidden_dim: int = Field(default=64, ge=1)
    embed_dim: int = Field(default=4, ge=1)
    conditional: bool = Field(default=True, description="whether the label enters the generator")


class ClassMeanConfig(Strict):
    """The control: one private release of the class means, plus public white noise when sampling."""

    kind: Literal["class_mean"] = "class_mean"
    noise_std: float = Field(
        default=0.3, ge=0, le=2, description="public white noise on [-1, 1] pixels, standard deviation"
    )


GeneratorConfig = Annotated[ConvCondConfig | CondBigganConfig | ClassMeanConfig, Field(discriminator="kind")]


class SinkhornConfig(Strict):
    """The semi-debiased entropic transport loss (paper, equations 8 to 11)."""

    cost: Literal["l1+l2", "l2", "l1"] = "l1+l2"
    l1_weight: float = Field(default=1.0, ge=0, le=100, description="m, the weight of the L1 part")
    p: Literal[1, 2] = 1
    blur: float = Field(default=0.05, gt=0, le=1000, description="entropic regularisation is blur ** p")
    debias_ratio: float = Field(default=0.2, ge=0, le=1)
    label_weight: float = Field(default=15.0, ge=0, le=1e4, description="scale of the one-hot label")
    gen_batch_size: int = Field(default=50, ge=2, le=100_000, description="n, generated points per step")
    labels: Literal["balanced", "uniform"] = Field(
        default="balanced", description="labels of generated points: equal counts, or drawn uniformly"
    )
    backend: Literal["analytic", "geomloss"] = Field(
        default="analytic", description="batch mechanism only: own gradient, or geomloss and autograd"
    )


class PrivacyConfig(Strict):
    """Mechanism and budget. Give `noise_multiplier` (steps follow) or `steps` (noise follows)."""

    mechanism: Literal["record", "batch"] = "record"
    target_epsilon: float = Field(default=10.0, gt=0, description="inf runs NON-PRIVATE")
    delta: float = Field(default=1e-5, gt=0, lt=1)
    noise_multiplier: float | None = Field(default=None, ge=0, description="σ, relative to the sensitivity")
    clip_norm: float = Field(default=20.0, gt=0, le=1e9)
    batch_size: int = Field(default=500, ge=1, description="expected size of the Poisson batch, q·N")
    steps: int | None = Field(default=None, ge=1, description="train this long; σ is calibrated to it")
    step_limit: int | None = Field(default=None, ge=1, description="stop here even if budget is left")
    score_noise: float | None = Field(
        default=None, gt=0, description="σ of the scores on a private validation split, relative to their sensitivity"
    )

    @field_validator("target_epsilon", "noise_multiplier", "clip_norm", "delta", "score_noise")
    @classmethod
    def _not_nan(cls, value: float | None) -> float | None:
        if value is not None and math.isnan(value):
            raise ValueError("must be a number, not NaN")
        return value

    @model_validator(mode="after")
    def _steps_or_noise(self) -> "PrivacyConfig":
        if self.steps is not None and self.step_limit is not None:
            raise ValueError("set steps or step_limit, not both")
        if self.private and self.noise_multiplier == 0:
            raise ValueError("noise_multiplier=0 must be > 0; for a run without privacy set target_epsilon=.inf")
        if self.private and self.steps is not None and self.noise_multiplier is not None:
            raise ValueError("set noise_multiplier or steps, not both: each follows from the other")
        if not self.private and self.steps is None:
            raise ValueError("target_epsilon=inf has no budget that ends the run; set steps")
        return self

    @property
    def private(self) -> bool:
        return math.isfinite(self.target_epsilon)


class OptimizerConfig(Strict):
    """Adam."""

    lr: float = Field(default=1e-3, gt=0, le=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    schedule: Literal["constant", "cosine"] = "constant"


class EvaluationConfig(Strict):
    """What is measured at each evaluation point, on public data."""

    points: int = Field(default=1, ge=1, le=1000, description="evaluations and checkpoints per trial")
    samples: int = Field(default=2000, ge=20, description="synthetic images per evaluation")
    classifiers: tuple[Literal["logreg", "mlp", "cnn"], ...] = ("logreg", "mlp", "cnn")
    extractor: Literal["classifier", "inception"] = "classifier"


class TrialConfig(Strict):
    """One trial, whole."""

    seed: int = Field(
        default=0, ge=0, lt=2**63, description="public: initialisation, latents and labels, never the noise"
    )
    data: DataConfig = DataConfig()
    generator: GeneratorConfig = ConvCondConfig()
    sinkhorn: SinkhornConfig = SinkhornConfig()
    privacy: PrivacyConfig = PrivacyConfig(noise_multiplier=3.0)
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_generator_kind(cls, values: Any) -> Any:
        generator = values.get("generator") if isinstance(values, dict) else None
        if isinstance(generator, dict) and "kind" not in generator:
            return {**values, "generator": {"kind": "conv_cond", **generator}}
        return values

    @model_validator(mode="after")
    def _noise_is_determined(self) -> "TrialConfig":
        privacy, control = self.privacy, self.generator.kind == "class_mean"
        if control and (privacy.noise_multiplier is not None or privacy.steps is not None):
            raise ValueError("generator.kind=class_mean is one release: leave privacy.noise_multiplier and steps out")
        if not control and privacy.private and privacy.noise_multiplier is None and privacy.steps is None:
            raise ValueError("privacy needs noise_multiplier (steps follow) or steps (noise follows)")
        if (self.data.validation == "private") != (privacy.score_noise is not None) and privacy.private:
            raise ValueError("data.validation=private and privacy.score_noise go together: set both, or neither")
        if self.sinkhorn.backend == "geomloss" and privacy.mechanism == "record":
            raise ValueError("sinkhorn.backend=geomloss serves privacy.mechanism=batch only")
        return self


class Performance(Strict):
    """Where and how fast a trial runs. Nothing here changes ε, the steps or the mathematics."""

    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    threads: int = Field(default=0, ge=0, description="CPU threads of the tensor library; 0: its default")
    precision: Literal["single", "tf32", "double"] = Field(
        default="single", description="of generator and gradients; tf32: faster products of a GPU, less exact"
    )
    graphs: Literal["auto", "on", "off"] = Field(
        default="auto", description="fixed shapes, recorded as CUDA graphs; auto: on a GPU"
    )
    slots: int = Field(default=1, ge=1, le=1024, description="trials side by side on one stack")

    @property
    def captures(self) -> bool:
        """Whether steps run on fixed shapes and addresses, which a GPU can record."""
        return self.graphs == "on" or (self.graphs == "auto" and self.device != "cpu")


def flatten(config: BaseModel) -> dict[str, Any]:
    """Dotted path to value, for every leaf of a settings tree."""
    leaves: dict[str, Any] = {}
    _collect_leaves("", config.model_dump(mode="json"), leaves)
    return leaves


def _collect_leaves(prefix: str, value: Any, leaves: dict[str, Any]) -> None:
    if not isinstance(value, dict):
        leaves[prefix] = ",".join(map(str, value)) if isinstance(value, list) else value
        return
    for key, child in value.items():
        _collect_leaves(f"{prefix}.{key}" if prefix else key, child, leaves)


def config_sha256(config: BaseModel) -> str:
    """SHA-256 of the canonical JSON of a settings tree, hexadecimal."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def load_config(path: Path | None = None, overrides: Iterable[str] = ()) -> TrialConfig:
    """Reads a trial from YAML, then applies `path.to.key=value` overrides.

    Raises:
        InputError: unreadable file, unknown key (the nearest is named), a value outside its range.
    """
    tree = read_yaml(path) if path is not None else {}
    for override in overrides:
        apply_override(tree, override)
    return validate(TrialConfig, tree, source=str(path) if path else "settings")


def dump_config(config: BaseModel) -> str:
    """The settings as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {_one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: must hold key: value settings, not a {type(tree).__name__}")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `path.to.key=value` in a nested mapping, in place; the value is YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise InputError(f"override '{override}' must be path.to.key=value, such as optimizer.lr=1e-3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override '{override}' has a value that is not YAML: {_one_line(error)}") from None
    set_path(tree, path.strip(), value)


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets `a.b.c` in a nested mapping, in place, making the mappings on the way."""
    *parents, leaf = path.split(".")
    for key in parents:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise InputError(f"'{path}': '{key}' is a value, not a group of settings")
        tree = child
    tree[leaf] = value


def validate(model: type[Model], tree: Mapping[str, Any], *, source: str) -> Model:
    """Builds a settings model, or raises one line that says which values broke which rules."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(model, error)}") from None


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    details = error.errors()
    # Unknown keys explain the errors that follow from them.
    told = [one for one in details if one["type"] == "extra_forbidden"] or details
    more = f" (and {len(told) - TOLD} more)" if len(told) > TOLD else ""
    return "; ".join(_explain_one(model, one) for one in told[:TOLD]) + more


def _explain_one(model: type[BaseModel], detail: Mapping[str, Any]) -> str:
    location = [str(part) for part in detail["loc"]]
    path = ".".join(part for part in location if part not in _union_tags())
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{path}'{_nearest(location[-1], _names_at(model, location[:-1]))}"
    message = detail["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(detail.get("input"), dict) or not path else f"={detail.get('input')!r}"
    return f"{path}{shown}: {message}" if path else message


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the known name closest to a misspelt one, or all of them."""
    return _nearest(name, sorted(known))


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


def _union_tags() -> set[str]:
    return {"conv_cond", "cond_biggan", "class_mean"}


def _names_at(model: type[BaseModel], location: list[str]) -> list[str]:
    """Field names of the settings group that a pydantic error location points into."""
    groups = [model]
    for part in location:
        inner = [group for parent in groups for group in _children(parent, part)]
        groups = inner or groups  # a union's tag or a list's index names no field
    return sorted({name for group in groups for name in group.model_fields})


def _children(model: type[BaseModel], field: str) -> list[type[BaseModel]]:
    info = model.model_fields.get(field)
    return _models_in(info.annotation) if info else []


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
