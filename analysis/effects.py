"""Which hyperparameters made the difference, how sure that is, and what to search next.

Optuna's evaluators judge a study rebuilt from the configurations, again and again on bootstrap samples of them. Each
time a parameter that nobody searched, of random values, takes part: what it reaches is what chance reaches.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.rules import losses_of, parse_rule
from analysis.runs import Runs
from analysis.selection import ranked_by
from dpsink.errors import InputError

if TYPE_CHECKING:  # its import takes a second
    import optuna

RESAMPLES = 30
FEWEST_RESAMPLES = RESAMPLES // 2  # in which the configurations can be told apart
LARGEST_SAMPLE = 120  # configurations in one resample: fANOVA's time grows faster than they do
TREES = 16
FEWEST = 5  # configurations
ENOUGH = 10  # configurations per searched parameter
BEST_PART = 0.25
CHANCE = " chance"  # no path has a space
TOO_FEW = "keep: too few to tell"
MATTERS, UNCLEAR, NOISE = "matters", "unclear", "like chance"
Positions = np.ndarray[tuple[int], np.dtype[np.float64]]
Shares = dict[str, tuple[float, float]]  # by path: fANOVA's and PED-ANOVA's


@dataclass(frozen=True)
class Dimension:
    """One searched parameter.

    Attributes:
        positions: of the configurations, in [0, 1]: of a number its place in the range, by logarithm where the search
            was by logarithm; of a choice the number of the choice.
        low, high: the range; None of a choice.
        choices: None of a number.
        told: whether the study says its range; otherwise it is what was seen.
    """

    path: str
    positions: Positions
    low: float | None
    high: float | None
    log: bool
    choices: tuple[str, ...] | None
    told: bool

    def value(self, position: float) -> str:
        """What stands at a position, for people."""
        if self.choices is not None:
            return self.choices[int(position)]
        assert self.low is not None and self.high is not None
        if self.log:
            return f"{self.low * (self.high / self.low) ** position:.3g}"
        return f"{self.low + (self.high - self.low) * position:.3g}"


def importance(
    runs: Runs, by: str = "", *, epsilon: float | None = None, where: Sequence[str] = (), seed: int = 0
) -> pd.DataFrame:
    """How much of a metric's variation each searched parameter explains, the largest first.

    Args:
        by: a quality metric; by default the study's own objective.
        epsilon, where: as for `best`.
        seed: of the bootstrap and of the forests.

    Returns:
        One row per parameter. `fanova`, `fanova_low`, `fanova_high`: share of the variation (median and 5 % to 95 % of
        the resamples). `ped_anova`, …: the same of what sets the best quarter apart. `chance`: how often a parameter
        of random values did at least as well in fANOVA, in (0, 1]. `verdict`: `matters` (chance up to 5 %: one
        useless parameter in twenty looks so), `unclear` (up to 30 %) or `like chance`. `best`: its value in
        the best configuration. `advice`: what to search next. `attrs`: `metric`, `configurations`, `note`; `left_out`,
        the parameters that were searched under some choices only: `where` looks at one of these.

    Raises:
        InputError: fewer than five configurations, nothing searched, or the metric does not vary, or only in so few
            configurations that most resamples are tied.
    """
    rule = parse_rule(by or runs.study.objectives[:1])
    found = ranked_by(runs, rule, epsilon=epsilon, where=where)
    metric = rule.metrics[0]
    losses = losses_of(found, metric)
    searched = dimensions(runs, found)
    _check(runs, losses, searched, metric)
    drawn = _drawn(searched, losses, seed)
    if len(drawn) < FEWEST_RESAMPLES:
        raise InputError(
            f"study '{runs.name}': too many configurations have the same {metric}: {RESAMPLES - len(drawn)} of "
            f"{RESAMPLES} resamples cannot tell them apart; let it go on, or look --by another metric"
        )
    rows = [_row(dimension, drawn, len(found), len(searched)) for dimension in searched]
    table = pd.DataFrame(rows).sort_values("fanova", ascending=False, kind="stable").reset_index(drop=True)
    partly = {path: choices for path in _searched(runs) if (choices := _choices_of(runs, found, path))}
    missing = f"{found.attrs['note']}." if found.attrs["note"] else ""
    notes = (_note(len(found), len(searched)), _tied(len(drawn)), missing, *map(_left_out, partly, partly.values()))
    note = " ".join(filter(None, notes))
    table.attrs = {"metric": metric, "configurations": len(found), "note": note, "left_out": list(partly)}
    return table


def _check(runs: Runs, losses: Positions, dimensions: Sequence[Dimension], metric: str) -> None:
    if not dimensions:
        raise InputError(f"study '{runs.name}': no searched parameter has two values: nothing to tell apart")
    if len(losses) < FEWEST:
        raise InputError(f"study '{runs.name}': importance needs {FEWEST} configurations, it has {len(losses)}")
    if np.ptp(losses) == 0:
        raise InputError(f"study '{runs.name}': all configurations have the same {metric}")


def _note(count: int, parameters: int) -> str:
    if count >= ENOUGH * parameters:
        return ""
    return (
        f"{count} configurations for {parameters} parameters are few (below {ENOUGH} for each): take this as a hint, "
        "and let the study go on before fixing anything."
    )


def _tied(told: int) -> str:
    return f"{RESAMPLES - told} of {RESAMPLES} resamples are left out: their best are tied." if told < RESAMPLES else ""


def _left_out(path: str, choices: str) -> str:
    return f"{path} is left out: only some configurations searched it (--where '{choices}' looks at those)."


# The search space.


def dimensions(runs: Runs, found: pd.DataFrame) -> list[Dimension]:
    """The parameters that were searched, with two values at least, in all configurations.

    Args:
        found: configurations, as `configurations` gives them.
    """
    told, paths = _space(runs), [path for path in _searched(runs) if path in found]
    made = [_dimension(path, pd.Series(found[path]), told.get(path)) for path in paths
            if not _choices_of(runs, found, path)]  # fmt: skip
    return [one for one in made if one is not None and np.ptp(one.positions) > 0]


def _space(runs: Runs) -> dict[str, Any]:
    return {path: one for study in reversed(runs.studies) for path, one in study.space.items()}


def _searched(runs: Runs) -> list[str]:
    return list(dict.fromkeys(path for study in runs.studies for path in study.searched))


def _choices_of(runs: Runs, found: pd.DataFrame, path: str) -> str:
    """The choice under which a parameter was searched, as a condition; empty if it was in all configurations.

    What others have instead is no value that anybody proposed: it has no importance beside theirs.
    """
    for on, wanted in _space(runs).get(path, {}).get("when", {}).items():
        values = list(map(str, wanted if isinstance(wanted, list) else [wanted]))
        if on in found and not set(map(str, found[on])) <= set(values):
            return f"{on}={values[0]}"
        if above := _choices_of(runs, found, on):
            return above
    return ""


def _dimension(path: str, values: pd.Series, told: dict[str, Any] | None) -> Dimension | None:
    is_choice = told["choice"] if told and "choice" in told else None
    if is_choice is not None or not pd.api.types.is_numeric_dtype(values):
        texts = values.map(str).where(values.notna(), "None")
        choices = tuple(sorted(set(texts)))
        return Dimension(path, texts.map(choices.index).to_numpy(float), None, None, False, choices, bool(told))
    if values.isna().any():  # not all configurations have it, and the study does not tell why
        return None
    numbers = values.to_numpy(float)
    bounds = (
        next((told[kind] for kind in ("uniform", "log_uniform", "int", "integer") if kind in told), None)
        if told
        else None
    )
    low, high = map(float, bounds or (numbers.min(), numbers.max()))
    log = "log_uniform" in told if bounds and told else low > 0 and high >= 10 * low
    if low == high:
        return None
    places = np.log(numbers / low) / np.log(high / low) if log else (numbers - low) / (high - low)
    return Dimension(path, np.clip(places, 0, 1), low, high, log, None, bounds is not None)


# What Optuna says.


def _drawn(dimensions: Sequence[Dimension], losses: Positions, seed: int) -> list[Shares]:
    turns = (_resample(dimensions, losses, np.random.default_rng((seed, turn))) for turn in range(RESAMPLES))
    return [shares for shares in turns if shares is not None]


def _resample(dimensions: Sequence[Dimension], losses: Positions, rng: np.random.Generator) -> Shares | None:
    """Importances on one bootstrap sample, the one of chance among them; None where it is tied.

    Either no best quarter stands apart from the rest, or what does is in none of fANOVA's trees.
    """
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator

    random = Dimension(CHANCE, rng.random(len(losses)), 0, 1, False, None, True)
    chosen = rng.integers(len(losses), size=min(len(losses), LARGEST_SAMPLE))
    seed = int(rng.integers(2**31))
    if np.quantile(losses[chosen], BEST_PART, method="inverted_cdf") == losses[chosen].max():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = _study([*dimensions, random], losses, chosen)
        evaluators = (
            FanovaImportanceEvaluator(n_trees=TREES, seed=seed),
            PedAnovaImportanceEvaluator(target_quantile=BEST_PART, evaluate_on_local=False),
        )
        try:
            shares = [optuna.importance.get_param_importances(study, evaluator=one) for one in evaluators]
        except RuntimeError as error:
            if "zero total variance" in str(error):
                return None
            raise
    return {one.path: (shares[0][one.path], shares[1][one.path]) for one in (*dimensions, random)}


def _study(dimensions: Sequence[Dimension], losses: Positions, chosen: Any) -> "optuna.Study":
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, BaseDistribution] = {
        one.path: FloatDistribution(0, 1) if one.choices is None else CategoricalDistribution(range(len(one.choices)))
        for one in dimensions
    }
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        optuna.create_trial(
            params={one.path: _native(one, index) for one in dimensions},
            distributions=distributions, value=float(losses[index]),
        )
        for index in chosen
    )  # fmt: skip
    return study


def _native(dimension: Dimension, index: int) -> float | int:
    position = float(dimension.positions[index])
    return position if dimension.choices is None else int(position)


# What it means.


def _row(dimension: Dimension, drawn: Sequence[Shares], count: int, parameters: int) -> dict:
    fanova, ped = np.array([turn[dimension.path] for turn in drawn]).T
    random = np.array([turn[CHANCE][0] for turn in drawn])
    chance = float((1 + (random >= np.median(fanova)).sum()) / (1 + len(random)))
    verdict = MATTERS if chance <= 0.05 else UNCLEAR if chance <= 0.3 else NOISE
    row: dict[str, Any] = {"parameter": dimension.path}
    for name, values in (("fanova", fanova), ("ped_anova", ped)):
        low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
        row |= {name: middle, f"{name}_low": low, f"{name}_high": high}
    best = dimension.value(dimension.positions[0])
    advice = _advice(dimension, verdict, enough=count >= ENOUGH * parameters)
    return row | {"chance": chance, "verdict": verdict, "best": best, "advice": advice}


def _advice(dimension: Dimension, verdict: str, *, enough: bool) -> str:
    """What to search next, by rules on the best quarter of the configurations (three at least).

    Nothing is fixed before there are enough configurations. Like chance: fix it. A number: widen where the middle of
    the best lies in the outer fifth of the range, narrow where they take up no more than half of it. A choice: fix it
    where four fifths of the best agree.
    """
    best = dimension.positions[: max(3, round(BEST_PART * len(dimension.positions)))]
    if verdict == NOISE:
        return f"fix at {dimension.value(best[0])}: it makes no difference that shows" if enough else TOO_FEW
    if dimension.choices is not None:
        counts = np.bincount(best.astype(int))
        if counts.max() < 0.8 * len(best):
            return "keep"
        return f"fix at {dimension.value(int(counts.argmax()))}" if enough else TOO_FEW
    middle, span = float(np.median(best)), f"[{dimension.value(0)}, {dimension.value(1)}]"
    span = span if dimension.told else f"the {span} that was seen"
    if middle >= 0.8 or middle <= 0.2:
        way = "above" if middle >= 0.8 else "below"
        return f"widen {way}: the best lie around {dimension.value(middle)} of {span}"
    if np.ptp(best) <= 0.5:
        return f"narrow to [{dimension.value(best.min())}, {dimension.value(best.max())}] of {span}"
    return "keep"
