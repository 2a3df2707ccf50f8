"""Forecasters for a pretrained Forecast-MAE: prompts that keep its decoder, or a new MLP head.

    symbol  here          shape          meaning
    K       modes                        futures of the focal agent
    P       prompts                      prompt tokens per encoder block, and per mode
    r       adapter_rank                 inner width of a parallel adapter
    CEP     prompt_scene  (depth, P, d)  contextual embedding prompts of each encoder block
    MCP     prompt_mode   (K, P, d)      modality-control prompts of each mode

Prompts and adapters: Wang et al., arXiv:2407.19564, section 3.3. Head: Cheng et al.,
arXiv:2308.09882, section 3.4.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypedDict

from foretune.errors import UserError
from foretune.files import CONFIG_FILE, WEIGHTS_FILE
from foretune.forecasting.config import ForecastMAEConfig
from foretune.forecasting.model import (
    ARCHITECTURE,
    FORMAT,
    Block,
    ForecastMAE,
    Forecasts,
    Scene,
    remove_parts,
)
from foretune.formats import build_for, damage_named, load_tensors, read_json

PRETEXT_ONLY = (
    "future_embed",
    "history_pred",
    "lane_pred",
    "history_mask_token",
    "lane_mask_token",
)
DECODER = (
    "decoder_embed",
    "decoder_pos_embed",
    "decoder_blocks",
    "decoder_norm",
    "future_mask_token",
    "future_pred",
)


class Adapter(nn.Module):
    """Linear, GELU, Linear in parallel to a branch; its output is zero before training.

    Args:
        width: Token width.
        rank: Inner width.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        # Were both layers zero, only the last bias would receive a gradient.
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) → (…, d)."""
        out: Tensor = self.up(F.gelu(self.down(x)))
        return out


class ModePrompts(nn.Module):
    """Forecasts by the pretext task: all futures are hidden, and prompts select the mode.

    Args:
        config: Sizes of the model.
        modes: Number of modes K.
        prompts: Prompt tokens P per encoder block and per mode.
        adapter_rank: Inner width r of the adapters, which sit in the model's blocks; 0 for none.
    """

    def __init__(
        self, config: ForecastMAEConfig, *, modes: int, prompts: int, adapter_rank: int
    ) -> None:
        super().__init__()
        d = config.width
        self.options = {
            "kind": "prompts",
            "modes": modes,
            "prompts": prompts,
            "adapter_rank": adapter_rank,
        }
        self.prompt_scene = nn.Parameter(0.02 * torch.randn(config.encoder_depth, prompts, d))
        self.prompt_mode = nn.Parameter(0.02 * torch.randn(modes, prompts, d))
        self.prompt_score = nn.Linear(d, 1)

    def forward(self, model: ForecastMAE, scene: Scene) -> Forecasts:
        """Forecasts of all modes from one decoder call on a batch of B·K."""
        batch, num_agents = scene["kind"].shape
        modes, prompts, d = self.prompt_mode.shape
        x, pose, present = model.observed(scene)
        x = x + model.pos_embed(pose)
        size = x.shape[1]
        visible = F.pad(present, (0, prompts), value=True)
        for block, prompt in zip(model.blocks, self.prompt_scene, strict=True):
            # Each block gets its own prompts; their outputs are dropped.
            x = block(torch.cat([x, prompt.expand(batch, -1, -1)], 1), visible)[:, :size]
        x = model.decoder_embed(model.norm(x))
        future = model.future_mask_token.expand(batch, num_agents, -1)
        x = torch.cat([x[:, :num_agents], future, x[:, num_agents:]], 1)
        agents, lanes = pose[:, :num_agents], pose[:, num_agents:]
        x = x + model.decoder_pos_embed(torch.cat([agents, agents, lanes], 1))
        agents, lanes = present[:, :num_agents], present[:, num_agents:]
        visible = F.pad(torch.cat([agents, agents, lanes], 1), (0, prompts), value=True)
        size = x.shape[1]
        x = torch.cat(
            [
                x[:, None].expand(-1, modes, -1, -1),
                self.prompt_mode.expand(batch, -1, -1, -1),
            ],
            2,
        ).reshape(batch * modes, size + prompts, d)
        visible = visible.repeat_interleave(modes, 0)
        for block in model.decoder_blocks:
            x = block(x, visible)
        x = model.decoder_norm(x).view(batch, modes, size + prompts, d)
        trajectories = model.positions(model.future_pred(x[:, :, num_agents]))
        if prompts == 0:
            return Forecasts(trajectories, trajectories.new_zeros(batch, modes))
        return Forecasts(trajectories, self.prompt_score(x[:, :, size]).squeeze(-1))


class ModeHead(nn.Module):
    """Forecast-MAE's fine-tuning head: no decoder, an MLP of the focal token gives all modes.

    Args:
        config: Sizes of the model.
        modes: Number of modes K.
        spread: Draw the modes' biases with standard deviation 1, so that the modes start apart.
    """

    def __init__(self, config: ForecastMAEConfig, *, modes: int, spread: bool) -> None:
        super().__init__()
        d, wide = config.width, 2 * config.width
        self.options = {"kind": "head", "modes": modes, "spread": spread}
        self.multimodal_proj = nn.Linear(d, modes * d)
        if spread:
            nn.init.normal_(self.multimodal_proj.bias)
        self.loc = _mlp(d, wide, d, 2 * config.future_steps)
        self.pi = _mlp(d, wide, d, 1)
        self.dense_predictor = _mlp(d, wide, 2 * config.future_steps)

    def forward(self, model: ForecastMAE, scene: Scene) -> Forecasts:
        """Forecasts of the focal agent's modes, and one future for each other agent."""
        num_agents = scene["kind"].shape[1]
        x, pose, present = model.observed(scene)
        x = x + model.pos_embed(pose)
        for block in model.blocks:
            x = block(x, present)
        x = model.norm(x)
        modes = self.multimodal_proj(x[:, 0]).unflatten(-1, (-1, x.shape[-1]))
        others = model.positions(self.dense_predictor(x[:, 1:num_agents]))
        return Forecasts(model.positions(self.loc(modes)), self.pi(modes).squeeze(-1), others)


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def add_prompts(
    model: ForecastMAE, *, modes: int = 6, prompts: int = 50, adapter_rank: int = 64
) -> None:
    """Add prompts and adapters to a pretrained model, in place: it forecasts with its own decoder.

    Args:
        model: Pretrained, without a forecaster; loses the parts that only the pretext task uses.
        modes: Number of modes K.
        prompts: Prompt tokens P per encoder block and per mode.
        adapter_rank: Inner width r of the adapters; 0 for none.

    Raises:
        UserError: It is not a Forecast-MAE, or already has a forecaster.
    """
    check_pretrained(model)
    remove_parts(model, PRETEXT_ONLY)
    model.forecaster = ModePrompts(
        model.sizes, modes=modes, prompts=prompts, adapter_rank=adapter_rank
    )
    for block in (*model.blocks, *model.decoder_blocks) if adapter_rank else ():
        assert isinstance(block, Block)
        block.adapter_attn = Adapter(model.sizes.width, adapter_rank)
        block.adapter_mlp = Adapter(model.sizes.width, adapter_rank)


def add_head(model: ForecastMAE, *, modes: int = 6, spread: bool = False) -> None:
    """Replace the decoder of a pretrained model by an MLP head, in place.

    Args:
        model: Pretrained, without a forecaster.
        modes: Number of modes K.
        spread: Draw the modes' biases with standard deviation 1, so that the modes start apart.

    Raises:
        UserError: It is not a Forecast-MAE, or already has a forecaster.
    """
    check_pretrained(model)
    remove_parts(model, PRETEXT_ONLY + DECODER)
    model.forecaster = ModeHead(model.sizes, modes=modes, spread=spread)


def check_pretrained(model: Any) -> ForecastMAE:
    """The model itself, if it is a pretrained Forecast-MAE.

    Raises:
        UserError: It is not a Forecast-MAE, or already has a forecaster.
    """
    if not isinstance(model, ForecastMAE):
        raise UserError(
            "expected a Forecast-MAE (foretune forecast pretrain makes one), "
            f"got {type(model).__name__}"
        )
    if model.forecaster is not None:
        raise UserError(
            "this Forecast-MAE already has a forecaster; start from the pretrained model instead"
        )
    return model


class Config(TypedDict):
    """The fields of a Forecast-MAE's config file."""

    sizes: dict[str, Any]
    forecaster: dict[str, Any] | None


def load_forecast_mae(folder: Path | str) -> ForecastMAE:
    """Load a model that `save_forecast_mae` wrote, in eval mode.

    Raises:
        UserError: The folder holds no Forecast-MAE, or its weights do not fit its config.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} holds no Forecast-MAE: it lacks {CONFIG_FILE}, which foretune forecast "
            f"pretrain writes beside {WEIGHTS_FILE}"
        )
    file = folder / CONFIG_FILE
    architecture = read_json(file, dict[str, Any]).get("architecture")
    if architecture != ARCHITECTURE:
        raise UserError(
            f"{file} does not describe a Forecast-MAE: its architecture is {architecture!r}"
        )
    config = read_json(file, Config, FORMAT)

    def build() -> ForecastMAE:
        model = ForecastMAE(ForecastMAEConfig(**config["sizes"]))
        add_forecaster(model, config["forecaster"])
        return model

    with damage_named(file):
        model = build_for(folder / WEIGHTS_FILE, build)
    load_tensors(model, folder / WEIGHTS_FILE)
    return model.eval()


def add_forecaster(model: ForecastMAE, options: dict[str, Any] | None) -> None:
    """Add the forecaster that a config describes, in place; None adds nothing."""
    if options is None:
        return
    fields = {k: v for k, v in options.items() if k != "kind"}
    if options["kind"] == "prompts":
        add_prompts(model, **fields)
    else:
        add_head(model, **fields)
