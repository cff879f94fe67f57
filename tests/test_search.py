"""The searcher: what it proposes, records, admits and tells, also when its driver dies. No Ray process runs here."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState as Told
from ray.tune.search import Searcher

from dpsink.checkpoint import save_checkpoint
from dpsink.config import TrialConfig
from dpsink.data import ImageData
from dpsink.engine import TrialState
from dpsink.errors import InputError
from dpsink.generators import build_generator
from dpsink.privacy.budget import TrialBudget
from dpsink.privacy.ledger import Selection, planned_epsilon
from dpsink.privacy.plan import derive_plan
from dpsink.records import CheckpointState, Report
from dpsink.synthesis import sample_grid
from dpsink.training import train
from tune import search
from tune.folder import StudyFolder
from tune.preflight import check_study
from tune.search import StudySearcher, config_id, open_optuna
from tune.study import Study
from tune.sweep import open_accounts

STEPS = 20  # T of every trial
OBJECTIVE = "accuracy_logreg"


def make_study(tmp_path: Path, *, trials: int = 3, **changes: Any) -> Study:
    """Tiny trials on digits."""
    tree = {
        "name": "small",
        "trial": {
            "generator": {"latent_dim": 2, "hidden_dim": 2, "embed_dim": 2},
            "sinkhorn": {"cost": "l2", "gen_batch_size": 10},
            "privacy": {"noise_multiplier": 3, "delta": 5e-5, "batch_size": 100, "step_limit": STEPS},
            "evaluation": {"samples": 40, "classifiers": ["logreg"]},
        },
        "space": {"optimizer.lr": {"log_uniform": (1e-3, 1e-2)}},
        "algorithm": {"kind": "random", "trials": trials},
        "objective": OBJECTIVE,
        "storage": tmp_path,
    }
    return Study.model_validate({**tree, **changes})


class Driver:
    """A study's driver without Ray: a folder, its ledger and a searcher, which can be closed and opened again."""

    def __init__(self, study: Study) -> None:
        self.study, self.folder = study, StudyFolder(study.storage / study.name)
        self.plan = check_study(study, None)
        self.open()

    def open(self) -> None:
        """A new session on the same folder."""
        self.ledger = open_accounts(self.study, self.folder, self.plan)
        self.changed: list[str] = []
        self.searcher = StudySearcher(
            self.study, self.folder, self.ledger, len(self.plan.data.train), {"threads": 1}, self.changed.append
        )

    def close(self) -> None:
        """Ends the session, as a crash would: nothing is left in memory."""
        self.ledger.close()

    def restart(self) -> None:
        self.close()
        self.open()

    def suggest(self, ray_id: str = "") -> str | None:
        """Name of the next trial; None when there is none."""
        answer = self.searcher.suggest(ray_id or f"ray-{len(self.searcher.names)}")
        return answer["trial"] if isinstance(answer, dict) else None

    def suggest_all(self) -> list[str]:
        return list(iter(self.suggest, None))

    def end(self, name: str, *, error: bool = False) -> None:
        """Ray's word that a trial has ended."""
        ray_id = next(ray for ray, trial in self.searcher.names.items() if trial == name)
        self.searcher.on_trial_complete(ray_id, error=error)
        if error:  # as the session does, when it hears the reason
            self.searcher.finish(name, failed=True, error="a reason")

    def run(self, name: str, value: float = 0.5, *, charged: int = STEPS, status: str = "completed") -> None:
        """Leaves the run folder as a worker would."""
        write_run(self.folder.run(name), self.folder.read_trial(name).config, value, charged, status)

    def state_of(self, name: str) -> str | None:
        end = self.folder.end_of(name)
        return end.state if end else None

    def told(self) -> dict[int, tuple[Told, float | None]]:
        """What Optuna knows of its trials."""
        trials = open_optuna(self.study, self.folder).get_trials(deepcopy=False)
        return {trial.number: (trial.state, trial.value if trial.state == Told.COMPLETE else None) for trial in trials}

    def params(self) -> list[tuple[Any, ...]]:
        return [tuple(record.params.values()) for record in self.folder.trials() if record.role == "search"]


def write_run(run: Path, config: TrialConfig, value: float, charged: int, status: str) -> None:
    """A run folder: so many steps charged, and one checkpoint."""
    plan = derive_plan(config, 1437)
    with TrialBudget.open(run / "ledger", plan.terms("hmac")) as budget:
        budget.reserve(charged - budget.charged)
    report = Report(
        step=charged, charged=charged, epsilon=1.0, budget_fraction=charged / plan.steps, steps_per_second=1.0,
        status=status, metrics={OBJECTIVE: value},
    )  # fmt: skip
    description = CheckpointState(
        config=config, plan=asdict(plan), image_shape=(1, 8, 8), num_classes=10, step=charged,
        data_fingerprint="hmac", reports=(report,),
    )  # fmt: skip
    generator = build_generator(config, (1, 8, 8), 10)
    state = TrialState(generator, torch.zeros(2, 0), torch.Generator().manual_seed(0), charged)
    save_checkpoint(run, description, state, sample_grid(generator, num_classes=10))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Makes drivers, and closes them."""
    drivers: list[Driver] = []

    def make(**changes: Any) -> Driver:
        drivers.append(Driver(make_study(tmp_path, **changes)))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()


@pytest.fixture
def driver(start: Callable[..., Driver]) -> Driver:
    return start()


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What the searcher logs, whatever other tests did to the loggers."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("dpsink")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_baselines_come_first(start: Callable[..., Driver]) -> None:
    driver = start(trials=2, baselines={"large": {"privacy": {"batch_size": 200}}, "base": {}})
    assert driver.suggest_all() == ["baseline-large", "baseline-base", "trial-0001", "trial-0002"]


def test_a_suggestion_names_the_folder_the_trial_and_what_the_worker_needs(driver: Driver) -> None:
    answer = driver.searcher.suggest("ray-0")
    assert answer == {"folder": str(driver.folder.path), "trial": "trial-0001", "threads": 1}


def test_a_trial_is_recorded_before_it_is_suggested(driver: Driver) -> None:
    driver.suggest()
    record = driver.folder.read_trial("trial-0001")
    assert record.config.optimizer.lr == record.params["optimizer.lr"]
    assert (record.steps, record.noise_multiplier, record.number) == (STEPS, 3, 0)


def test_a_trial_is_admitted_before_it_is_suggested(driver: Driver) -> None:
    driver.suggest()
    assert driver.ledger.admitted == {"trial-0001"}


@pytest.mark.parametrize("interrupted", ["check", "admit"])
def test_a_driver_that_dies_before_the_admission_loses_no_trial_and_charges_none_twice(
    start: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    """Its cost is searched: another proposal under the same name would be refused."""
    driver = start(trials=1, space={"privacy.noise_multiplier": {"uniform": (3, 5)}})
    with monkeypatch.context() as patch:
        patch.setattr(type(driver.ledger), interrupted, dies)
        with pytest.raises(KeyboardInterrupt):
            driver.suggest()
    driver.restart()
    assert driver.suggest_all() == ["trial-0001"]
    assert driver.ledger.admitted == {"trial-0001"}


def dies(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_folder_that_has_lost_an_admitted_trial_is_refused(driver: Driver, tmp_path: Path) -> None:
    """It would run again, and be charged once."""
    driver.suggest()
    driver.folder.trial("trial-0001").rename(tmp_path / "away")
    driver.close()
    with pytest.raises(InputError, match="trials that its ledger admitted are gone"):
        driver.open()


def test_a_study_ends_after_its_trials(driver: Driver) -> None:
    assert len(driver.suggest_all()) == 3
    assert driver.searcher.remaining == 0


def test_a_new_session_offers_the_unfinished_trials_and_no_finished_one(driver: Driver) -> None:
    first, second, third = driver.suggest_all()
    driver.run(second)
    driver.end(second)
    driver.restart()
    assert driver.searcher.remaining == 2
    assert driver.suggest_all() == [first, third]


def test_an_unfinished_trial_keeps_its_configuration(driver: Driver) -> None:
    driver.suggest()
    before = driver.folder.read_trial("trial-0001")
    driver.restart()
    driver.suggest()
    assert driver.folder.read_trial("trial-0001") == before


def test_a_finished_study_offers_nothing(driver: Driver) -> None:
    for name in driver.suggest_all():
        driver.run(name)
        driver.end(name)
    driver.restart()
    assert not driver.searcher.unfinished
    assert driver.suggest_all() == []


def test_a_failed_trial_is_offered_again_only_when_its_end_is_forgotten(driver: Driver) -> None:
    names = driver.suggest_all()
    for name in names:
        driver.end(name, error=True)
    driver.restart()
    assert driver.suggest_all() == []
    driver.folder.forget_end("trial-0002")
    driver.restart()
    assert driver.suggest_all() == ["trial-0002"]


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_proposals_do_not_repeat_after_a_restart(start: Callable[..., Driver], kind: str) -> None:
    driver = start(algorithm={"kind": kind, "trials": 6})
    for _ in range(3):
        for _ in range(2):
            name = driver.suggest(f"ray-{len(driver.params())}")
            assert name
            driver.run(name)
            driver.end(name)
        driver.restart()
    assert len(set(driver.params())) == 6


def test_the_seed_decides_the_proposals(start: Callable[..., Driver], tmp_path: Path) -> None:
    proposals = []
    for index, seed in enumerate((1, 1, 2)):
        driver = start(algorithm={"kind": "random", "trials": 2, "seed": seed}, storage=tmp_path / str(index))
        driver.suggest_all()
        proposals.append(driver.params())
    assert proposals[0] == proposals[1] != proposals[2]


@pytest.mark.parametrize(
    ("status", "state", "told"),
    [
        ("completed", "completed", (Told.COMPLETE, 0.25)),
        ("diverged", "diverged", (Told.COMPLETE, 0.25)),
        ("running", "stopped_early", (Told.PRUNED, None)),
    ],
)
def test_optuna_is_told_how_a_trial_ended(driver: Driver, status: str, state: str, told: Any) -> None:
    driver.suggest()
    driver.run("trial-0001", 0.25, status=status)
    driver.end("trial-0001")
    assert driver.state_of("trial-0001") == state
    assert driver.told() == {0: told}


@pytest.mark.parametrize("reported", [True, False])
def test_optuna_never_takes_a_failed_trial_for_a_result(driver: Driver, reported: bool) -> None:
    driver.suggest()
    if reported:
        driver.run("trial-0001", 0.9, status="running")
    driver.end("trial-0001", error=True)
    assert driver.state_of("trial-0001") == "failed"
    assert driver.told() == {0: (Told.FAIL, None)}


def test_optuna_is_told_of_a_failure_where_the_objective_is_no_number(driver: Driver) -> None:
    driver.suggest()
    driver.run("trial-0001", math.nan)
    driver.end("trial-0001")
    assert driver.told() == {0: (Told.FAIL, None)}


def test_a_trial_that_ended_without_a_report_has_failed(driver: Driver) -> None:
    driver.suggest()
    driver.end("trial-0001")
    assert driver.state_of("trial-0001") == "failed"


def test_baselines_are_nothing_to_optuna(start: Callable[..., Driver]) -> None:
    driver = start(baselines={"base": {}})
    driver.suggest()
    driver.run("baseline-base")
    driver.end("baseline-base")
    assert driver.state_of("baseline-base") == "completed"
    assert driver.told() == {}


def test_a_proposal_whose_driver_died_before_it_was_recorded_is_given_up(driver: Driver) -> None:
    driver.searcher._optuna.ask()
    driver.restart()
    assert driver.told() == {0: (Told.FAIL, None)}
    driver.suggest()
    assert driver.told()[1][0] == Told.RUNNING


def test_a_lock_that_a_killed_driver_left_on_optunas_journal_holds_nobody_up(driver: Driver) -> None:
    os.symlink(driver.folder.search / "optuna.log", driver.folder.search / "optuna.log.lock")
    started = time.monotonic()
    driver.restart()
    assert driver.suggest()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("charged", [STEPS, 5])
def test_a_trial_that_ended_costs_what_it_was_charged(driver: Driver, charged: int) -> None:
    driver.suggest()
    worst = driver.ledger.spent()
    driver.run("trial-0001", charged=charged)
    driver.end("trial-0001")
    assert (driver.ledger.spent() == worst) == (charged == STEPS)
    assert driver.ledger.spent() > 0


def test_a_failed_trial_stays_charged_with_its_worst_case(driver: Driver) -> None:
    driver.suggest()
    worst = driver.ledger.spent()
    driver.run("trial-0001", charged=5, status="running")
    driver.end("trial-0001", error=True)
    assert driver.ledger.spent() == worst


def test_a_trial_whose_ledger_is_gone_stays_charged_with_its_worst_case(
    driver: Driver, log_lines: list[str], tmp_path: Path
) -> None:
    driver.suggest()
    worst = driver.ledger.spent()
    driver.run("trial-0001", charged=5)
    (driver.folder.run("trial-0001") / "ledger").rename(tmp_path / "away")
    driver.end("trial-0001")
    assert driver.state_of("trial-0001") == "completed"
    assert driver.ledger.spent() == worst
    assert "stays charged with its worst case" in log_lines[0]


def test_an_end_that_is_told_twice_changes_nothing(driver: Driver) -> None:
    driver.suggest()
    driver.run("trial-0001", 0.25, charged=5)
    driver.end("trial-0001")
    before = driver.ledger.spent(), driver.told(), driver.state_of("trial-0001")
    driver.end("trial-0001")
    assert (driver.ledger.spent(), driver.told(), driver.state_of("trial-0001")) == before


@pytest.mark.parametrize("interrupted", ["settle", "tell", "end_trial"])
def test_an_end_that_the_driver_did_not_survive_is_repeated(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    """Wherever it died: the trial is settled once, told once, and ends as it would have."""
    driver.suggest()
    worst = driver.ledger.spent()
    driver.run("trial-0001", 0.25, charged=5)
    owner: Any = {"settle": type(driver.ledger), "tell": optuna.Study, "end_trial": StudyFolder}[interrupted]

    with monkeypatch.context() as patch:
        patch.setattr(owner, interrupted, dies)
        with pytest.raises(KeyboardInterrupt):
            driver.end("trial-0001")
    driver.restart()
    assert driver.suggest() == "trial-0001"
    driver.end("trial-0001")
    assert driver.state_of("trial-0001") == "completed"
    assert driver.told() == {0: (Told.COMPLETE, 0.25)}
    assert 0 < driver.ledger.spent() < worst


@pytest.fixture
def refusing(start: Callable[..., Driver], tmp_path: Path) -> Driver:
    """A study of four trials whose ledger has room for two."""
    cost = check_study(make_study(tmp_path), None).terms.planned[0]
    bound = planned_epsilon([cost] * 2, 5e-5, adaptive=True)
    assert bound
    return start(trials=4, ledger={"study_epsilon": bound * 1.001})


def end_all(driver: Driver, names: list[str], **how: Any) -> None:
    for name in names:
        driver.run(name, **how)
        driver.end(name)


def test_a_trial_without_room_waits_while_others_run(refusing: Driver, log_lines: list[str]) -> None:
    assert refusing.suggest_all() == ["trial-0001", "trial-0002"]
    assert refusing.searcher.suggest("later") is None
    assert refusing.searcher.refused is None
    assert log_lines == []


def test_a_trial_that_waited_starts_when_another_leaves_room(refusing: Driver) -> None:
    first, _ = refusing.suggest_all()
    waiting = refusing.told()[2]
    end_all(refusing, [first], charged=0)
    assert refusing.suggest() == "trial-0003"
    assert (refusing.folder.read_trial("trial-0003").number, refusing.told()[2]) == (2, waiting)


def test_a_trial_that_waited_is_no_trial_of_the_next_session(refusing: Driver) -> None:
    names = refusing.suggest_all()
    refusing.restart()
    assert refusing.suggest_all() == names
    assert refusing.told()[2][0] == Told.FAIL


def test_the_filter_ends_the_study_when_no_trial_runs_and_says_so(refusing: Driver, log_lines: list[str]) -> None:
    end_all(refusing, refusing.suggest_all())
    assert refusing.searcher.suggest("last") == Searcher.FINISHED
    assert refusing.searcher.refused
    assert "could exceed epsilon" in refusing.searcher.refused
    assert refusing.searcher.refused in log_lines[-1]


def test_a_study_that_the_filter_ended_is_finished_when_its_trials_are(refusing: Driver) -> None:
    names = refusing.suggest_all()
    assert refusing.searcher.unfinished
    end_all(refusing, names)
    assert refusing.suggest() is None
    assert not refusing.searcher.unfinished


def test_the_filter_is_kept_across_sessions(refusing: Driver) -> None:
    end_all(refusing, refusing.suggest_all())
    refusing.restart()
    assert refusing.suggest_all() == []
    assert refusing.searcher.refused
    assert refusing.ledger.spent() <= (refusing.ledger.cap or 0)


def test_optuna_does_not_wait_for_a_trial_that_the_filter_refused(refusing: Driver) -> None:
    end_all(refusing, refusing.suggest_all())
    refusing.suggest()
    states = [state for state, _ in refusing.told().values()]
    assert states == [Told.COMPLETE, Told.COMPLETE, Told.FAIL]


def test_proposals_that_cannot_be_afforded_are_skipped(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter(range(100))

    def refuse_every_other(config: TrialConfig, records: int) -> Any:
        if next(asked) % 2 == 0:
            raise InputError("allows no step")
        return derive_plan(config, records)

    monkeypatch.setattr(search, "derive_plan", refuse_every_other)
    assert driver.suggest_all() == ["trial-0001", "trial-0002", "trial-0003"]
    assert [state for state, _ in driver.told().values()] == [Told.FAIL, Told.RUNNING] * 3


def test_a_space_where_nothing_can_be_afforded_ends_the_study_and_says_so(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    def refuse(config: TrialConfig, records: int) -> Any:
        raise InputError("allows no step")

    monkeypatch.setattr(search, "derive_plan", refuse)
    assert driver.suggest_all() == []
    assert not driver.searcher.unfinished
    assert driver.searcher.refused
    assert "narrow the space" in driver.searcher.refused
    assert len(driver.told()) == search.MOST_SKIPS
    assert "narrow the space" in log_lines[-1]


def test_everyone_who_listens_hears_of_starts_and_ends(driver: Driver) -> None:
    driver.suggest()
    driver.run("trial-0001")
    driver.end("trial-0001")
    assert driver.changed == ["trial-0001", "trial-0001"]


def test_a_trial_that_ray_does_not_know_is_ignored(driver: Driver) -> None:
    driver.searcher.on_trial_complete("stranger")
    assert driver.folder.trials() == []


def test_repetitions_share_the_name_of_their_configuration(driver: Driver) -> None:
    config = driver.study.configure({})
    assert config_id(config) == config_id(config.model_copy(update={"seed": 7}))
    assert config_id(config) != config_id(driver.study.configure({"optimizer.lr": 0.5}))


def test_a_trial_that_was_really_trained_is_told_with_its_objective(driver: Driver, digits: ImageData) -> None:
    driver.suggest()
    reports = list(train(driver.folder.read_trial("trial-0001").config, digits, driver.folder.run("trial-0001")))
    driver.end("trial-0001")
    assert driver.state_of("trial-0001") == "completed"
    assert driver.told() == {0: (Told.COMPLETE, reports[-1].metrics[OBJECTIVE])}


# Studies of which only the winner is published.


SEALED = {"policy": "release_best", "selection": {"expected_trials": 3}}


@pytest.fixture
def start_sealed(start: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Driver]:
    """Makes drivers of sealed studies that have drawn three trials."""
    monkeypatch.setattr(Selection, "draw", lambda _: 3)
    return lambda **changes: start(**{"algorithm": {}, "ledger": SEALED, **changes})


def test_a_selection_has_as_many_trials_as_were_drawn(start_sealed: Callable[..., Driver]) -> None:
    assert len(start_sealed().suggest_all()) == 3


def test_a_failed_trial_of_a_selection_is_not_drawn_again(start_sealed: Callable[..., Driver]) -> None:
    driver = start_sealed()
    for name in driver.suggest_all():
        driver.end(name, error=True)
    driver.restart()
    assert (driver.suggest_all(), driver.searcher.unfinished) == ([], False)


def test_a_selection_has_no_more_trials_however_often_its_driver_dies(start_sealed: Callable[..., Driver]) -> None:
    driver, seen = start_sealed(), set()
    for _ in range(6):
        name = driver.suggest()
        assert name
        seen.add(name)
        if len(seen) == 2:
            driver.run(name)
            driver.end(name)
        driver.restart()
        driver.suggest_all()
        driver.restart()
    assert len(seen | set(driver.suggest_all())) <= 3
    assert len(driver.ledger.admitted) == 3


def test_proposals_of_a_selection_cannot_be_repeated(start_sealed: Callable[..., Driver], tmp_path: Path) -> None:
    """A sequence that follows from the study file would tell at which place the winner stood."""
    proposals = []
    for index in range(2):
        driver = start_sealed(storage=tmp_path / str(index))
        driver.suggest_all()
        proposals += driver.params()
    assert len(set(proposals)) == 6


def test_every_proposal_of_a_selection_asks_the_operating_system(
    start_sealed: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, asked = start_sealed(), []
    monkeypatch.setattr(driver.searcher._optuna.sampler, "reseed_rng", lambda: asked.append(1))
    driver.suggest_all()
    assert len(asked) == 3


def test_a_proposal_that_is_not_covered_is_drawn_again(
    start_sealed: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, asked = start_sealed(), iter(range(100))
    monkeypatch.setattr(driver.ledger, "covers", lambda _: next(asked) % 2 == 1)
    assert len(driver.suggest_all()) == 3
    assert next(asked) == 6


def test_a_selection_that_affords_no_proposal_is_not_finished(
    start_sealed: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer trials than were drawn it would be another selection than the one that was accounted."""
    driver = start_sealed()
    monkeypatch.setattr(driver.ledger, "covers", lambda _: False)
    assert driver.suggest_all() == []
    assert driver.searcher.unfinished


def test_a_selection_says_nothing_of_its_trials(
    start_sealed: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch, log_lines: list[str], tmp_path: Path
) -> None:
    driver = start_sealed()
    driver.suggest()
    driver.run("trial-0001")
    (driver.folder.run("trial-0001") / "ledger").rename(tmp_path / "away")
    driver.end("trial-0001")
    monkeypatch.setattr(driver.ledger, "covers", lambda _: False)
    driver.suggest_all()
    assert log_lines == []


# Scores on private validation images.


def test_a_trial_with_private_scores_is_settled_on_both_accounts(start: Callable[..., Driver]) -> None:
    trial = make_study(Path()).trial
    trial |= {"data": {"name": "digits", "validation": "private"}}
    trial |= {"privacy": trial["privacy"] | {"score_noise": 20}}
    driver = start(trial=trial)
    name = driver.suggest()
    assert name
    record = driver.folder.read_trial(name)
    assert (record.score_noise, record.score_releases) == (20, 1)
    driver.run(name, charged=5)
    with TrialBudget.open(driver.folder.run(name) / "score-ledger", derive_plan(record.config, 1437).score_terms("h")):
        pass
    driver.end(name)
    spent = driver.ledger.statement(10).accounts
    assert 0 < spent["training"]["spent"] < 1
    assert spent["private validation"]["spent"] == 0
