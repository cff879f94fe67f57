"""Runs a study: preflight, privacy accounts, a session of trials. Resumes by itself."""

import logging
import time
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dpsink.config import read_yaml
from dpsink.errors import InputError
from dpsink.privacy.accounts import StudyAccounts
from dpsink.privacy.storage import DamagedLedger
from tune.check import Preflight
from tune.choice import select_best
from tune.folder import Earlier, StudyFolder, StudyRecord, TrialRecord
from tune.lock import only_one
from tune.preflight import StudyPlan
from tune.repeat import earlier_study
from tune.session import Session
from tune.study import Study
from tune.tracking import MLflowTracker, tracking_uri

log = logging.getLogger("dpsink")


@dataclass(frozen=True)
class Outcome:
    """How a study stands after a session."""

    folder: StudyFolder
    record: StudyRecord
    finished: bool
    interrupted: bool  # by a person or the system
    problem: str  # why an unfinished study is not finished
    best: TrialRecord | None
    statement: dict[str, Any]
    ended_early: str | None  # why no further trial started, where there were more to come
    seconds: float


def run_study(study: Study, *, data_root: Path | None = None, retry_failed: bool = False) -> Outcome:
    """Runs a study to its end, or from where it was left.

    Raises:
        InputError: anything the preflight finds, a study folder of other settings, a second sweep at once.
    """
    started = time.monotonic()
    folder = StudyFolder(study.storage.absolute() / study.name)
    if study.sealed and retry_failed:
        raise InputError("--retry-failed goes against release_best: there a failed trial counts as the worst; drop it")
    preflight = Preflight(study, data_root)
    if study.sealed:
        log.info("working out what the selection may cost: up to half a minute")
    for check in preflight.quick():
        check.run()
    plan = preflight.plan
    # Until here nothing is written: a study that is refused leaves nothing behind.
    with only_one(folder):
        record = _open_study(study, folder, plan)
        if retry_failed:
            _forget_failures(folder)
        if folder.selected:
            return _after_selection(study, folder, record, started)
        with open_accounts(study, folder, plan) as accounts:
            session = _make_session(study, folder, plan, accounts, preflight.data_root)
            try:
                session.run()
            finally:
                statement = session.close()
    return Outcome(
        folder=folder,
        record=record,
        finished=session.finished,
        interrupted=session.interrupted,
        problem=session.problem,
        best=select_best(folder, study.objective),
        statement=statement,
        ended_early=session.searcher.refused,
        seconds=time.monotonic() - started,
    )


def open_accounts(study: Study, folder: StudyFolder, plan: StudyPlan) -> StudyAccounts:
    """The study's privacy accounts, created with their promise before the first trial."""
    witness = (folder.sealed if study.sealed else folder).witness()
    try:
        return StudyAccounts.open(folder.ledger, plan.terms, witness=witness)
    except DamagedLedger:
        if study.sealed:
            raise InputError(
                f"ledger {folder.ledger}: is damaged; the details would tell of its trials; restore it from a "
                "backup, or start anew under a new name"
            ) from None
        raise


def _make_session(
    study: Study, folder: StudyFolder, plan: StudyPlan, accounts: StudyAccounts, data_root: Path
) -> Session:
    if not study.sealed:
        return Session(study, folder, plan, accounts, data_root)
    from tune.sealing import SealedSession

    return SealedSession(study, folder, plan, accounts, data_root)


def _after_selection(study: Study, folder: StudyFolder, record: StudyRecord, started: float) -> Outcome:
    """A selection that has ended: nothing is run, what a kill has left of it is destroyed, and MLflow catches up."""
    from tune.sealing import destroy_sealed

    destroy_sealed(folder)
    tracker = MLflowTracker(record.tracking_uri, folder)
    tracker.close(study="completed")
    return Outcome(
        folder=folder,
        record=record,
        finished=True,
        interrupted=False,
        problem="",
        best=select_best(folder, study.objective),
        statement=folder.statement(),
        ended_early=None,
        seconds=time.monotonic() - started,
    )


def _open_study(study: Study, folder: StudyFolder, plan: StudyPlan) -> StudyRecord:
    if folder.exists:
        return _check_same_study(study, folder, plan)
    record = StudyRecord(
        study_id=uuid.uuid4().hex,
        name=study.name,
        experiment=study.tracking.experiment,
        tracking_uri=tracking_uri(study),
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        version=version("dpsink"),
        target_epsilon=plan.target_epsilon,
        delta=plan.delta,
        data_name=plan.data.name,
        data_fingerprint=plan.data.fingerprint,
        extractor=plan.extractor,
        objectives=study.objectives,
        searched=study.searched,
        seeds=study.seeds,
        trials=None if study.sealed else study.trials,
        repeats=_earlier(study, plan),
    )
    folder.write_study(record, study.to_yaml())
    return record


def _earlier(study: Study, plan: StudyPlan) -> Earlier | None:
    """What is repeated; where the records were others, the two claims would not add up."""
    if study.repeats is None:
        return None
    if StudyFolder(study.repeats).read_study().data_fingerprint != plan.data.fingerprint:
        raise InputError(f"study {study.name}: the data are not those of {study.repeats}, which it repeats")
    return earlier_study(study.repeats, study.name)


def _check_same_study(study: Study, folder: StudyFolder, plan: StudyPlan) -> StudyRecord:
    record = folder.read_study()
    if record.data_fingerprint != plan.data.fingerprint:
        raise InputError(f"study {study.name}: the data are not those it was started on; give it another name")
    if _lasting(read_yaml(folder.path / "study.yaml")) != _lasting(yaml.safe_load(study.to_yaml())):
        raise InputError(
            f"study {study.name}: its settings differ from {folder.path / 'study.yaml'}, with which it was "
            "started; give it another name, or the old settings"
        )
    return record


def _lasting(tree: dict[str, Any]) -> dict[str, Any]:
    """A study file without what may change between two sessions: a study that needs too much can be given less."""
    return {key: value for key, value in tree.items() if key != "resources"}


def _forget_failures(folder: StudyFolder) -> None:
    for record in folder.trials():
        end = folder.end_of(record.name)
        if end is not None and end.state == "failed":
            folder.forget_end(record.name)
