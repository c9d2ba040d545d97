"""What training minimises: the distance of a network's output from the clean image.

Images are (B, 3, H, W) with values in [0, 1]; every loss is a mean over all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_nets.metrics import ssim
from restore_nets.models.subtasks import half_size

Output = Tensor | tuple[Tensor, Tensor]  # the restored image, or that and the one at half resolution

CHARBONNIER_EPSILON = 1e-3
HALF_WEIGHT = 0.8  # arXiv 2311.05147
PYRAMID_KERNEL = (0.05, 0.25, 0.4, 0.25, 0.05)  # Burt and Adelson (1983), with a = 0.4


def outputs_of(output: Output) -> tuple[Tensor, Tensor | None]:
    """The restored image (B, 3, H, W), and the one at half resolution if the network returned it."""
    return (output, None) if isinstance(output, Tensor) else output


def training_loss(
    output: Output, clean: Tensor, half_weight: float, edge_weight: float, ssim_weight: float
) -> Tensor:
    """The sum of the losses of a network's output.

    Args:
        output: the restored image, or a pair of that and the restored image at half resolution
            (B, 3, ceil(H/2), ceil(W/2)), as the networks of association learning return.
        clean: (B, 3, H, W), float32.
        half_weight: of Charbonnier's loss at half resolution; nothing where there is no such output.
        edge_weight: of ``edge_loss`` of the restored image.
        ssim_weight: of ``ssim_loss`` of the restored image; needs H, W >= 11.

    Returns:
        A scalar, float32: Charbonnier's loss of the restored image plus the weighted others.
    """
    restored, half = outputs_of(output)
    restored = restored.float()
    loss = charbonnier(restored, clean)
    if half is not None:
        loss = loss + half_weight * charbonnier(half.float(), half_size(clean))
    if edge_weight:
        loss = loss + edge_weight * edge_loss(restored, clean)
    if ssim_weight:
        loss = loss + ssim_weight * ssim_loss(restored, clean)
    return loss


def charbonnier(restored: Tensor, clean: Tensor) -> Tensor:
    """mean sqrt((restored - clean)^2 + eps^2), eps = 1e-3 (Charbonnier et al., 1994): a smooth L1."""
    return _smooth_l1(restored - clean)


def edge_loss(restored: Tensor, clean: Tensor) -> Tensor:
    """Charbonnier's loss of the images' finest details (arXiv 2102.02808, equation 4; see ``laplacian``)."""
    return _smooth_l1(laplacian(restored - clean))  # the filter is linear: once is enough


def ssim_loss(restored: Tensor, clean: Tensor) -> Tensor:
    """1 - SSIM, with an 11x11 Gaussian window of sigma 1.5 where it fits into the image: H, W >= 11."""
    return 1 - ssim(restored, clean, peak=1.0)


def _smooth_l1(difference: Tensor) -> Tensor:
    return (difference.square() + CHARBONNIER_EPSILON**2).sqrt().mean()


def laplacian(image: Tensor) -> Tensor:
    """The finest level of the Laplacian pyramid (Burt and Adelson, 1983): image - expand(reduce(image)).

    reduce(g)(i, j) = sum_mn w(m) w(n) g(2i + m, 2j + n) with the five weights of ``PYRAMID_KERNEL``, and
    expand(g)(i, j) = 4 sum_mn w(m) w(n) g((i - m) / 2, (j - n) / 2), of which the terms at whole
    positions count. Beyond its borders an image repeats its outermost pixels.

    Shape: (B, C, H, W) -> (B, C, H, W), any size.
    """
    channels = image.shape[1]
    weights = image.new_tensor(PYRAMID_KERNEL)
    kernel = torch.outer(weights, weights).expand(channels, 1, 5, 5)
    reduced = F.conv2d(F.pad(image, (2, 2, 2, 2), mode="replicate"), kernel, stride=2, groups=channels)
    around = F.pad(reduced, (1, 1, 1, 1), mode="replicate")
    # Position i of the reduced image lies at 2i in the image, and at 2 (i + 1) + 2 here.
    expanded = F.conv_transpose2d(around, 4 * kernel, stride=2, groups=channels)
    return image - expanded[:, :, 4 : 4 + image.shape[2], 4 : 4 + image.shape[3]]
