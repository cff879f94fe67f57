"""The search space: its dimensions, when each of them is searched, and its grid."""

import math
from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from dpsink.config import Strict, nearest

GRID_LIMIT = 100_000  # points of a grid


class Distribution(Strict):
    """One dimension: exactly one of `uniform`, `log_uniform`, `int`, `choice`."""

    uniform: tuple[float, float] | None = Field(default=None, description="[low, high]")
    log_uniform: tuple[float, float] | None = Field(default=None, description="[low, high], 0 < low")
    integer: tuple[int, int] | None = Field(default=None, alias="int", description="[low, high], both included")
    choice: tuple[Any, ...] | None = Field(default=None, description="a list of values")
    points: int | None = Field(
        default=None, ge=2, le=10_000, description="grid only: so many values, evenly spaced; log-spaced if log_uniform"
    )
    when: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict,
        description="path of a choice to the value, or values, with which this is searched; else the trial's own holds",
    )

    @field_validator("when", mode="before")
    @classmethod
    def _one_value_is_a_list(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {path: given if isinstance(given, list | tuple) else [given] for path, given in value.items()}

    @model_validator(mode="after")
    def _exactly_one(self) -> "Distribution":
        given = [value for value in (self.uniform, self.log_uniform, self.integer, self.choice) if value is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of uniform, log_uniform, int, choice")
        if self.choice is not None:
            self._check_choice(self.choice)
            return self
        low, high = self.bounds
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"[{low}, {high}] must be [low, high] with low < high, both finite")
        if self.log_uniform is not None and low <= 0:
            raise ValueError(f"log_uniform [{low}, {high}] must start above 0")
        return self

    def _check_choice(self, choice: tuple[Any, ...]) -> None:
        if not choice:
            raise ValueError("choice must list at least one value")
        if any(isinstance(value, list | dict) for value in choice):
            raise ValueError("choice must list plain values, not lists or groups")
        if self.points is not None:
            raise ValueError(f"points={self.points} is for numbers; a choice has the values that it lists")

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value not in (None, {})}

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) of a numeric dimension."""
        bounds = self.uniform or self.log_uniform or self.integer
        assert bounds is not None
        return bounds

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values at the edge of the dimension, for the preflight: all choices, or both bounds."""
        return self.choice if self.choice is not None else self.bounds

    @property
    def grid(self) -> Sequence[Any]:
        """Its values on a grid, in order; none of a number without `points`, unless it is an int."""
        if self.choice is not None:
            return self.choice
        low, high = self.bounds
        if self.points is None:
            return range(int(low), int(high) + 1) if self.integer is not None else ()
        parts = [index / (self.points - 1) for index in range(self.points)]
        if self.integer is not None:
            return tuple(dict.fromkeys(round(low + part * (high - low)) for part in parts))
        return (low, *(self._between(part) for part in parts[1:-1]), high)

    def at(self, quantile: float) -> Any:
        """The value below which that part in [0, 1) of the proposals lies."""
        if self.choice is not None:
            return self.choice[int(quantile * len(self.choice))]
        if self.integer is not None:
            low, high = self.integer
            return int(low + quantile * (high - low + 1))
        return self._between(quantile)

    def _between(self, part: float) -> float:
        low, high = self.bounds
        return low * (high / low) ** part if self.log_uniform is not None else low + part * (high - low)


Space = Mapping[str, Distribution]


def check_conditions(space: Space) -> None:
    """Raises ValueError unless each condition is on a value of a choice, and none on itself in the end."""
    for path, dimension in space.items():
        for on, values in dimension.when.items():
            if on not in space:
                raise ValueError(f"{path}.when: '{on}' is not searched{nearest(on, set(space) - {path})}")
            choice = space[on].choice
            if choice is None:
                raise ValueError(f"{path}.when: '{on}' must be a choice; a condition names some of its values")
            if unknown := [value for value in values if value not in choice]:
                raise ValueError(f"{path}.when: {on}={unknown[0]!r} must be one of {', '.join(map(str, choice))}")
    try:
        ordered(space)
    except CycleError as error:
        raise ValueError(f"{' -> '.join(error.args[1])}: conditions go round in a circle; leave one out") from None


def ordered(space: Space) -> list[str]:
    """Its paths, conditions before what depends on them, else as they are listed."""
    return list(TopologicalSorter({path: space[path].when.keys() for path in space}).static_order())


def holds(space: Space, path: str, values: Mapping[str, Any]) -> bool:
    """Whether a dimension is searched, given the values of those before it that are."""
    return all(on in values and values[on] in wanted for on, wanted in space[path].when.items())


def active(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values whose dimensions are searched; one whose condition is not searched is not either."""
    kept: dict[str, Any] = {}
    for path in ordered(space):
        if path in values and holds(space, path, kept):
            kept[path] = values[path]
    return kept


def activations(space: Space, path: str, *, also: Iterable[str] = ()) -> list[dict[str, Any]]:
    """All values of a dimension's conditions, and of theirs, with which it is searched.

    Args:
        also: further choices to tell the values of, where they are searched.
    """
    wanted = {name for start in (path, *also) if start in space for name in (start, *conditions(space, start))}
    choices = {name: space[name] for name in space if name in wanted and space[name].choice is not None}
    found = [values for values in grid(choices) if holds(space, path, values)]
    others = [{name: value for name, value in values.items() if name != path} for values in found]
    return [values for index, values in enumerate(others) if values not in others[:index]]


def conditions(space: Space, path: str) -> set[str]:
    """The dimensions that decide whether one is searched."""
    return set(space[path].when).union(*(conditions(space, on) for on in space[path].when))


def grid(space: Space) -> list[dict[str, Any]]:
    """Every combination of the dimensions' values, one multiplied in only where it is searched; the last runs fastest.

    Raises:
        ValueError: more than `GRID_LIMIT`.
    """
    points: list[dict[str, Any]] = [{}]
    for path in ordered(space):
        values = space[path].grid
        splits = [holds(space, path, point) for point in points]
        if sum(len(values) if split else 1 for split in splits) > GRID_LIMIT:
            raise ValueError(f"the grid has more than {GRID_LIMIT:,} points with {path}; give fewer values")
        points = [
            {**point, **one}
            for point, split in zip(points, splits, strict=True)
            for one in ([{path: value} for value in values] if split else [{}])
        ]
    return points
