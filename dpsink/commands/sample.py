"""`dpsink sample`: a synthetic data set with its privacy card."""

from pathlib import Path
from typing import Annotated

import typer

from dpsink import console
from dpsink.commands.options import MAX_SEED, Json, Run
from dpsink.errors import InputError


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
