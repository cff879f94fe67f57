"""What may leave a trial: the one list, and the check against it.

A trial reads private records, so nothing that it tells is harmless by default. What may be reported, logged, tracked
or put into a checkpoint is named here with the reason; everything else is refused, by name. All that is listed
is one of three things: fixed before the first private record is read, a count of steps, or computed from noised
answers and public data (post-processing).

There is no switch that lets anything else out. The quantities of `NEVER` are computed nowhere but inside a mechanism's
query, and no setting, flag or environment variable reports one. A run without privacy is asked for with
`target_epsilon: inf` and by nothing else; it is labelled NON-PRIVATE, and so is what is made from it. Its list is the
same.
"""

from collections.abc import Iterable, Mapping
from typing import Any

TEST_PREFIX = "test_"  # of a metric on the public test split

REPORT: dict[str, str] = {
    "step": "a count of steps",
    "charged": "a count of steps, from the ledger",
    "epsilon": "follows from the plan and the steps charged",
    "budget_fraction": "follows from the plan and the steps charged",
    "steps_per_second": "the clock; see timing among what the guarantee does not cover",
    "status": "whether the noised weights are finite, and a count of steps",
    "metrics": "the generator's samples against public images",
}
METRICS: dict[str, str] = dict.fromkeys(
    (
        "fid", "kid", "precision", "recall", "variety",
        "accuracy", "accuracy_logreg", "accuracy_mlp", "accuracy_cnn",
    ),
    "the generator's samples against public images",
)  # fmt: skip
CHECKPOINT: dict[str, str] = {
    "format": "fixed beforehand",
    "config": "fixed beforehand",
    "plan": "fixed beforehand, from settings and the public N",
    "image_shape": "public",
    "num_classes": "public",
    "data_fingerprint": "keyed by the owner: says nothing without the key, except whether two are equal",
    "step": "a count of steps",
    "seconds": "the clock; see timing among what the guarantee does not cover",
    "witness": "the ledger: counts of steps, and checksums over them",
    "score_witness": "the ledger of noisy scores: counts of releases, and checksums over them",
    "reports": "a list of reports",
}
CHECKPOINT_FILES: dict[str, str] = {
    "model.safetensors": "weights, moved by noised answers only; batch statistics of generated images",
    "optimizer.safetensors": "moments of the same gradients; the public random state",
    "state.json": "the fields of a checkpoint",
    "samples.png": "the generator's samples",
}

_UNNOISED = "a function of private records without noise"
NEVER: dict[str, str] = {
    "train_loss": _UNNOISED,
    "gradient_norm": _UNNOISED,
    "record_norms": _UNNOISED,
    "clip_fraction": _UNNOISED,
    "coupling": _UNNOISED,
    "potentials": _UNNOISED,
    "realised_batch_size": "|S| tells whether a record joined; q·N is public",
    "members": "which records joined a step is what the subsampling hides",
    "noise": "with the noise a release is the clean answer",
    "entropy": "with the bytes behind the noise a release is the clean answer",
    "real_images": _UNNOISED,
    "reference_statistics": "moments of private features are a function of private records without noise",
    "fid_floor": "real training images against real test images: a function of private records without noise",
    "record_count": "an exact count of usable or skipped records tells a data set from its neighbour; N is declared",
    "data_sha256": "a plain hash tells a data set from its neighbour with certainty; the keyed fingerprint does not",
}


class ReleaseRefused(RuntimeError):
    """Something was about to leave a trial that is not on the list: an error of the program, not of its user."""


def check_report(report: Mapping[str, Any]) -> None:
    """Refuses a report that tells more than the list, in its metrics too.

    Args:
        report: field to value, as from `Report.model_dump`.

    Raises:
        ReleaseRefused: a field or a metric is not on the list.
    """
    _check("report field", report, REPORT)
    check_metrics(report.get("metrics", {}))


def check_metrics(names: Iterable[str]) -> None:
    """Refuses metrics that are not on the list; those on the test split carry `TEST_PREFIX`.

    Raises:
        ReleaseRefused: one is not.
    """
    _check("metric", (name.removeprefix(TEST_PREFIX) for name in names), METRICS)


def check_checkpoint(description: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose JSON part tells more than the list, in its reports too.

    Args:
        description: field to value, as from `CheckpointState.model_dump`.

    Raises:
        ReleaseRefused: a field, or a field or metric of a report, is not on the list.
    """
    _check("checkpoint field", description, CHECKPOINT)
    for report in description.get("reports", ()):
        check_report(report)


def check_files(names: Iterable[str]) -> None:
    """Refuses files of a checkpoint that are not on the list.

    Raises:
        ReleaseRefused: one is not.
    """
    _check("checkpoint file", names, CHECKPOINT_FILES)


def _check(kind: str, names: Iterable[str], listed: Mapping[str, str]) -> None:
    for name in names:
        if name not in listed:
            why = NEVER.get(name, "it is not on the list of what may leave a trial")
            raise ReleaseRefused(f"{kind} '{name}' may not leave: {why}; see dpsink/privacy/release.py")
