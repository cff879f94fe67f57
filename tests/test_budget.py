"""Write-ahead reservations of one trial, against crashes, full disks and meddling."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dpsink.errors import InputError
from dpsink.privacy.budget import BudgetTerms, TrialBudget, charged_steps
from dpsink.privacy.storage import GENESIS, Chain, DamagedLedger, FencedError, FolderStorage

TERMS = BudgetTerms(
    mechanism="record",
    noise_multiplier=1.1,
    sample_rate=0.01,
    clip_norm=1.0,
    records=60_000,
    delta=1e-5,
    target_epsilon=10.0,
    steps_allowed=1000,
    data_fingerprint="fingerprint",
)
CHANGES = {
    "mechanism": "batch",
    "noise_multiplier": 1.2,
    "sample_rate": 0.02,
    "clip_norm": 2.0,
    "records": 59_999,
    "delta": 1e-6,
    "target_epsilon": 9.0,
    "steps_allowed": 1001,
    "data_fingerprint": "other",
}


class MemoryStorage:
    """An object store in memory, seen by several hosts: its lock keeps nobody out."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.before_create: Callable[[str], object] = lambda _: None  # lets another host act in between

    def create(self, name: str, content: bytes) -> None:
        self.before_create(name)
        if name in self.objects:
            raise FileExistsError(name)
        self.objects[name] = content

    def names(self) -> list[str]:
        return list(self.objects)

    def read(self, name: str) -> bytes:
        try:
            return self.objects[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def lock(self):
        return nullcontext()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ledger's folder that does not exist yet."""
    return tmp_path / "trial" / "ledger"


def open_budget(place, witness=None, **changes) -> TrialBudget:
    return TrialBudget.open(place, dataclasses.replace(TERMS, **changes), witness=witness)


def fill(place) -> dict:
    """Three attempts, six reservations, two of them settled. Returns the witness; 240 steps are charged."""
    witness = {}
    for _ in range(3):
        with open_budget(place) as budget:
            budget.reserve(40)
            budget.reserve(50)
            if budget.attempt != 2:
                budget.settle(35)
            witness = budget.witness()
    return witness


def reservations(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*-*.json") if "settled" not in path.name)


# What is granted and charged


def test_reserve_grants_what_is_wanted_until_the_budget_is_exhausted(folder):
    with open_budget(folder) as budget:
        assert [budget.reserve(400) for _ in range(4)] == [400, 400, 200, 0]
        assert (budget.charged, budget.remaining, budget.allowed) == (1000, 0, 1000)


def test_exhausted_budget_stays_exhausted_after_reopening(folder):
    with open_budget(folder) as budget:
        budget.reserve(1000)
    with open_budget(folder) as budget:
        assert budget.reserve(1) == 0


def test_resume_charges_replayed_steps_again(folder):
    with open_budget(folder) as budget:
        budget.reserve(100)
    with open_budget(folder) as budget:
        budget.reserve(100)
        assert budget.charged == 200


def test_settling_gives_back_the_unused_part_of_the_last_reservation(folder):
    with open_budget(folder) as budget:
        budget.reserve(100)
        budget.reserve(100)
        budget.settle(30)
        assert budget.charged == 130
    assert charged_steps(folder) == 130


def test_steps_can_be_reserved_after_settling_to_zero(folder):
    with open_budget(folder) as budget:
        for _ in range(3):
            assert budget.reserve(1000) == 1000
            budget.settle(0)
        assert budget.charged == 0


def test_settling_twice_is_refused(folder):
    with open_budget(folder) as budget:
        budget.reserve(10)
        budget.settle(10)
        with pytest.raises(RuntimeError, match="no open reservation"):
            budget.settle(5)


def test_another_attempt_cannot_settle_a_reservation(folder):
    with open_budget(folder) as budget:
        budget.reserve(10)
    with open_budget(folder) as budget, pytest.raises(RuntimeError, match="no open reservation"):
        budget.settle(0)


@pytest.mark.parametrize("used", [-1, 11])
def test_settling_outside_the_reservation_is_refused(folder, used):
    with open_budget(folder) as budget:
        budget.reserve(10)
        with pytest.raises(ValueError, match="used"):
            budget.settle(used)
        assert budget.charged == 10


def test_negative_reservation_is_refused(folder):
    with open_budget(folder) as budget, pytest.raises(ValueError, match="steps=-1"):
        budget.reserve(-1)


def test_closed_budget_grants_nothing(folder):
    budget = open_budget(folder)
    budget.close()
    with pytest.raises(RuntimeError, match="closed"):
        budget.reserve(1)


def test_charge_of_a_trial_without_ledger_is_refused_not_zero(folder):
    with pytest.raises(InputError, match="no ledger"):
        charged_steps(folder)


def test_reservation_takes_milliseconds(folder):
    with open_budget(folder) as budget:
        start = time.perf_counter()
        for _ in range(50):
            budget.reserve(1)
    assert (time.perf_counter() - start) / 50 < 0.1  # 8 ms on an SSD; generous for a busy test machine


class Lives(RuleBasedStateMachine):
    """A trial that is reserved, run, settled, killed and resumed at random."""

    def __init__(self) -> None:
        super().__init__()
        self.storage = MemoryStorage()
        self.used = self.granted = 0  # steps run in the trial's life; steps left under the open reservation
        self.resume()

    @rule()
    def resume(self) -> None:
        self.budget = open_budget(self.storage, steps_allowed=60)
        self.size = self.left = 0

    @rule(steps=st.integers(0, 50))
    def reserve(self, steps: int) -> None:
        if granted := self.budget.reserve(steps):
            self.size = self.left = granted

    @rule(steps=st.integers(0, 50))
    def run(self, steps: int) -> None:
        steps = min(steps, self.left)
        self.used, self.left = self.used + steps, self.left - steps

    @rule()
    def settle(self) -> None:
        if self.size:
            self.budget.settle(self.size - self.left)
        self.size = self.left = 0

    @invariant()
    def charge_is_between_the_steps_used_and_those_allowed(self) -> None:
        assert self.used <= self.budget.charged <= self.budget.allowed

    @invariant()
    def the_record_agrees_with_the_live_count(self) -> None:
        assert charged_steps(self.storage) == self.budget.charged


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


# Two attempts at once


def test_older_attempt_that_comes_back_is_refused():
    storage = MemoryStorage()
    old = open_budget(storage)
    open_budget(storage)
    with pytest.raises(FencedError, match="newer"):
        old.reserve(1)
    assert charged_steps(storage) == 0


def test_older_attempt_cannot_settle():
    storage = MemoryStorage()
    old = open_budget(storage)
    old.reserve(10)
    open_budget(storage)
    with pytest.raises(FencedError):
        old.settle(0)
    assert charged_steps(storage) == 10


def test_attempt_that_is_replaced_while_it_reserves_is_granted_nothing():
    storage = MemoryStorage()
    old = open_budget(storage)
    newer = []

    def replace(name):
        storage.before_create = lambda _: None
        newer.append(open_budget(storage))

    storage.before_create = replace
    with pytest.raises(FencedError):
        old.reserve(10)
    assert newer[0].reserve(1000) == 1000  # it did not see the other's object, which was granted nothing
    # ... and which is not counted beyond what the trial may run
    assert charged_steps(storage) == open_budget(storage).charged == 1000


def test_overlapping_reservations_of_two_attempts_add_up():
    storage = MemoryStorage()
    old = open_budget(storage)

    def reserve_first(name):
        storage.before_create = lambda _: None
        assert old.reserve(10) == 10  # the newer attempt is not visible yet: this is granted

    storage.before_create = reserve_first
    new = open_budget(storage)
    assert new.charged == 10
    new.reserve(20)
    assert charged_steps(storage) == 30
    assert open_budget(storage).charged == 30


def test_two_hosts_that_open_at_once_take_different_attempts():
    storage = MemoryStorage()
    opened = []

    def open_too(name):
        storage.before_create = lambda _: None
        opened.append(open_budget(storage))

    storage.before_create = open_too
    opened.append(open_budget(storage))
    assert [budget.attempt for budget in opened] == [1, 2]


def test_second_process_is_refused_with_the_first_ones_pid(folder):
    with open_budget(folder), pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        open_budget(folder)


def test_lock_is_free_after_closing(folder):
    open_budget(folder).close()
    open_budget(folder).close()


@pytest.mark.parametrize("field", CHANGES)
def test_changed_term_is_refused_by_name_with_both_values(folder, field):
    open_budget(folder).close()
    with pytest.raises(InputError) as refusal:
        open_budget(folder, **{field: CHANGES[field]})
    for part in (f"{field}=", repr(CHANGES[field]), repr(getattr(TERMS, field))):
        assert part in str(refusal.value)


def test_every_term_has_its_change_tested():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(BudgetTerms)}


def test_refused_terms_take_no_attempt(folder):
    open_budget(folder).close()
    with pytest.raises(InputError):
        open_budget(folder, clip_norm=2.0)
    with open_budget(folder) as budget:
        assert budget.attempt == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise_multiplier", float("nan")), ("sample_rate", 1.5), ("steps_allowed", 0), ("target_epsilon", 0.0)],
)
def test_term_outside_its_range_is_refused(field, value):
    with pytest.raises(InputError, match=field):
        dataclasses.replace(TERMS, **{field: value})


def test_trial_without_privacy_can_be_budgeted(folder):
    for _ in range(2):
        open_budget(folder, target_epsilon=float("inf"), noise_multiplier=0.0).close()


# A ledger that someone or something meddled with


def drop_newest(folder: Path) -> None:
    max(folder.glob("*-settled.json")).unlink()


def drop_all(folder: Path) -> None:
    shutil.rmtree(folder)


def replace_by_another(folder: Path) -> None:
    shutil.rmtree(folder)
    fill(folder)


def start_over(folder: Path) -> None:
    shutil.rmtree(folder)
    open_budget(folder).close()


@pytest.mark.parametrize("lose", [drop_newest, drop_all, replace_by_another, start_over])
def test_ledger_that_lost_what_the_checkpoint_saw_is_refused(folder, lose):
    witness = json.loads(json.dumps(fill(folder)))
    lose(folder)
    with pytest.raises(DamagedLedger):
        open_budget(folder, witness)


def test_vanished_ledger_is_refused_again_and_again(folder):
    witness = fill(folder)
    shutil.rmtree(folder)
    for _ in range(2):
        with pytest.raises(DamagedLedger, match="gone"):
            open_budget(folder, witness)


def test_intact_ledger_passes_every_older_witness(folder):
    witnesses = []
    for _ in range(3):
        with open_budget(folder) as budget:
            witnesses.append(budget.witness())
            budget.reserve(10)
            witnesses.append(budget.witness())
    for witness in witnesses:
        open_budget(folder, witness).close()


def test_witness_counts_objects_and_charge(folder):
    witness = fill(folder)
    assert (witness["objects"], witness["charged"]) == (1 + 3 + 6 + 2, 240)


@pytest.mark.parametrize("name", [GENESIS, "000001.json", "000002-*-*.json"])
def test_missing_object_in_the_middle_is_found_without_a_witness(folder, name):
    fill(folder)
    sorted(folder.glob(name))[0].unlink()
    with pytest.raises(DamagedLedger, match="missing"):
        open_budget(folder)


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("size", [0, 1, 40, -1])
def test_truncated_object_is_found(folder, at, size):
    fill(folder)
    path = reservations(folder)[at]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedLedger, match="truncated"):
        open_budget(folder)


@pytest.mark.parametrize("at", [0, -1])
def test_edited_object_is_found(folder, at):
    fill(folder)
    path = reservations(folder)[at]
    path.write_text(path.read_text().replace('"reserved":', '"reserved":0,"was":'))
    with pytest.raises(DamagedLedger, match="edited"):
        open_budget(folder)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_any_object_is_found(data):
    storage = MemoryStorage()
    fill(storage)
    name = data.draw(st.sampled_from(sorted(storage.objects)))
    content = bytearray(storage.objects[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    storage.objects[name] = bytes(content)
    with pytest.raises(DamagedLedger):
        open_budget(storage)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_missing_objects_are_found_with_the_witness(data):
    storage = MemoryStorage()
    witness = fill(storage)
    for name in data.draw(st.sets(st.sampled_from(sorted(storage.objects)), min_size=1)):
        del storage.objects[name]
    with pytest.raises(DamagedLedger):
        open_budget(storage, witness)


def test_copied_object_is_found(folder):
    fill(folder)
    path = reservations(folder)[0]
    shutil.copy(path, path.with_name("000001-000000000090-000000000130.json"))
    with pytest.raises(DamagedLedger, match="copy"):
        open_budget(folder)


def test_object_of_another_trial_is_found(folder, tmp_path):
    fill(folder)
    with open_budget(tmp_path / "other") as other:
        other.reserve(7)
    shutil.copy(reservations(tmp_path / "other")[0], folder)
    with pytest.raises(DamagedLedger, match="another ledger"):
        open_budget(folder)


def test_damaged_ledger_gives_no_charge(folder):
    fill(folder)
    reservations(folder)[0].unlink()
    with pytest.raises(DamagedLedger):
        charged_steps(folder)


def test_files_left_by_a_crash_in_mid_write_are_ignored(folder):
    fill(folder)
    (folder / ".0123456789abcdef").write_bytes(b'{"half')
    with open_budget(folder) as budget:
        assert budget.charged == 240


# A disk that fails


@contextmanager
def file_size_limit(size: int):
    """Writes beyond `size` bytes fail in this process with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100])
def test_write_that_fails_grants_nothing_and_the_ledger_stays_usable(folder, size):
    with open_budget(folder) as budget:
        budget.reserve(10)
        with file_size_limit(size), pytest.raises(OSError, match="large"):
            budget.reserve(10)
        assert budget.charged == charged_steps(folder) == 10
        assert budget.reserve(10) == 10
    with open_budget(folder) as budget:
        assert budget.charged == 20


@pytest.mark.parametrize("failing", ["os.fsync", "os.link"])
def test_failing_system_call_grants_nothing(folder, failing, monkeypatch):
    with open_budget(folder) as budget:
        budget.reserve(10)

        def fail(*_):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
            patch.setattr(failing, fail)
            budget.reserve(10)
        assert budget.charged == 10


def test_reservation_is_synced_before_and_after_it_gets_its_name(folder, monkeypatch):
    calls = []
    sync, link = os.fsync, os.link

    def fsync(descriptor):
        calls.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        sync(descriptor)

    with open_budget(folder) as budget, monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        patch.setattr("os.link", lambda *names: calls.append("link") or link(*names))
        budget.reserve(10)
    assert calls == ["sync file", "link", "sync folder"]


def test_failed_settlement_stays_charged_in_full(folder):
    with open_budget(folder) as budget:
        budget.reserve(10)
        with file_size_limit(0), pytest.raises(OSError, match="large"):
            budget.settle(3)
        assert budget.charged == charged_steps(folder) == 10


@pytest.fixture
def small_disk():
    """A file system of 64 KiB; needs root."""
    with tempfile.TemporaryDirectory() as mount:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("cannot mount a tmpfs here; the RLIMIT_FSIZE tests cover the same path")
        try:
            yield Path(mount)
        finally:
            subprocess.run(["umount", mount], check=True)


def test_full_disk_stops_the_trial_and_freeing_it_lets_the_trial_go_on(small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(32 * 1024))
    with open_budget(small_disk / "ledger") as budget:
        granted = 0
        with pytest.raises(OSError, match="No space"):
            while True:
                granted += budget.reserve(1)
        assert 0 < granted == budget.charged == charged_steps(small_disk / "ledger")
        ballast.unlink()
        assert budget.reserve(1) == 1
    with open_budget(small_disk / "ledger") as budget:
        assert budget.charged == granted + 1


# Real processes that are really killed

CHILD = """
import json, sys
from dpsink.privacy.budget import BudgetTerms, TrialBudget

place, terms, chunk, settle = json.loads(sys.argv[1])
with TrialBudget.open(place, BudgetTerms(**terms)) as budget:
    print("open", flush=True)
    while granted := budget.reserve(chunk):
        for _ in range(granted):
            print("step", flush=True)
        if settle:
            budget.settle(granted)
"""


def start_child(folder: Path, *, chunk: int = 3, settle: bool = False) -> subprocess.Popen:
    terms = dataclasses.asdict(dataclasses.replace(TERMS, steps_allowed=10**6))
    arguments = json.dumps([str(folder), terms, chunk, settle])
    command = [sys.executable, "-c", CHILD, arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


def kill_after(child: subprocess.Popen, seconds: float) -> int:
    """Kill a child some time after it has opened the ledger. Returns the steps that it announced as run."""
    assert child.stdout is not None
    assert child.stdout.readline() == b"open\n"
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    announced = child.stdout.read().count(b"step")
    child.wait()
    return announced


@pytest.mark.slow
def test_killed_at_any_instant_the_charge_covers_every_step_that_ran(folder):
    ran = 0
    for life in range(12):
        ran += kill_after(start_child(folder), 0.0031 * life)
        charged = charged_steps(folder)
        assert ran <= charged <= ran + 3 * (life + 1)  # each death loses at most its open reservation
    assert ran > 0


def test_killed_ledger_opens_at_once_and_goes_on(folder):
    kill_after(start_child(folder), 0.02)
    charged = charged_steps(folder)
    with open_budget(folder, steps_allowed=10**6) as budget:
        assert (budget.attempt, budget.charged) == (2, charged)
        assert budget.reserve(5) == 5


@pytest.mark.parametrize("call", ["open", "fsync", "link", "unlink"])
def test_killed_at_any_system_call_of_a_reservation_the_ledger_is_intact(folder, call):
    """The child kills itself just before and just after its n-th call of each kind, for every n."""
    for when, n in [(w, n) for w in ("before", "after") for n in range(3)]:
        place = folder / f"{when}-{n}"
        with open_budget(place) as budget:
            budget.reserve(10)
        assert os.waitstatus_to_exitcode(_reserve_and_die(place, call, when, n)) in (0, -signal.SIGKILL)
        assert charged_steps(place) in (10, 20)
        with open_budget(place) as budget:
            assert budget.reserve(5) == 5


def _reserve_and_die(place: Path, call: str, when: str, n: int) -> int:
    """Fork a child that dies at a system call while it reserves; what it is granted must be on record."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            budget = open_budget(place)
            _die_at(call, when, n)
            granted = budget.reserve(10)
            status = 0 if charged_steps(place) == 10 + granted else 2
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def _die_at(call: str, when: str, n: int) -> None:
    original, calls = getattr(os, call), []

    def deadly(*args, **kwargs):
        calls.append(call)
        if len(calls) > n and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) > n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, call, deadly)


def test_child_that_holds_the_ledger_is_named_in_the_refusal(folder):
    child = start_child(folder)
    assert child.stdout is not None and child.stdout.readline() == b"open\n"
    try:
        with pytest.raises(InputError, match=f"in use by process {child.pid} "):
            open_budget(folder, steps_allowed=10**6)
    finally:
        child.kill()
        child.communicate()


def test_settling_child_is_charged_for_exactly_what_it_ran_but_its_last_reservation(folder):
    ran = kill_after(start_child(folder, settle=True), 0.05)
    assert ran <= charged_steps(folder) <= ran + 3


# The chain under both ledgers


def test_chain_keeps_what_it_was_told(tmp_path):
    with Chain.open(FolderStorage(tmp_path), {"a": 1}) as chain:
        chain.append("x.json", {"value": [1, 2]})
    with Chain.open(FolderStorage(tmp_path), {"a": 1}) as chain:
        assert chain.data["x.json"] == {"value": [1, 2]}


def test_name_that_is_taken_is_refused(tmp_path):
    with Chain.open(FolderStorage(tmp_path), {}) as chain:
        chain.append("x.json", {})
        with pytest.raises(FileExistsError):
            chain.append("x.json", {})


def test_objects_are_readable_by_their_owner_only(tmp_path):
    with Chain.open(FolderStorage(tmp_path), {}):
        assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.json")} == {0o600}
