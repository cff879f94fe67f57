"""Which configuration is best, by the mean of its seeds, and which of its runs to take."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.conditions import meeting
from analysis.rules import Rule, called, ordered, parse_rule
from analysis.runs import ALL_QUALITY, NUMBERS, Row, Runs, rows_of
from dpsink.config import nearest
from dpsink.errors import InputError
from tune import schema

HEAD = ["study", "config_id", "trial", "seeds"]
SE = "_se"  # suffix of a standard error's column
CONTROL = "class_mean"  # kind of the generator without variety
SHOWN = ("fid", "accuracy", "variety", "recall")
USUAL = ("fid", "accuracy")  # what is looked at where nobody says by what


def best(
    runs: Runs,
    by: str | Sequence[str] = (),
    *,
    weights: str | None = None,
    epsilon: float | None = None,
    where: Sequence[str] = (),
) -> pd.DataFrame:
    """The searched configurations, best first.

    Args:
        by: metrics in turn, each `METRIC` or `METRIC:TOLERANCE`; by default the study's own objective.
        weights: instead of `by`, `METRIC=WEIGHT,…`, whose sum is maximised.
        epsilon: the largest ε allowed, of each of a configuration's seeds.
        where: conditions on a configuration's means and settings, such as `accuracy_cnn>0.8`.

    Returns:
        As `configurations`, with `rank` from 1 as its first column. `attrs["note"]` says how many could not be ranked.

    Raises:
        InputError: nothing to compare, an unknown metric, a condition that none meets.
    """
    return ranked_by(runs, rule_of(runs, by, weights), epsilon=epsilon, where=where)


def ranked_by(runs: Runs, rule: Rule, *, epsilon: float | None = None, where: Sequence[str] = ()) -> pd.DataFrame:
    """As `best`, by a rule that has been read."""
    found = meeting(configurations(runs), where, epsilon)
    ranked = ordered(found, rule)
    ranked.insert(0, "rank", range(1, len(ranked) + 1))
    ranked.attrs["note"] = left_out_in_words(len(found) - len(ranked), len(found), rule.metrics)
    return ranked


def left_out_in_words(count: int, found: int, metrics: Sequence[str]) -> str:
    """That a metric was not told by all seeds of some configurations; empty if it was by all of all."""
    told = ", ".join(map(called, metrics))
    return f"{count} of {found} configurations are left out: not all of their seeds have {told}" if count else ""


def rule_of(runs: Runs, by: str | Sequence[str] = (), weights: str | None = None) -> Rule:
    """A rule from words, by default the study's own objectives in turn."""
    return parse_rule(by or ([] if weights else runs.study.objectives), weights)


def usual_rules(runs: Runs) -> list[Rule]:
    """FID and accuracy, each by itself; where no run has either, the study's objective.

    A private validation split has no FID, and a study need not run all classifiers.
    """
    searched = comparable(runs, schema.ROLE_SEARCH)
    return [parse_rule(metric) for metric in USUAL if bool(searched[metric].notna().any())] or [rule_of(runs)]


def configurations(runs: Runs, role: str = schema.ROLE_SEARCH) -> pd.DataFrame:
    """One row per configuration that may be compared: what all its seeds have in common, and their means.

    Returns:
        `study`, `config_id`, `trial` (the first by name), `seeds` (how many), all that the runs' table has, with means
        over the seeds for metrics, NaN where a seed has none, and the largest ε, and `<metric>_se`: the standard error
        of each quality metric's mean, NaN of a single seed.

    Raises:
        InputError: there is none.
    """
    return _means(comparable(runs, role))


def _means(table: pd.DataFrame) -> pd.DataFrame:
    table = table.sort_values(["study", "trial"])
    key = ["study", "config_id"]
    groups = table.groupby(key, sort=False, dropna=False)
    seeds = pd.Series(groups.size(), name="seeds")
    told = pd.DataFrame(groups[list(NUMBERS)].count()).eq(seeds, axis=0)  # by every seed: a part of them would flatter
    means = pd.DataFrame(groups[list(NUMBERS)].mean()).where(told)
    means[schema.EPSILON] = groups[schema.EPSILON].max()
    errors = pd.DataFrame(groups[list(ALL_QUALITY)].sem()).where(told[list(ALL_QUALITY)]).add_suffix(SE)
    common = table.drop(columns=[*NUMBERS, "seed"], errors="ignore").drop_duplicates(key).set_index(key)
    merged = pd.concat([seeds, common, means, errors], axis=1).reset_index()
    return merged.reindex(columns=[*HEAD, *merged.columns.difference(HEAD, sort=False)])


def comparable(runs: Runs, role: str | None = None) -> pd.DataFrame:
    """The accepted runs, of a role. A study that repeats another one here is no part of the selection: it was selected.

    Raises:
        InputError: there is none; says why, by count.
    """
    told = runs.rejected_counts
    if runs.accepted.empty:
        why = f"all {len(runs.table)} runs are rejected: {told}" if told else "no trial has started"
        raise InputError(f"study '{runs.name}' has nothing to compare: {why}; run `dpsink-tune sweep` on")
    if role is None:
        return runs.accepted
    here = {study.study_id for study in runs.studies}
    repeats = [study.name for study in runs.studies if study.repeats in here]
    found = pd.DataFrame(runs.accepted[(runs.accepted["role"] == role) & ~runs.accepted["study"].isin(repeats)])
    if found.empty:
        why = f" ({told})" if told else ""
        raise InputError(f"study '{runs.name}' has no accepted run of role {role}{why}; let it go on")
    return found


def select_best(
    runs: Runs, by: Rule | str | Sequence[str] = (), *, epsilon: float | None = None, where: Sequence[str] = ()
) -> Row:
    """The run to take: of the best configuration, the seed that is best by the same rule.

    Args:
        by: a rule, or its words; `best` says which, and what `epsilon` and `where` are.

    Raises:
        InputError: as `best`.
    """
    rule = by if isinstance(by, Rule) else rule_of(runs, by)
    return run_of(runs, rows_of(ranked_by(runs, rule, epsilon=epsilon, where=where).head(1))[0], rule)


def run_of(runs: Runs, configuration: Row, by: Rule | str | Sequence[str] = ()) -> Row:
    """The best of a configuration's seeds, by a rule or its words.

    Args:
        configuration: a row of `best`, `pareto` or `configurations`.
    """
    table, rule = runs.accepted, by if isinstance(by, Rule) else rule_of(runs, by)
    same = (table["config_id"] == configuration["config_id"]) & (table["study"] == configuration["study"])
    return rows_of(ordered(pd.DataFrame(table[same]), rule).head(1))[0]


def repeated(runs: Runs, configuration: Row) -> list[Row]:
    """The runs that trained a configuration again, in the studies here that repeat its own."""
    first = next(study for study in runs.studies if study.name == configuration["study"])
    names = [study.name for study in runs.studies if study.repeats == first.study_id]
    table = runs.accepted
    again = table["study"].isin(names) & (table["config_id"] == configuration["config_id"])
    return rows_of(pd.DataFrame(table[again & (table["role"] == schema.ROLE_SEARCH)]))


def named(runs: Runs, trial: str) -> Row:
    """The run of a trial, whether or not it may be compared.

    Raises:
        InputError: there is none, or there are several.
    """
    found = rows_of(pd.DataFrame(runs.table[runs.table["trial"] == trial]))
    if not found:
        raise InputError(f"study '{runs.name}' has no trial '{trial}'{nearest(trial, list(runs.table['trial']))}")
    if len(found) > 1:
        raise InputError(f"{len(found)} of the studies {runs.name} have a trial '{trial}': name one study")
    return found[0]


def baselines(runs: Runs) -> list[Row]:
    """The accepted baselines, by name."""
    accepted = comparable(runs)
    return rows_of(pd.DataFrame(accepted[accepted["role"] == schema.ROLE_BASELINE]))


def baseline_configurations(runs: Runs) -> list[Row]:
    """The accepted baselines, as `configurations` gives them; those of a study that repeats another too."""
    accepted = comparable(runs)
    return rows_of(_means(pd.DataFrame(accepted[accepted["role"] == schema.ROLE_BASELINE])))


def control_of(runs: Runs, run: Row) -> Row | None:
    """The class-mean control that was promised the same ε as a run, the mean of its seeds; of its own study first."""
    target = "privacy.target_epsilon"
    found = baseline_configurations(runs)
    controls = [one for one in found if one.get("generator.kind") == CONTROL and one.get(target) == run.get(target)]
    return min(controls, key=lambda one: one["study"] != run["study"], default=None)


def control_in_words(runs: Runs, run: Row) -> str:
    """How a run compares with the control: an accuracy that samples without variety reach too is worth nothing."""
    control = control_of(runs, run)
    if control is None:
        return (
            f"study '{run['study']}' has no class-mean control at this ε: a classifier's accuracy rewards collapse; "
            "add a baseline with generator.kind: class_mean"
        )
    words = [_against(run, control, "", "validation"), _against(run, control, schema.TEST_PREFIX, "test")]
    return f"{run['trial']} and the class-mean control at the same target ε: {'; '.join(filter(None, words))}"


def _against(run: Row, control: Row, prefix: str, split: str) -> str:
    """The metrics that both have on a split, and whether the control does as well."""
    mine, its = ({name: one.get(prefix + name, np.nan) for name in SHOWN} for one in (run, control))
    both = [name for name in SHOWN if not np.isnan([mine[name], its[name]]).any()]
    pieces = ", ".join(f"{called(name)} {mine[name]:.3g} against {its[name]:.3g}" for name in both)
    beaten = " (no better than the control)" if its["accuracy"] >= mine["accuracy"] else ""
    return f"on {split} {pieces}{beaten}" if both else ""
