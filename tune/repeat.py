"""The best configurations of a study once more, with fresh noise and several seeds: a study of its own.

What won a search has been lucky too. Trained again, its mean tells what the settings are worth. That costs privacy: the
new study keeps its own ledger, and its statement contains the first one's ε and δ.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpsink.config import read_yaml, validate
from dpsink.errors import InputError
from dpsink.privacy.ledger import PrivacyStatement
from tune import schema
from tune.choice import Configuration, configurations
from tune.folder import Earlier, StudyFolder
from tune.lock import holder
from tune.status import find_folder
from tune.study import KIND, Study, checked, load_study

KEPT = ("trial", "objectives", "test_samples", "resources", "tracking")  # of the study file


def repetition(study: str, *, top: int, seeds: int, by: str | None = None, name: str | None = None) -> Study:
    """The study that trains the best configurations of another again; the same one when it is asked for once more.

    Args:
        study: the first one's file, folder or name; it has to be finished.
        top: how many configurations, 1 at least.
        seeds: trials of each, and of the control.
        by: a metric on validation; the first objective by default.
        name: of the new study; NAME-repeat by default.

    Raises:
        InputError: the study is not finished or has too few configurations, or another repetition has the name.
    """
    first = find_folder(study)
    title = name or f"{first.path.name}-repeat"
    if (there := StudyFolder(first.path.parent / title)).exists:
        return _begun(there, first, top, seeds, by)
    _check_finished(first)
    best = _best(first, by, top)
    source = f"the repetition of {study}"
    return checked(validate(Study, _tree(first, best, title, seeds), source=source), source)


def earlier_study(place: Path, name: str) -> Earlier:
    """What was claimed before a repetition: by the study that it repeats, and by other repetitions of that one.

    Args:
        place: folder of the study that is repeated; its repetitions lie beside it.
        name: of the repetition itself.

    Raises:
        InputError: the folder is gone, or it has claimed nothing yet.
    """
    first = StudyFolder(place)
    record = first.read_study()
    if not first.statement():
        raise InputError(f"repeats={place}: has no privacy statement; give the folder of a finished study")
    before = [one for one in _repetitions(first, record.study_id) if one.path.name != name]
    claims = [_claim(first), *map(_own_claim, before)]
    epsilons = [epsilon for epsilon, _, _ in claims if epsilon is not None]
    return Earlier(
        study_id=record.study_id,
        name=f"{record.name} with its repetition {', '.join(one.path.name for one in before)}"
        if before
        else record.name,
        epsilon=math.fsum(epsilons) if len(epsilons) == len(claims) else None,
        delta=math.fsum(delta for _, delta, _ in claims),
        spent=math.fsum(spent for _, _, spent in claims),
    )


Claim = tuple[float | None, float, float]  # ε, None for no claim; δ; what was spent


def _repetitions(first: StudyFolder, study_id: str) -> list[StudyFolder]:
    """The repetitions of a study that have been begun."""
    folders = [StudyFolder(path.parent) for path in sorted(first.path.parent.glob("*/study.json"))]
    earlier = [(one, one.read_study().repeats) for one in folders]
    return [one for one, repeats in earlier if repeats is not None and repeats.study_id == study_id]


def _claim(folder: StudyFolder) -> Claim:
    """What a study's statement says; one that was killed before its first cannot be counted."""
    if not (told := folder.statement()):
        raise InputError(f"study {folder.path.name}: has no privacy statement yet; run its command again first")
    statement = PrivacyStatement.from_dict(told)
    return statement.study_epsilon, statement.study_delta, statement.spent


def _own_claim(repetition: StudyFolder) -> Claim:
    """A repetition's part of its statement, which is of it and of what was before; rounded up."""
    earlier, outcome = repetition.read_study().repeats, repetition.outcome()
    assert earlier is not None
    epsilon, delta, spent = _claim(repetition)
    own = _difference(epsilon, earlier.epsilon)
    ended = own is None or (outcome is not None and outcome.finished)
    return own, _difference(delta, earlier.delta) or 0.0, (_difference(spent, earlier.spent) if ended else own) or 0.0


def _difference(together: float | None, before: float | None) -> float | None:
    if together is None or before is None or math.isinf(together):
        return together if before is not None else None
    return math.nextafter(together - before, math.inf)


def _check_finished(first: StudyFolder) -> None:
    outcome = first.outcome()
    if holder(first) or not (first.selected or (outcome is not None and outcome.finished)):
        raise InputError(f"study {first.path.name} is not finished; let `dpsink-tune sweep` end it first")


def _best(first: StudyFolder, by: str | None, top: int) -> Sequence[Configuration]:
    metric = by or first.read_study().objectives[0]
    if metric not in schema.QUALITY:
        raise InputError(f"--by={metric} must be one of {', '.join(schema.QUALITY)}")
    ranked = configurations(first, metric)
    if len(ranked) < top:
        raise InputError(f"--top={top} must be at most {len(ranked)}, the configurations of {first.path.name} to rank")
    return ranked[:top]


def _tree(first: StudyFolder, best: Sequence[Configuration], name: str, seeds: int) -> dict[str, Any]:
    """The new study's file: what the first one's trials shared, its control, and the listed configurations."""
    given = read_yaml(first.path / "study.yaml")
    kept = {key: given[key] for key in KEPT if key in given}
    fresh = int(kept["trial"].get("seed", 0)) + first.read_study().seeds  # other first weights than the first study's
    return kept | {
        "name": name,
        "trial": kept["trial"] | {"seed": fresh},
        "baselines": {key: one for key, one in (given.get("baselines") or {}).items() if _is_control(one)},
        "algorithm": {
            "kind": "listed",
            "configurations": [one.best.params for one in best],
            "seeds_per_configuration": seeds,
        },
        "repeats": str(first.path),
        "storage": str(first.path.parent),
    }


def _is_control(baseline: dict[str, Any]) -> bool:
    return baseline.get(KIND, (baseline.get("generator") or {}).get("kind")) == "class_mean"


def _begun(there: StudyFolder, first: StudyFolder, top: int, seeds: int, by: str | None) -> Study:
    """A repetition that was begun, to go on with."""
    study, repeats = load_study(there.path / "study.yaml"), there.read_study().repeats
    same = repeats is not None and repeats.study_id == first.read_study().study_id  # a folder's name is given again
    if study.repeats != first.path or not same or (study.configurations, study.seeds) != (top, seeds):
        raise InputError(
            f"study {study.name}: exists, of {study.configurations} configurations with {study.seeds} seeds of "
            f"{study.repeats}; ask for the same to go on with it, or give another --name"
        )
    if by and study.points != [one.best.params for one in _best(first, by, top)]:
        raise InputError(
            f"study {study.name}: exists, of configurations that are not the best by {by}; leave --by out to go on "
            "with it, or give another --name"
        )
    return study
