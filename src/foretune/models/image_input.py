"""Image files as what an image tower reads: resized, cropped and normalised."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from foretune.errors import UserError
from foretune.formats import read_json
from foretune.printable import in_one_line

PREPROCESSOR_FILE = "preprocessor_config.json"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # mean and deviation of SigLIP
CACHED = 1024  # pictures: 600 MB at 224 x 224


@dataclass(frozen=True)
class ImageInput:
    """How a picture becomes an array.

    Args:
        size: Side of the square that the model reads, in pixels.
        mean: Mean of each channel, of values from 0 to 1.
        std: Standard deviation of each channel.
        edge: The shorter side is resized to it and the middle is cut out, as for CLIP; None: the
            picture is resized to a square, whatever its shape, as for SigLIP.
    """

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    edge: int | None = None


def image_input(model: nn.Module) -> ImageInput | None:
    """How the model reads pictures; None for one whose input size is not known.

    Mean, deviation and resizing are those of `preprocessor_config.json` beside the model, or of
    open_clip's `visual`; without them, CLIP's, and SigLIP's for a SigLIP.

    Raises:
        UserError: The file is damaged.
    """
    visual: Any = getattr(model, "visual", None)
    if hasattr(visual, "image_size"):
        size = visual.image_size
        size = size if isinstance(size, int) else size[0]
        mean = getattr(visual, "image_mean", None) or CLIP_MEAN
        std = getattr(visual, "image_std", None) or CLIP_STD
        return ImageInput(size, tuple(mean), tuple(std), edge=size)
    config: Any = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    if not isinstance(size, int):
        return None
    settings = _preprocessor(getattr(model, "name_or_path", None))
    squared = "siglip" in getattr(config, "model_type", "")
    crops = settings.get("do_center_crop", not squared)
    resized = settings.get("size", size)
    edge = resized.get("shortest_edge", size) if isinstance(resized, dict) else resized
    return ImageInput(
        size,
        tuple(settings.get("image_mean", HALF if squared else CLIP_MEAN)),
        tuple(settings.get("image_std", HALF if squared else CLIP_STD)),
        edge=edge if crops else None,
    )


def _preprocessor(name: str | None) -> dict[str, Any]:
    """The settings beside a model in a folder or in the cache of the Hub; empty without any."""
    if not name:
        return {}
    file = Path(name) / PREPROCESSOR_FILE
    if not Path(name).is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, PREPROCESSOR_FILE) if name.count("/") < 2 else None
        file = Path(cached) if isinstance(cached, str) else file
    return read_json(file, dict[str, Any]) if file.is_file() else {}


def check_image(path: str, where: str) -> None:
    """Check that a file begins as a picture does, without decoding it.

    Raises:
        UserError: It does not, it is missing, or Pillow is.
    """
    with _opened(path, where):
        pass


@functools.lru_cache(maxsize=CACHED)
def read_image(path: str, how: ImageInput) -> np.ndarray:
    """(3, size, size) float32: a picture as the model reads it.

    Raises:
        UserError: The file is damaged or missing, or Pillow is.
    """
    from PIL import Image

    with _opened(path, "an example") as opened:
        try:
            picture = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(_unreadable(path, "an example", error)) from error
    edge = (how.size, how.size)
    if how.edge is not None:
        factor = how.edge / min(picture.size)
        edge = tuple(max(how.size, round(side * factor)) for side in picture.size)
    picture = picture.resize(edge, Image.Resampling.BICUBIC)
    left, top = ((side - how.size) // 2 for side in picture.size)
    picture = picture.crop((left, top, left + how.size, top + how.size))
    values = np.asarray(picture, np.float32) / 255
    normal = (values - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


def _opened(path: str, where: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(
            f"{where}: reading the image {path} needs Pillow: pip install pillow"
        ) from error
    try:
        return Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(_unreadable(path, where, error)) from error


def _unreadable(path: str, where: str, error: Exception) -> str:
    reason = "no such file" if isinstance(error, FileNotFoundError) else in_one_line(str(error))
    return f"{where}: cannot read the image {path}: {reason}; mend or remove it"
