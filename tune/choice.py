"""Which configurations are best, and the last word on their trials: the test split's only use.

A configuration is what its trials have in common: they differ in their seed alone, and it counts by their mean.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpsink.judging import judge
from dpsink.training import use_threads
from tune import schema
from tune.folder import StudyFolder, TrialRecord
from tune.study import Study

CHOSEN_BY = ("fid", "accuracy")  # what analysis selects by, besides the study's own objectives


@dataclass(frozen=True)
class Configuration:
    """A searched configuration whose every seed has completed.

    Attributes:
        trials: one for each seed, in the order of their names.
        metrics: means over the trials of what each told last, on validation.
        epsilon: mean of the trials' own.
        best: the trial that is best by the metric compared.
    """

    trials: tuple[TrialRecord, ...]
    metrics: dict[str, float]
    epsilon: float
    best: TrialRecord

    @property
    def name(self) -> str:
        return self.trials[0].label


def configurations(folder: StudyFolder, metric: str) -> list[Configuration]:
    """The searched configurations that may be compared by a metric, best first; ties go to the lower ε, then by name.

    The mean of the seeds that went well would flatter one of which another failed or diverged: it is left out.
    The same order as `dpsink-analysis best`, so that both name the same run.
    """
    seeds = folder.read_study().seeds if folder.exists else 1
    searched = [record for record in folder.trials() if record.role == schema.ROLE_SEARCH]
    found = [_compared(folder, records, seeds, metric) for records in by_configuration(searched)]
    ranked = [one for one in found if one is not None]
    return sorted(ranked, key=lambda one: (_loss(one.metrics[metric], metric), one.epsilon, one.trials[0].name))


def by_configuration(records: Iterable[TrialRecord]) -> list[tuple[TrialRecord, ...]]:
    """Trials together with those of the same configuration and role, in the order of the first."""
    groups: dict[tuple[str, str], list[TrialRecord]] = {}
    for record in records:
        groups.setdefault((record.role, record.config_id), []).append(record)
    return [tuple(group) for group in groups.values()]


def select_best(folder: StudyFolder, metric: str) -> TrialRecord | None:
    """The best trial of the best searched configuration by a validation metric."""
    ranked = configurations(folder, metric)
    return ranked[0].best if ranked else None


def pareto_front(candidates: Sequence[Configuration], objectives: Sequence[str]) -> list[Configuration]:
    """Those that no other beats in one objective without losing in another, in the given order."""
    losses = [tuple(_loss(one.metrics.get(name, math.nan), name) for name in objectives) for one in candidates]
    return [
        one
        for one, mine in zip(candidates, losses, strict=True)
        if not any(math.isnan(loss) for loss in mine) and not any(_dominates(other, mine) for other in losses)
    ]


def chosen_trials(folder: StudyFolder, objectives: Sequence[str]) -> list[TrialRecord]:
    """The completed baselines, and the completed trials of what is best by something or on the Pareto front."""
    best = [ranked[0] for metric in (*objectives, *CHOSEN_BY) if (ranked := configurations(folder, metric))]
    front = pareto_front(configurations(folder, objectives[0]), objectives) if len(objectives) > 1 else []
    names = {trial.name for one in (*best, *front) for trial in one.trials}
    return [
        record
        for record in folder.trials()
        if (record.role == schema.ROLE_BASELINE or record.name in names) and _state(folder, record) == "completed"
    ]


def judge_once(study: Study, folder: StudyFolder, record: TrialRecord, data_root: Path) -> None:
    """Writes a chosen trial's metrics on the test split, unless they are there."""
    if folder.test_metrics(record.name):
        return
    use_threads(1)  # a second one waits more than it works on images this small
    answer = judge(
        folder.run(record.name), samples=study.test_samples, data_root=data_root,
        extractor=record.config.evaluation.extractor,
    )  # fmt: skip
    folder.write_floor(answer["floor"])
    folder.write_test(record.name, answer["metrics"])


def means(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every metric that all of them have."""
    shared = [name for name in metrics[0] if all(name in one for one in metrics)] if metrics else []
    return {name: math.fsum(one[name] for one in metrics) / len(metrics) for name in shared}


def _compared(folder: StudyFolder, records: Sequence[TrialRecord], seeds: int, metric: str) -> Configuration | None:
    completed = [record for record in records if _state(folder, record) == "completed"]
    lasts = [(record, reports[-1]) for record in completed if (reports := folder.reports(record.name))]
    metrics = means([last.metrics for _, last in lasts])
    if len(lasts) < max(seeds, len(records)) or math.isnan(metrics.get(metric, math.nan)):
        return None
    epsilon = math.fsum(last.epsilon for _, last in lasts) / len(lasts)
    best = min((_loss(last.metrics[metric], metric), last.epsilon, record.name, record) for record, last in lasts)[3]
    return Configuration(tuple(record for record, _ in lasts), metrics, epsilon, best)


def _state(folder: StudyFolder, record: TrialRecord) -> str | None:
    end = folder.end_of(record.name)
    return end.state if end else None


def _loss(value: float, metric: str) -> float:
    """The value turned so that less is better."""
    return value if schema.mode_of(metric) == "min" else -value


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)
