"""The last word on a trained generator: its metrics against real images, and the card that goes with it."""

from pathlib import Path
from typing import Any

from dpsink.checkpoint import load_generator
from dpsink.data import ImageData, load_dataset
from dpsink.errors import InputError
from dpsink.evaluation import build_extractor, evaluate, inception_extractor
from dpsink.privacy.ledger import trial_statement
from dpsink.privacy.plan import NON_PRIVATE, PrivacyPlan
from dpsink.records import STATEMENT, CheckpointState, read_json
from dpsink.synthesis import balanced_labels, generate


def judge(
    place: Path,
    *,
    samples: int,
    split: str = "test",
    seed: int = 0,
    extractor: str = "classifier",
    inception_weights: Path | None = None,
    data_root: Path | None = None,
) -> dict[str, Any]:
    """Metrics of a generator on a public split of its own data set. No privacy cost: post-processing.

    Args:
        place: folder of a run, a checkpoint or an export.
        samples: synthetic images, balanced over the classes.
        split: `test` or `validation`.

    Returns:
        `metrics`, `epsilon`, `delta`, `split`, `samples`, `extractor`, and `privacy`, a line of text.
    """
    generator, description = load_generator(place)
    data = load_dataset(description.config.data, root=data_root)
    if data.fingerprint != description.data_fingerprint:
        raise InputError(f"{place}: was trained on other data than what lies under the data root now")
    reference = _split(data, split)
    labels = balanced_labels(samples, description.num_classes)
    synthetic = generate(generator, labels, num_classes=description.num_classes, seed=seed)
    features = (
        inception_extractor(inception_weights)
        if inception_weights is not None
        else build_extractor(extractor, data.public_reference)
    )
    card = privacy_card(place, description)
    return {
        "metrics": evaluate(synthetic, reference, extractor=features, seed=seed),
        "epsilon": card["epsilon"],
        "delta": card["delta"],
        "split": split,
        "samples": samples,
        "extractor": features.tag,
        "privacy": privacy_line(card),
    }


def privacy_card(place: Path, description: CheckpointState) -> dict[str, Any]:
    """What may be said about a generator's privacy, and where it comes from; stands beside everything made of it."""
    plan, charged, epsilon = _spent(place, description)
    return {
        "private": plan.private,
        "epsilon": epsilon if plan.private else NON_PRIVATE,
        "delta": plan.delta if plan.private else None,
        "mechanism": plan.mechanism,
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "steps_charged": charged,
        "records": plan.records,
        "statement": _statement(place) or trial_statement(epsilon, plan.delta).to_dict(),
        "source": str(place),
        "data": description.config.data.name,
        "data_fingerprint": description.data_fingerprint,
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


def privacy_line(card: dict[str, Any]) -> str:
    """One line for people: the guarantee, or that there is none."""
    if not card["private"]:
        return f"{NON_PRIVATE}: trained without noise"
    return (
        f"(ε, δ) = ({card['epsilon']:.4g}, {card['delta']:g}), add/remove one record, "
        f"mechanism {card['mechanism']}, σ {card['noise_multiplier']:.4g}, {card['steps_charged']:,} steps charged"
    )


def _statement(place: Path) -> dict[str, Any] | None:
    """The statement of the study that the generator was chosen from, where it belongs to one."""
    path = place / STATEMENT
    return read_json(path) if path.exists() else None


def _split(data: ImageData, split: str) -> Any:
    if split not in ("test", "validation"):
        raise InputError(f"--split={split} must be test or validation")
    if split == "validation":
        if data.validation is None or not data.validation_is_public:
            raise InputError("--split=validation: this run has no public validation images; use --split=test")
        return data.validation
    return data.test
