"""Versions between nodes: everything that a trial computes with is compared."""

import re
from collections.abc import Callable
from configparser import ConfigParser
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dpsink.errors import InputError
from tests.test_tracking import Fake, make_study
from tune.packing import Packing, run_packed
from tune.trainable import run_trial
from tune.versions import DRIVERS_OWN, deciding_versions, differences, require_same, versions


def test_every_dependency_is_compared_but_those_of_the_driver_alone() -> None:
    parser = ConfigParser()
    parser.read(Path(__file__).parents[1] / "setup.cfg")
    lines = parser["options"]["install_requires"].split()
    needed = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines}
    assert needed >= DRIVERS_OWN
    assert set(versions()) == needed - DRIVERS_OWN | {"python", "dpsink"}
    assert "missing" not in versions().values()


def test_differences_name_what_is_there_and_what_is_wanted() -> None:
    assert differences({"torch": "1", "numpy": "2", "more": "3"}, {"torch": "2", "numpy": "2", "scipy": "1"}) == [
        "torch 1 instead of 2", "scipy missing instead of 1",
    ]  # fmt: skip


def test_a_node_of_another_version_trains_nothing() -> None:
    require_same(deciding_versions())
    with pytest.raises(InputError, match=r"it has torch .* instead of 1\.0, which the study's driver has"):
        require_same(deciding_versions() | {"torch": "1.0"})


@pytest.mark.parametrize("run", [run_trial, partial(run_packed, packing=Packing("study", 2))])
def test_a_trial_on_a_node_of_another_version_fails_before_a_step_is_charged(
    tmp_path: Path, run: Callable[[dict[str, Any]], None]
) -> None:
    folder = make_study(tmp_path / "study", [Fake("one", state=None, epsilons=())], "")
    given = {"folder": str(folder.path), "trial": "one", "data_root": str(tmp_path), "fingerprint": "", "threads": 1}
    with pytest.raises(InputError, match="it has torch"):
        run(given | {"versions": {"torch": "1.0"}})
    assert not folder.run("one").exists()
