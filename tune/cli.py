"""`dpsink-tune sweep · repeat · check · status · ui · track · schema`: hyperparameter studies from a shell."""

import os
import signal
import time
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.live import Live

from dpsink import console
from dpsink.commands.options import DataRoot, Json

if TYPE_CHECKING:  # it takes seconds
    from tune.study import Study

LogLevel = Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="what is told beside the table")]
Address = Annotated[
    str | None, typer.Option(help="of a Ray cluster, or auto on one of its nodes; default: this machine alone")
]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="a study's YAML file, folder or name")]
WATCH_SECONDS = 2.0

app = console.new_app("dpsink-tune", "Run hyperparameter studies of private generators under one budget.")


def main() -> None:
    """Entry point of the console script."""
    console.run(app)


@app.command()
def sweep(
    study_file: Annotated[Path, typer.Argument(help="YAML of the study")],
    data_root: DataRoot = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="run failed trials again")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="tell what it would run, cost and take; no more")] = False,
    address: Address = None,
    log_level: LogLevel = "info",
    as_json: Json = False,
) -> None:
    """Run a study. To resume it, run the same command again."""
    from tune.study import load_study

    console.set_up_logging(log_level)
    study = load_study(study_file)
    if dry_run:
        _show_forecast(study, data_root, as_json)
        return
    _run(study, data_root, address, retry_failed, as_json)


@app.command()
def repeat(
    study: StudyArgument,
    top: Annotated[int, typer.Option(min=1, help="how many of its best configurations")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="trials of each, and of the control, with fresh noise")] = 3,
    by: Annotated[str | None, typer.Option(help="metric to rank by; default: its first objective")] = None,
    name: Annotated[str | None, typer.Option(help="of the new study; default: NAME-repeat")] = None,
    data_root: DataRoot = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="run failed trials again")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="tell what it would run, cost and take; no more")] = False,
    address: Address = None,
    log_level: LogLevel = "info",
    as_json: Json = False,
) -> None:
    """Train the best of a finished study again, as a study of its own; to resume it, run the same command again."""
    from tune.repeat import repetition

    console.set_up_logging(log_level)
    again = repetition(study, top=top, seeds=seeds, by=by, name=name)
    if dry_run:
        _show_forecast(again, data_root, as_json)
    else:
        _run(again, data_root, address, retry_failed, as_json)


def _run(study: "Study", data_root: Path | None, address: str | None, retry_failed: bool, as_json: bool) -> None:
    """A session of a study, what came of it, and the exit code."""
    from tune.nodes import cluster
    from tune.room import Blocked
    from tune.sweep import run_study

    try:
        with cluster(address) if address else nullcontext():
            outcome = run_study(study, data_root=data_root, retry_failed=retry_failed)
    except Blocked as full:  # before a trial could start
        console.fail(str(full), console.FAILED)
    from tune.summary import print_summary, summarise

    document = summarise(outcome, study)
    if as_json:
        console.print_json(document)
    else:
        print_summary(document)
    if not outcome.finished:
        code = console.INTERRUPTED if outcome.interrupted else console.FAILED
        console.fail(f"{outcome.problem}{_progress(study, document)}; run the same command again to go on", code)
    if outcome.best is None:
        sealed = "no winner: every trial of the selection failed; why stays sealed"
        console.fail(sealed if study.sealed else "no searched trial completed; the reasons are above", console.FAILED)


def _progress(study: "Study", document: dict[str, Any]) -> str:
    """How far a study is, unless that is secret."""
    from tune.schema import ENDED

    if study.sealed:
        return ""
    ended = sum(state in ENDED for state in document["trials"].values())
    return f": {ended} of {study.trials} trials have ended"


def _show_forecast(study: "Study", data_root: Path | None, as_json: bool) -> None:
    from tune.forecast import forecast, print_forecast

    document = forecast(study, data_root)
    if as_json:
        console.print_json(document)
    else:
        print_forecast(document)


@app.command()
def schema() -> None:
    """Print the JSON Schema of study files, for an editor."""
    from tune.grammar import study_schema

    console.print_json(study_schema())


@app.command()
def track(
    study_folder: Annotated[Path, typer.Argument(help="folder of the study")],
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow; default: the study's own")] = None,
    log_level: LogLevel = "info",
) -> None:
    """Rebuild a study's runs in MLflow from its folder; safe to repeat."""
    from tune.folder import StudyFolder
    from tune.lock import only_one
    from tune.outage import told_when_lost
    from tune.schema import shown_uri
    from tune.tracking import rebuild

    console.set_up_logging(log_level)
    folder = StudyFolder(study_folder)
    record = folder.read_study()
    uri = tracking_uri or record.tracking_uri
    with only_one(folder), told_when_lost(uri):  # a sweep at work writes the runs itself
        rebuild(folder, uri, unfinished="interrupted")
    console.out.print(f"{len(folder.trials())} trials of {record.name} are in {shown_uri(uri)}", markup=False)


@app.command()
def check(
    study_file: Annotated[Path, typer.Argument(help="YAML of the study")],
    data_root: DataRoot = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Find out what would stop a study before it is started; exit code 2 where something would."""
    from tune.study import load_study

    console.set_up_logging()
    study = load_study(study_file)
    from tune.check import Preflight, look

    findings = []
    with closing(Preflight(study, data_root, address=address)) as preflight:
        for finding in look((*preflight.quick(), *preflight.thorough())):
            findings.append(finding)
            if not as_json:
                words = f"{finding.mark:<8} {finding.name + ':':<15} {finding.text}"
                console.out.print(words, markup=False, soft_wrap=True)
    if as_json:
        console.print_json([asdict(finding) for finding in findings])
    if problems := sum(finding.made and not finding.ok for finding in findings):
        console.fail(f"{problems} of {len(findings)} checks found a problem", console.BAD_INPUT)


@app.command()
def status(
    study: StudyArgument,
    watch: Annotated[bool, typer.Option("--watch", help="look again every two seconds until the sweep ends")] = False,
    as_json: Json = False,
) -> None:
    """Show how a study stands, from another terminal, while it runs and afterwards."""
    from tune.status import Reader, document, find_folder, picture

    reader = Reader(find_folder(study))
    if as_json:
        console.print_json(document(reader.read()))
    elif watch and console.out.is_terminal:
        with Live(picture(reader.read()), console=console.out, auto_refresh=False, vertical_overflow="visible") as live:
            while (now := reader.read()).holder:
                live.update(picture(now), refresh=True)
                time.sleep(WATCH_SECONDS)
            live.update(picture(now), refresh=True)
    else:
        console.out.print(picture(reader.read()), soft_wrap=True)


@app.command()
def ui(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="its file, folder or name")] = None,
) -> None:
    """Open MLflow's pages about a study: starts its server on this machine, prints the links, ends with Ctrl-C."""
    from tune.status import STORAGE, find_folder
    from tune.ui import serving, study_links

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server too
    folder = find_folder(study) if study else None
    default = f"sqlite:///{Path(STORAGE).absolute()}/mlflow.db"
    uri = folder.read_study().tracking_uri if folder else os.environ.get("MLFLOW_TRACKING_URI") or default
    with serving(uri) as server:
        shown = study_links(folder, server, uri) if folder else {"studies": f"{server}/#/experiments"}
        for name, link in shown.items():
            console.out.print(f"{name + ':':<8} {link}", markup=False, soft_wrap=True)
        if uri.startswith("sqlite:"):
            console.err.print("Ctrl-C ends the server", markup=False)
            with suppress(KeyboardInterrupt):
                signal.pause()


if __name__ == "__main__":
    main()
