"""The largest trials that a study may run: those by which its need of memory is measured."""

from collections.abc import Iterator
from typing import Any

from dpsink.config import TrialConfig
from dpsink.engine import structure
from tune.space import active, conditions, grid
from tune.study import KIND, Study

KINDS = (KIND, "privacy.mechanism", "sinkhorn.cost", "sinkhorn.backend")  # no numbers, and no memory is like another


def largest(study: Study) -> list[TrialConfig]:
    """A trial of each kind, large in every direction of the space or the list, and the baselines; of two alike one."""
    searched = [study.configure(values) for values in (_of_list(study) if study.space == {} else _of_space(study))]
    baselines = [study.baseline(name) for name in study.baselines]
    alike = {(structure(one), one.privacy.batch_size): one for one in (*baselines, *searched)}
    return list(alike.values())


def _of_space(study: Study) -> Iterator[dict[str, Any]]:
    space = study.space
    deciding = {path for path in KINDS if path in space}.union(*(conditions(space, path) for path in space))
    most = {path: max(dimension.extremes, key=_size) for path, dimension in space.items()}
    for kind in grid({path: space[path] for path in space if path in deciding}):
        yield active(space, most | kind)


def _of_list(study: Study) -> list[dict[str, Any]]:
    """Of each kind the largest values; nothing searched is one trial like the base."""
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in study.points or [{}]:
        most = kinds.setdefault(tuple(one.get(path) for path in KINDS), {})
        most.update({path: value for path, value in one.items() if _size(value) >= _size(most.get(path))})
    return list(kinds.values())


def _size(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
