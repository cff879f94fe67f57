"""`dpsink-analysis best`: reads a finished study."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpsink import console
from tune import schema

if TYPE_CHECKING:  # they take seconds
    from analysis.runs import Row, Runs

app = console.new_app("dpsink-analysis", "Read a study back: select, compare, export.")

StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="name of a study, its YAML file, or its folder")]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow; default $MLFLOW_TRACKING_URI or studies/mlflow.db")]
Force = Annotated[bool, typer.Option("--force", help="replace an earlier export")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, logs on stderr")]

CHOICES = ("fid", "accuracy")  # metrics that `best` selects by
COMPARISON = "comparison.png"


def main() -> None:
    """Entry point of the console script."""
    console.run(app)


@app.callback()
def group() -> None:
    """Keeps `best` a subcommand while it is the only one."""


@app.command()
def best(
    study: StudyArgument,
    tracking_uri: TrackingUri = None,
    out: Annotated[Path | None, typer.Option(help="folder of the exports; default exports/STUDY")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show the best runs beside the baselines, and export them.

    Writes best-fid/, best-accuracy/ (both, even if one run is best by both) and comparison.png. A metric that no run
    has is left out; where there is neither, the study's objective decides.
    """
    from analysis.runs import load_runs
    from analysis.selection import baselines, select_best

    console.set_up_logging()
    runs = load_runs(study, tracking_uri)
    chosen = {metric: select_best(runs, metric) for metric in _choices(runs)}
    columns = [Column(row["trial"].removeprefix("baseline-"), row) for row in baselines(runs)]
    columns += [Column(f"best by {_called(metric)}", row, metric) for metric, row in chosen.items()]
    written = _export(runs, columns, out or Path("exports") / runs.study.name, force)
    if as_json:
        console.print_json(_document(runs, columns, written))
        return
    _print_rejected(runs)
    _print_comparison(runs, _merged(columns))
    console.out.print("written:", *map(str, written), sep="\n  ", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Column:
    """A run in the comparison; `metric` is what it was selected by, None for a baseline."""

    title: str
    run: "Row"
    metric: str | None = None


def _choices(runs: "Runs") -> list[str]:
    """What `best` selects by: a private validation split has no FID, and a study need not run all classifiers."""
    from analysis.runs import metrics_of, rows_of

    had = {name for run in rows_of(runs.accepted, schema.ROLE_SEARCH) for name in metrics_of(run)}
    return [metric for metric in CHOICES if metric in had] or list(runs.study.objectives)


def _called(metric: str) -> str:
    return "FID" if metric == "fid" else metric


def _merged(columns: Sequence[Column]) -> list[Column]:
    """The columns for a person: a run that is best by several metrics stands there once."""
    merged: dict[str, Column] = {}
    for column in columns:
        run_id = column.run["run_id"]
        if run_id in merged:
            title = f"{merged[run_id].title} and {_called(column.metric or '')}"
            column = Column(title, column.run, column.metric)
        merged[run_id] = column
    return list(merged.values())


def _export(runs: "Runs", columns: Sequence[Column], out: Path, force: bool) -> list[Path]:
    """Writes the chosen runs and the picture; looks at all targets before it writes the first."""
    from analysis.export import check_target, drafted, export_run

    folders = {column.metric: out / f"best-{column.metric}" for column in columns if column.metric}
    picture = out / COMPARISON
    for target in (*folders.values(), picture):
        check_target(target, force=force)
    for column in columns:
        if column.metric:
            export_run(runs, column.run, folders[column.metric], selected_by=column.metric, force=force)
    with drafted(picture) as draft:
        _draw(runs, columns, draft)
    return [*folders.values(), picture]


def _draw(runs: "Runs", columns: Sequence[Column], path: Path) -> None:
    from analysis.figures import Panel, comparison
    from analysis.runs import fetch_artifact

    with tempfile.TemporaryDirectory() as folder:
        panels = []
        for column in _merged(columns):
            run_id = column.run["run_id"]
            grid = fetch_artifact(runs, run_id, schema.GRID_ARTIFACT, Path(folder) / run_id)
            panels.append(Panel(column.title, column.run, grid))
        comparison(panels, title=f"{runs.study.name}\n{_guarantee(runs)}").savefig(path)


def _guarantee(runs: "Runs") -> str:
    """The two promises: of each trial, and of all that the study makes, with the selection."""
    facts, statement = runs.study, runs.study.statement
    whole = statement.get("study_epsilon")
    claim = "no claim for the whole study" if whole is None else f"whole study ε ≤ {_rounded_up(whole)}"
    policy = f" ({statement['policy']})" if "policy" in statement else ""
    return f"each trial ε ≤ {facts.target_epsilon:g}, {claim}{policy}, δ = {facts.delta:g}"


def _rounded_up(epsilon: float | str) -> str:
    from dpsink.privacy.plan import NON_PRIVATE

    value = float(epsilon)
    return f"{math.ceil(value * 1000) / 1000:g}" if math.isfinite(value) else NON_PRIVATE


def _print_rejected(runs: "Runs") -> None:
    total = len(runs.accepted) + len(runs.rejected)
    console.out.print(f"{runs.study.name}: {len(runs.accepted)} of {total} runs accepted", markup=False)
    if runs.rejected.empty:
        return
    shown = console.table("rejected", "reason", "detail")
    for row in runs.rejected.to_dict("records"):
        shown.add_row(row["trial"], row["reason"], row["detail"])
    console.out.print(shown)


def _print_comparison(runs: "Runs", columns: Sequence[Column]) -> None:
    shown = console.table("", *(column.title for column in columns))
    for name, values in _comparison_rows(runs, columns).items():
        shown.add_row(name, *map(_cell, values))
    console.out.print(shown)
    console.out.print(_guarantee(runs), markup=False, soft_wrap=True)


def _comparison_rows(runs: "Runs", columns: Sequence[Column]) -> dict[str, list[Any]]:
    """Trial, ε, metrics that anybody has, and searched settings: one value per column."""
    from analysis.runs import ALL_QUALITY, metrics_of

    had = {name for column in columns for name in metrics_of(column.run)}
    metrics = [name for name in ALL_QUALITY if name in had]
    names = ["trial", "state", schema.EPSILON, *metrics, *runs.study.searched]
    return {name: [_value(column.run.get(name)) for column in columns] for name in names}


def _value(value: Any) -> Any:
    return None if value != value else value  # NaN


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else console.metric_text(value)


def _document(runs: "Runs", columns: Sequence[Column], written: Sequence[Path]) -> dict[str, Any]:
    rows = _comparison_rows(runs, columns)
    return {
        "study": vars(runs.study),
        "accepted": len(runs.accepted),
        "rejected": runs.rejected.to_dict("records"),
        "runs": [
            {"title": column.title, "selected_by": column.metric}
            | {name: values[index] for name, values in rows.items()}
            for index, column in enumerate(columns)
        ],
        "written": [str(path) for path in written],
    }
