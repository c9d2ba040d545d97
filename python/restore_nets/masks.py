"""How well a predicted degradation mask finds the rain: its correlation with the true streaks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MaskCheck:
    """A network's degradation mask of one photo, beside what it should find.

    Args:
        mask: (H, W) in [0, 1], as the network predicts it.
        streaks: the true opacity of the rain, (H, W) in [0, 1]; None where it is not known.
        removed: mean over the colours of |rainy - restored|, (H, W): where the network took rain out.
        brightness: mean over the colours of the rainy photo, (H, W): rain is bright, but not it alone.
    """

    mask: Tensor
    streaks: Tensor | None
    removed: Tensor
    brightness: Tensor

    def pictures(self) -> dict[str, Tensor]:
        """Pictures (3, H, W) by caption: the mask in red over the photo, the mask, the streaks if known."""
        photo = self.brightness * (1 - self.mask)
        pictures = {
            "mask over the photo": torch.stack((photo + self.mask, photo, photo)),
            "predicted mask": self.mask.expand(3, -1, -1),
        }
        if self.streaks is not None:
            pictures["true streaks"] = self.streaks.expand(3, -1, -1)
        return pictures

    def correlation(self, what: str = "mask") -> float:
        """Pearson's with the true streaks, of the mask or of another picture for comparison.

        Raises:
            ValueError: the streaks are not known.
        """
        if self.streaks is None:
            raise ValueError("streaks must be known to correlate with; got None")
        return pearson(getattr(self, what), self.streaks)


def check_mask(model: nn.Module, rainy: Tensor, restored: Tensor, streaks: Tensor | None) -> MaskCheck | None:
    """Let a network predict its mask for a photo it never saw.

    Args:
        model: a network; one with a method ``degradation_mask`` maps (1, 3, H, W) to (1, 1, H, W) by it.
        rainy, restored: (3, H, W) in [0, 1].
        streaks: (H, W), if known.

    Returns:
        None for networks without a mask.
    """
    predict = getattr(model, "degradation_mask", None)
    if predict is None:
        return None
    device = next(model.parameters(), rainy).device
    model.eval()
    with torch.inference_mode():
        mask = predict(rainy[None].to(device))[0, 0].float().cpu()
    return MaskCheck(mask, streaks, (rainy - restored).abs().mean(dim=0), rainy.mean(dim=0))


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of the entries of two tensors of one shape; NaN where one is constant."""
    if x.shape != y.shape:
        raise ValueError(f"x must have the shape of y, {tuple(y.shape)}; got {tuple(x.shape)}")
    if bool(x.min() == x.max()) or bool(y.min() == y.max()):
        return math.nan
    x, y = (z.double().flatten() - z.double().mean() for z in (x, y))
    return float((x @ y) / (x.norm() * y.norm()))
