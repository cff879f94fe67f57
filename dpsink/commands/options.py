"""Options that several commands have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

MAX_SEED = 2**32 - 1

Overrides = Annotated[list[str] | None, typer.Argument(help="path.to.key=value, applied after --config")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, logs on stderr")]
DataRoot = Annotated[
    Path | None, typer.Option(help="folder that the data lie in; default $DPSINK_DATA_ROOT or ./datasets")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="go on without images that cannot be read; the same as data.skip_bad=true")
]
Download = Annotated[bool, typer.Option("--download", help="fetch what is missing: the data set, Inception's weights")]
InceptionWeights = Annotated[
    Path | None,
    typer.Option(help="file; default $DPSINK_INCEPTION_WEIGHTS, else in torch hub's cache"),
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: one a core")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
Run = Annotated[Path, typer.Argument(help="folder of a run, a checkpoint or an export")]


def with_skip_bad(overrides: Sequence[str] | None, skip_bad: bool) -> list[str]:
    """The overrides, and the one that --skip-bad stands for: so it is part of the trial, its hash and its record."""
    return [*(overrides or ()), *(["data.skip_bad=true"] if skip_bad else ())]


def use_device(device: str, threads: int) -> None:
    """Prepares this process, or refuses a device that is not there, before anything is read or written."""
    from dpsink.config import Performance, validate
    from dpsink.training import set_up

    set_up(validate(Performance, {"device": device, "threads": threads}, source="performance"))
