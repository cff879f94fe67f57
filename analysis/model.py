"""An exported generator as a model of MLflow, which imports this module by its name: no code and no pickle travel.

Input: a data frame with the column `label`, integers in [0, K), the class asked for; a row an image. A generator that
knows no classes takes it as a count. Parameter `seed`: an integer in [0, 2⁶³), of the latents; the same one gives the
same images.

Output: a data frame, a row an image in the same order: `label`, and `image`, the bytes of a PNG. Without `label` where
the generator knows no classes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dpsink.checkpoint import load_generator
from dpsink.errors import InputError
from dpsink.synthesis import stream
from dpsink.writing import is_conditional, pixels, png

if TYPE_CHECKING:  # its import takes a second
    import pandas as pd

LABEL, IMAGE, SEED = "label", "image", "seed"
LARGEST_SEED = 2**63


class LabelledImages:
    """A generator that answers labels with images.

    Args:
        folder: of an export.
    """

    def __init__(self, folder: Path) -> None:
        self.generator, self.description = load_generator(folder)

    def predict(self, data: "pd.DataFrame", params: dict[str, Any] | None = None) -> "pd.DataFrame":
        """Images of the labels; the module says in what form.

        Raises:
            InputError: no such column, no whole numbers, or no such class.
        """
        import pandas as pd

        labels, seed = self._labels(data), int((params or {}).get(SEED, 0))
        if not 0 <= seed < LARGEST_SEED:
            raise InputError(f"{SEED}={seed} must be in [0, 2⁶³); choose another")
        parts = stream(self.generator, labels, num_classes=self.description.num_classes, seed=seed)
        pictures = [png(image) for part in parts for image in pixels(part)]
        known = {LABEL: labels.numpy()} if is_conditional(self.description) else {}
        return pd.DataFrame({**known, IMAGE: pictures})

    def _labels(self, data: "pd.DataFrame") -> torch.Tensor:
        """int64, (N,)."""
        classes = self.description.num_classes
        if LABEL not in data or data[LABEL].dtype.kind not in "iu":
            raise InputError(f"give a data frame with a column '{LABEL}' of integers in [0, {classes})")
        labels = torch.tensor(data[LABEL].to_numpy(), dtype=torch.int64)
        wrong = labels[(labels < 0) | (labels >= classes)]
        if is_conditional(self.description) and len(wrong):
            raise InputError(f"{LABEL}={wrong[0]} must be in [0, {classes}), the generator's classes")
        return labels.clamp(0, classes - 1)


def _load_pyfunc(path: str) -> LabelledImages:
    """What MLflow calls, with the folder of the export."""
    return LabelledImages(Path(path))
