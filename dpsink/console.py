"""What all commands share: exit codes, one-line errors, JSON on stdout and everything else on stderr."""

import atexit
import gc
import json
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dpsink.errors import InputError

# Typer carries its own copy of click; this is that copy's base of everything a mistyped command raises.
_UsageError: Any = typer.BadParameter.__bases__[0]

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def new_app(name: str, purpose: str) -> typer.Typer:
    """A command group that shows help when it is called bare."""
    return typer.Typer(
        name=name, help=purpose, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )  # fmt: skip


def run(app: typer.Typer) -> None:
    """Runs a command line to its exit code: 0, 1 failed, 2 bad input (one line, no traceback)."""
    atexit.register(gc.freeze)  # the interpreter's last collection would take seconds over torch, Ray and MLflow
    try:
        code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer has caught Ctrl-C, and says nothing
            raise KeyboardInterrupt
        sys.exit(code)
    except InputError as error:
        fail(str(error), BAD_INPUT)
    except PermissionError as error:
        fail(f"{error.filename}: {error.strerror}; ask its owner, or name another place", BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", INTERRUPTED)
    except Exception as error:
        if not isinstance(error, _UsageError):
            raise
        _explain_usage(error.format_message())  # pyright: ignore[reportAttributeAccessIssue]


def _explain_usage(message: str) -> None:
    if "\n" in message:  # called bare: the message is the help text
        err.print(message, markup=False)
        sys.exit(BAD_INPUT)
    fail(f"{message.rstrip('.')}. See --help.", BAD_INPUT)


def fail(message: str, code: int) -> NoReturn:
    """Prints one line on stderr and exits."""
    err.print(f"error: {message}" if code == BAD_INPUT else message, markup=False, soft_wrap=True)
    sys.exit(code)


def set_up_logging(level: str = "info") -> None:
    """Log lines of this project on stderr."""
    handler = RichHandler(console=err, show_path=False, show_level=False, log_time_format="%H:%M:%S")
    logger = logging.getLogger("dpsink")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def print_json(document: Any) -> None:
    """One JSON document on stdout; infinities become strings, so that any parser takes it."""
    json.dump(_plain(document), sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the house style; numbers are right-aligned by `add_row` callers' formatting."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return made


def progress(unit: str, *, quiet: bool = False, transient: bool = False) -> Progress:
    """A bar on stderr with what is done, how long it took and how long it will take; none where no person looks.

    Args:
        transient: whether it goes when it is done.
    """
    done = TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}")
    columns = (
        TextColumn("{task.description}"), BarColumn(), done,
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    return Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=transient)


def metric_text(value: float | None) -> str:
    """A metric for a table: four significant digits, a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def floor_text(floor: Mapping[str, Any]) -> str:
    """The floor of FID and KID in a line: what real images score against real ones, and which those are."""
    fid, kid = (metric_text(floor[name]) for name in ("fid", "kid"))
    return f"real images against real ones have FID {fid}, KID {kid}: {floor['of']}"


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a flag, so that a trial can end cleanly; a second Ctrl-C kills."""
    asked: list[int] = []

    def ask(number: int, _frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        err.print("stopping at the next step …", markup=False)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
