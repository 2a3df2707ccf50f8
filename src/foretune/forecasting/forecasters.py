"""What makes a pretrained Forecast-MAE forecast: prompts that keep its decoder, or a new MLP head.

    symbol  here          shape        meaning
    K       modes                      futures of the focal agent
    P       prompts                    prompt tokens of a layer, or of a mode
    r       adapter_rank               inner width of a parallel adapter
    CEP     prompt_scene  (depth, P, d)  contextual embedding prompts, of each encoder block
    MCP     prompt_mode   (K, P, d)    modality-control prompts, of each mode

Source of the prompts and adapters: Wang et al., arXiv:2407.19564, section 3.3; of the head: Cheng
et al., arXiv:2308.09882, section 3.4.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretune.errors import UserError
from foretune.forecasting.config import ForecastMAEConfig
from foretune.forecasting.model import (
    ARCHITECTURE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    Block,
    ForecastMAE,
    Forecasts,
    Scene,
    remove,
)

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
    """Linear, GELU, Linear beside a branch; adds nothing until it is trained.

    Args:
        width: Of a token.
        rank: Inner width.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)  # of both layers, and only the last bias would get gradients
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) → (…, d)."""
        out: Tensor = self.up(F.gelu(self.down(x)))
        return out


class ModePrompts(nn.Module):
    """Forecasts by the pretext task: the future is hidden, and prompts say which mode is meant.

    Args:
        config: Sizes of the model.
        modes: K.
        prompts: P.
        adapter_rank: r; 0 for no adapters. They sit in the model's blocks.
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
        """All modes in one call of the decoder, as a batch of B·K."""
        batch, num_agents = scene["kind"].shape
        modes, prompts, d = self.prompt_mode.shape
        x, pose, present = model.observed(scene)
        x = x + model.pos_embed(pose)
        size = x.shape[1]
        seen = F.pad(present, (0, prompts), value=True)
        for block, prompt in zip(model.blocks, self.prompt_scene, strict=True):
            # Fresh prompts before each block; what became of the last ones is dropped.
            x = block(torch.cat([x, prompt.expand(batch, -1, -1)], 1), seen)[:, :size]
        x = model.decoder_embed(model.norm(x))
        future = model.future_mask_token.expand(batch, num_agents, -1)
        x = torch.cat([x[:, :num_agents], future, x[:, num_agents:]], 1)
        agents, lanes = pose[:, :num_agents], pose[:, num_agents:]
        x = x + model.decoder_pos_embed(torch.cat([agents, agents, lanes], 1))
        agents, lanes = present[:, :num_agents], present[:, num_agents:]
        seen = F.pad(torch.cat([agents, agents, lanes], 1), (0, prompts), value=True)
        size = x.shape[1]
        x = torch.cat(
            [
                x[:, None].expand(-1, modes, -1, -1),
                self.prompt_mode.expand(batch, -1, -1, -1),
            ],
            2,
        ).reshape(batch * modes, size + prompts, d)
        seen = seen.repeat_interleave(modes, 0)
        for block in model.decoder_blocks:
            x = block(x, seen)
        x = model.decoder_norm(x).view(batch, modes, size + prompts, d)
        trajectories = model.positions(model.future_pred(x[:, :, num_agents]))
        if prompts == 0:
            return Forecasts(trajectories, trajectories.new_zeros(batch, modes))
        return Forecasts(trajectories, self.prompt_score(x[:, :, size]).squeeze(-1))


class ModeHead(nn.Module):
    """Forecast-MAE's own way to fine-tune: no decoder, an MLP of the focal token gives all modes.

    Args:
        config: Sizes of the model.
        modes: K.
        spread: Draw the modes' biases with standard deviation 1, so that the modes begin apart.
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
        """Modes of the focal agent, and one future for each of the others."""
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
    """Makes a pretrained model forecast with its own decoder, in place.

    Args:
        model: Without a forecaster; loses what only the pretext task needs.
        modes: K.
        prompts: P.
        adapter_rank: r; 0 for no adapters.

    Raises:
        UserError: It has a forecaster already.
    """
    check_pretrained(model)
    remove(model, PRETEXT_ONLY)
    model.forecaster = ModePrompts(
        model.sizes, modes=modes, prompts=prompts, adapter_rank=adapter_rank
    )
    for block in (*model.blocks, *model.decoder_blocks) if adapter_rank else ():
        assert isinstance(block, Block)
        block.adapter_attn = Adapter(model.sizes.width, adapter_rank)
        block.adapter_mlp = Adapter(model.sizes.width, adapter_rank)


def add_head(model: ForecastMAE, *, modes: int = 6, spread: bool = False) -> None:
    """Puts an MLP head in the place of the decoder, in place.

    Raises:
        UserError: The model has a forecaster already.
    """
    check_pretrained(model)
    remove(model, PRETEXT_ONLY + DECODER)
    model.forecaster = ModeHead(model.sizes, modes=modes, spread=spread)


def check_pretrained(model: Any) -> ForecastMAE:
    """The model.

    Raises:
        UserError: It is no Forecast-MAE, or one that forecasts already.
    """
    if not isinstance(model, ForecastMAE):
        raise UserError(
            f"this needs a Forecast-MAE (foretune forecast pretrain), got {type(model).__name__}"
        )
    if model.forecaster is not None:
        raise UserError(
            "this Forecast-MAE forecasts already; adapt the pretrained one that it was made from"
        )
    return model


def load_forecast_mae(folder: Path | str) -> ForecastMAE:
    """Reads what `save_forecast_mae` wrote, in eval mode.

    Raises:
        UserError: The folder holds no Forecast-MAE, or its weights do not fit its config.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} holds no Forecast-MAE: it needs {CONFIG_FILE} and {WEIGHTS_FILE}, which "
            "foretune forecast pretrain writes"
        )
    try:
        about = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        if about.get("architecture") != ARCHITECTURE:
            raise UserError(
                f"{folder / CONFIG_FILE} describes no Forecast-MAE: its architecture is "
                f"{about.get('architecture')!r}"
            )
        model = ForecastMAE(ForecastMAEConfig(**about["sizes"]))
        put_forecaster(model, about["forecaster"])
        safetensors.torch.load_model(model, str(folder / WEIGHTS_FILE))
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        safetensors.SafetensorError,
    ) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"cannot load the Forecast-MAE in {folder}: {reason}") from e
    return model.eval()


def put_forecaster(model: ForecastMAE, options: dict[str, Any] | None) -> None:
    """Makes the forecaster that a config describes; None for none."""
    if options is None:
        return
    fields = {k: v for k, v in options.items() if k != "kind"}
    if options["kind"] == "prompts":
        add_prompts(model, **fields)
    else:
        add_head(model, **fields)
