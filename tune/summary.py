"""What a study says at its end: baselines and best side by side, its cost, and where to look."""

from pathlib import Path
from typing import Any

from dpsink import console
from dpsink.privacy.ledger import PrivacyStatement
from tune import schema
from tune.folder import TrialRecord
from tune.study import Study
from tune.sweep import Outcome

SHOWN = ("fid", "variety", "recall", "accuracy_logreg", "accuracy_mlp", "accuracy_cnn")


def summarise(outcome: Outcome, study: Study) -> dict[str, Any]:
    """The study's end as one JSON-able document."""
    folder = outcome.folder
    states = {record.name: folder.end_of(record.name) for record in folder.trials()}
    chosen = [record for record in folder.trials() if record.role == schema.ROLE_BASELINE]
    chosen += [outcome.best] if outcome.best else []
    return {
        "study": study.name,
        "trials": {name: end.state if end else "unfinished" for name, end in states.items()},
        "failed": {name: end.error for name, end in states.items() if end and end.state == "failed"},
        "best": outcome.best.name if outcome.best else None,
        "objective": study.objective,
        "runs": [_describe(outcome, record) for record in chosen],
        "statement": outcome.statement,
        "ended_early": outcome.ended_early,
        "seconds": round(outcome.seconds, 1),
        "folder": str(folder.path),
        "tracking_uri": schema.shown_uri(outcome.record.tracking_uri),
    }


def print_summary(document: dict[str, Any]) -> None:
    """The document for people."""
    _print_runs(document)
    out = console.out
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


def _describe(outcome: Outcome, record: TrialRecord) -> dict[str, Any]:
    reports = outcome.folder.reports(record.name)
    best = outcome.best is not None and record.name == outcome.best.name
    return {
        "name": record.name,
        "label": f"best: {record.name}" if best else record.name.removeprefix("baseline-"),
        "epsilon": reports[-1].epsilon if reports else None,
        "steps": reports[-1].step if reports else None,
        "validation": reports[-1].metrics if reports else {},
        "test": outcome.folder.test_metrics(record.name),
        "params": record.params,
    }


def _param_text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _shell_path(path: str) -> str:
    relative = Path(path)
    return str(relative.relative_to(Path.cwd())) if relative.is_relative_to(Path.cwd()) else path
