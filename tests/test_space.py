"""The search space: conditions between dimensions, and the grid."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune.space import Distribution, activations, active, check_conditions, grid, ordered

COST = {"choice": ["l2", "l1+l2"]}


def space(**dimensions: Any) -> dict[str, Distribution]:
    return {path: Distribution.model_validate(one) for path, one in dimensions.items()}


CHAIN = space(
    c={"uniform": [0, 1], "points": 2, "when": {"b": [True, "on"]}},
    b={"choice": ["on", "off", True], "when": {"a": 1}},
    a={"choice": [1, 2]},
)


def test_conditions_come_before_what_depends_on_them() -> None:
    assert ordered(CHAIN) == ["a", "b", "c"]


def test_dimensions_without_conditions_stay_as_listed() -> None:
    assert ordered(space(z=COST, a=COST, m=COST)) == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"a": 1, "b": "on", "c": 0.5}, {"a": 1, "b": "on", "c": 0.5}),
        ({"a": 1, "b": True, "c": 0.5}, {"a": 1, "b": True, "c": 0.5}),
        ({"a": 1, "b": "off", "c": 0.5}, {"a": 1, "b": "off"}),
        ({"a": 2, "b": "on", "c": 0.5}, {"a": 2}),
    ],
)
def test_a_dimension_whose_condition_is_not_met_is_not_searched_nor_what_depends_on_it(
    values: dict[str, Any], kept: dict[str, Any]
) -> None:
    assert active(CHAIN, values) == kept


def test_activations_are_all_ways_in_which_a_dimension_is_searched() -> None:
    assert activations(CHAIN, "c") == [{"a": 1, "b": "on"}, {"a": 1, "b": True}]
    assert activations(CHAIN, "a") == [{}]
    assert activations(CHAIN, "a", also=("b",)) == [{"b": "on"}, {"b": "off"}, {"b": True}, {}]
    assert activations(CHAIN | space(d=COST), "d", also=("a", "nowhere")) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("dimensions", "rule"),
    [
        ({"a": {**COST, "when": {"b": "l2"}}}, "'b' is not searched"),
        ({"a": {**COST, "when": {"b": 1}}, "b": {"uniform": [0, 1]}}, "'b' must be a choice"),
        ({"a": {**COST, "when": {"b": "l3"}}, "b": COST}, "b='l3' must be one of l2, "),
        ({"a": {**COST, "when": {"a": "l2"}}}, "go round in a circle"),
        ({"a": {**COST, "when": {"b": "l2"}}, "b": {**COST, "when": {"a": "l2"}}}, "a -> b -> a|b -> a -> b"),
    ],
)
def test_condition_that_cannot_be_met_is_refused(dimensions: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        check_conditions(space(**dimensions))


@pytest.mark.parametrize(
    ("dimension", "values"),
    [
        ({"uniform": [0, 1], "points": 3}, [0, 0.5, 1]),
        ({"log_uniform": [1e-3, 1e-1], "points": 3}, [1e-3, 1e-2, 1e-1]),
        ({"int": [2, 4]}, [2, 3, 4]),
        ({"int": [1, 9], "points": 3}, [1, 5, 9]),
        ({"int": [1, 3], "points": 9}, [1, 2, 3]),
        ({"choice": [3, 1, 2]}, [3, 1, 2]),
        ({"uniform": [0, 1]}, []),
    ],
)
def test_values_on_a_grid(dimension: dict[str, Any], values: list[Any]) -> None:
    assert list(Distribution.model_validate(dimension).grid) == pytest.approx(values)


@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e6), st.integers(2, 30), st.booleans())
def test_a_grid_stays_within_its_bounds_and_reaches_them(low: float, factor: float, points: int, log: bool) -> None:
    key = "log_uniform" if log else "uniform"
    dimension = Distribution.model_validate({key: [low, low * factor], "points": points})
    values = list(dimension.grid)
    assert (values[0], values[-1], len(values)) == (low, low * factor, points)
    assert all(low <= value <= low * factor for value in values)


def test_a_grid_is_the_product_and_its_last_dimension_runs_fastest() -> None:
    made = grid(space(a={"choice": [1, 2]}, b={"int": [5, 6]}))
    assert [tuple(point.values()) for point in made] == [(1, 5), (1, 6), (2, 5), (2, 6)]


def test_a_conditional_dimension_multiplies_only_where_it_is_searched() -> None:
    assert grid(CHAIN) == [
        {"a": 1, "b": "on", "c": 0},
        {"a": 1, "b": "on", "c": 1},
        {"a": 1, "b": "off"},
        {"a": 1, "b": True, "c": 0},
        {"a": 1, "b": True, "c": 1},
        {"a": 2},
    ]


def test_a_grid_without_end_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="more than 100,000 points with b"):
        grid(space(a={"choice": [1, 2]}, b={"int": [1, 10**12]}))


def test_an_empty_space_has_one_point() -> None:
    assert grid({}) == [{}]
