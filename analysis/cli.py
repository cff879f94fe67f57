"""`dpsink-analysis`: thin shells over the functions of this package."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpsink import console
from dpsink.errors import InputError
from tune import schema

if TYPE_CHECKING:  # they take seconds
    import pandas as pd
    from matplotlib.figure import Figure

    from analysis.rules import Rule
    from analysis.runs import Row, Runs
    from analysis.verdict import OnProgress

app = console.new_app("dpsink-analysis", "Read studies back: select, compare, judge, export.")

PICTURES = (".png", ".pdf", ".svg")
Studies = Annotated[list[str], typer.Argument(metavar="STUDY...", help="names of studies, YAML files, or folders")]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow; default $MLFLOW_TRACKING_URI or studies/mlflow.db")]
Force = Annotated[bool, typer.Option("--force", help="replace what an earlier call wrote")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, logs on stderr")]
Csv = Annotated[Path | None, typer.Option(help="file to write the whole table to")]
Plot = Annotated[Path | None, typer.Option(help="PNG, PDF or SVG to draw")]
By = Annotated[
    list[str] | None, typer.Option(help="METRIC, or METRIC:TOLERANCE; several are looked at in turn")
]  # fmt: skip
Weights = Annotated[str | None, typer.Option(help="instead of --by, a sum to maximise: accuracy=1,fid=-0.02")]
Epsilon = Annotated[float | None, typer.Option(help="the largest ε allowed")]
Where = Annotated[list[str] | None, typer.Option(help="condition such as 'accuracy_cnn>0.8'; several must all hold")]


def main() -> None:
    """Entry point of the console script."""
    console.run(app)


@app.command("runs")
def show_runs(
    studies: Studies, tracking_uri: TrackingUri = None, csv: Csv = None, force: Force = False, as_json: Json = False
) -> None:
    """Show which runs may be compared, and why the others may not."""
    from analysis.tables import plain_rows, print_rejected

    runs = _load(studies, tracking_uri)
    _write_table(runs.table, csv, force)
    if as_json:
        console.print_json({**_head(runs), "table": plain_rows(runs.table)})
        return
    print_rejected(runs)
    _print_written(csv)


@app.command()
def best(
    studies: Studies,
    by: By = None,
    weights: Weights = None,
    epsilon: Epsilon = None,
    where: Where = None,
    top: Annotated[int, typer.Option(min=1, help="configurations to list")] = 5,
    tracking_uri: TrackingUri = None,
    plot: Plot = None,
    csv: Csv = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show the best configurations, and their best seeds beside the baselines; --plot draws what those make.

    A configuration counts by the mean of its seeds. Without --by and --weights the rules are FID and accuracy, each by
    itself; where no run has either, the study's objective.
    """
    from analysis import selection
    from analysis.figures import comparison_figure
    from analysis.runs import rows_of
    from analysis.tables import floor_in_words, guarantee, print_configurations, print_rejected

    _check_targets(force, plot, csv)
    runs = _load(studies, tracking_uri)
    rules = _rules(runs, by, weights)
    ranked = [selection.ranked_by(runs, rule, epsilon=epsilon, where=where or ()) for rule in rules]
    columns = [Column(row["trial"].removeprefix("baseline-"), row) for row in selection.baselines(runs)]
    for rule, table in zip(rules, ranked, strict=True):
        columns.append(Column(f"best by {rule.title}", selection.run_of(runs, rows_of(table.head(1))[0], rule), rule))
    _write_table(ranked[0], csv, force)
    merged = _merged(columns)
    if plot:
        title = f"{runs.name}\n{guarantee(runs)}"
        _save(comparison_figure(runs, {column.title: column.run for column in merged}, title=title), plot)
    control = list(dict.fromkeys(selection.control_in_words(runs, one.run) for one in columns if one.rule))
    if as_json:
        console.print_json(_document(runs, columns, ranked, rules, control))
        return
    print_rejected(runs)
    for rule, table in zip(rules, ranked, strict=True):
        title = f"\nbest by {rule.title}: {min(top, len(table))} of {len(table)} configurations"
        print_configurations(table.head(top), rule.metrics, title, "rank")
        if table.attrs["note"]:
            console.out.print(table.attrs["note"], markup=False, soft_wrap=True)
    console.out.print()
    _print_comparison(runs, merged)
    for line in (floor_in_words(runs), *control, guarantee(runs)):
        console.out.print(line, markup=False, soft_wrap=True)
    _print_written(plot, csv)


@app.command()
def pareto(
    studies: Studies,
    metric: Annotated[list[str] | None, typer.Option(help="two or three; default fid, accuracy and epsilon")] = None,
    reference: Annotated[
        str | None, typer.Option(help="where the hypervolume ends, as fid=100,accuracy=0.1; default the worst found")
    ] = None,
    epsilon: Epsilon = None,
    where: Where = None,
    tracking_uri: TrackingUri = None,
    plot: Plot = None,
    csv: Csv = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show the configurations that none beats in everything, and the hypervolume of their front."""
    from analysis import fronts
    from analysis.charts import pareto_figure
    from analysis.runs import rows_of
    from analysis.selection import control_in_words, control_of
    from analysis.tables import floor_in_words, guarantee, plain_rows, print_configurations, print_rejected

    _check_targets(force, plot, csv)
    runs = _load(studies, tracking_uri)
    found = fronts.pareto(
        runs, tuple(metric or fronts.METRICS), reference=_numbers(reference), epsilon=epsilon, where=where or ()
    )
    some = rows_of(found)[0]
    _write_table(found, csv, force)
    if plot:
        _save(pareto_figure(found, control_of(runs, some)), plot)
    if as_json:
        console.print_json({**_head(runs), **found.attrs, "table": plain_rows(found)})
        return
    print_rejected(runs)
    print_configurations(
        found.head(found["on_front"].tolist().count(True)), found.attrs["metrics"], "\nPareto front", "on_front"
    )
    words = (fronts.pareto_in_words(found), floor_in_words(runs), control_in_words(runs, some), guarantee(runs))
    for line in words:
        console.out.print(line, markup=False, soft_wrap=True)
    _print_written(plot, csv)


@app.command()
def importance(
    studies: Studies,
    by: Annotated[str, typer.Option(help="a quality metric; default the study's objective")] = "",
    epsilon: Epsilon = None,
    where: Where = None,
    tracking_uri: TrackingUri = None,
    plot: Plot = None,
    csv: Csv = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show which hyperparameters made the difference, how sure that is, and what to search next."""
    from analysis import effects
    from analysis.charts import importance_figure
    from analysis.tables import plain_rows, print_rejected

    _check_targets(force, plot, csv)
    runs = _load(studies, tracking_uri)
    found = effects.importance(runs, by, epsilon=epsilon, where=where or ())
    _write_table(found, csv, force)
    if plot:
        _save(importance_figure(found), plot)
    if as_json:
        console.print_json({**_head(runs), **found.attrs, "table": plain_rows(found)})
        return
    print_rejected(runs)
    _print_importance(found)
    _print_written(plot, csv)


@app.command()
def evaluate_top(
    studies: Studies,
    by: By = None,
    weights: Weights = None,
    epsilon: Epsilon = None,
    where: Where = None,
    top: Annotated[int, typer.Option(min=1, help="configurations to judge")] = 3,
    seeds: Annotated[int, typer.Option(min=2, help="judgements of each, with samples of their own")] = 3,
    samples: Annotated[int, typer.Option(min=20, help="synthetic images of one judgement")] = 5000,
    tracking_uri: TrackingUri = None,
    out: Annotated[Path | None, typer.Option(help="folder of the results; default exports/STUDY/evaluate-top")] = None,
    data_root: Annotated[Path | None, typer.Option(help="of the data sets; default $DPSINK_DATA_ROOT")] = None,
    inception_weights: Annotated[Path | None, typer.Option(help="file of torch-fidelity's weights")] = None,
    threads: Annotated[int, typer.Option(min=0, help="of the CPU; 0: all")] = 0,
    plot: Plot = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Judge the best generators again on the test split, with fresh samples: does the selection hold?

    Stopped, the same command goes on where it was.
    """
    from analysis import verdict
    from analysis.charts import verdict_figure
    from analysis.tables import floor_in_words, plain_rows, print_rejected
    from dpsink.training import use_threads

    _check_targets(force, plot)
    runs = _load(studies, tracking_uri)
    use_threads(threads)
    with _progress("judging") as told, _told_to_go_on():
        found = verdict.evaluate_top(
            runs, by or (), weights=weights, epsilon=epsilon, where=where or (), top=top, seeds=seeds, samples=samples,
            out=out, data_root=data_root, inception_weights=inception_weights, force=force, on_progress=told,
        )  # fmt: skip
    if plot:
        _save(verdict_figure(found), plot)
    if as_json:
        console.print_json({**_head(runs), **found.attrs, "table": plain_rows(found)})
        return
    print_rejected(runs)
    _print_verdict(found)
    console.out.print(floor_in_words(runs), markup=False, soft_wrap=True)
    _print_written(found.attrs["written"], plot)


@app.command()
def report(
    studies: Studies,
    out: Annotated[Path, typer.Option(help="HTML file to write")] = Path("report.html"),
    verdict: Annotated[
        Path | None, typer.Option(help="folder of evaluate-top; default exports/STUDY/evaluate-top")
    ] = None,
    tracking_uri: TrackingUri = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write all that is known about studies as one HTML file: privacy first, for a phone, a desk and paper."""
    from analysis import page
    from analysis.tables import print_rejected

    runs = _load(studies, tracking_uri)
    written = page.report(runs, out, verdict=verdict, force=force)
    if as_json:
        console.print_json({**_head(runs), "written": str(written)})
        return
    print_rejected(runs)
    _print_written(written)


@app.command()
def export(
    source: Annotated[
        list[str], typer.Argument(metavar="STUDY...|MODEL", help="as above, or models:/NAME@ALIAS to fetch it back")
    ],
    by: By = None,
    weights: Weights = None,
    epsilon: Epsilon = None,
    where: Where = None,
    trial: Annotated[str | None, typer.Option(help="this one, instead of the best")] = None,
    out: Annotated[Path | None, typer.Option(help="the folder to make; default exports/STUDY/best-RULE")] = None,
    register: Annotated[
        bool, typer.Option("--register", help="also in MLflow's model registry, with the alias best-METRIC")
    ] = False,
    name: Annotated[str | None, typer.Option(help="of the registered model; default the study's")] = None,
    tracking_uri: TrackingUri = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Take the best run out of its study: a folder that stands alone, and a registered model; or fetch one back.

    Without --by, --weights and --trial each objective of the study is a rule by itself, and each best run is taken.
    A rule by FID sets the alias best-fid, one by an accuracy best-accuracy.
    """
    from analysis.registry import is_model

    if name and not register:
        raise InputError(f"--name={name}: goes with --register")
    if not any(map(is_model, source)):
        runs = _load(source, tracking_uri)
        chosen = _chosen(runs, by, weights, epsilon, where, trial)
        document = {**_head(runs), **_ship(runs, chosen, out, name, force, register)}
    elif len(source) > 1 or by or weights or where or trial or register or epsilon is not None:
        raise InputError(f"{' '.join(source)}: a registered model is fetched as it is, one at a time; no rules with it")
    else:
        document = _fetch(source[0], out, tracking_uri, force)
    if as_json:
        console.print_json(document)
        return
    for line in document["words"]:
        console.out.print(line, markup=False, soft_wrap=True)


# What they have in common.


def _load(studies: Sequence[str], tracking_uri: str | None) -> "Runs":
    from analysis.runs import load_runs

    console.set_up_logging()
    return load_runs(studies, tracking_uri)


def _head(runs: "Runs") -> dict[str, Any]:
    """What every JSON document begins with."""
    import pandas as pd

    from analysis.tables import REJECTED, plain_rows

    return {
        "studies": [vars(study) for study in runs.studies],
        "accepted": len(runs.accepted),
        "rejected": plain_rows(pd.DataFrame(runs.rejected[REJECTED])),
    }


def _check_targets(force: bool, plot: Path | None, *paths: Path | None) -> None:
    """Refuses, before anything is done, what could not be written at the end."""
    from dpsink.disk import check_target

    if plot and plot.suffix.lower() not in PICTURES:
        raise InputError(f"--plot={plot}: must end in .png, .pdf or .svg")
    for path in filter(None, (plot, *paths)):
        check_target(path, force=force)


def _write_table(table: "pd.DataFrame", path: Path | None, force: bool) -> None:
    from analysis.tables import write_csv

    if path:
        write_csv(table, path, force=force)


def _save(figure: "Figure", path: Path) -> None:
    from dpsink.disk import drafted

    with drafted(path) as draft:
        figure.savefig(draft)


def _print_written(*paths: Path | None) -> None:
    if given := [str(path) for path in paths if path]:
        console.out.print("written:", *given, sep="\n  ", markup=False, soft_wrap=True)


def _numbers(text: str | None) -> dict[str, float]:
    """`fid=100,accuracy=0.1`."""
    pairs = [piece.partition("=") for piece in text.split(",")] if text else []
    try:
        return {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        raise InputError(f"--reference={text}: must be METRIC=NUMBER,…") from None


@contextmanager
def _progress(what: str) -> "Iterator[OnProgress]":
    """A bar with an ETA, or lines where nobody watches; both on stderr."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"),
        TimeRemainingColumn(),
    )  # fmt: skip
    watched, started = console.err.is_terminal, time.monotonic()
    with Progress(*columns, console=console.err, disable=not watched) as bar:
        task = bar.add_task(what, total=None)

        def tell(done: int, total: int, label: str) -> None:
            bar.update(task, description=f"{what} {label}".strip(), completed=done, total=total)
            if not watched and label:
                left = (time.monotonic() - started) / done * (total - done) if done else None
                eta = "" if left is None else f", about {left:.0f} s left"
                console.err.print(f"{what} {label} ({done + 1} of {total}{eta})", markup=False, soft_wrap=True)

        yield tell


@contextmanager
def _told_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.fail("interrupted; what is measured is kept: the same command goes on", console.INTERRUPTED)


# `best`.


@dataclass(frozen=True)
class Column:
    """A run in the comparison; `rule` is what it was selected by, None for a baseline."""

    title: str
    run: "Row"
    rule: "Rule | None" = None


def _rules(runs: "Runs", by: Sequence[str] | None, weights: str | None) -> list["Rule"]:
    from analysis.rules import parse_rule
    from analysis.selection import usual_rules

    return [parse_rule(by or (), weights)] if by or weights else usual_rules(runs)


def _merged(columns: Sequence[Column]) -> list[Column]:
    """The columns for a person: a run that is best by several rules stands there once."""
    merged: dict[str, Column] = {}
    for column in columns:
        run_id = column.run["run_id"]
        if run_id in merged and column.rule:
            column = Column(f"{merged[run_id].title} and {column.rule.title}", column.run, column.rule)
        merged[run_id] = column
    return list(merged.values())


def _print_comparison(runs: "Runs", columns: Sequence[Column]) -> None:
    shown = console.table("", *(column.title for column in columns))
    for name, values in _comparison_rows(runs, columns).items():
        shown.add_row(name, *(value if isinstance(value, str) else console.metric_text(value) for value in values))
    console.out.print(shown)


def _comparison_rows(runs: "Runs", columns: Sequence[Column]) -> dict[str, list[Any]]:
    """Trial, ε, metrics that anybody has, and searched settings: one value per column."""
    from analysis.runs import ALL_QUALITY, metrics_of
    from analysis.tables import plain

    had = {name for column in columns for name in metrics_of(column.run)}
    metrics = [name for name in ALL_QUALITY if name in had]
    searched = dict.fromkeys(path for study in runs.studies for path in study.searched)
    names = ["trial", "state", schema.EPSILON, *metrics, *searched]
    return {name: [plain(column.run.get(name)) for column in columns] for name in names}


def _document(
    runs: "Runs",
    columns: Sequence[Column],
    ranked: Sequence["pd.DataFrame"],
    rules: Sequence["Rule"],
    control: Sequence[str],
) -> dict[str, Any]:
    from analysis.tables import plain_rows

    rows = _comparison_rows(runs, columns)
    return {
        **_head(runs),
        "runs": [
            {"title": column.title, "selected_by": column.rule.title if column.rule else None}
            | {name: values[index] for name, values in rows.items()}
            for index, column in enumerate(columns)
        ],
        "rankings": {rule.title: plain_rows(table) for rule, table in zip(rules, ranked, strict=True)},
        "control": list(control),
    }


# `export`.


@dataclass(frozen=True)
class Chosen:
    """A run to take: the name of its folder, its alias in a registry, if it has one, and what it was selected by."""

    run: "Row"
    title: str
    alias: str
    selected_by: str


def _chosen(
    runs: "Runs",
    by: Sequence[str] | None,
    weights: str | None,
    epsilon: float | None,
    where: Sequence[str] | None,
    trial: str | None,
) -> list[Chosen]:
    """The run that was named, or the best by the rule that was given, or by each of the study's objectives."""
    from analysis import selection
    from analysis.rules import parse_rule

    if trial is not None:
        if by or weights or where or epsilon is not None:
            raise InputError(f"--trial={trial}: names the run; leave the rules out")
        return [Chosen(selection.named(runs, trial), trial, "", "name")]
    asked = [parse_rule(by or (), weights)] if by or weights else list(map(parse_rule, runs.study.objectives))
    conditions = [*(where or ()), *([f"ε ≤ {epsilon:g}"] if epsilon is not None else [])]
    under = f", where {' and '.join(conditions)}" if conditions else ""
    return [
        Chosen(
            selection.select_best(runs, rule, epsilon=epsilon, where=where or ()),
            f"best-{rule.slug}",
            rule.alias,
            rule.title + under,
        )
        for rule in asked
    ]


def _ship(
    runs: "Runs", chosen: Sequence[Chosen], out: Path | None, name: str | None, force: bool, register: bool
) -> dict[str, Any]:
    """Writes the folders, and registers them, if it is to; looks at all places before it writes the first."""
    from analysis.export import check_run, default_folder
    from analysis.registry import check_place
    from analysis.tables import guarantee

    if out and len(chosen) > 1:
        raise InputError(f"--out={out}: {len(chosen)} folders are made, one by each objective; give --by or no --out")
    folders = [out or default_folder(runs) / one.title for one in chosen]
    _check_targets(force, None, *folders)
    for one in chosen:
        check_run(one.run)
        if register:
            check_place(runs, one.run, name=name or one.run["study"], alias=one.alias, force=force)
    shipped = [_ship_one(runs, one, folder, name, force, register) for one, folder in zip(chosen, folders, strict=True)]
    words = [*(line for one in shipped for line in one.pop("words")), guarantee(runs)]
    return {"exports": shipped, "words": words}


def _ship_one(runs: "Runs", one: Chosen, folder: Path, name: str | None, force: bool, register: bool) -> dict[str, Any]:
    from analysis.export import export_run
    from analysis.registry import register_run
    from dpsink.judging import privacy_line
    from dpsink.records import read_json

    export_run(runs, one.run, folder, selected_by=one.selected_by, force=force)
    model = None
    if register:
        model = register_run(runs, one.run, folder, name=name or "", alias=one.alias, force=force)
    card = read_json(folder / "card.json")
    words = [
        f"trial {one.run['trial']} of {one.run['study']}, selected by {one.selected_by}: {privacy_line(card)}",
        f"folder: {folder}",
        *([f"model:  {model}" + (f" (alias {one.alias} set)" if one.alias else " (no alias)")] if model else []),
        f"next:   dpsink sample {folder} --out NAME.npz",
    ]
    return {"folder": str(folder), "model": model, "card": card, "words": words}


def _fetch(place: str, out: Path | None, tracking_uri: str | None, force: bool) -> dict[str, Any]:
    from analysis.registry import default_place, fetch_model
    from analysis.runs import STORAGE, default_uri
    from dpsink.judging import privacy_line
    from dpsink.records import read_json

    uri = tracking_uri or default_uri(Path(STORAGE))
    folder = fetch_model(place, out or default_place(place), tracking_uri=uri, force=force)
    card = read_json(folder / "card.json")
    words = [f"{place}: {privacy_line(card)}", f"folder: {folder}", f"next:   dpsink sample {folder} --out NAME.npz"]
    return {"exports": [{"folder": str(folder), "model": place, "card": card}], "words": words}


# The others.


def _print_importance(found: "pd.DataFrame") -> None:
    from analysis.rules import called

    title = f"\nimportance for {called(found.attrs['metric'])}, {found.attrs['configurations']} configurations"
    shown = console.table("parameter", "fANOVA", "5–95 %", "PED-ANOVA", "5–95 %", "", title=title)
    for row in found.to_dict("records"):
        shares = []
        for name in ("fanova", "ped_anova"):
            shares += [f"{row[name]:.0%}", f"{row[f'{name}_low']:.0%}–{row[f'{name}_high']:.0%}"]
        shown.add_row(row["parameter"], *shares, row["verdict"])
    console.out.print(shown)
    if found.attrs["note"]:
        console.out.print(found.attrs["note"], markup=False, soft_wrap=True)
    console.out.print("what to search next:", markup=False)
    for row in found.to_dict("records"):
        console.out.print(f"  {row['parameter']}: {row['advice']}", markup=False, soft_wrap=True)


def _print_verdict(found: "pd.DataFrame") -> None:
    from dpsink.console import metric_text

    columns = ("selected", "judged", "95 %", "best, %", "variety", "recall")
    shown = console.table("", "trial", "ε", *columns, title=f"\n{found.attrs['value']}, selected and judged")
    control = found.attrs["control"]
    for row in [*found.to_dict("records"), *([control] if control else [])]:
        interval = f"[{metric_text(row['judged_low'])}, {metric_text(row['judged_high'])}]"
        beside = [metric_text(row.get(f"test_{name}")) for name in ("variety", "recall")]
        numbers = [metric_text(row[name]) for name in (schema.EPSILON, "selected", "judged")]
        chance = "–" if row is control else f"{row['probability_best']:.0%}"
        shown.add_row(str(row.get("rank", "control")), row["trial"], *numbers, interval, chance, *beside)
    console.out.print(shown)
    for line in (*found.attrs["words"], *found.attrs["skipped"]):
        console.out.print(line, markup=False, soft_wrap=True)
