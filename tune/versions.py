"""Versions of what trials compute with: a study's nodes have to have the same."""

import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from dpsink.errors import InputError

# What the driver alone needs, to search, to record and to show; with all other dependencies trials compute.
DRIVERS_OWN = frozenset({"optuna", "mlflow", "typer", "rich", "pandas", "pyarrow", "matplotlib", "jinja2"})
DECIDING = ("dpsink", "torch")  # without the same of these no trial starts


@cache
def versions() -> Mapping[str, str]:
    """Of Python, this package and those of its dependencies that a trial computes with, in this process."""
    needed = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requires("dpsink") or () if "extra ==" not in line]
    compared = ("dpsink", *(name for name in needed if name not in DRIVERS_OWN))
    return {"python": platform.python_version()} | {name: _version(name) for name in compared}


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What has another version there than here."""
    known = {name: there.get(name, "missing") for name in here}
    return [f"{name} {known[name]} instead of {wanted}" for name, wanted in here.items() if known[name] != wanted]


def deciding_versions() -> dict[str, str]:
    """For `require_same`, in the study's driver."""
    return {name: versions()[name] for name in DECIDING}


def require_same(driver: Mapping[str, str]) -> None:
    """Refuses to train with another version than the driver has, before a step is paid for.

    Raises:
        InputError: so it is.
    """
    if other := differences(versions(), driver):
        raise InputError(f"it has {', '.join(other)}, which the study's driver has; make them the same")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
