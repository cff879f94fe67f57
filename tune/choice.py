"""Which trials are best, and the last word on them: the test split's only use."""

from pathlib import Path

from dpsink.judging import judge
from dpsink.training import use_threads
from tune import schema
from tune.folder import StudyFolder, TrialRecord
from tune.study import Study

CHOSEN_BY = ("fid", "accuracy")  # what analysis selects by, besides the study's own objective


def select_best(folder: StudyFolder, metric: str) -> TrialRecord | None:
    """The completed searched trial that is best by a validation metric; ties go to the lower ε, then to the name.

    The same order as `dpsink-analysis best`, so that both name the same run.
    """
    sign = 1 if schema.mode_of(metric) == "min" else -1
    ranked = [
        ((sign * reports[-1].metrics[metric], reports[-1].epsilon, record.name), record)
        for record in folder.trials()
        if record.role == schema.ROLE_SEARCH
        and (end := folder.end_of(record.name)) is not None
        and end.state == "completed"
        and (reports := folder.reports(record.name))
        and metric in reports[-1].metrics
    ]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def chosen_trials(folder: StudyFolder, objective: str) -> list[TrialRecord]:
    """The completed baselines, and the runs that are best by something."""
    best = [select_best(folder, metric) for metric in (objective, *CHOSEN_BY)]
    return [
        record
        for record in folder.trials()
        if (record.role == schema.ROLE_BASELINE or record in best)
        and (end := folder.end_of(record.name)) is not None
        and end.state == "completed"
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
    folder.write_test(record.name, answer["metrics"])
