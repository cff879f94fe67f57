"""`dpsink audit`: a claim under attack."""

from typing import Annotated, Any, Literal

import typer

from dpsink import console
from dpsink.commands.options import Json, Threads


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
