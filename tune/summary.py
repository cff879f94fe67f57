"""What a study says at its end: baselines and best side by side, its cost, and where to look."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dpsink import console
from dpsink.privacy.ledger import PrivacyStatement
from tune import schema
from tune.choice import by_configuration, configurations, means, pareto_front
from tune.folder import TrialRecord
from tune.study import Study
from tune.sweep import Outcome

SHOWN = ("fid", "variety", "recall", "accuracy_logreg", "accuracy_mlp", "accuracy_cnn")


def summarise(outcome: Outcome, study: Study) -> dict[str, Any]:
    """The study's end as one JSON-able document."""
    folder = outcome.folder
    states = {record.name: folder.end_of(record.name) for record in folder.trials()}
    groups = by_configuration(folder.trials())
    chosen = [group for group in groups if group[0].role == schema.ROLE_BASELINE]
    chosen += [group for group in groups if outcome.best in group]
    return {
        "study": study.name,
        "trials": {name: end.state if end else "unfinished" for name, end in states.items()},
        "failed": {name: end.error for name, end in states.items() if end and end.state == "failed"},
        "best": outcome.best.name if outcome.best else None,
        "objectives": list(study.objectives),
        "runs": [_describe(outcome, group) for group in chosen],
        "front": _front(outcome, study),
        "floor": folder.floor(),
        "statement": outcome.statement,
        "ended_early": outcome.ended_early,
        "seconds": round(outcome.seconds, 1),
        "folder": str(folder.path),
        "tracking_uri": schema.shown_uri(outcome.record.tracking_uri),
    }


def print_summary(document: dict[str, Any]) -> None:
    """The document for people."""
    _print_runs(document)
    _print_front(document)
    out = console.out
    if document["floor"]:
        out.print(f"floor:   {console.floor_text(document['floor'])}", markup=False, soft_wrap=True)
    out.print()
    out.print(PrivacyStatement.from_dict(document["statement"]).text(), markup=False, soft_wrap=True)
    for name, error in document["failed"].items():
        out.print(f"failed: {name}: {error}", markup=False, soft_wrap=True)
    if document["ended_early"]:
        out.print(f"ended early: {document['ended_early']}", markup=False, soft_wrap=True)
    out.print(f"time:    {document['seconds']:.0f} s", markup=False)
    out.print(f"folder:  {document['folder']}", markup=False, soft_wrap=True)
    out.print(f"runs:    dpsink-tune ui {_shell_path(document['folder'])}", markup=False, soft_wrap=True)
    out.print(f"next:    dpsink-analysis best {_shell_path(document['folder'])}", markup=False, soft_wrap=True)


def _print_runs(document: dict[str, Any]) -> None:
    runs = document["runs"]
    if not runs:
        console.out.print("nothing to show: no trial has completed, or all are sealed", markup=False)
        return
    made = console.table("", *[run["label"] for run in runs], title="baselines and best, on the test split")
    made.add_row("ε", *[console.metric_text(run["epsilon"]) for run in runs])
    for name in SHOWN:
        made.add_row(name, *[console.metric_text(run["test"].get(name)) for run in runs])
    for path in sorted({path for run in runs for path in run["params"]}):
        made.add_row(path, *[_param_text(run["params"].get(path)) for run in runs])
    console.out.print(made)


def _print_front(document: dict[str, Any]) -> None:
    if not document["front"]:
        return
    names = _beside(document["objectives"])
    made = console.table("", *names, title="Pareto front, on validation")
    for one in document["front"]:
        made.add_row(one["name"], *[console.metric_text(one["metrics"].get(name)) for name in names])
    console.out.print(made)


def _front(outcome: Outcome, study: Study) -> list[dict[str, Any]]:
    """What is best by several objectives, best by the first one first; nothing with one alone."""
    if len(study.objectives) == 1:
        return []
    front = pareto_front(configurations(outcome.folder, study.objective), study.objectives)
    names = _beside(study.objectives)
    return [{"name": one.name, "metrics": {name: one.metrics.get(name) for name in names}} for one in front]


def _beside(objectives: Iterable[str]) -> list[str]:
    """Objectives with what tells a collapse, which accuracy alone rewards."""
    return list(dict.fromkeys((*objectives, "variety", "recall")))


def _describe(outcome: Outcome, records: Sequence[TrialRecord]) -> dict[str, Any]:
    """A configuration: means over its seeds, and the largest ε and steps among them."""
    first, best = records[0], outcome.best is not None and outcome.best in records
    lasts = [reports[-1] for record in records if (reports := outcome.folder.reports(record.name))]
    tests = [metrics for record in records if (metrics := outcome.folder.test_metrics(record.name))]
    label = f"best: {first.label}" if best else first.label.removeprefix("baseline-")
    return {
        "name": outcome.best.name if best and outcome.best else first.name,
        "label": label + (f" ({len(records)} seeds)" if len(records) > 1 else ""),
        "trials": [record.name for record in records],
        "epsilon": max((last.epsilon for last in lasts), default=None),
        "steps": max((last.step for last in lasts), default=None),
        "validation": means([last.metrics for last in lasts]),
        "test": means(tests),
        "params": first.params,
    }


def _param_text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _shell_path(path: str) -> str:
    relative = Path(path)
    return str(relative.relative_to(Path.cwd())) if relative.is_relative_to(Path.cwd()) else path
