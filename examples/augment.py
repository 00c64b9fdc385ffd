"""Random views of images, the only knowledge that self-supervised learning is given."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
