"""What "best" means: one metric, several in turn, or a weighted sum."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dpsink.config import nearest
from dpsink.errors import InputError
from tune import schema

FROM_FEATURES = frozenset({"fid", "kid", "precision", "recall"})  # mean nothing across extractors
Order = np.ndarray[tuple[int], np.dtype[np.intp]]  # positions of rows, best first
Losses = np.ndarray[tuple[int], np.dtype[np.float64]]  # one per row, to be minimised


@dataclass(frozen=True)
class Rule:
    """An order of runs, or of configurations.

    Attributes:
        terms: metric and number. Of a lexicographic rule the number is a tolerance: rows as good as the best up to it
            count as equal, and the next metric decides. Of a weighted rule it is the metric's weight.
        weighted: whether the sum of weight times metric is maximised.
    """

    terms: tuple[tuple[str, float], ...]
    weighted: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that it looks at; the first is the main one."""
        return tuple(metric for metric, _ in self.terms)

    @property
    def title(self) -> str:
        """For people: `FID`, `accuracy within 0.01, then FID`, `1·accuracy − 0.02·FID`."""
        if self.weighted:
            pieces = [f"{'−' if weight < 0 else '+'} {abs(weight):g}·{called(name)}" for name, weight in self.terms]
            return " ".join(pieces).removeprefix("+ ")
        within = [called(name) + (f" within {limit:g}" if limit else "") for name, limit in self.terms]
        return ", then ".join(within)

    @property
    def alias(self) -> str:
        """In the registry: `best-fid`, `best-accuracy`, by the main metric; a weighted sum has one of its own."""
        main = "accuracy" if self.metrics[0].startswith("accuracy") else self.metrics[0]
        return f"best-{self.slug if self.weighted else main}"

    @property
    def slug(self) -> str:
        """For the name of a folder."""
        return "-".join((*(("weighted",) if self.weighted else ()), *self.metrics))


def parse_rule(by: str | Sequence[str] = (), weights: str | None = None) -> Rule:
    """A rule from words.

    Args:
        by: metrics in turn, each `METRIC` or `METRIC:TOLERANCE`; FID and KID are minimised, the others maximised.
        weights: `METRIC=WEIGHT,…`; the sum is maximised, so that FID wants a negative weight.

    Raises:
        InputError: an unknown metric or one on test, no number, a metric twice, or both ways at once.
    """
    words = [by] if isinstance(by, str) else list(by)
    if bool(words) == (weights is not None):
        raise InputError("give metrics to select by, or weights, and not both")
    mark, told = ("=", weights.split(",")) if weights is not None else (":", words)
    rule = Rule(tuple(_term(word, mark) for word in told), weighted=weights is not None)
    if len(set(rule.metrics)) < len(rule.terms):
        raise InputError(f"{', '.join(told)}: names a metric twice")
    return rule


def check_selects(metric: str) -> None:
    """Refuses what judges: whoever selects by the test split has nothing left that tells what the selection is worth.

    Raises:
        InputError: so it is.
    """
    if metric.startswith(schema.TEST_PREFIX):
        bare = metric.removeprefix(schema.TEST_PREFIX)
        raise InputError(f"'{metric}' may not select: the test split judges what validation chose; give '{bare}'")


def _term(word: str, mark: str) -> tuple[str, float]:
    metric, given, number = word.strip().partition(mark)
    check_selects(metric)
    if metric not in schema.QUALITY:
        raise InputError(f"no metric '{metric}'{nearest(metric, schema.QUALITY)}")
    try:
        value = float(number) if given else 0.0
    except ValueError:
        value = math.nan
    weighted = mark == "="
    if not math.isfinite(value) or (value < 0 and not weighted) or (not value and weighted):
        wanted = "METRIC=WEIGHT, not 0, as in accuracy=1,fid=-0.02" if weighted else "METRIC or METRIC:TOLERANCE"
        raise InputError(f"'{word}' must be {wanted}")
    return metric, value


def ordered(table: pd.DataFrame, rule: Rule) -> pd.DataFrame:
    """The rows that have the rule's metrics, best first. Ties: less ε, then study and trial by name.

    Raises:
        InputError: no row has all of the metrics, or their extractors differ.
    """
    having = table.dropna(subset=list(rule.metrics))
    if having.empty:
        had = [name for name in schema.QUALITY if bool(table[name].notna().any())]
        missing = [name for name in rule.metrics if name not in had]
        raise InputError(f"none has the metric '{', '.join(missing or rule.metrics)}'; they have {', '.join(had)}")
    features = [name for name in rule.metrics if name in FROM_FEATURES]
    if features and len(set(having["fid_extractor"])) > 1:
        raise InputError(f"'{features[0]}' with different FID extractors cannot be ranked; rank by accuracy")
    having = having.sort_values([schema.EPSILON, "study", "trial"], kind="stable")
    order = _by_weight(having, rule) if rule.weighted else _in_turn(having, rule.terms)
    return having.iloc[order].reset_index(drop=True)


def _by_weight(table: pd.DataFrame, rule: Rule) -> Order:
    score = sum((weight * table[metric].to_numpy() for metric, weight in rule.terms), np.zeros(len(table)))
    return np.argsort(-score, kind="stable")


def _in_turn(table: pd.DataFrame, terms: Sequence[tuple[str, float]]) -> Order:
    """Positions by the first metric, in bands as wide as its tolerance; within a band by the other metrics."""
    columns = [(losses_of(table, metric), tolerance) for metric, tolerance in terms]
    return np.array(_banded(np.arange(len(table)), columns), dtype=np.intp)


def _banded(positions: Order, columns: Sequence[tuple[Losses, float]]) -> list[int]:
    if not columns or len(positions) == 1:
        return positions.tolist()
    (losses, tolerance), rest = columns[0], columns[1:]
    order = positions[np.argsort(losses[positions], kind="stable")]
    values, result, start = losses[order], [], 0
    while start < len(order):
        limit = values[start] + tolerance * (1 + 1e-9)  # 0.80 and 0.79 are 0.01 apart, in decimals
        end = int(np.searchsorted(values, limit, side="right"))
        result += _banded(np.sort(order[start:end]), rest)  # sorted: back in the order of ties
        start = end
    return result


def losses_of(table: pd.DataFrame, metric: str) -> Losses:
    """A metric, or ε, as something to minimise."""
    minimised = metric == schema.EPSILON or schema.mode_of(metric) == "min"
    return table[metric].to_numpy(float) * (1 if minimised else -1)


def called(metric: str) -> str:
    """A metric's name for people."""
    names = {"fid": "FID", "kid": "KID", schema.EPSILON: "ε"}
    name = metric.removeprefix(schema.TEST_PREFIX)
    return names.get(name, name) + (" on test" if metric.startswith(schema.TEST_PREFIX) else "")
