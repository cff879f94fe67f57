"""The class-mean control of a judged set: which one stands beside it, and the command that makes it."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpsink.config import DataConfig
from dpsink.errors import InputError

CONTROL = "class_mean"
SAME_EPSILON = 0.01  # relative: calibration stops a little below its target
OWN_MUST_SAY = ("validation", "test", "classes")  # what has no default for own data; the last, npz only


def check_control(place: Path, control: Mapping[str, Any], card: Mapping[str, Any] | None) -> None:
    """Refuses what is no control of the same data at the same ε and δ.

    Args:
        place: of the control, for the message.
        control: its privacy card.
        card: that of what it stands beside; None where nothing is known.

    Raises:
        InputError: so it is.
    """
    if control["mechanism"] != CONTROL:
        raise InputError(f"--control={place}: must be a run of generator.kind={CONTROL}")
    if card is None or not card["private"]:
        raise InputError(f"--control={place}: what it would stand beside claims no ε, so no control is at the same one")
    for what in ("data_fingerprint", "delta"):
        if control[what] != card[what]:
            raise InputError(f"--control={place}: its {what} is {control[what]}, and must be {card[what]}")
    if not math.isclose(control["epsilon"], card["epsilon"], rel_tol=SAME_EPSILON):
        raise InputError(
            f"--control={place}: its ε is {control['epsilon']:.4g}, and must be {card['epsilon']:.4g}; "
            f"train one with privacy.target_epsilon={card['epsilon']:.4g}"
        )


def control_command(card: Mapping[str, Any]) -> str | None:
    """The command that makes the class-mean control at a card's ε and δ; None without privacy, where there is none.

    The control is one more release of the private data, so evaluation never makes it by itself.
    """
    if not card["private"] or card["mechanism"] == CONTROL:
        return None
    data, score_noise = DataConfig.model_validate(card["config"]["data"]), card["config"]["privacy"].get("score_noise")
    said = ("name", *OWN_MUST_SAY) if data.path else ("name",)
    usual = DataConfig.model_validate({key: getattr(data, key) for key in said})
    words = [
        f"data.{key}={value}"
        for key, value in data.model_dump(mode="json").items()
        if (key in said and value is not None) or value != getattr(usual, key)
    ]
    words += [f"privacy.score_noise={score_noise}"] if score_noise is not None else []
    words += [f"generator.kind={CONTROL}", f"privacy.target_epsilon={card['epsilon']:.4g}"]
    # Half of the largest norm an image can have: what the project's own controls use.
    words += [
        f"privacy.delta={card['delta']:g}",
        f"privacy.clip_norm={math.sqrt(math.prod(card['image_shape'])) / 2:g}",
    ]
    return shlex.join(["dpsink", "train", *words])
