"""`dpsink train`: one trial, to its end."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dpsink import console
from dpsink.commands.options import DataRoot, Device, Json, Overrides, SkipBad, Threads, with_skip_bad
from dpsink.config import Performance, TrialConfig, config_sha256, load_config, validate


def train(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="YAML of the trial")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/NAME-HASH")] = None,
    data_root: DataRoot = None,
    skip_bad: SkipBad = False,
    download: Annotated[bool, typer.Option("--download", help="fetch the data set if missing")] = False,
    threads: Threads = 0,
    device: Device = "cpu",
    precision: Annotated[str, typer.Option(help="single, tf32 (faster products of a GPU) or double")] = "single",
    as_json: Json = False,
) -> None:
    """Train one trial. To resume it, run the same command again."""
    from dpsink.data import load_dataset
    from dpsink.training import read_result

    console.set_up_logging()
    trial = load_config(config, with_skip_bad(overrides, skip_bad))
    folder = out or default_folder(config, trial)
    settings = {"threads": threads, "device": device, "precision": precision}
    performance = validate(Performance, settings, source="performance")
    data = load_dataset(trial.data, root=data_root, download=download)
    if not _train_with_progress(trial, data, folder, performance, quiet=as_json):
        console.fail(f"stopped; run the same command again to go on ({folder})", console.INTERRUPTED)
    _show_result(folder, read_result(folder), as_json)


def default_folder(config: Path | None, trial: TrialConfig) -> Path:
    """runs/NAME-HASH: the same settings always name the same folder, so the same command resumes."""
    data = trial.data.path.stem if trial.data.path else trial.data.name
    return Path("runs") / f"{config.stem if config else data}-{config_sha256(trial)[:8]}"


def _train_with_progress(trial: TrialConfig, data: Any, folder: Path, performance: Performance, *, quiet: bool) -> bool:
    """Trains with a bar on stderr; False if a signal stopped it."""
    from dpsink.training import RUNNING, read_result
    from dpsink.training import train as run_training

    bar = console.progress("steps", quiet=quiet)
    with console.stop_on_signals() as should_stop, bar:
        task = bar.add_task("preparing", total=None)

        def show(progress: Any) -> None:
            bar.update(
                task, description=f"ε ≤ {progress.epsilon_bound:.3g}", completed=progress.step, total=progress.total
            )

        ended = read_result(folder) is not None
        for report in run_training(
            trial, data, folder, performance=performance, should_stop=should_stop, on_progress=show
        ):
            bar.update(task, completed=report.step)
            _print_report(report)
            ended = report.status != RUNNING
    return ended


def _print_report(report: Any) -> None:
    metrics = "  ".join(f"{name} {console.metric_text(value)}" for name, value in report.metrics.items())
    console.err.print(f"step {report.step:,}  ε {report.epsilon:.4g}  {metrics}", markup=False, soft_wrap=True)


def _show_result(folder: Path, report: Any, as_json: bool) -> None:
    if as_json:
        console.print_json({"folder": str(folder), **report.model_dump()})
        return
    console.out.print(
        f"{report.status}: {report.step:,} steps, ε = {report.epsilon:.4g}, "
        f"{report.steps_per_second:.1f} steps/s\nfolder: {folder}\nnext:   dpsink evaluate {folder}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
