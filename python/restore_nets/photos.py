"""Real photos that are already on the disk: those inside the installed scikit-image package.

Only files of the package itself are used, none that ``skimage.data`` would download. The photos for
training and those kept unseen are disjoint, also in what they show.
"""

from __future__ import annotations

from importlib.resources import as_file, files

from torch import Tensor

from restore_nets.images import read_image, to_bytes

# Credits: https://scikit-image.org/docs/stable/api/skimage.data.html; all are public domain or CC0.
TRAINING = (
    "astronaut.png",  # NASA
    "motorcycle_left.png",  # D. Scharstein et al., Middlebury stereo 2014
    "motorcycle_right.png",
    "camera.png",  # Lav Varshney
    "brick.png",  # CC0Textures
    "grass.png",  # linolafett
    "gravel.png",  # CC0Textures
    "coins.png",  # Brooklyn Museum
)
UNSEEN = (
    "chelsea.png",  # Stéfan van der Walt
    "coffee.png",  # Rachel Michetti
    "rocket.jpg",  # SpaceX
)


def shipped_photos(names: tuple[str, ...]) -> dict[str, Tensor]:
    """Photos of scikit-image by name without suffix: (3, H, W), uint8.

    Raises:
        FileNotFoundError: the installed scikit-image has no such file.
    """
    photos = {}
    for name in names:
        with as_file(files("skimage") / "data" / name) as path:
            photos[path.stem] = to_bytes(read_image(path))
    return photos
