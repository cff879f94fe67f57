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
from dpsink.privacy.budget import TrialBudget, charged_steps
from dpsink.privacy.ledger import Selection, planned_epsilon
from dpsink.privacy.plan import derive_plan
from dpsink.records import CheckpointState, Report, latest_state
from dpsink.synthesis import sample_grid
from dpsink.training import train
from tune import search
from tune.choice import chosen_trials, configurations, pareto_front, select_best
from tune.folder import StudyFolder, StudyRecord
from tune.memory import open_optuna
from tune.preflight import check_study
from tune.search import StudySearcher, config_id
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
        "objectives": [OBJECTIVE],
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

    def run(
        self, name: str, value: float = 0.5, *, charged: int = STEPS, status: str = "completed", **metrics: float
    ) -> None:
        """Leaves the run folder as a worker would."""
        config = self.folder.read_trial(name).config
        write_run(self.folder.run(name), config, {OBJECTIVE: value, **metrics}, charged, status)

    def state_of(self, name: str) -> str | None:
        end = self.folder.end_of(name)
        return end.state if end else None

    def told(self) -> dict[int, tuple[Told, float | None]]:
        """What Optuna knows of its trials."""
        trials = open_optuna(self.study, self.folder).get_trials(deepcopy=False)
        return {trial.number: (trial.state, trial.value if trial.state == Told.COMPLETE else None) for trial in trials}

    def params(self) -> list[tuple[Any, ...]]:
        return [tuple(record.params.values()) for record in self.folder.trials() if record.role == "search"]


def write_run(run: Path, config: TrialConfig, metrics: dict[str, float], charged: int, status: str) -> None:
    """A run folder: so many steps charged, and a checkpoint with one more report."""
    latest = latest_state(run)
    earlier = [told for told in (latest[1].reports if latest else ()) if told.step < charged]
    plan = derive_plan(config, 1437)
    with TrialBudget.open(run / "ledger", plan.terms("hmac")) as budget:
        budget.reserve(charged - budget.charged)
    report = Report(
        step=charged, charged=charged, epsilon=1.0, budget_fraction=charged / plan.steps, steps_per_second=1.0,
        status=status, metrics=metrics,
    )  # fmt: skip
    description = CheckpointState(
        config=config, plan=asdict(plan), image_shape=(1, 8, 8), num_classes=10, step=charged,
        data_fingerprint="hmac", reports=(*earlier, report),
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
    driver.searcher._memory.optuna.ask()
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
    if interrupted == "settle":
        assert driver.suggest() == "trial-0001"
        driver.end("trial-0001")
    assert driver.state_of("trial-0001") == "completed"
    assert driver.told() == {0: (Told.COMPLETE, 0.25)}
    assert 0 < driver.ledger.spent() < worst
    assert driver.suggest() == "trial-0002"


def test_an_entry_of_the_journal_that_was_half_written_is_written_again(driver: Driver) -> None:
    """By a full disk, or a power cut."""
    driver.suggest()
    with (driver.folder.search / "optuna.log").open("ab") as journal:
        journal.write(b'{"op_code": 5, "worker')
    driver.restart()
    assert driver.suggest_all() == ["trial-0001", "trial-0002", "trial-0003"]
    driver.restart()
    assert len(driver.told()) == 3


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
    monkeypatch.setattr(driver.searcher._memory.optuna.sampler, "reseed_rng", lambda: asked.append(1))
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


# Several seeds of a configuration.


def seeded(seeds: int = 2, *, trials: int = 2, kind: str = "random") -> dict[str, Any]:
    return {"algorithm": {"kind": kind, "trials": trials, "seeds_per_configuration": seeds}}


def test_every_seed_of_a_configuration_is_a_trial_of_its_own(start: Callable[..., Driver]) -> None:
    driver = start(**seeded(), baselines={"base": {}})
    names = driver.suggest_all()
    assert names == [f"{label}-{seed}" for label in ("baseline-base", "trial-0001", "trial-0002") for seed in (1, 2)]
    assert driver.ledger.admitted == set(names)


def test_seeds_differ_and_nothing_else_does(start: Callable[..., Driver]) -> None:
    driver = start(**seeded(3, trials=1))
    records = [driver.folder.read_trial(name) for name in driver.suggest_all()]
    assert [record.config.seed for record in records] == [0, 1, 2]
    assert len({(record.config_id, record.number, record.label) for record in records}) == 1
    assert [record.config.model_copy(update={"seed": 0}) for record in records] == [records[0].config] * 3


def test_optuna_is_told_the_mean_when_the_last_seed_ends(start: Callable[..., Driver]) -> None:
    driver = start(**seeded(trials=1))
    first, second = driver.suggest_all()
    driver.run(second, 0.2)
    driver.end(second)
    assert driver.told() == {0: (Told.RUNNING, None)}
    driver.run(first, 0.6)
    driver.end(first)
    assert driver.told() == {0: (Told.COMPLETE, pytest.approx(0.4))}


def test_a_diverged_seed_counts_with_its_worst_value(start: Callable[..., Driver]) -> None:
    driver = start(**seeded(trials=1))
    first, second = driver.suggest_all()
    end_all(driver, [first], value=0.6)
    end_all(driver, [second], value=0.0, status="diverged")
    assert driver.told() == {0: (Told.COMPLETE, 0.3)}


def test_a_configuration_with_a_failed_seed_has_failed(start: Callable[..., Driver]) -> None:
    driver = start(**seeded(trials=1))
    first, second = driver.suggest_all()
    driver.end(first, error=True)
    end_all(driver, [second])
    assert driver.told() == {0: (Told.FAIL, None)}


def test_the_mean_survives_drivers(start: Callable[..., Driver]) -> None:
    """One dies after each of: the decision, the first start, the first end."""
    driver = start(**seeded(trials=1))
    assert driver.suggest() == "trial-0001-1"
    driver.restart()
    assert driver.suggest_all() == ["trial-0001-1", "trial-0001-2"]
    end_all(driver, ["trial-0001-1"], value=0.2)
    driver.restart()
    assert driver.searcher.remaining == 1
    assert driver.suggest_all() == ["trial-0001-2"]
    end_all(driver, ["trial-0001-2"], value=0.4)
    assert driver.told() == {0: (Told.COMPLETE, pytest.approx(0.3))}
    assert not driver.searcher.unfinished


def test_a_configuration_that_was_cut_short_gets_its_other_seeds_first(start: Callable[..., Driver]) -> None:
    driver = start(**seeded(3))
    driver.suggest()
    driver.restart()
    assert driver.suggest_all()[:4] == ["trial-0001-1", "trial-0001-2", "trial-0001-3", "trial-0002-1"]
    assert len(driver.told()) == 2


# What is best.


def finished_study(start: Callable[..., Driver], values: dict[str, float | None], **changes: Any) -> Driver:
    """A study whose trials scored these; None: it failed."""
    driver = start(**changes)
    for name in driver.suggest_all():
        value = values[name]
        if value is None:
            driver.end(name, error=True)
        else:
            end_all(driver, [name], value=value)
    record = StudyRecord(
        study_id="1", name="small", experiment="", tracking_uri="", created="", version="", target_epsilon=10,
        delta=1e-5, data_name="digits", data_fingerprint="", extractor="", objectives=driver.study.objectives,
        searched=(), seeds=driver.study.seeds,
    )  # fmt: skip
    driver.folder.write_study(record, "")
    return driver


SCORES = {"trial-0001-1": 0.9, "trial-0001-2": 0.1, "trial-0002-1": 0.5, "trial-0002-2": 0.7}


def test_the_best_configuration_has_the_best_mean_and_its_best_seed_stands_for_it(start: Callable[..., Driver]) -> None:
    folder = finished_study(start, dict(SCORES), **seeded()).folder
    ranked = configurations(folder, OBJECTIVE)
    assert [(one.name, one.metrics[OBJECTIVE]) for one in ranked] == [
        ("trial-0002", pytest.approx(0.6)),
        ("trial-0001", pytest.approx(0.5)),
    ]
    best = select_best(folder, OBJECTIVE)
    assert best
    assert best.name == "trial-0002-2"


def test_every_seed_of_the_best_is_judged(start: Callable[..., Driver]) -> None:
    folder = finished_study(start, dict(SCORES), **seeded()).folder
    assert [record.name for record in chosen_trials(folder, [OBJECTIVE])] == ["trial-0002-1", "trial-0002-2"]


def test_a_configuration_short_of_a_seed_is_not_compared(start: Callable[..., Driver]) -> None:
    folder = finished_study(start, SCORES | {"trial-0002-1": None}, **seeded()).folder
    assert [one.name for one in configurations(folder, OBJECTIVE)] == ["trial-0001"]


def test_a_configuration_with_a_diverged_seed_is_not_compared(start: Callable[..., Driver]) -> None:
    """As in analysis: that one of two runs went well is luck."""
    driver = start(**seeded(trials=1))
    first, second = driver.suggest_all()
    end_all(driver, [first], value=0.6)
    end_all(driver, [second], value=0.5, status="diverged")
    assert configurations(driver.folder, OBJECTIVE) == []


def test_a_stopped_trial_is_not_compared(start: Callable[..., Driver]) -> None:
    driver = start(trials=2)
    first, second = driver.suggest_all()
    end_all(driver, [first], value=0.9, status="running", charged=5)
    end_all(driver, [second], value=0.1)
    assert [one.name for one in configurations(driver.folder, OBJECTIVE)] == [second]


def test_a_pareto_front_holds_what_nothing_else_beats(start: Callable[..., Driver]) -> None:
    driver = start(trials=5, objectives=["fid", OBJECTIVE])
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.5), (1.0, 0.5), (4.0, 0.1)]
    for name, (fid, accuracy) in zip(driver.suggest_all(), points, strict=True):
        driver.run(name, accuracy, fid=fid)
        driver.end(name)
    front = pareto_front(configurations(driver.folder, "fid"), driver.study.objectives)
    assert [one.name for one in front] == ["trial-0002", "trial-0004", "trial-0001"]
    assert {trial.name for trial in chosen_trials(driver.folder, driver.study.objectives)} >= {
        "trial-0001", "trial-0002", "trial-0004",
    }  # fmt: skip


# Grids.


GRID_SPACE = {
    "sinkhorn.cost": {"choice": ["l2", "l1+l2"]},
    "sinkhorn.l1_weight": {"uniform": [1, 3], "points": 2, "when": {"sinkhorn.cost": "l1+l2"}},
}


def test_a_grid_is_searched_point_by_point_across_drivers(start: Callable[..., Driver]) -> None:
    driver = start(algorithm={"kind": "grid"}, space=GRID_SPACE)
    driver.suggest()
    driver.restart()
    assert driver.suggest_all() == ["trial-0001", "trial-0002", "trial-0003"]
    assert driver.params() == [("l2",), ("l1+l2", 1), ("l1+l2", 3)]
    assert driver.searcher.remaining == 0


def test_a_point_whose_driver_died_before_it_was_recorded_is_searched_again(start: Callable[..., Driver]) -> None:
    driver = start(algorithm={"kind": "grid"}, space=GRID_SPACE)
    driver.searcher._memory.ask(0)
    driver.restart()
    driver.suggest()
    assert (driver.params(), driver.told()[0][0]) == ([("l2",)], Told.FAIL)


def test_optuna_knows_the_points_of_a_grid_with_their_values(start: Callable[..., Driver]) -> None:
    """So that the importance of a hyperparameter is computed as after any other search."""
    driver = start(algorithm={"kind": "grid"}, space=GRID_SPACE)
    end_all(driver, driver.suggest_all(), value=0.5)
    trials = open_optuna(driver.study, driver.folder).get_trials()
    assert [(trial.params, trial.value) for trial in trials] == [
        ({"sinkhorn.cost": "l2"}, 0.5),
        ({"sinkhorn.cost": "l1+l2", "sinkhorn.l1_weight": 1}, 0.5),
        ({"sinkhorn.cost": "l1+l2", "sinkhorn.l1_weight": 3}, 0.5),
    ]


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_a_dimension_is_proposed_only_where_its_condition_holds(start: Callable[..., Driver], kind: str) -> None:
    space = {path: {key: value for key, value in one.items() if key != "points"} for path, one in GRID_SPACE.items()}
    driver = start(algorithm={"kind": kind, "trials": 12}, space=space)
    while name := driver.suggest():
        end_all(driver, [name], value=0.5)
    proposed = [record.params for record in driver.folder.trials()]
    assert {len(params) for params in proposed} == {1, 2}
    assert all(("sinkhorn.l1_weight" in params) == (params["sinkhorn.cost"] == "l1+l2") for params in proposed)


# Several objectives.


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_optuna_is_told_every_objective(start: Callable[..., Driver], kind: str) -> None:
    driver = start(objectives=["fid", OBJECTIVE], algorithm={"kind": kind, "trials": 8})
    while name := driver.suggest():
        driver.run(name, 0.5, fid=3.0)
        driver.end(name)
    told = open_optuna(driver.study, driver.folder)
    assert [direction.name for direction in told.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert [trial.values for trial in told.get_trials()] == [[3.0, 0.5]] * 8


# Stopping early.


HALVING = {"scheduler": {"kind": "asha", "grace": 0.25, "reduction": 2}}
REPORTS = {"samples": 40, "classifiers": ["logreg"], "points": 4}


@pytest.fixture
def halving(start: Callable[..., Driver], tmp_path: Path) -> Driver:
    """A study of four trials, of which half go on at a quarter and at half of their budget."""
    trial = make_study(tmp_path).trial | {"evaluation": REPORTS}
    return start(trials=4, trial=trial, baselines={"base": {}}, **HALVING)


def report(driver: Driver, name: str, value: float, part: float = 0.25) -> bool:
    """A worker's report; whether the trial is stopped after it."""
    driver.run(name, value, charged=int(part * STEPS), status="running")
    return driver.searcher.should_stop(name)


def test_the_worse_half_is_stopped_at_each_rung(halving: Driver) -> None:
    _, first, second, third, fourth = halving.suggest_all()
    assert [report(halving, name, value) for name, value in ((first, 0.5), (second, 0.4), (third, 0.7))] == [
        False, True, False,
    ]  # fmt: skip
    assert not report(halving, third, 0.8, 0.5)
    assert report(halving, first, 0.6, 0.5)
    assert not report(halving, fourth, 0.9)


def test_no_trial_is_stopped_between_rungs_or_before_the_first(halving: Driver) -> None:
    _, first, second, *_ = halving.suggest_all()
    assert not report(halving, first, 0.9)
    assert not report(halving, second, 0.1, 0.2)
    assert not report(halving, first, 0.0, 0.4)


def test_a_trial_is_judged_on_each_rung_by_what_it_scored_there(halving: Driver) -> None:
    """However far it has got before a driver, which was away, looks again."""
    _, first, second, third, _ = halving.suggest_all()
    assert not report(halving, first, 0.5)
    for name, early, late in ((second, 0.4, 0.9), (third, 0.6, 0.3)):
        halving.run(name, early, charged=STEPS // 4, status="running")
        halving.run(name, late, charged=STEPS // 4 + 1, status="running")
    assert halving.searcher.should_stop(second)
    assert not halving.searcher.should_stop(third)


def test_a_baseline_is_never_stopped(halving: Driver) -> None:
    base, first, *_ = halving.suggest_all()
    assert not report(halving, first, 0.9)
    assert not report(halving, base, 0.0)


def test_a_trial_that_has_ended_is_not_stopped_too(halving: Driver) -> None:
    _, first, second, *_ = halving.suggest_all()
    report(halving, first, 0.9, 0.5)
    halving.run(second, 0.0)
    assert not halving.searcher.should_stop(second)


def test_rungs_survive_the_driver(halving: Driver) -> None:
    _, first, second, *_ = halving.suggest_all()
    assert not report(halving, first, 0.9)
    halving.restart()
    halving.suggest_all()
    assert not report(halving, first, 0.9)
    assert report(halving, second, 0.5)


def test_a_trial_that_was_given_up_is_so_for_the_next_driver_too(halving: Driver) -> None:
    """The last one died between the decision and the trial's end; the trial tells its last report again."""
    _, first, second, *_ = halving.suggest_all()
    report(halving, first, 0.9)
    assert report(halving, second, 0.5)
    halving.restart()
    halving.suggest_all()
    assert halving.searcher.should_stop(second)
    halving.end(second)
    assert halving.state_of(second) == "stopped_early"


@pytest.mark.parametrize("interrupted", ["tell", "end_trial"])
def test_a_stopped_trial_whose_charge_is_final_never_runs_again(
    halving: Driver, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    """The driver died after it had settled, and before the trial's end was on disk."""
    _, first, second, *_ = halving.suggest_all()
    report(halving, first, 0.9)
    assert report(halving, second, 0.5)
    owner: Any = {"tell": optuna.Study, "end_trial": StudyFolder}[interrupted]
    with monkeypatch.context() as patch:
        patch.setattr(owner, interrupted, dies)
        with pytest.raises(KeyboardInterrupt):
            halving.end(second)
    spent = halving.ledger.spent()
    halving.restart()
    assert second not in halving.suggest_all()
    assert halving.state_of(second) == "stopped_early"
    assert halving.told()[1] == (Told.PRUNED, None)
    assert halving.ledger.spent() == spent


def test_a_stopped_trial_that_could_not_be_settled_is_stopped_again(
    halving: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own ledger could not be read, so that its worst case stays charged; and then its driver died."""
    _, first, second, *_ = halving.suggest_all()
    report(halving, first, 0.9)
    assert report(halving, second, 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(StudySearcher, "_charged", lambda *_: {})
        patch.setattr(StudyFolder, "end_trial", dies)
        with pytest.raises(KeyboardInterrupt):
            halving.end(second)
    halving.restart()
    assert second in halving.suggest_all()
    assert halving.searcher.should_stop(second)


def test_a_paused_search_starts_nothing_and_leaves_what_is_halfway_to_go_on(driver: Driver) -> None:
    name = str(driver.suggest())
    driver.run(name, 0.5, status="running")
    driver.searcher.pause()
    driver.end(name)
    assert (driver.state_of(name), driver.suggest()) == (None, None)
    driver.restart()
    assert name in driver.suggest_all()


def test_a_trial_that_ends_while_the_search_pauses_has_ended(driver: Driver) -> None:
    name = str(driver.suggest())
    driver.run(name, 0.5)
    driver.searcher.pause()
    driver.end(name)
    assert driver.state_of(name) == "completed"


def test_a_stopped_trial_costs_what_it_ran_and_is_no_result_to_optuna(halving: Driver) -> None:
    _, first, second, *_ = halving.suggest_all()
    before = halving.ledger.spent()
    report(halving, first, 0.9)
    assert report(halving, second, 0.5)
    halving.end(second)
    assert halving.state_of(second) == "stopped_early"
    assert halving.ledger.spent() < before
    told = open_optuna(halving.study, halving.folder).get_trials()[1]
    assert (told.state, told.intermediate_values) == (Told.PRUNED, {25: 0.5})


def test_what_is_reserved_is_used_up_at_every_report(driver: Driver, digits: ImageData) -> None:
    """A trial that is stopped after a report is charged the steps that it ran, and no more."""
    driver.suggest()
    config = driver.folder.read_trial("trial-0001").config
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"points": 4})})
    run = driver.folder.run("trial-0001")
    seen = [(told.step, charged_steps(run / "ledger")) for told in train(config, digits, run)]
    assert seen == [(5, 5), (10, 10), (15, 15), (20, 20)]


# Running failures again.


def test_a_failure_that_succeeds_at_last_is_a_result_to_optuna(driver: Driver) -> None:
    first, *_ = driver.suggest_all()
    driver.end(first, error=True)
    driver.folder.forget_end(first)
    driver.restart()
    assert first in driver.suggest_all()
    end_all(driver, [first], value=0.7)
    driver.end(first)  # told twice
    optuna_trials = open_optuna(driver.study, driver.folder).get_trials()
    assert [trial.state for trial in optuna_trials] == [Told.FAIL, Told.RUNNING, Told.RUNNING, Told.COMPLETE]
    assert (optuna_trials[3].value, optuna_trials[3].params) == (0.7, optuna_trials[0].params)
    assert not driver.searcher.should_stop(first)
