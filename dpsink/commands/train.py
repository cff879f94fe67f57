"""`dpsink train`: one trial, to its end."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpsink import console
from dpsink.commands.options import (
    DataRoot,
    Device,
    Download,
    InceptionWeights,
    Json,
    Overrides,
    SkipBad,
    Threads,
    with_skip_bad,
)
from dpsink.config import Performance, TrialConfig, config_sha256, load_config, validate

if TYPE_CHECKING:  # it takes seconds
    from dpsink.data import ImageData
    from dpsink.records import Report

FloorOf = Callable[[], Mapping[str, Any]]


def train(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="YAML of the trial")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/NAME-HASH")] = None,
    data_root: DataRoot = None,
    skip_bad: SkipBad = False,
    download: Download = False,
    inception_weights: InceptionWeights = None,
    threads: Threads = 0,
    device: Device = "cpu",
    precision: Annotated[str, typer.Option(help="single, tf32 (faster products of a GPU) or double")] = "single",
    as_json: Json = False,
) -> None:
    """Train one trial. To resume it, run the same command again."""
    from dpsink.data import load_dataset
    from dpsink.training import read_result
    from dpsink.training import train as run_training

    console.set_up_logging()
    trial = load_config(config, with_skip_bad(overrides, skip_bad))
    folder = out or default_folder(config, trial)
    settings = {"threads": threads, "device": device, "precision": precision}
    performance = validate(Performance, settings, source="performance")
    data = load_dataset(trial.data, root=data_root, download=download)
    floor = _floor_of(trial, data, inception_weights, device, download=download)
    reports = partial(run_training, trial, data, folder, performance=performance, inception_weights=inception_weights)
    if not _train_with_progress(reports, floor, read_result(folder) is not None, quiet=as_json):
        console.fail(f"stopped; run the same command again to go on ({folder})", console.INTERRUPTED)
    _show_result(folder, read_result(folder), floor(), as_json)


def default_folder(config: Path | None, trial: TrialConfig) -> Path:
    """runs/NAME-HASH: the same settings always name the same folder, so the same command resumes."""
    data = trial.data.path.stem if trial.data.path else trial.data.name
    return Path("runs") / f"{config.stem if config else data}-{config_sha256(trial)[:8]}"


def _floor_of(
    trial: TrialConfig, data: "ImageData", weights: Path | None, device: str, *, download: bool
) -> FloorOf:  # fmt: skip
    """What measures the floor that stands beside each FID, once one is told; it gives nothing where none ever is."""
    from dpsink.evaluation import build_extractor, distance_floor, require_extractor

    reference, name = data.public_validation, trial.evaluation.extractor
    if reference is None:
        return dict
    require_extractor(name, weights=weights, download=download)
    return cache(lambda: asdict(distance_floor(data, build_extractor(name, reference, weights=weights, device=device))))


def _train_with_progress(
    reports: Callable[..., Iterator["Report"]], floor: FloorOf, ended: bool, *, quiet: bool
) -> bool:  # fmt: skip
    """Trains with a bar on stderr; False if a signal stopped it."""
    from dpsink.training import RUNNING

    bar = console.progress("steps", quiet=quiet)
    with console.stop_on_signals() as should_stop, bar:
        task = bar.add_task("preparing", total=None)

        def show(progress: Any) -> None:
            bar.update(
                task, description=f"ε ≤ {progress.epsilon_bound:.3g}", completed=progress.step, total=progress.total
            )

        for report in reports(should_stop=should_stop, on_progress=show):
            bar.update(task, completed=report.step)
            metrics = _metrics_text(report, floor())
            console.err.print(f"step {report.step:,}  ε {report.epsilon:.4g}  {metrics}", markup=False, soft_wrap=True)
            ended = report.status != RUNNING
    return ended


def _metrics_text(report: "Report", floor: Mapping[str, Any]) -> str:
    """The metrics of a report in a line; a distance with what real images score against real ones."""
    floors = {name: f" (floor {console.metric_text(floor[name])})" for name in ("fid", "kid") if name in floor}
    return "  ".join(
        f"{name} {console.metric_text(value)}{floors.get(name, '')}" for name, value in report.metrics.items()
    )


def _show_result(folder: Path, report: Any, floor: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json({"folder": str(folder), **report.model_dump(), "floor": floor or None})
        return
    lines = [
        f"{report.status}: {report.step:,} steps, ε = {report.epsilon:.4g}, {report.steps_per_second:.1f} steps/s",
        *([f"on validation: {_metrics_text(report, floor)}"] if report.metrics else []),
        f"folder: {folder}",
        f"next:   dpsink evaluate {folder}",
    ]
    console.out.print("\n".join(lines), markup=False, soft_wrap=True)
