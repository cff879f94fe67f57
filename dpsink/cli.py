"""`dpsink train · evaluate · sample · budget · audit`: one trial, from a shell."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpsink import console
from dpsink.config import OWN, DataConfig, Performance, TrialConfig, config_sha256, load_config, validate
from dpsink.errors import InputError

app = console.new_app("dpsink", "Train, evaluate and sample one differentially private generator.")

MAX_SEED = 2**32 - 1

Overrides = Annotated[list[str] | None, typer.Argument(help="path.to.key=value, applied after --config")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, logs on stderr")]
DataRoot = Annotated[
    Path | None, typer.Option(help="folder that the data lie in; default $DPSINK_DATA_ROOT or ./datasets")
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to the tensor library")]
Run = Annotated[Path, typer.Argument(help="folder of a run, a checkpoint or an export")]


def main() -> None:
    """Entry point of the console script."""
    console.run(app)


@app.command()
def train(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="YAML of the trial")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/NAME-HASH")] = None,
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="fetch the data set if missing")] = False,
    threads: Threads = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    precision: Annotated[str, typer.Option(help="single, tf32 (faster products of a GPU) or double")] = "single",
    as_json: Json = False,
) -> None:
    """Train one trial. To resume it, run the same command again."""
    from dpsink.data import load_dataset
    from dpsink.training import read_result

    console.set_up_logging()
    trial = load_config(config, overrides or ())
    folder = out or default_folder(config, trial)
    settings = {"threads": threads, "device": device, "precision": precision}
    performance = validate(Performance, settings, source="performance")
    data = load_dataset(trial.data, root=data_root, download=download)
    if not _train_with_progress(trial, data, folder, performance, quiet=as_json):
        console.fail(f"stopped; run the same command again to go on ({folder})", console.INTERRUPTED)
    _show_result(folder, read_result(folder), as_json)


@app.command()
def evaluate(
    run: Run,
    samples: Annotated[int, typer.Option(min=20, help="synthetic images to train and compare on")] = 10_000,
    split: Annotated[str, typer.Option(help="test or validation: the real images to judge by")] = "test",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="of latents and classifiers")] = 0,
    extractor: Annotated[str, typer.Option(help="features for FID: classifier or inception")] = "classifier",
    inception_weights: Annotated[Path | None, typer.Option(help="file of torch-fidelity's weights")] = None,
    data_root: DataRoot = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Judge a generator: classifiers trained on its samples and tested on real images, FID, variety."""
    from dpsink.judging import judge
    from dpsink.training import use_threads

    console.set_up_logging()
    use_threads(threads)
    answer = judge(
        run, samples=samples, split=split, seed=seed, extractor=extractor, inception_weights=inception_weights,
        data_root=data_root,
    )  # fmt: skip
    if as_json:
        console.print_json(answer)
        return
    rows = console.table("metric", split)
    for name, value in answer["metrics"].items():
        rows.add_row(name, console.metric_text(value))
    console.out.print(rows)
    console.out.print(answer["privacy"], markup=False, soft_wrap=True)


@app.command()
def sample(
    run: Run,
    out: Annotated[Path, typer.Option(help="the npz file to write")],
    count: Annotated[int, typer.Option(min=1, help="number of images, balanced over the classes")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="of the latents")] = 0,
    force: Annotated[bool, typer.Option("--force", help="replace an existing file")] = False,
    as_json: Json = False,
) -> None:
    """Write a labelled synthetic data set with its privacy card beside it."""
    from dpsink.checkpoint import load_generator
    from dpsink.judging import privacy_card
    from dpsink.synthesis import synthesize

    if out.exists() and not force:
        raise InputError(f"{out}: exists; choose another --out, or --force to replace it")
    if out.suffix != ".npz":
        raise InputError(f"{out}: must end in .npz")
    generator, description = load_generator(run)
    card = privacy_card(run, description)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        written = synthesize(generator, description, card, count=count, seed=seed, out=out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    if as_json:
        console.print_json({"images": str(written[0]), "card": str(written[1]), **card})
        return
    console.out.print(f"{count:,} images: {written[0]}\nprivacy card: {written[1]}", markup=False, soft_wrap=True)


@app.command()
def budget(
    delta: Annotated[float, typer.Option(help="of the (epsilon, delta) guarantee")],
    target_epsilon: Annotated[float, typer.Option(help="the bound")],
    noise_multiplier: Annotated[list[float], typer.Option(help="σ; may be given several times")],
    sample_rate: Annotated[float | None, typer.Option(help="q; or give --data and --batch-size")] = None,
    data: Annotated[str | None, typer.Option(help="a built-in data set")] = None,
    batch_size: Annotated[int | None, typer.Option(help="expected batch, q·N")] = None,
    validation_size: Annotated[int | None, typer.Option(help="images held out of training")] = None,
    plot: Annotated[Path | None, typer.Option(help="a PNG of ε over the steps, by each accountant")] = None,
    as_json: Json = False,
) -> None:
    """Steps that a target allows, by each accountant, without training."""
    rate = sample_rate if sample_rate is not None else _rate_of(data, batch_size, validation_size, delta)
    rows = [_budget_row(sigma, rate, delta, target_epsilon) for sigma in noise_multiplier]
    if plot is not None:
        from dpsink.figures import save_epsilon_figure

        save_epsilon_figure(rows, plot)
    if as_json:
        console.print_json(rows[0] if len(rows) == 1 else rows)
        return
    shown = console.table("σ", "q", "δ", "ε", "steps (PLD)", "steps (RDP)", "ε of RDP's steps by PLD")
    for row in rows:
        steps = row["max_steps"]
        shown.add_row(
            f"{row['noise_multiplier']:g}", f"{rate:.4g}", f"{delta:g}", f"{target_epsilon:g}",
            f"{steps['pld']:,}", f"{steps['rdp']:,}", f"{row['pld_epsilon_of_rdp_steps']:.3f}",
        )  # fmt: skip
    console.out.print(shown)
    if plot is not None:
        console.out.print(f"picture: {plot}", markup=False, soft_wrap=True)


@app.command()
def audit(
    mechanism: Annotated[Literal["record", "batch"], typer.Option(help="what to attack")] = "record",
    one_run: Annotated[bool, typer.Option("--one-run", help="attack a whole training run, not one step")] = False,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="σ that is claimed; default 1.1, with --one-run 6")
    ] = None,
    delta: Annotated[float, typer.Option(help="of the (epsilon, delta) guarantee")] = 1e-5,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Attack a mechanism and hold the epsilon that is measured against the claimed one; exit code 1 if it is above."""
    from dpsink.privacy import audit as audits
    from dpsink.training import use_threads

    use_threads(threads)
    usual = audits.TRIAL_NOISE_MULTIPLIER if one_run else audits.STEP_NOISE_MULTIPLIER
    sigma = usual if noise_multiplier is None else noise_multiplier
    if one_run:
        found = audits.audit_trial(mechanism, noise_multiplier=sigma, delta=delta)
    else:
        found = audits.audit_step(audits.audit_mechanism(mechanism), noise_multiplier=sigma, delta=delta)
    _show_audit(found, audits.LIMITS, as_json)
    if found.violated:
        raise typer.Exit(console.FAILED)


def default_folder(config: Path | None, trial: TrialConfig) -> Path:
    """runs/NAME-HASH: the same settings always name the same folder, so the same command resumes."""
    data = trial.data.path.stem if trial.data.path else trial.data.name
    return Path("runs") / f"{config.stem if config else data}-{config_sha256(trial)[:8]}"


def _train_with_progress(trial: TrialConfig, data: Any, folder: Path, performance: Performance, *, quiet: bool) -> bool:
    """Trains with a bar on stderr; False if a signal stopped it."""
    from dpsink.training import RUNNING, read_result
    from dpsink.training import train as run_training

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f} steps"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    bar = Progress(*columns, console=console.err, disable=quiet or not console.err.is_terminal)
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


def _budget_row(sigma: float, sample_rate: float, delta: float, target_epsilon: float) -> dict[str, Any]:
    from dpsink.privacy.accounting import epsilon, max_steps

    terms: dict[str, Any] = {"sample_rate": sample_rate, "noise_multiplier": sigma, "delta": delta}
    steps = {
        "pld": max_steps(target_epsilon=target_epsilon, **terms, accountant="pld"),
        "rdp": max_steps(target_epsilon=target_epsilon, **terms, accountant="rdp"),
    }
    spent = epsilon(steps=steps["rdp"], **terms)
    return {**terms, "target_epsilon": target_epsilon, "max_steps": steps, "pld_epsilon_of_rdp_steps": spent}


def _show_audit(found: Any, limits: str, as_json: bool) -> None:
    facts = vars(found)
    if as_json:
        console.print_json({**facts, "violated": found.violated, "verdict": found.verdict, "limits": limits})
        return
    rows = console.table("audit", "")
    for name, value in facts.items():
        if value is not None:
            rows.add_row(name, console.metric_text(value) if isinstance(value, float) else str(value))
    console.out.print(rows)
    console.out.print(f"{found.verdict}\n{limits}", markup=False, soft_wrap=True)


def _rate_of(data: str | None, batch_size: int | None, validation_size: int | None, delta: float) -> float:
    from dpsink.config import validate
    from dpsink.data import private_records

    if data is None or batch_size is None:
        raise InputError("give --sample-rate, or --data and --batch-size")
    if data.startswith(OWN):
        raise InputError(
            f"--data={data}: give --sample-rate = batch size / N; N of own data follows from their settings"
        )
    tree: dict[str, Any] = {"name": data}
    if validation_size is not None:
        tree["validation_size"] = validation_size
    records = private_records(validate(DataConfig, tree, source="--data"))
    if not 1 <= batch_size <= records:
        raise InputError(f"--batch-size={batch_size} must be in [1, {records}], the private records of {data}")
    if delta >= 1 / records:
        raise InputError(f"--delta={delta:g} must be below 1/N = {1 / records:.3g}; choose {0.1 / records:.0e} or less")
    return batch_size / records


if __name__ == "__main__":
    main()
