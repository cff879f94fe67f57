"""`dpsink budget`: steps that a target allows, without training."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dpsink import console
from dpsink.commands.options import Json
from dpsink.config import OWN, DataConfig, validate
from dpsink.errors import InputError


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


def _budget_row(sigma: float, sample_rate: float, delta: float, target_epsilon: float) -> dict[str, Any]:
    from dpsink.privacy.accounting import epsilon, max_steps

    terms: dict[str, Any] = {"sample_rate": sample_rate, "noise_multiplier": sigma, "delta": delta}
    steps = {
        "pld": max_steps(target_epsilon=target_epsilon, **terms, accountant="pld"),
        "rdp": max_steps(target_epsilon=target_epsilon, **terms, accountant="rdp"),
    }
    spent = epsilon(steps=steps["rdp"], **terms)
    return {**terms, "target_epsilon": target_epsilon, "max_steps": steps, "pld_epsilon_of_rdp_steps": spent}


def _rate_of(data: str | None, batch_size: int | None, validation_size: int | None, delta: float) -> float:
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
