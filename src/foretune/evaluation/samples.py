"""Images sampled from a denoising model, and a contact sheet of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from foretune.errors import UserError
from foretune.models import diffusion

GAP = 2  # pixels between images


@torch.no_grad()
def draw_samples(
    model: nn.Module,
    objective: Any,
    shape: Sequence[int],
    num: int = 16,
    *,
    seed: int = 0,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> np.ndarray:
    """Images from noise, over all timesteps of the schedule.

    By ancestral sampling (Ho, Jain, Abbeel, arXiv:2006.11239, algorithm 2), or where the model
    predicts a flow, by Euler's method. Two models with the same seed start from the same noise.

    Args:
        model: Called as model(noisy, t); its training mode is restored afterwards.
        objective: The `foretune.Denoising` that the model was trained with.
        shape: Shape of one image, (channels, height, width).
        num: Number of images.
        seed: Random seed of the noise.
        inputs: Further arguments of the model, (num, …) each.

    Returns:
        Images (num, *shape), float32, clipped to −1..1.

    Example:
        >>> draw_samples(model, Denoising(), (1, 16, 16), 8)  # doctest: +SKIP
    """
    scheduler = objective.scheduler()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((num, *shape), generator=generator).to(device)
    was_training = model.training
    model.eval()
    for t in reversed(range(objective.num_steps)):
        is_flow = objective.prediction == "flow"
        times = torch.full((num,), t + is_flow, device=device)
        predicted = diffusion.call(model, x, times, inputs or {})
        if is_flow:
            x = x - predicted / objective.num_steps
        else:
            x = scheduler.step(predicted, t, x, generator=generator).prev_sample
    model.train(was_training)
    return x.clamp(-1, 1).float().cpu().numpy()


def save_sheet(rows: Mapping[str, np.ndarray], path: Path | str, *, scale: int = 3) -> Path:
    """Writes greyscale images as one PNG, one row of images per entry, in the mapping's order.

    Args:
        rows: Name → images (n, 1, height, width) in −1..1; the names are not written.
        path: File to write, ending with .png.
        scale: Factor by which the images are enlarged.

    Raises:
        UserError: No images, images of several sizes, colour images, or Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("a sheet needs Pillow: pip install 'foretune[diffusion]'") from error
    shapes = {images.shape[1:] for images in rows.values()}
    if len(shapes) != 1 or next(iter(shapes))[0] != 1:
        raise UserError(
            f"a sheet needs greyscale images (n, 1, height, width) of one size, got {shapes}"
        )
    _, height, width = next(iter(shapes))
    most = max(len(images) for images in rows.values())
    size = (len(rows) * (height + GAP) - GAP, most * (width + GAP) - GAP)
    sheet = np.full(size, 128, dtype=np.uint8)
    for i, images in enumerate(rows.values()):
        for j, image in enumerate(images):
            top, left = i * (height + GAP), j * (width + GAP)
            grey = np.clip((image[0] + 1) * 127.5, 0, 255).round()
            sheet[top : top + height, left : left + width] = grey.astype(np.uint8)
    path = Path(path)
    picture = Image.fromarray(sheet)
    picture.resize((size[1] * scale, size[0] * scale), Image.Resampling.NEAREST).save(path)
    return path
