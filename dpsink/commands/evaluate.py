"""`dpsink evaluate`: the last word on synthetic images."""

from pathlib import Path
from typing import Annotated

import typer

from dpsink import console
from dpsink.commands.options import MAX_SEED, DataRoot, Json, Run, Threads


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
