"""Image files as tensors: PNG and JPEG, read into RGB in [0, 1] and written whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from restore_nets.files import written_whole

FORMATS: Mapping[str, str] = MappingProxyType({".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"})
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},  # restored detail should survive the file
}


def is_image_name(path: Path) -> bool:
    return path.suffix.lower() in FORMATS


def read_image(path: Path) -> Tensor:
    """An image file as it is meant to be seen: (3, H, W), float32 in [0, 1].

    Grey becomes equal channels, transparency shows white, the EXIF orientation is applied. 16-bit
    grey is read in full; of 16-bit colour the upper 8 bits.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no readable PNG or JPEG, or is truncated; the message names it.
    """
    with _opened(path) as image:
        image.load()
        pixels = _rgb(ImageOps.exif_transpose(image))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_colour_profile(path: Path) -> bytes | None:
    """The ICC profile that says which colours the file's numbers mean, if it has one."""
    with _opened(path) as image:
        return image.info.get("icc_profile")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The file as Pillow's image, of which nothing is decoded yet. What fails in the block names it."""
    with path.open("rb") as file, warnings.catch_warnings():
        # Pillow warns of pictures beyond 89 megapixels; those beyond twice as many it refuses.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=tuple(_SAVE_OPTIONS)) as image:
                yield image
        except Exception as error:  # decoders of damaged files fail in many ways
            reason = "neither PNG nor JPEG" if isinstance(error, Image.UnidentifiedImageError) else error
            raise ValueError(f"{path} is not a readable image ({reason})") from error


def _rgb(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, 3), float32 in [0, 1]."""
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image, dtype=np.float32) / np.float32(65535)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255)


def write_image(path: Path, image: Tensor, colour_profile: bytes | None = None) -> None:
    """Write a PNG or JPEG file, by the suffix of its name, with 8 bits per channel.

    Args:
        path: ends in .png, .jpg or .jpeg; its folder exists.
        image: (3, H, W); values outside [0, 1] are clipped.
        colour_profile: ICC profile to embed.

    Raises:
        ValueError: another suffix, or an image of another shape or with values that are not finite.
        OSError: the file cannot be written.
    """
    if not is_image_name(path):
        raise ValueError(f"path must end in {', '.join(FORMATS)}; got {path}")
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"image must have shape (3, H, W); got {tuple(image.shape)}")
    if not bool(image.isfinite().all()):
        raise ValueError(f"image must be finite; {path.name} would have NaN or infinite pixels")
    kind = FORMATS[path.suffix.lower()]
    picture = Image.fromarray(to_bytes(image).permute(1, 2, 0).numpy())
    with written_whole(path) as temporary:
        picture.save(temporary, format=kind, icc_profile=colour_profile, **_SAVE_OPTIONS[kind])


def to_bytes(image: Tensor) -> Tensor:
    """Values in [0, 1] rounded to the 8 bits of an image file: uint8 on the CPU, same shape."""
    return (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)


def from_bytes(image: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return image.float() / 255
