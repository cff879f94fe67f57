"""What a person may ask of runs: `accuracy_cnn>0.8`. A column, a comparison, a value; nothing is evaluated."""

import operator
import re
from collections.abc import Sequence

import pandas as pd

from analysis.rules import check_selects
from dpsink.config import nearest
from dpsink.errors import InputError
from tune import schema

OPERATORS = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "==": operator.eq, "=": operator.eq,
    ">": operator.gt, "<": operator.lt,
}  # fmt: skip
CONDITION = re.compile(r"\s*([\w.]+)\s*(>=|<=|!=|==|=|>|<)\s*(\S.*?)\s*")


def meeting(table: pd.DataFrame, where: Sequence[str] = (), epsilon: float | None = None) -> pd.DataFrame:
    """The rows that meet all conditions; a row without the value meets none about it.

    Args:
        where: each `COLUMN OP VALUE`, OP one of > >= < <= = !=; text has only = and !=.
        epsilon: the largest ε allowed.

    Raises:
        InputError: a condition that cannot be read, an unknown column or one of the test split, or none is left.
    """
    asked = [*where, *([f"{schema.EPSILON}<={epsilon!r}"] if epsilon is not None else [])]
    for condition in asked:
        left = pd.DataFrame(table[_holds(table, condition)])
        if left.empty:
            raise InputError(f"'{condition}' leaves none of {len(table)} configurations{_span(table, condition)}")
        table = left
    return table.reset_index(drop=True)


def _holds(table: pd.DataFrame, condition: str) -> pd.Series:
    column, sign, text = _parsed(condition)
    check_selects(column)
    if column not in table.columns:
        raise InputError(f"--where '{condition}': no column '{column}'{nearest(column, map(str, table.columns))}")
    values = table[column]
    if not pd.api.types.is_numeric_dtype(values):
        if sign not in ("=", "==", "!="):
            raise InputError(f"--where '{condition}': {column} is text; compare it with = or !=")
        return OPERATORS[sign](values, text) & values.notna()
    try:
        return OPERATORS[sign](values, float(text)) & values.notna()
    except ValueError:
        raise InputError(f"--where '{condition}': {column} is a number and '{text}' is none") from None


def _parsed(condition: str) -> tuple[str, str, str]:
    found = CONDITION.fullmatch(condition)
    if not found:
        signs = " ".join(OPERATORS)
        raise InputError(f"--where '{condition}': must be COLUMN OP VALUE, as in 'accuracy_cnn>0.8'; OP: {signs}")
    column, sign, text = found.groups()
    return column, sign, text


def _span(table: pd.DataFrame, condition: str) -> str:
    """What there is instead, of a number."""
    column = _parsed(condition)[0]
    values = table[column].dropna()
    if values.empty or not pd.api.types.is_numeric_dtype(values):
        return ""
    return f": {column} lies in [{values.min():.4g}, {values.max():.4g}]"
