"""Random views of images, the only knowledge that self-supervised learning is given, and turned images."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from digits import Digits
from torch import Tensor

QUARTERS = 4


@dataclass(frozen=True)
class Views:
    """Draws one random view per image: rotated, slanted, zoomed, shifted, and noisy."""

    degrees: float = 15  # largest rotation, either way
    slant: float = 0.2  # largest shear, either way
    zoom: tuple[float, float] = (0.85, 1.2)  # above 1 the image is cropped
    shift: float = 0.15  # largest shift, as a share of the image's width
    noise: float = 0.1  # standard deviation

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to views of the same shape."""
        grid = F.affine_grid(self._draw_transforms(images), list(images.shape), align_corners=False)
        views = F.grid_sample(images, grid, align_corners=False)
        return views + self.noise * torch.randn_like(views)

    def _draw_transforms(self, images: Tensor) -> Tensor:
        """``[N, 2, 3]``: where, in coordinates from -1 to 1, every pixel of a view lies in its image."""

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(len(images), device=images.device).uniform_(low, high)

        angle = uniform(-math.radians(self.degrees), math.radians(self.degrees))
        size = 1 / uniform(*self.zoom)
        slant = uniform(-self.slant, self.slant)
        cos, sin = size * angle.cos(), size * angle.sin()
        shift_x, shift_y = (2 * uniform(-self.shift, self.shift) for _ in range(2))
        rows = torch.stack([cos, slant - sin, shift_x]), torch.stack([sin, cos, shift_y])
        return torch.stack(rows).permute(2, 0, 1)


def turned(data: Digits, mirrored: bool = False) -> Digits:
    """Every image in all quarter turns (mirrored: and their mirror images), each of which makes a class of its own.

    A few digits are too few classes to learn what makes two images differ; this makes four or eight times as many.
    """
    images = [data.images.rot90(quarters, dims=(2, 3)) for quarters in range(QUARTERS)]
    if mirrored:
        images += [image.flip(3) for image in images]
    classes = int(data.labels.max()) + 1
    return Digits(torch.cat(images), torch.cat([data.labels + classes * copy for copy in range(len(images))]))
