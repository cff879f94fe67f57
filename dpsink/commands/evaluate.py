"""`dpsink evaluate`: the last word on synthetic images."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dpsink import console
from dpsink.commands.options import (
    MAX_SEED,
    DataRoot,
    Device,
    Download,
    InceptionWeights,
    Json,
    SkipBad,
    Threads,
    use_device,
    with_skip_bad,
)
from dpsink.config import DataConfig, load_config

DISTANCES = ("fid", "kid")  # what has a floor


def evaluate(
    place: Annotated[
        Path, typer.Argument(help="folder of a run, a checkpoint or an export; or images: an npz, a folder of classes")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="for images: data.key=value, as in a trial")] = None,
    data: Annotated[str | None, typer.Option(help="for images: the data set that they imitate, such as mnist")] = None,
    config: Annotated[Path | None, typer.Option(help="for images: YAML of a trial, for its data")] = None,
    samples: Annotated[int, typer.Option(min=20, help="synthetic images to train and compare on")] = 10_000,
    split: Annotated[str, typer.Option(help="test or validation: the real images to judge by")] = "test",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="the first, of latents and classifiers")] = 0,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="how many seeds: mean and 95 % interval")] = 1,
    control: Annotated[Path | None, typer.Option(help="run of the class-mean control at the same ε and δ")] = None,
    extractor: Annotated[str, typer.Option(help="features for FID: classifier or inception")] = "classifier",
    inception_weights: InceptionWeights = None,
    data_root: DataRoot = None,
    download: Download = False,
    skip_bad: SkipBad = False,
    device: Device = "cpu",
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Judge synthetic images: classifiers trained on them and tested on real images, FID, KID, recall, variety."""
    from dpsink.judging import judge

    console.set_up_logging()
    use_device(device, threads)
    with console.progress("evaluations", quiet=as_json) as bar:
        task = bar.add_task("judging", total=None)
        answer = judge(
            place, samples=samples, split=split, seed=seed, seeds=seeds, extractor=extractor, control=control,
            inception_weights=inception_weights, data=_data(data, config, overrides, skip_bad), data_root=data_root,
            skip_bad=skip_bad, download=download, device=device,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if as_json:
        console.print_json(answer)
    else:
        _show(answer)


def _data(name: str | None, config: Path | None, overrides: list[str] | None, skip_bad: bool) -> DataConfig | None:
    """What the options say about the real images; None where they say nothing."""
    if name is None and config is None and not overrides:
        return None
    named = [f"data.name={name}"] if name is not None else []
    return load_config(config, with_skip_bad([*named, *(overrides or ())], skip_bad)).data


def _show(answer: dict[str, Any]) -> None:
    several, control, floor = len(answer["seeds"]) > 1, answer["control"], answer["floor"]
    columns = [answer["split"], *(["± 95 %"] if several else []), *(["class means"] if control else []), "floor"]
    rows = console.table("metric", *columns)
    for name, value in answer["metrics"].items():
        cells = [console.metric_text(value)]
        cells += [console.metric_text(answer["intervals"][name])] if several else []
        cells += [console.metric_text(control["metrics"].get(name))] if control else []
        rows.add_row(name, *cells, console.metric_text(floor[name]) if name in DISTANCES else "")
    console.out.print(rows)
    for line in _notes(answer):
        console.out.print(line, markup=False, soft_wrap=True)


def _notes(answer: dict[str, Any]) -> list[str]:
    """What the figures are of, the guarantee last."""
    seeds = answer["seeds"]
    drawn = f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    lines = [
        f"{answer['samples']:,} synthetic against {answer['reference_images']:,} real images, {drawn}, "
        f"extractor {answer['extractor']}",
        f"floor: {answer['floor']['of']}, under the same extractor",
    ]
    if answer["control"]:
        lines.append(f"class means: the control at the same ε and δ, {answer['control']['source']}")
    elif answer["control_command"]:
        lines.append(f"for the class-mean control beside it: {answer['control_command']}, then --control RUN")
    return [*lines, answer["privacy"]]
