"""The winner's curse, faced: the best configurations judged again, by fresh samples on images that chose nothing.

    OUT/measured/*.json   one judgement of one generator with one seed, written when it is made: a rerun goes on there
    OUT/result.json       the table and what it means; OUT/result.csv, the table

No privacy cost: what is made of a private generator is post-processing. But the test split is used, and whoever
chooses by this table has chosen by the test split.
"""

import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.export import checkpoint_of, default_folder
from analysis.rules import Rule, called
from analysis.runs import Row, Runs, rows_of
from analysis.selection import control_of, ranked_by, repeated, rule_of, run_of
from dpsink.disk import check_target, drafted
from dpsink.errors import InputError
from dpsink.records import read_json, write_atomically
from tune import schema

RESULT, TABLE, MEASURED = "result.json", "result.csv", "measured"
INCEPTION = "inception"  # the extractor that has weights of its own
FIRST_SEED = 1_000_000  # far from those that training and sweeps judge by
CONFIDENCE = 0.95
DRAWS = 20_000
CONTROL = "control"  # role of its row in the table's file
Measured = dict[str, list[dict[str, float]]]  # by run, by seed
Values = np.ndarray[tuple[int, int], np.dtype[np.float64]]  # (generators, seeds)
OnProgress = Callable[[int, int, str], None]  # how many are measured, of how many, which comes now


def evaluate_top(
    runs: Runs,
    by: str | Sequence[str] = (),
    *,
    weights: str | None = None,
    epsilon: float | None = None,
    where: Sequence[str] = (),
    top: int = 3,
    seeds: int = 3,
    samples: int = 5000,
    out: Path | None = None,
    data_root: Path | None = None,
    inception_weights: Path | None = None,
    force: bool = False,
    on_progress: OnProgress = lambda *_: None,
) -> pd.DataFrame:
    """Judges the generators of the best configurations on the test split, with fresh samples.

    Where a study that repeats the first is given too, its trainings of the same configurations are judged alike; so is
    the class-mean control at the same target ε, which is not ranked.

    Args:
        by, weights, epsilon, where: as for `best`; metrics on test may not select.
        top: how many configurations, 1 at least.
        seeds: judgements of each generator, 2 at least.
        samples: synthetic images per judgement, balanced over the classes.
        out: folder of the results; by default exports/STUDY/evaluate-top. What was measured there before is kept.
        inception_weights: their file, for a study that measured FID with Inception.
        force: replace an earlier result.

    Returns:
        One row per generator, in the order of the selection: `rank`, `study`, `study_id`, `config_id`, `trial`,
        `epsilon`; `selected`, the value on validation that it was selected by; `judged`, `judged_low`, `judged_high`,
        the same on test, mean and 95 % confidence interval (Student's, from the pooled scatter over seeds);
        `judged_rank`; `probability_best`, of being the best of them; means `test_<metric>`; `trainings`, how often the
        configuration was trained again, and `retrained`, `retrained_low`, `retrained_high`, the mean of these on test
        with its 95 % confidence interval, NaN below two. `attrs`: `value`, what is judged; `words`, what it means;
        `rule`, what selected and how it was judged; `control`, a row without ranks, None where there is none to judge;
        `skipped`, a line for each whose files are gone; `written`, the result's file.

    Raises:
        InputError: a result is there already, no generator is left, the data are not at hand, weights that the
            study's FID has no use for.
    """
    rule = rule_of(runs, by, weights)
    _check(top, seeds)
    _check_weights(runs, inception_weights)
    place = out or default_place(runs)
    for name in (RESULT, TABLE):
        check_target(place / name, force=force)
    ranked = ranked_by(runs, rule, epsilon=epsilon, where=where)
    chosen, skipped = _generators(runs, rows_of(ranked.head(top)), rule)
    again = [_trained_again(runs, row, skipped) for row, _ in chosen]
    control = _control(runs, chosen[0][0], rule, skipped)
    jobs = [
        _Job(row, checkpoint, FIRST_SEED + seed, samples)
        for seed in range(seeds)
        for row, checkpoint in (*chosen, *(one for each in again for one in each), *control)
    ]
    measured: Measured = {}
    for done, job in enumerate(jobs):
        on_progress(done, len(jobs), f"{job.row['trial']}, seed {job.seed - FIRST_SEED + 1} of {seeds}")
        measured.setdefault(job.row["run_id"], []).append(_measure(job, place / MEASURED, data_root, inception_weights))
    on_progress(len(jobs), len(jobs), "")
    table = _table([row for row, _ in chosen], measured, rule)
    _add_trainings(table, [[measured[row["run_id"]] for row, _ in each] for each in again], rule)
    words = _in_words(table, rule, seeds, samples)
    metrics = [by] if isinstance(by, str) and by else list(by or (() if weights else runs.study.objectives))
    selects = {"by": metrics, "weights": weights, "epsilon": epsilon, "where": list(where)}
    table.attrs = {
        "value": _called(rule),
        "words": words,
        "rule": selects | {"top": top, "seeds": seeds, "samples": samples},
        "control": next((_control_row(row, measured, rule) for row, _ in control), None),
        "skipped": skipped,
        "written": place / RESULT,
    }
    _write(place, table)
    return table


def _check(top: int, seeds: int) -> None:
    if top < 1 or seeds < 2:
        raise InputError(f"--top={top} --seeds={seeds}: at least 1 generator, and 2 seeds for an interval")


def _check_weights(runs: Runs, inception_weights: Path | None) -> None:
    """A FID of other features than the study's would stand beside it under its name."""
    if inception_weights and not runs.study.extractor.startswith(INCEPTION):
        told = f"study {runs.study.name} measured FID with {runs.study.extractor}"
        raise InputError(f"--inception-weights={inception_weights}: {told}; leave it out")


def _generators(runs: Runs, configurations: list[Row], rule: Rule) -> tuple[list[tuple[Row, Path]], list[str]]:
    """The run of each configuration with its checkpoint, and a line for each whose files are not here."""
    found, gone = [], []
    for configuration in configurations:
        run = run_of(runs, configuration, rule)
        try:
            checkpoint = checkpoint_of(run)
        except InputError as error:
            gone.append(str(error))
        else:
            selected = _value(configuration, rule)
            facts = {"study_id": runs.study_of(run).study_id, "rank": configuration["rank"], "selected": selected}
            found.append((run | facts, checkpoint))
    if not found:
        raise InputError(f"none of the best {len(configurations)} can be judged: {gone[0]}")
    return found, gone


def _trained_again(runs: Runs, row: Row, skipped: list[str]) -> list[tuple[Row, Path]]:
    """The runs that repeat a configuration, with their checkpoints; a line is added for each whose files are gone."""
    found = []
    for run in repeated(runs, row):
        try:
            found.append((run, checkpoint_of(run)))
        except InputError as error:
            skipped.append(str(error))
    return found


def _control(runs: Runs, best: Row, rule: Rule, skipped: list[str]) -> list[tuple[Row, Path]]:
    """The class-mean control beside the best, with its checkpoint; nothing, and a line, where it cannot be judged."""
    configuration = control_of(runs, best)
    if configuration is None:
        return []
    try:
        run = run_of(runs, configuration, rule)
        facts = {"study_id": runs.study_of(run).study_id, "selected": _value(configuration, rule)}
        return [(run | facts, checkpoint_of(run))]
    except InputError as error:
        skipped.append(f"class-mean control: {error}")
        return []


def default_place(runs: Runs) -> Path:
    """Where results are written that nobody has given another place."""
    return default_folder(runs) / "evaluate-top"


def read_verdict(runs: Runs, place: Path | None = None) -> dict[str, Any] | None:
    """What `evaluate_top` found about these runs: `rows`, `words`, `value`, `skipped`; None before it has.

    Raises:
        InputError: a place that was named holds no result, or it is about other runs.
    """
    path = (place or default_place(runs)) / RESULT
    if not path.exists():
        if place:
            raise InputError(f"{path}: no such result; run `dpsink-analysis evaluate-top --out {place}` first")
        return None
    found = read_json(path)
    ids = {study.name: study.study_id for study in runs.studies}
    known = [_identity(row | {"study_id": ids[row["study"]]}) for row in rows_of(runs.accepted)]
    if any(_identity(row) not in known for row in found.get("rows") or [{}]):
        raise InputError(f"{path}: is about other runs than these; run `dpsink-analysis evaluate-top` again")
    return found


def outdated_in_words(runs: Runs, found: dict[str, Any], place: Path | None = None) -> str:
    """That the selection which was judged is another one by now; empty if it is not, or if the result has no rule.

    Args:
        found: from `read_verdict`, with the same `place`.

    Raises:
        InputError: its rule cannot be followed any more.
    """
    asked = found.get("rule")
    if not asked:  # of an earlier version
        return ""
    rule = rule_of(runs, asked["by"], asked["weights"])
    ranked = rows_of(ranked_by(runs, rule, epsilon=asked["epsilon"], where=asked["where"]))
    now = {(runs.study_of(row).study_id, row["config_id"]): row["rank"] for row in ranked}
    if all(now.get((row["study_id"], row["config_id"])) == row["rank"] for row in found["rows"]):
        return ""
    leader = run_of(runs, ranked[0], rule)["trial"]
    command = _command(runs, asked, place)
    return f"outdated: the study went on, and by {rule.title} {leader} comes first now; `{command}` judges anew"


def _command(runs: Runs, asked: dict[str, Any], place: Path | None) -> str:
    """What judges again as it was judged."""
    words = ["dpsink-analysis", "evaluate-top", *(study.name for study in runs.studies)]
    words += [word for metric in asked["by"] for word in ("--by", metric)]
    words += [word for condition in asked["where"] for word in ("--where", condition)]
    given = {name: asked[name] for name in ("weights", "epsilon", "top", "seeds", "samples")} | {"out": place}
    words += [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join([*words, "--force"])


def _identity(row: Row) -> tuple[Any, ...]:
    """What a result is about, wherever it is shown: names and folders are given again."""
    return tuple(row.get(name) for name in ("study_id", "config_id", "trial", schema.EPSILON))


# Measuring.


@dataclass(frozen=True)
class _Job:
    row: Row
    checkpoint: Path
    seed: int
    samples: int

    @property
    def extractor(self) -> str:
        return str(self.row["fid_extractor"]).partition("@")[0]

    @property
    def file(self) -> str:
        """Named by all that the answer depends on."""
        run = (self.row["run_id"], self.row["config_sha256"], self.checkpoint.name)
        facts = repr((*run, self.samples, self.extractor, self.seed))
        return f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def _measure(job: _Job, folder: Path, data_root: Path | None, inception_weights: Path | None) -> dict[str, float]:
    from dpsink.judging import judge

    path = folder / job.file
    if path.exists():
        return read_json(path)["metrics"]
    answer = judge(
        job.checkpoint, samples=job.samples, split="test", seed=job.seed, extractor=job.extractor,
        inception_weights=inception_weights if job.extractor == INCEPTION else None, data_root=data_root,
    )  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(answer | {"trial": job.row["trial"], "seed": job.seed}, default=str))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
    return answer["metrics"]


def _write(place: Path, table: pd.DataFrame) -> None:
    document = {"rows": rows_of(table), **table.attrs}
    with drafted(place / RESULT) as draft, drafted(place / TABLE) as sheet:  # both, or none
        draft.write_text(json.dumps(document, indent=1, default=str) + os.linesep, encoding="utf-8")
        _with_control(table).to_csv(sheet, index=False)


def _with_control(table: pd.DataFrame) -> pd.DataFrame:
    """For a file: the control last, and a column that tells it."""
    marked, control = table.assign(role=schema.ROLE_SEARCH), table.attrs["control"]
    if control is None:
        return marked
    both = pd.concat([marked, pd.DataFrame([control | {"role": CONTROL}])])
    return both.astype(dict.fromkeys(("rank", "judged_rank", "trainings"), "Int64"))


# What it means.


def _table(rows: list[Row], measured: Measured, rule: Rule) -> pd.DataFrame:
    each = [measured[row["run_id"]] for row in rows]
    values = np.array([[_value(metrics, rule) for metrics in mine] for mine in each])
    means, half = values.mean(axis=1), _half_width(values)
    sign = 1 if _maximised(rule) else -1
    table = pd.DataFrame(rows, columns=["rank", "study", "study_id", "config_id", "trial", schema.EPSILON, "selected"])
    table["judged"], table["judged_low"], table["judged_high"] = means, means - half, means + half
    table["judged_rank"] = stats.rankdata(-sign * means, method="min").astype(int)
    table["probability_best"] = _probability_best(sign * values)
    for name in each[0][0]:
        table[f"{schema.TEST_PREFIX}{name}"] = [np.mean([metrics[name] for metrics in mine]) for mine in each]
    return table


def _control_row(row: Row, measured: Measured, rule: Rule) -> Row:
    """The control as the others are judged; its interval is of its own scatter."""
    alone = _table([row], measured, rule).drop(columns=["rank", "judged_rank", "probability_best"])
    return rows_of(alone)[0]


def _add_trainings(table: pd.DataFrame, again: list[list[list[dict[str, float]]]], rule: Rule) -> None:
    """What each configuration was worth when it was trained again: one value per training, its mean over the seeds.

    Args:
        again: by configuration, by training, by seed.
    """
    values = [np.array([np.mean([_value(one, rule) for one in seeds]) for seeds in each]) for each in again]
    level = (1 + CONFIDENCE) / 2
    halves = [float(stats.sem(one) * stats.t.ppf(level, len(one) - 1)) if len(one) > 1 else math.nan for one in values]
    means = [float(one.mean()) if len(one) else math.nan for one in values]
    table["trainings"], table["retrained"] = [len(one) for one in values], means
    table["retrained_low"] = [mean - half for mean, half in zip(means, halves, strict=True)]
    table["retrained_high"] = [mean + half for mean, half in zip(means, halves, strict=True)]


def _value(metrics: dict[str, float], rule: Rule) -> float:
    """What a rule is about: its first metric, or its weighted sum."""
    if rule.weighted:
        return sum(weight * metrics[metric] for metric, weight in rule.terms)
    return metrics[rule.metrics[0]]


def _called(rule: Rule) -> str:
    return rule.title if rule.weighted else called(rule.metrics[0])


def _maximised(rule: Rule) -> bool:
    return rule.weighted or schema.mode_of(rule.metrics[0]) == "max"


def _standard_error(values: Values) -> tuple[float, int]:
    """Of each generator's mean over its seeds, and its degrees of freedom: the scatter of all generators pooled.

    Three seeds of one generator agree by chance on a few hundred test images; what they scatter by is the samples and
    the classifiers, which is the same for all.
    """
    count, seeds = values.shape
    return float(np.sqrt(values.var(axis=1, ddof=1).mean() / seeds)), count * (seeds - 1)


def _half_width(values: Values) -> float:
    """Half of Student's confidence interval of a generator's mean."""
    error, freedom = _standard_error(values)
    return error * float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def _probability_best(values: Values) -> Any:
    """Of each generator, by draws of the means from the distributions behind their intervals; more is better."""
    error, freedom = _standard_error(values)
    means = values.mean(axis=1) + error * stats.t.rvs(freedom, size=(DRAWS, len(values)), random_state=0)
    ties = means == means.max(axis=1, keepdims=True)
    return (ties / ties.sum(axis=1, keepdims=True)).mean(axis=0)


def _in_words(table: pd.DataFrame, rule: Rule, seeds: int, samples: int) -> list[str]:
    first = rows_of(table)[0]
    interval = partial("[{judged_low:.4g}, {judged_high:.4g}]".format_map)
    words = [
        f"Selected by {rule.title} on validation, the mean of a configuration's seeds; judged by {_called(rule)} on "
        f"test, {samples:,} fresh samples with each of {seeds} seeds.",
        f"{first['trial']}: {first['selected']:.4g} when it was selected, {first['judged']:.4g} {interval(first)} now.",
    ]
    if len(table) > 1:
        words += _ranking_in_words(table, _maximised(rule))
    return [
        *words,
        *_trainings_in_words(table, _maximised(rule)),
        "The intervals of single generators cover new samples and classifiers, neither training nor other test images.",
        "The test split has been looked at: choose by validation, not by this table.",
    ]


def _ranking_in_words(table: pd.DataFrame, maximised: bool) -> list[str]:
    rows = rows_of(table)
    first, top = rows[0], min(rows, key=lambda row: row["judged_rank"])
    told = f"{first['trial']} is number {first['judged_rank']} of {len(rows)} on test"
    chance = f"the probability that it is the best of them is {first['probability_best']:.0%}"
    apart = top["judged_low"] > first["judged_high"] if maximised else top["judged_high"] < first["judged_low"]
    if first["probability_best"] >= CONFIDENCE:
        verdict = "The selection holds on these images"
    elif apart:
        verdict = f"The selection does not hold: {top['trial']} is better by more than both intervals"
    else:
        verdict = "The selection is not refuted, nor confirmed"
    words = [f"{verdict}: {told}; {chance}." if not apart else f"{verdict}. {told}; {chance}."]
    same = [row["trial"] for row in rows if row is not top and _overlap(row, top)]
    if same:
        words.append(f"Not to be told apart from {top['trial']}, the best on test: {', '.join(same)}.")
    if len(rows) > 2:
        tau = stats.kendalltau(table["rank"], table["judged_rank"])[0]
        words.append(f"Order of the selection and on test: Kendall's τ {tau:.2f} (1 the same, 0 unrelated).")
    return words


def _trainings_in_words(table: pd.DataFrame, maximised: bool) -> list[str]:
    rows = [row for row in rows_of(table) if row["trainings"]]
    words = [
        f"{row['trial']}, trained again {row['trainings']} times with fresh noise: {row['retrained']:.4g}"
        + (f" [{row['retrained_low']:.4g}, {row['retrained_high']:.4g}]" if row["trainings"] > 1 else "")
        + " on test, the mean of the trainings."
        for row in rows
    ]
    if len(rows) == len(table) > 1:
        top = (max if maximised else min)(rows, key=lambda row: row["retrained"])
        holds = "The order holds" if top["rank"] == rows[0]["rank"] else "The order does not hold"
        low, high = "retrained_low", "retrained_high"
        apart = all(row[low] > top[high] or row[high] < top[low] for row in rows if row is not top)
        sure = "" if apart else ", but the intervals overlap: more seeds would tell"
        words.append(f"{holds} when they are trained again: {top['trial']} has the best mean{sure}.")
    return words


def _overlap(one: Row, other: Row) -> bool:
    return one["judged_low"] <= other["judged_high"] and other["judged_low"] <= one["judged_high"]
