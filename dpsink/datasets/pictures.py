"""One picture in the form that the settings ask for: grey or colour, cropped, resized."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from dpsink.config import DataConfig

_GREY = {"1", "L", "LA"}  # Pillow's modes without colour
_EIGHT_BITS = _GREY | {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "La", "RGBa", "RGBX"}


@dataclass(frozen=True)
class Form:
    """What every picture is brought to.

    Attributes:
        size: side of the square in pixels; None keeps the stored size.
        colour: `grey` or `colour`; None keeps what is stored.
        crop: side of a central square that is cut out first; None keeps the whole picture.
    """

    size: int | None = None
    colour: Literal["grey", "colour"] | None = None
    crop: int | None = None

    @classmethod
    def of(cls, config: DataConfig, *, crop: int | None = None) -> "Form":
        """The form that the settings ask for."""
        return cls(config.size, config.colour, crop)

    def apply(self, picture: Image.Image) -> np.ndarray:
        """uint8 pixels, (C, H, W), C = 1 or 3.

        Raises:
            ValueError: more than 8 bits a pixel, or smaller than the crop.
        """
        if picture.mode not in _EIGHT_BITS:
            raise ValueError(f"has pixels of mode {picture.mode}; save it with 8 bits a channel")
        mode = self._mode(picture.mode)
        picture = picture if picture.mode == mode else picture.convert(mode)  # convert copies even where it need not
        if self.crop is not None:
            picture = _central_square(picture, self.crop)
        if self.size is not None and picture.size != (self.size, self.size):
            # Bilinear with support scaled to the reduction: antialiased, as torchvision's Resize.
            picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = np.asarray(picture)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def apply_to_all(self, images: np.ndarray) -> np.ndarray:
        """The same for pixels in memory, uint8 (rows, C, H, W); a copy only where something changes."""
        channels = {"grey": 1, "colour": 3, None: images.shape[1]}[self.colour]
        side = images.shape[2:] if self.size is None else (self.size, self.size)
        if images.shape[1:] == (channels, *side):
            return images
        changed = np.empty((len(images), channels, *side), np.uint8)
        for row, image in enumerate(images):
            changed[row] = self.apply(Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)))
        return changed

    def _mode(self, stored: str) -> str:
        if self.colour is None:
            return "L" if stored in _GREY else "RGB"
        return "L" if self.colour == "grey" else "RGB"


def shape_text(shape: tuple[int, ...]) -> str:
    """`3×32×32`, for messages."""
    return "×".join(map(str, shape))


def _central_square(picture: Image.Image, side: int) -> Image.Image:
    if min(picture.size) < side:
        raise ValueError(f"is {picture.width}×{picture.height}, smaller than the {side}×{side} that is cut out")
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))
