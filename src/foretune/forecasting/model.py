"""Forecast-MAE: a transformer over the agents and lanes of a traffic scene, and its pretext task.

Paper: Cheng et al., "Forecast-MAE: Self-supervised Pre-training for Motion Forecasting with Masked
Autoencoders", ICCV 2023, arXiv:2308.09882.

    symbol  here     meaning
    B A L   batch, agents and lanes of a scene (padded); agent 0 is the focal one
    H F P   history and future steps of an agent, points of a lane
    S       tokens: A histories, A futures, L lanes, in this order
    d       token width

A scene is a dict of tensors, made by `foretune.forecasting.scenes`:

    history (B, A, H, 4)   step (x, y) in m, change of the step's length, 1 where observed
    past    (B, A, H, 2)   position relative to the agent's last observed one: the pretext target
    future  (B, A, F, 3)   likewise, and 1 where observed
    kind    (B, A)         0 to 3: vehicle, pedestrian, cyclist, other
    lanes   (B, L, P, 3)   position relative to the lane's centre, and 1 where there is a point
    agent_pose, lane_pose (B, ·, 4)   x, y, cosine and sine of the heading, in the focal frame
    agent_present, lane_present (B, ·)   False for padding
    keep_history, keep_future, keep_lane (B, ·)   True where the pretext task shows the token

Deviations:
    - neighbourhood attention is a mask in plain torch; natten is not needed
    - hidden tokens are masked in the attention instead of removed, which gives the same outputs
    - query, key and value are three layers, so that LoRA finds them; head widths are configurable
Silent in the paper:
    - widths inside the PointNet and the prediction head: those of the released model
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretune.claims import output_folder
from foretune.errors import UserError
from foretune.files import CONFIG_FILE, WEIGHTS_FILE
from foretune.forecasting.config import ForecastMAEConfig
from foretune.forecasting.encoders import AgentEncoder, DropPath, LaneEncoder, Mlp
from foretune.models.routing import current_rows, route

Scene = Mapping[str, Tensor]
KINDS = 4
ARCHITECTURE, FORMAT = "ForecastMAE", "foretune-forecast-mae-1"


class Reconstruction(NamedTuple):
    """Predictions of the pretext task: (B, A, H, 2), (B, A, F, 2), (B, L, P, 2) in m."""

    history: Tensor
    future: Tensor
    lanes: Tensor


class Forecasts(NamedTuple):
    """Forecasts of a batch of scenes.

    Attributes:
        trajectories: (B, K, F, 2) in m, relative to the focal agent's last observed position.
        scores: (B, K) logits of the modes.
        others: (B, A - 1, F, 2) one future per other agent, or None.
    """

    trajectories: Tensor
    scores: Tensor
    others: Tensor | None = None


class Attention(nn.Module):
    """Multi-head self-attention over the visible tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """(B, S, d), (B, S) → (B, S, d)."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in layers)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None, :])
        mixed: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """A pre-norm transformer block with an optional parallel adapter beside each branch."""

    def __init__(self, config: ForecastMAEConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attn = Attention(config.width, config.num_heads)
        self.mlp = Mlp(config.width, 4 * config.width)
        self.drop_path = DropPath(drop_path)
        self.adapter_attn: nn.Module | None = None
        self.adapter_mlp: nn.Module | None = None

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """(B, S, d), (B, S) → (B, S, d)."""
        normed = self.norm1(x)
        branch = self.attn(normed, visible)
        if self.adapter_attn is not None:
            branch = branch + self.adapter_attn(normed)
        x = x + self.drop_path(branch)
        normed = self.norm2(x)
        branch = self.mlp(normed)
        if self.adapter_mlp is not None:
            branch = branch + self.adapter_mlp(normed)
        out: Tensor = x + self.drop_path(branch)
        return out


class ForecastMAE(nn.Module):
    """The masked autoencoder; with a forecaster (`foretune.forecasting.forecasters`) it forecasts.

    Args:
        config: Sizes of the model.
    """

    def __init__(self, config: ForecastMAEConfig) -> None:
        super().__init__()
        d = config.width
        self.sizes = config
        self.hist_embed = AgentEncoder(4, d, config.drop_path)
        self.future_embed: nn.Module | None = AgentEncoder(3, d, config.drop_path)
        self.lane_embed = LaneEncoder(3, d)
        self.pos_embed, self.decoder_pos_embed = _position_mlp(d), _position_mlp(d)
        self.blocks = _blocks(config, config.encoder_depth)
        self.norm = nn.LayerNorm(d)
        self.decoder_embed = nn.Linear(d, d)
        self.decoder_blocks = _blocks(config, config.decoder_depth)
        self.decoder_norm = nn.LayerNorm(d)
        self.actor_type_embed = nn.Parameter(0.02 * torch.randn(KINDS, d))
        self.lane_type_embed = nn.Parameter(0.02 * torch.randn(1, d))
        self.history_mask_token = nn.Parameter(0.02 * torch.randn(1, d))
        self.future_mask_token = nn.Parameter(0.02 * torch.randn(1, d))
        self.lane_mask_token = nn.Parameter(0.02 * torch.randn(1, d))
        self.future_pred = nn.Linear(d, 2 * config.future_steps)
        self.history_pred = nn.Linear(d, 2 * config.history_steps)
        self.lane_pred = nn.Linear(d, 2 * config.lane_points)
        self.forecaster: nn.Module | None = None

    def observed(self, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens (B, A + L, d), poses (B, A + L, 4), present (B, A + L)) of histories and lanes.

        The tokens do not include position embeddings yet.
        """
        present, lanes = scene["agent_present"], scene["lane_present"]
        history = self._embed(self.hist_embed, scene["history"], present, 3)
        lane = self._embed(self.lane_embed, scene["lanes"], lanes, 2)
        tokens = torch.cat(
            [history + self.actor_type_embed[scene["kind"]], lane + self.lane_type_embed], 1
        )
        return (
            tokens,
            self._scaled(torch.cat([scene["agent_pose"], scene["lane_pose"]], 1), 2),
            torch.cat([present, lanes], 1),
        )

    def positions(self, outputs: Tensor) -> Tensor:
        """(…, 2 steps) outputs of a prediction layer → (…, steps, 2) in m."""
        return self.sizes.metres * outputs.unflatten(-1, (-1, 2))

    def _scaled(self, features: Tensor, num_lengths: int) -> Tensor:
        """The features with their first `num_lengths` channels, which are lengths, in `metres`."""
        parts = [features[..., :num_lengths] / self.sizes.metres, features[..., num_lengths:]]
        return torch.cat(parts, -1)

    def _embed(
        self, encoder: nn.Module, features: Tensor, present: Tensor, num_lengths: int
    ) -> Tensor:
        """(B, N, d) tokens, zeros for padding: padding must not enter a batch norm."""
        out = features.new_zeros(*present.shape, self.sizes.width)
        if present.any():
            with route(_slots_of_tokens(present)):
                out[present] = encoder(self._scaled(features[present], num_lengths)).to(out.dtype)
        return out

    def reconstruct(self, scene: Scene) -> Reconstruction:
        """The pretext task: predict the tokens that `keep_…` hides from the visible ones."""
        assert self.future_embed is not None
        num_agents = scene["kind"].shape[1]
        observed, pose, present = self.observed(scene)
        has_future = scene["agent_present"] & scene["future"][..., 2].any(-1)
        future = self._embed(self.future_embed, scene["future"], has_future, 2)
        future = future + self.actor_type_embed[scene["kind"]]

        def joined(agents_and_lanes: Tensor, futures: Tensor) -> Tensor:
            agents, lanes = agents_and_lanes[:, :num_agents], agents_and_lanes[:, num_agents:]
            return torch.cat([agents, futures, lanes], 1)

        pose, present = joined(pose, pose[:, :num_agents]), joined(present, has_future)
        visible = torch.cat([scene[f"keep_{k}"] for k in ("history", "future", "lane")], 1)
        visible = visible & present
        x = joined(observed, future) + self.pos_embed(pose)
        for block in self.blocks:
            x = block(x, visible)
        x = self.decoder_embed(self.norm(x))
        hidden = torch.cat(
            [
                self.history_mask_token.expand(num_agents, -1),
                self.future_mask_token.expand(num_agents, -1),
                self.lane_mask_token.expand(scene["lanes"].shape[1], -1),
            ]
        )
        x = torch.where(visible[..., None], x, hidden) + self.decoder_pos_embed(pose)
        for block in self.decoder_blocks:
            x = block(x, present)
        x = self.decoder_norm(x)
        return Reconstruction(
            self.positions(self.history_pred(x[:, :num_agents])),
            self.positions(self.future_pred(x[:, num_agents : 2 * num_agents])),
            self.positions(self.lane_pred(x[:, 2 * num_agents :])),
        )

    def forecast(self, scene: Scene) -> Forecasts:
        """Forecasts of the focal agent's future.

        Raises:
            UserError: The model has no forecaster.
        """
        if self.forecaster is None:
            raise UserError(
                "this Forecast-MAE is only pretrained and cannot forecast yet: adapt it "
                "(foretune forecast adapt) or add a forecaster (add_prompts, add_head)"
            )
        out: Forecasts = self.forecaster(self, scene)
        return out

    def forward(self, scene: Scene) -> Reconstruction | Forecasts:
        """Forecasts if the model has a forecaster, else the pretext task's predictions."""
        return self.reconstruct(scene) if self.forecaster is None else self.forecast(scene)


def _slots_of_tokens(present: Tensor) -> list[int] | None:
    """The slot of each token that is present: scenes differ in their numbers of tokens."""
    rows = current_rows()
    if rows is None:
        return None
    counts = present.sum(1).tolist()
    return [slot for slot, n in zip(rows.slots, counts, strict=True) for _ in range(n)]


def _position_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, width))


def _blocks(config: ForecastMAEConfig, depth: int) -> nn.ModuleList:
    rates = torch.linspace(0, config.drop_path, depth, device="cpu").tolist()
    return nn.ModuleList(Block(config, rate) for rate in rates)


def remove_parts(model: ForecastMAE, names: Sequence[str]) -> None:
    """Remove parts that a forecaster never uses, so that they are neither saved nor counted."""
    for name in names:
        setattr(model, name, None)


def save_forecast_mae(model: ForecastMAE, folder: Path | str) -> Path:
    """Write config.json and model.safetensors as a folder that appears only when complete.

    Raises:
        UserError: The folder holds something other than such a model.
    """
    folder = Path(folder)
    with output_folder(folder, "forecast-pretrain", overwrite=True, at_once=True) as part:
        (part / CONFIG_FILE).write_text(json.dumps(describe(model), indent=1), encoding="utf-8")
        safetensors.torch.save_model(model, str(part / WEIGHTS_FILE))
    return folder


def describe(model: ForecastMAE) -> dict[str, Any]:
    """The content of a model's config.json."""
    forecaster = getattr(model.forecaster, "options", None)
    return {
        "format": FORMAT,
        "architecture": ARCHITECTURE,
        "sizes": dataclasses.asdict(model.sizes),
        "forecaster": forecaster,
    }
