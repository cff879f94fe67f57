"""What a report says about studies, section by section: words, tables, pictures. How it looks is the page's.

The statement of privacy comes first; what selects and what judges stand apart; beside each accuracy stand variety and
recall, and the class-mean control. What cannot be told is a note in its section, where the rest is still of use.
"""

import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.drawings import Picture, curve_picture, parallel_picture, pareto_picture
from analysis.effects import dimensions, importance
from analysis.figures import grid_of
from analysis.fronts import METRICS, pareto, pareto_in_words
from analysis.rules import called, ordered
from analysis.runs import Row, Runs, StudyFacts, file_of, rows_of
from analysis.selection import (
    SHOWN,
    baseline_configurations,
    comparable,
    control_in_words,
    control_of,
    ranked_by,
    rule_of,
    run_of,
    usual_rules,
)
from analysis.statements import Statement, statement_of
from analysis.store import fetch_history, find_runs
from analysis.tables import REJECTED, floor_in_words, guarantee, rounded_up, with_error
from analysis.verdict import outdated_in_words, read_verdict
from dpsink.config import read_yaml
from dpsink.console import metric_text
from dpsink.errors import InputError
from dpsink.privacy.plan import NON_PRIVATE
from tune import schema

if TYPE_CHECKING:
    from PIL import Image

PUBLISHED = Path(__file__).with_name("published.yaml")
TOP = 5  # configurations that are listed
MOST_NAMED = 100  # runs set apart that are named; what is more is counted
COMPARED = ("fid", "accuracy_logreg", "accuracy_mlp", "accuracy_cnn")  # as published
CONTROL = "class-mean control"


@dataclass
class Table:
    """Text in rows; the first cell of a row is its head.

    Attributes:
        kinds: of each row, a class of the style sheet; as many as rows, or none.
        groups: heads above the columns and how many columns each spans; none, or all columns.
    """

    caption: str
    columns: Sequence[str]
    rows: list[list[str]]
    kinds: list[str] = field(default_factory=list)
    groups: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class Grid:
    """Samples of a run; `picture` holds nothing but pixels."""

    title: str
    caption: str
    picture: "Image.Image"


@dataclass
class Section:
    """A part of a report, in the order in which it is read.

    Attributes:
        alarms: what nobody may overlook.
        lists: a head and its items.
        code: what it is, and text to be copied.
        notes: what is missing, and why.
    """

    title: str
    alarms: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    lists: list[tuple[str, list[str]]] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Material:
    """What the sections are made of."""

    runs: Runs
    verdict: Path | None = None  # where `evaluate_top` was told to write

    @cached_property
    def ranked(self) -> pd.DataFrame:
        """Configurations by the study's own objectives, best first."""
        return ranked_by(self.runs, rule_of(self.runs))

    @cached_property
    def chosen(self) -> dict[str, Row]:
        """The runs that are looked at closely: the one to take, and the median and the worst of all, if others."""
        rule = rule_of(self.runs)
        runs = rows_of(ordered(comparable(self.runs, schema.ROLE_SEARCH), rule))
        best = run_of(self.runs, rows_of(self.ranked.head(1))[0], rule)
        picked = {"best": best, "median": runs[(len(runs) - 1) // 2], "worst": runs[-1]}
        first = {run["run_id"]: name for name, run in reversed(picked.items())}  # who is two of them stands there once
        return {name: run for name, run in picked.items() if first[run["run_id"]] == name}

    @cached_property
    def beside(self) -> list[tuple[str, Row]]:
        """The baselines, by means over their seeds; the control of the best run first."""
        control = control_of(self.runs, self.chosen["best"]) or {}
        found = [(_same(row, control), row) for row in baseline_configurations(self.runs)]
        return [(CONTROL if same else "baseline", row) for same, row in sorted(found, key=lambda one: not one[0])]

    @property
    def control(self) -> Row | None:
        """The class-mean control beside the best run."""
        return next((row for head, row in self.beside if head == CONTROL), None)

    @property
    def sealed(self) -> bool:
        """Whether only winners are published."""
        return all(is_sealed(study) for study in self.runs.studies)


def _same(row: Row, other: Row) -> bool:
    return (row["study"], row["config_id"]) == (other.get("study"), other.get("config_id"))


def is_sealed(study: StudyFacts) -> bool:
    """Whether a study publishes its winner alone."""
    return study.statement.get("policy") == schema.SEALING_POLICY


def sections(runs: Runs, verdict: Path | None = None) -> list[Section]:
    """A report's sections.

    Args:
        verdict: where `evaluate_top` wrote, if it was told where.

    Raises:
        InputError: there is nothing to compare, or no verdict on it where one was named.
    """
    material = Material(runs, verdict)
    _ = material.chosen  # nothing to compare is no report
    if verdict:  # what was named must be there
        read_verdict(runs, verdict)
    parts = [part for part in SECTIONS if not (material.sealed and part[1] in OF_MANY)]
    return [_section(title, make, material) for title, make in parts]


def _section(title: str, make: Callable[[Material, Section], None], material: Material) -> Section:
    section = Section(title)
    try:
        make(material, section)
    except InputError as error:
        section.notes.append(str(error))
    return section


# Privacy.


def _privacy(material: Material, section: Section) -> None:
    runs = material.runs
    section.alarms += _alarms(runs)
    section.words += guarantee(runs).splitlines()
    if any(is_sealed(study) for study in runs.studies):
        section.words.append("Only the winner is published: how many trials there were, and the others, stay secret.")
    for study in runs.studies:
        statement = _statement(runs, study, section)
        alone = len(runs.studies) == 1
        title = "The ledger's statement" if alone else study.name
        section.tables.append(Table(title, ("", ""), _promised(runs, study, statement)))
        for key, head in (("assumptions", "It holds if"), ("not_covered", "It does not speak of")):
            if isinstance(told := statement.get(key), list):
                section.lists.append((head if alone else f"{study.name}: {head}", [str(one) for one in told]))


def _alarms(runs: Runs) -> list[str]:
    alarms = []
    for study in runs.studies:
        if not math.isfinite(study.target_epsilon) or study.statement.get("non_private"):
            alarms.append(f"{NON_PRIVATE}: study {study.name} gives no privacy as a whole.")
    free = runs.table["private"].tolist().count(NON_PRIVATE)
    if free:
        alarms.append(f"{NON_PRIVATE}: {free} of the runs were trained without noise; they are set apart below.")
    return alarms


def _statement(runs: Runs, study: StudyFacts, section: Section) -> Statement:
    try:
        return statement_of(runs, study)
    except InputError as error:
        section.notes.append(f"the statement's conditions are missing: {error}")
        return study.statement


def _promised(runs: Runs, study: StudyFacts, statement: Statement) -> list[list[str]]:
    mine = [row for row in rows_of(runs.table) if row["study"] == study.name]
    told = statement.get("accountants")
    accountants = (
        told if isinstance(told, list) else sorted({str(row["accountant"]) for row in mine if row["accountant"]})
    )
    whole, spent = statement.get("study_epsilon"), statement.get("spent")
    delta = float(statement.get("study_delta") or study.delta)
    rows = [
        ["target", f"each trial ε ≤ {study.target_epsilon:g} at δ = {study.delta:g}"],
        ["whole study", "no claim" if whole is None else f"ε ≤ {rounded_up(whole)} at δ = {delta:g}"],
        ["policy", str(statement.get("policy", "not told"))],
        ["claim", str(statement.get("guarantee", "not told"))],
        [
            "neighbours",
            str(statement.get("adjacency", "adding or removing one record; the number of records is public")),
        ],
        ["accountant", ", ".join(map(str, accountants)) or "not told"],
        ["data", f"{study.data_name}; {_splits(mine)}"],
    ]
    if spent is not None and not is_sealed(study):
        rows.append(["spent so far", f"ε {rounded_up(spent)}: an odometer's reading, no claim"])
    return rows


def _splits(mine: list[Row]) -> str:
    """Who may see what, as the trials say."""
    told = []
    for split in ("validation", "test"):
        values = sorted({str(row.get(f"data.{split}", "of unknown kind")) for row in mine})
        told.append(f"{split} images {' and '.join(values)}")
    return f"training images private, {', '.join(told)}"


# What is best.


def _best(material: Material, section: Section) -> None:
    runs = material.runs
    section.words.append(
        "Selected on validation: configurations are ranked by the means of their seeds there, ± their standard error. "
        "Judged on test, which selected nothing: the runs that the study chose at its end, and what was judged again. "
        "An accuracy that the class-mean control reaches too says nothing about the samples; variety and recall do."
    )
    section.words.append(f"F{floor_in_words(runs)[1:]}.")
    for rule in usual_rules(runs):
        ranked = ranked_by(runs, rule)
        section.notes += [f"{rule.title}: {ranked.attrs['note']}"] if ranked.attrs["note"] else []
        title = f"Best by {rule.title}: {min(TOP, len(ranked))} of {len(ranked)} configurations"
        listed = [(str(row["rank"]), row) for row in rows_of(ranked.head(TOP))]
        section.tables.append(_quality_table(title, [*listed, *material.beside], rule.metrics))


def _quality_table(title: str, listed: Sequence[tuple[str, Row]], metrics: Sequence[str] = ()) -> Table:
    """Rows with what selects them and what judges them; a head of a row is its rank, or what it is."""
    bare = [name.removeprefix(schema.TEST_PREFIX) for name in (*metrics, *SHOWN)]
    selects = _shown(list(dict.fromkeys(bare)), listed)
    judges = _shown([schema.TEST_PREFIX + name for name in dict.fromkeys(bare)], listed)
    rows = [
        [_named(head, row), metric_text(row[schema.EPSILON])]
        + [with_error(row, name).replace(" ±", "\n±") for name in (*selects, *judges)]
        for head, row in listed
    ]
    names = [called(name.removeprefix(schema.TEST_PREFIX)) for name in (*selects, *judges)]
    groups = [("", 2), ("validation: selects", len(selects)), ("test: judges", len(judges))]
    kinds = [_kind(head) for head, _ in listed]
    return Table(title, ("configuration", "ε", *names), rows, kinds, [group for group in groups if group[1]])


def _shown(names: Sequence[str], listed: Sequence[tuple[str, Row]]) -> list[str]:
    """The metrics that any row has; with an accuracy always those without which it says nothing, if only a dash."""
    had = [name for name in names if any(_has(row, name) for _, row in listed)]
    accuracy = any("accuracy" in name for name in had)
    return [name for name in names if name in had or (accuracy and name.removeprefix(schema.TEST_PREFIX) in SHOWN[2:])]


def _named(head: str, configuration: Row) -> str:
    """What stands first in a row: rank or role, the first of its trials, and how many there are."""
    seeds = f"\n{configuration['seeds']} seeds" if configuration["seeds"] > 1 else ""
    return f"{head}{'.' if head.isdigit() else ':'} {configuration['trial']}{seeds}"


def _has(row: Row, name: str) -> bool:
    return not math.isnan(row.get(name, math.nan))


def _kind(head: str) -> str:
    return "control" if head == CONTROL else "" if head.isdigit() else "baseline"


def _judged_again(material: Material, section: Section) -> None:
    runs = material.runs
    found = read_verdict(runs, material.verdict)
    if found is None:
        names = shlex.join(study.name for study in runs.studies)
        section.notes.append(f"not judged again by fresh samples yet: dpsink-analysis evaluate-top {names}")
        return
    section.words += [*found.get("words", ()), *found.get("skipped", ())]
    rows = [_judged_row(f"{row.get('rank')}. {row['trial']}", row) for row in found["rows"]]
    rows += _control_rows(material, found)
    columns = [
        "generator", "ε", "selected", "judged", "95 %", "chance to be best", "variety on test", "recall on test",
        "trained again",
    ]  # fmt: skip
    if not any(row.get("trainings") for row in found["rows"]):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    kinds = [*[""] * len(found["rows"]), "control"][: len(rows)]
    section.tables.append(Table(f"Judged again: {found.get('value')}", columns, rows, kinds))
    outdated = outdated_in_words(runs, found, material.verdict)
    section.notes += [outdated] if outdated else []


def _control_rows(material: Material, found: dict[str, Any]) -> list[list[str]]:
    """The control as it was judged beside the others, else as the study judged it; none where there is none."""
    if judged := found.get("control"):
        return [_judged_row(f"{CONTROL}: {judged['trial']}", judged)]
    return [_control_row(material.control, str(found.get("value")))] if material.control else []


def _judged_row(head: str, row: Row) -> list[str]:
    numbers = [metric_text(row.get(name)) for name in (schema.EPSILON, "selected", "judged")]
    interval = f"[{metric_text(row.get('judged_low'))}, {metric_text(row.get('judged_high'))}]"
    beside = [metric_text(row.get(f"test_{name}")) for name in ("variety", "recall")]
    chance = row.get("probability_best")
    return [head, *numbers, interval, "–" if chance is None else f"{chance:.0%}", *beside, _retrained(row)]


def _retrained(row: Row) -> str:
    """The mean of a configuration's new trainings, in the studies that repeat it."""
    if not row.get("trainings"):
        return "–"
    mean, low, high = (metric_text(row[name]) for name in ("retrained", "retrained_low", "retrained_high"))
    return f"{mean} [{low}, {high}], {row['trainings']} times"


def _control_row(control: Row, value: str) -> list[str]:
    """What the control reaches in the same metric, on validation and where the study judged it."""
    metric = next((name for name in schema.QUALITY if called(name) == value), "")
    names = (schema.EPSILON, metric, f"test_{metric}")
    beside = [metric_text(control.get(f"test_{name}")) for name in ("variety", "recall")]
    return [
        f"{CONTROL}: {control['trial']}",
        *(metric_text(control.get(name)) for name in names),
        "–",
        "–",
        *beside,
        "–",
    ]


# Pictures.


def _tradeoffs(material: Material, section: Section) -> None:
    metrics = [name for name in METRICS if bool(material.ranked[name].notna().any())]
    found = pareto(material.runs, metrics)
    section.pictures.append(pareto_picture(found, material.control))
    section.words.append(pareto_in_words(found) + ".")
    on_front = [row for row in rows_of(found) if row["on_front"]]
    front = [(str(number), row) for number, row in enumerate(on_front[: 4 * TOP], 1)]
    control = [(CONTROL, material.control)] if material.control else []
    title = f"On the front: {len(front)} of {len(on_front)}"
    section.tables.append(_quality_table(title, [*front, *control]))


def _settings(material: Material, section: Section) -> None:
    ranked = material.ranked
    searched = dimensions(material.runs, ranked)
    if searched and len(ranked) > 1:
        metrics = [name for name in SHOWN[:3] if bool(ranked[name].notna().all())]
        section.pictures.append(parallel_picture(ranked, searched, metrics))
        section.words.append(
            "Each line is a configuration: at the upper axes what it was set to, at the lower ones the quality it "
            "reached on validation, better to the right."
        )
    else:
        section.notes.append("no searched setting has two values: nothing to draw")
    paths = [path for study in material.runs.studies for path in study.searched if path in ranked]
    rows = [[path, *(_setting(run.get(path)) for run in material.chosen.values())] for path in dict.fromkeys(paths)]
    columns = ("setting", *(f"{name}: {run['trial']}" for name, run in material.chosen.items()))
    if rows:
        section.tables.append(Table(f"Settings, by {rule_of(material.runs).title}", columns, rows))


def _setting(value: Any) -> str:
    if isinstance(value, int | float):
        return metric_text(value)
    return "–" if value is None else str(value)


def _curves(material: Material, section: Section) -> None:
    metrics = [name for name in SHOWN[:3] if bool(material.ranked[name].notna().any())]
    histories: dict[str, dict[str, dict[int, float]]] = {}
    for name, run in material.chosen.items():
        found = fetch_history(material.runs.tracking_uri, run["run_id"], (schema.EPSILON, *metrics))
        if not found:
            section.notes.append(f"MLflow holds no reports on the way of {run['trial']}")
        histories[f"{name}: {run['trial']}"] = found
    for metric in metrics:
        curves = {name: _curve(history, metric) for name, history in histories.items()}
        if drawn := {name: curve for name, curve in curves.items() if curve}:
            section.pictures.append(curve_picture(metric, drawn, material.control))
    if section.pictures:
        section.words.append(
            "What each run had reached on validation when it had been charged an ε: the best seed of the best "
            f"configuration, the median and the worst of all runs by {rule_of(material.runs).title}."
        )


def _curve(history: dict[str, dict[int, float]], metric: str) -> dict[float, float]:
    """Value by ε, of the reports that have both."""
    charged = history.get(schema.EPSILON, {})
    pairs = [(charged.get(step, math.nan), value) for step, value in history.get(metric, {}).items()]
    return {epsilon: value for epsilon, value in pairs if math.isfinite(epsilon) and math.isfinite(value)}


def _samples(material: Material, section: Section) -> None:
    shown = material.chosen | ({CONTROL: material.control} if material.control else {})
    for name, run in shown.items():
        try:
            picture = grid_of(material.runs, run)
        except InputError as error:
            section.notes.append(str(error))
            continue
        if picture is None:
            section.notes.append(f"{run['trial']} ({name}) has no samples in MLflow")
            continue
        numbers = ", ".join(f"{called(metric)} {metric_text(run[metric])}" for metric in (schema.EPSILON, *SHOWN))
        section.grids.append(Grid(f"{name}: {run['trial']}", numbers, picture))
    if section.grids:
        section.words.append("Samples as they came, none picked: one column for each of the first ten classes.")


# What failed, what to compare with, how to go on.


def _set_apart(material: Material, section: Section) -> None:
    runs, rejected = material.runs, material.runs.rejected
    if material.sealed:
        section.words.append("What else ran is secret.")
        return
    if rejected.empty:
        section.words.append(f"Nothing: all {len(runs.table)} runs are compared.")
        return
    section.words.append(f"{len(rejected)} of {len(runs.table)} runs are not compared: {runs.rejected_counts}.")
    counts = Counter(str(reason) for reason in rejected["reason"])
    section.tables.append(
        Table("By reason", ("reason", "runs"), [[why, str(count)] for why, count in counts.most_common()])
    )
    named = [[str(row[name]) for name in REJECTED] for row in rows_of(rejected.head(MOST_NAMED))]
    section.tables.append(Table("By name", REJECTED, named))
    if len(rejected) > MOST_NAMED:
        names = shlex.join(study.name for study in runs.studies)
        section.notes.append(
            f"and {len(rejected) - MOST_NAMED} more: dpsink-analysis runs {names} --csv runs.csv has all"
        )


def _compared(material: Material, section: Section) -> None:
    runs, told = material.runs, read_yaml(PUBLISHED)
    best = [rows_of(ranked_by(runs, rule).head(1))[0] | {"by": rule.title} for rule in usual_rules(runs)]
    control = [material.control] if material.control else []
    section.words += dict.fromkeys(control_in_words(runs, row) for row in best)
    published = told.get(runs.study.data_name, [])
    with_fid = runs.study.extractor.startswith("inception")
    delta = runs.study.delta
    rows = [_own_row(f"best by {row['by']}: {row['trial']}", row, delta, with_fid) for row in best]
    rows += [_own_row(CONTROL, row, delta, with_fid) for row in control]
    kinds = ["" for _ in best] + ["control" for _ in control]
    columns = ("", "ε", "δ", "FID", "LogReg", "MLP", "CNN", "variety", "recall", "on")
    if not published:
        section.words.append(f"No figures of {runs.study.data_name} are published that could stand beside these.")
    rows += [_published_row(row) for row in published]
    title = "With the published figures" if published else "With the control"
    section.tables.append(Table(title, columns, rows, kinds + ["published"] * len(published)))
    if published:
        sources = {row["source"] for row in published}
        section.lists.append(("Sources", [text for name, text in told["sources"].items() if name in sources]))
        section.notes.append("the publications tell neither variety nor recall; 60,000 samples are judged on test")
        section.notes += [text for name, text in told["conditions"].items() if name == runs.study.data_name]
    if not with_fid:
        section.notes.append(f"FID here is of the features of {runs.study.extractor}, no published one: it is left out")


def _own_row(head: str, row: Row, delta: float, with_fid: bool) -> list[str]:
    """On test where it was judged there, else on validation."""
    on_test = _has(row, schema.TEST_PREFIX + "accuracy")
    prefix, split = (schema.TEST_PREFIX, "test") if on_test else ("", "validation")
    numbers = [metric_text(row.get(prefix + name)) for name in (*COMPARED, "variety", "recall")]
    fid = numbers[0] if with_fid else "–"
    return [head, metric_text(row[schema.EPSILON]), f"{delta:g}", fid, *numbers[1:], split]


def _published_row(row: dict[str, Any]) -> list[str]:
    private = row["epsilon"] is not None
    return [
        row["method"],
        metric_text(row["epsilon"]) if private else NON_PRIVATE,
        f"{row['delta']:g}" if private else "–",
        *(metric_text(row[name]) for name in ("fid", "logreg", "mlp", "cnn")),
        "–",
        "–",
        "test",
    ]


def _outlook(material: Material, section: Section) -> None:
    found = importance(material.runs)
    section.words += [found.attrs["note"]] if found.attrs["note"] else []
    rows = [
        [row["parameter"], f"{row['fanova']:.0%}", _span(row), row["verdict"], row["best"], row["advice"]]
        for row in rows_of(found)
    ]
    title = f"What made the difference in {called(found.attrs['metric'])}, and what to search next"
    section.tables.append(Table(title, ("setting", "share", "5 % to 95 %", "", "in the best", "search next"), rows))


def _span(row: Row) -> str:
    return f"{row['fanova_low']:.0%} to {row['fanova_high']:.0%}"


def _reproduce(material: Material, section: Section) -> None:
    runs = material.runs
    commands = [shlex.join(_command(runs, study)) for study in runs.studies]
    names = [study.name for study in runs.studies]
    commands.append(
        shlex.join(["dpsink-analysis", "report", *names, "--tracking-uri", schema.shown_uri(runs.tracking_uri)])
    )
    section.code.append(("Commands", "\n".join(commands)))
    section.words.append(
        "The noise has no seed: another run of the study gives other generators, alike up to that noise. On the same "
        "private data it is one more release, whose ε comes on top. Where the study's folder is, the first command "
        "resumes it."
    )
    for study in runs.studies:
        if file := file_of(study, "study.yaml"):
            section.code.append((f"{study.name}.yaml", file.read_text(encoding="utf-8")))
        else:
            section.notes.append(
                f"the study file of {study.name} is not here: it is study.yaml in {study.folder or 'its folder'}"
            )


def _command(runs: Runs, study: StudyFacts) -> list[str]:
    """What ran, or runs on, a study."""
    if study.repeats is None:
        return ["dpsink-tune", "sweep", f"{study.name}.yaml"]
    known = find_runs(runs.tracking_uri, schema.KIND_TAG, [schema.KIND_STUDY])
    names = {one.tags.get(schema.STUDY_ID_TAG): one.tags.get(schema.STUDY_NAME_TAG) for one in known}
    first = names.get(study.repeats) or "STUDY"
    mine = runs.table[(runs.table["study"] == study.name) & (runs.table["role"] == schema.ROLE_SEARCH)]
    options = ["--top", str(len(set(mine["config_id"]))), "--seeds", str(study.seeds), "--name", study.name]
    return ["dpsink-tune", "repeat", first, *options]


SECTIONS: tuple[tuple[str, Callable[[Material, Section], None]], ...] = (
    ("Privacy", _privacy),
    ("The best runs", _best),
    ("Is the best really the best?", _judged_again),
    ("What can be had together", _tradeoffs),
    ("Settings and what they reached", _settings),
    ("Quality over ε", _curves),
    ("Samples", _samples),
    ("What was set apart, and why", _set_apart),
    ("Beside the control and the published figures", _compared),
    ("How the search could go on", _outlook),
    ("How to reproduce this", _reproduce),
)
OF_MANY = (_tradeoffs, _settings, _outlook)  # sections that one run cannot fill
