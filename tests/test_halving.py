"""A study with its real scheduler, successive halving, whose processes are all killed on the way."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from dpsink.privacy.budget import charged_steps
from tests.test_sweep import (
    PATIENCE,
    Command,
    folder_of,
    runs_of,
    states,
    statuses,
    step_of,
    wait_for,
    write_study,
)
from tune import schema
from tune.folder import StudyFolder
from tune.memory import open_optuna
from tune.study import load_study

pytestmark = pytest.mark.slow
STEPS, POINTS, TRIALS = 240, 4, 6


@dataclass
class Halved:
    """A study that ended, and how it stood when it was killed."""

    path: Path
    folder: StudyFolder
    killed: dict[str, str | None]  # states
    code: int | None

    def told(self) -> dict[str, FrozenTrial]:
        """What Optuna knows, by trial; of what was proposed when the driver died, before it was a trial, nothing."""
        names = {record.number: record.name for record in self.folder.trials()}
        known = {one.number: one for one in open_optuna(load_study(self.path), self.folder).trials}
        assert all(known[number].state == TrialState.FAIL for number in known.keys() - names.keys())
        return {name: known[number] for number, name in names.items() if number is not None}


def rungs_of(trial: FrozenTrial) -> dict[str, float]:
    """What a trial scored on each rung, as its scheduler keeps it."""
    return {key: value for key, value in trial.system_attrs.items() if key.startswith("completed_rung_")}


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Halved:
    """Killed as soon as one trial was stopped, and let finish by the same command."""
    scheduler = {"kind": "asha", "grace": 0.25, "reduction": 2}
    path = write_study(
        tmp_path_factory.mktemp("halved"), "halved", steps=STEPS, points=POINTS, trials=TRIALS, scheduler=scheduler
    )
    folder = folder_of(path)
    with Command(path) as command:
        wait_for(lambda: "stopped_early" in states(folder).values() or command.process.poll(), "a trial to be stopped")
        command.look()
        command.kill_all()
        killed = states(folder)
    with Command(path) as command:
        command.process.wait(PATIENCE)
        return Halved(path, folder, killed, command.process.returncode)


def test_every_trial_ends_once_completed_or_stopped(halved: Halved) -> None:
    ended = states(halved.folder)
    assert halved.code == 0
    assert len(ended) == TRIALS + 1
    assert set(ended.values()) == {"completed", "stopped_early"}
    assert None in halved.killed.values()
    assert all(ended[name] == state for name, state in halved.killed.items() if state)


def test_a_stopped_trial_is_no_result_to_optuna_and_a_completed_one_is(halved: Halved) -> None:
    ended = states(halved.folder)
    for name, trial in halved.told().items():
        if ended[name] == "stopped_early":
            assert trial.state == TrialState.PRUNED
        else:
            metrics = halved.folder.reports(name)[-1].metrics
            assert (trial.state, trial.value) == (TrialState.COMPLETE, metrics["accuracy_logreg"])


def test_no_trial_is_stopped_that_was_the_best_on_its_rung(halved: Halved) -> None:
    """By rung and not by spent budget, of which a trial that was killed has lost some between two reports."""
    rungs = {name: rungs_of(trial) for name, trial in halved.told().items()}
    for name in (name for name, state in states(halved.folder).items() if state == "stopped_early"):
        last = max(rungs[name])
        assert max(scores[last] for scores in rungs.values() if last in scores) > rungs[name][last]


def test_a_stopped_trial_is_charged_what_it_ran_and_took_no_step_after_its_last_report(halved: Halved) -> None:
    for name, state in states(halved.folder).items():
        charged = charged_steps(halved.folder.run(name) / "ledger")
        last = halved.folder.reports(name)[-1]
        assert charged == last.charged
        assert state == "completed" or last.step in [STEPS // 4, STEPS // 2]


def test_the_whole_study_is_charged_less_than_it_had_promised(halved: Halved) -> None:
    statement = halved.folder.statement()
    assert statement["spent"] < statement["study_epsilon"]


def test_mlflow_has_each_trial_once_with_each_report_once(halved: Halved) -> None:
    assert set(statuses(halved.folder).values()) == {"FINISHED"}
    steps = {
        run.data.tags[schema.TRIAL_ID_TAG]: run.data.metrics[schema.BUDGET_FRACTION] for run in runs_of(halved.folder)
    }
    assert all(steps[name] == halved.folder.reports(name)[-1].budget_fraction for name in states(halved.folder))
    assert all(step_of(halved.folder, name) for name in steps)
