"""The last word on synthetic images: their metrics against real ones, and the card that goes with them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch
from scipy.special import stdtrit

from dpsink.checkpoint import load_generator
from dpsink.config import DataConfig
from dpsink.control import check_control, control_command
from dpsink.data import ImageData, LabelledImages, load_dataset
from dpsink.errors import InputError
from dpsink.evaluation import build_extractor, distance_floor, evaluate, require_extractor
from dpsink.privacy.ledger import trial_statement
from dpsink.privacy.plan import NON_PRIVATE, PrivacyPlan
from dpsink.records import PREFIX, STATEMENT, CheckpointState, latest_checkpoint, read_json
from dpsink.subjects import Subject, holds_images, read_subject
from dpsink.synthesis import balanced_labels, generate
from dpsink.writing import card_path, is_conditional

UNKNOWN = "nothing is known about the privacy of these images: no ε is claimed"
CONFIDENCE = 0.95
_CARD_FIELDS = (
    "private", "epsilon", "delta", "mechanism", "noise_multiplier", "steps_charged", "data_fingerprint", "image_shape",
    "config",
)  # fmt: skip


def judge(
    place: Path,
    *,
    samples: int,
    split: str = "test",
    seed: int = 0,
    seeds: int = 1,
    extractor: str = "classifier",
    inception_weights: Path | None = None,
    data: DataConfig | None = None,
    data_root: Path | None = None,
    skip_bad: bool = False,
    download: bool = False,
    control: Path | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Metrics of a generator, or of synthetic images, on a public split. No privacy cost: post-processing.

    Args:
        place: folder of a run, a checkpoint or an export; or an npz file or a folder of classes with images.
        samples: synthetic images, balanced over the classes; of given images at most so many.
        split: `test` or `validation`.
        seed, seeds: the first seed and how many follow; each draws other latents and other classifiers.
        extractor: `classifier` or `inception`, which `inception_weights` implies.
        inception_weights: their file; by default at `$DPSINK_INCEPTION_WEIGHTS` or in torch hub's cache.
        data: the real images that given images imitate; a run knows its own.
        skip_bad: leave out images that cannot be read.
        download: fetch real images and Inception's weights where they are missing.
        control: run of the class-mean control at the same (ε, δ), judged alike.
        device: where generator, extractor and classifiers compute.
        on_progress: told how many of how many evaluations are done.

    Returns:
        `metrics`, their means over the seeds; `intervals`, half widths of their 95 % confidence intervals, for two
        seeds and more; `values` by seed; `seeds`; `floor`, FID and KID of real images against real ones; `control`,
        the same of the control; `control_command`, which makes one; `epsilon`, `delta`, `split`, `samples`,
        `reference_images`, `extractor`, and `privacy`, a line of text.

    Raises:
        InputError: a place that holds neither, other data, a control that is none.
    """
    extractor = "inception" if inception_weights is not None else extractor
    require_extractor(extractor, weights=inception_weights, download=download)

    def load(config: DataConfig) -> ImageData:
        named = config.model_copy(update={"skip_bad": config.skip_bad or skip_bad})
        return load_dataset(named, root=data_root, download=download)

    real, subject = (
        _open_images(place, data, load, skip_bad) if holds_images(place) else _open_run(place, data, load, device)
    )
    reference = _split(real, split)
    samples = int(min(samples, subject.available))  # as many of the control: more of them would be judged better
    contenders = [subject] + ([_open_control(control, subject, device)] if control is not None else [])
    features = build_extractor(extractor, real.public_reference, weights=inception_weights, device=device)
    numbers = range(seed, seed + seeds)

    def scores(contender: Subject) -> Iterator[dict[str, float]]:
        for number in numbers:
            synthetic = contender.draw(samples, number)
            yield evaluate(
                synthetic, reference, extractor=features, seed=number, device=device, labelled=contender.labelled
            )
            on_progress(next(done), seeds * len(contenders))

    done = count(1)
    results = [summary(list(scores(contender))) for contender in contenders]
    card = subject.card
    return {
        **results[0],
        "seeds": list(numbers),
        "floor": asdict(distance_floor(real, features)),
        "control": {"source": str(control), **results[1]} if control is not None else None,
        "control_command": control_command(card) if card else None,
        "epsilon": card["epsilon"] if card else None,
        "delta": card["delta"] if card else None,
        "split": split,
        "samples": samples,
        "reference_images": len(reference),
        "extractor": features.tag,
        "privacy": _privacy_of(subject, real),
    }


def summary(scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Means over seeds, half widths of their 95 % confidence intervals (Student's t), and all values."""
    values = {name: [score[name] for score in scores] for name in scores[0]}
    return {
        "metrics": {name: sum(of) / len(of) for name, of in values.items()},
        "intervals": {name: half_width(of) for name, of in values.items()} if len(scores) > 1 else {},
        "values": values,
    }


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % confidence interval of a mean of at least two independent values."""
    spread = torch.tensor(values, dtype=torch.float64).std().item()
    return float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * spread / math.sqrt(len(values))


Load = Callable[[DataConfig], ImageData]


def _open_run(
    place: Path, data: DataConfig | None, load: Load, device: torch.device | str
) -> tuple[ImageData, Subject]:
    if data is not None:
        if latest_checkpoint(place) is None and not (place / "state.json").exists():
            raise InputError(
                f"{place}: holds neither a run nor images; give an npz file, or a folder with a sub-folder a class"
            )
        raise InputError(f"{place}: a run is judged by the data that it was made for; leave --data and --config out")
    generator, description = load_generator(place)
    real = load(description.config.data)
    if real.fingerprint != description.data_fingerprint:
        raise InputError(f"{place}: was trained on other data than what lies under the data root now")
    return real, _generator_subject(place, generator.to(device), description)


def _open_images(place: Path, data: DataConfig | None, load: Load, skip_bad: bool) -> tuple[ImageData, Subject]:
    if data is None:
        raise InputError(f"{place}: images do not say what they imitate; give --data, such as --data mnist")
    card = read_card(place)
    real = load(data)
    return real, read_subject(place, real.test, card, skip_bad=skip_bad)


def _open_control(place: Path, subject: Subject, device: torch.device | str) -> Subject:
    """A run of the control, if it is one of the same data at the same ε and δ."""
    generator, description = load_generator(place)
    card = privacy_card(place, description)
    check_control(place, card, subject.card)
    return _generator_subject(place, generator.to(device), description)


def _generator_subject(place: Path, generator: torch.nn.Module, description: CheckpointState) -> Subject:
    classes = description.num_classes

    def draw(samples: int, seed: int) -> LabelledImages:
        return generate(generator, balanced_labels(samples, classes), num_classes=classes, seed=seed)

    return Subject(place, privacy_card(place, description), is_conditional(description), draw)


def read_card(place: Path) -> dict[str, Any] | None:
    """The privacy card that stands with images on disk, None where there is none.

    Raises:
        InputError: a file of that name that is no privacy card.
    """
    path = card_path(place)
    if not path.exists():
        return None
    card = read_json(path)
    missing = [name for name in _CARD_FIELDS if name not in card]
    numbers = [card.get(name) for name in ("epsilon", "delta", "noise_multiplier", "steps_charged")]
    if missing or (card["private"] and not all(isinstance(number, int | float) for number in numbers)):
        raise InputError(f"{path}: is no privacy card of this version; remove it, or write the images again")
    return card


def _privacy_of(subject: Subject, real: ImageData) -> str:
    if subject.card is None:
        return UNKNOWN
    other = "" if subject.card["data_fingerprint"] == real.fingerprint else "; made from other data than these"
    source = f", says {card_path(subject.place)}" if holds_images(subject.place) else ""
    return privacy_line(subject.card) + source + other


def privacy_card(place: Path, description: CheckpointState) -> dict[str, Any]:
    """What may be said about a generator's privacy, and where it comes from; stands beside everything made of it."""
    plan, charged, epsilon = _spent(place, description)
    own = trial_statement(epsilon, plan.delta)
    return {
        "private": plan.private,
        "epsilon": epsilon if plan.private else NON_PRIVATE,
        "delta": plan.delta if plan.private else None,
        "mechanism": plan.mechanism,
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "steps_charged": charged,
        "records": plan.records,
        "adjacency": own.adjacency,
        "accountant": own.accountants[0],
        "statement": _statement(place) or own.to_dict(),
        "source": str(place),
        "data": description.config.data.name,
        "data_fingerprint": description.data_fingerprint,
        "image_shape": list(description.image_shape),
        "config": description.config.model_dump(mode="json"),
    }


def _spent(place: Path, description: CheckpointState) -> tuple[PrivacyPlan, int, float]:
    """The plan of a checkpoint, the steps charged when it was written, and the ε of all that was released by then."""
    try:
        plan = PrivacyPlan(**description.plan)
        charged = int(description.witness.get("charged", plan.steps))
        scored = int((description.score_witness or {}).get("charged", plan.score_releases))
        return plan, charged, plan.trial_epsilon(charged, scored)
    except (TypeError, ValueError) as error:
        raise InputError(f"{place}: its checkpoint holds no privacy plan of this version: {error}") from None


def privacy_line(card: Mapping[str, Any]) -> str:
    """One line for people: the guarantee, or that there is none."""
    if not card["private"]:
        return f"{NON_PRIVATE}: trained without noise"
    return (
        f"(ε, δ) = ({card['epsilon']:.4g}, {card['delta']:g}), add/remove one record, "
        f"mechanism {card['mechanism']}, σ {card['noise_multiplier']:.4g}, {card['steps_charged']:,} steps charged"
    )


def _statement(place: Path) -> dict[str, Any] | None:
    """The statement of the study that the generator was chosen from, where it belongs to one."""
    run = place.parent if place.name.startswith(PREFIX) else place
    path = run / STATEMENT
    return read_json(path) if path.exists() else None


def _split(data: ImageData, split: str) -> LabelledImages:
    if split not in ("test", "validation"):
        raise InputError(f"--split={split} must be test or validation")
    found = data.test if split == "test" else data.public_validation
    if found is None:
        raise InputError("--split=validation: this run has no public validation images; use --split=test")
    return found
