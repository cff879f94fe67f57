"""Pictures of numbers that `dpsink` knows: ε over steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpsink.errors import InputError
from dpsink.privacy.accounting import epsilon_curve
from dpsink.privacy.questions import Accountant

POINTS = 24  # per curve
STYLES: tuple[tuple[Accountant, str], ...] = (("pld", "-"), ("rdp", "--"))


def save_epsilon_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """ε over the number of steps for each noise multiplier, by both accountants, with the target.

    Args:
        rows: as `dpsink budget --json` prints them.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        last = max(1, row["max_steps"]["pld"])
        steps = sorted({max(1, round(last * k / POINTS)) for k in range(1, POINTS + 1)})
        for accountant, line in STYLES:
            curve = epsilon_curve(
                steps=steps, delta=row["delta"], sample_rate=row["sample_rate"],
                noise_multiplier=row["noise_multiplier"], accountant=accountant,
            )  # fmt: skip
            label = f"σ = {row['noise_multiplier']:g}, {accountant.upper()}"
            axes.plot(steps, curve, line, color=f"C{index}", label=label)
    axes.axhline(rows[0]["target_epsilon"], color="0.4", linewidth=1)
    axes.set(xlabel="steps", ylabel=f"ε at δ = {rows[0]['delta']:g}", xlim=(0, None), ylim=(0, None))
    axes.set_title(f"Privacy spent, sample rate {rows[0]['sample_rate']:.4g}", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot={path}: cannot be written ({error})") from None
