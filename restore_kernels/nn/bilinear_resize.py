"""Bilinear resizing by a factor of two."""

from __future__ import annotations

from torch import Tensor, nn

from restore_kernels.bilinear_resize import bilinear_resize


class BilinearResize(nn.Upsample):
    """``nn.Upsample(scale_factor=scale_factor, mode="bilinear")`` for factors of 2 and 0.5.

    Called with the image and optionally with a residual of the result's size, which is added to it; see
    ``bilinear_resize``, also for odd sides, of which half is rounded up.

    Shape: (B, C, H, W) -> (B, C, 2 H, 2 W) or (B, C, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, scale_factor: float) -> None:
        if scale_factor not in (2, 0.5):
            raise ValueError(f"scale_factor must be 2 or 0.5; got {scale_factor!r}")
        super().__init__(scale_factor=scale_factor, mode="bilinear")
        self.factor = float(scale_factor)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return bilinear_resize(x, self.factor, residual)
