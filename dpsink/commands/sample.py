"""`dpsink sample`: a synthetic data set with its privacy card."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dpsink import console
from dpsink.commands.options import MAX_SEED, Device, Json, Run, Threads, use_device
from dpsink.errors import InputError

if TYPE_CHECKING:  # it takes seconds
    from torch import Tensor

    from dpsink.records import CheckpointState

COUNT = 10_000


def sample(
    run: Run,
    out: Annotated[Path, typer.Option(help="NAME.npz, NAME.parquet, or NAME for a folder of PNGs")],
    form: Annotated[
        Literal["npz", "png", "parquet"] | None, typer.Option("--format", help="what --out must be named for")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help=f"number of images, balanced over the classes; default {COUNT:,}")
    ] = None,
    per_class: Annotated[int | None, typer.Option(min=1, help="images of each class")] = None,
    class_counts: Annotated[str | None, typer.Option(help="images of some classes: 0=100,3=50")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="of the latents")] = 0,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier data set")] = False,
    device: Device = "cpu",
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Write a labelled synthetic data set with its privacy card."""
    from dpsink.checkpoint import load_generator
    from dpsink.judging import privacy_card, privacy_line
    from dpsink.writing import check_target, format_of, synthesize

    if form is not None and form != format_of(out):
        raise InputError(f"--format={form} does not go with --out={out}: npz and parquet are suffixes, png has none")
    check_target(out, force=force)
    use_device(device, threads)
    generator, description = load_generator(run)
    labels = _labels(description, count, per_class, class_counts)
    card = privacy_card(run, description)
    with console.stop_on_signals() as should_stop, console.progress("images", quiet=as_json) as bar:
        task = bar.add_task("writing", total=len(labels))

        def show(done: int) -> None:
            bar.update(task, completed=done)
            if should_stop():
                raise KeyboardInterrupt

        try:
            data, card_file = synthesize(
                generator.to(device), description, card, labels=labels, seed=seed, out=out, on_progress=show
            )  # fmt: skip
        except KeyboardInterrupt:
            console.fail(f"stopped; nothing was written to {out}", console.INTERRUPTED)
    if as_json:
        console.print_json({**card, "seed": seed, "images": str(data), "card": str(card_file), "count": len(labels)})
        return
    lines = f"{len(labels):,} images: {data}\nprivacy card: {card_file}\n{privacy_line(card)}"
    console.out.print(lines, markup=False, soft_wrap=True)


def _labels(
    description: "CheckpointState", count: int | None, per_class: int | None, class_counts: str | None
) -> "Tensor":
    """The labels that the options ask for; without options, a balanced set."""
    from dpsink.synthesis import balanced_labels, labels_of
    from dpsink.writing import is_conditional

    classes = description.num_classes
    given = {"--count": count, "--per-class": per_class, "--class-counts": class_counts}
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) > 1:
        raise InputError(f"give one of {' and '.join(asked)}, not both")
    if asked and asked != ["--count"] and not is_conditional(description):
        raise InputError(f"{asked[0]}: this generator knows no classes (generator.conditional=false); give --count")
    if per_class is not None:
        return labels_of([per_class] * classes)
    if class_counts is not None:
        return labels_of(_parsed_counts(class_counts, classes))
    return balanced_labels(count or COUNT, classes)


def _parsed_counts(text: str, classes: int) -> list[int]:
    counts = [0] * classes
    for part in text.split(","):
        label, _, number = (word.strip() for word in part.partition("="))
        if not (label.isdecimal() and number.isdecimal() and int(label) < classes) or counts[int(label)]:
            raise InputError(
                f"--class-counts={text}: '{part}' must be CLASS=COUNT, each class of 0 to {classes - 1} at most once"
            )
        counts[int(label)] = int(number)
    if not sum(counts):
        raise InputError(f"--class-counts={text}: must ask for an image")
    return counts
