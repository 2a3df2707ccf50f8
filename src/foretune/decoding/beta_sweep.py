"""EFT over a range of beta: implicit reward against KL from the model alone.

Texts are scored under the distribution p that generated them: at each token, the expected reward
E_p[log p_tuned − log p_untuned] and KL(p || p_base), averaged over tokens, in nats. For a given KL
EFT's distribution has the highest possible reward (paper, section 3), so token by token the curve
is a frontier; the small tuned model and a fine-tuned large model lie on it or below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foretune.decoding.generation import Generated, Prompt, generate_texts, prompt_ids
from foretune.errors import UserError
from foretune.evaluation.report import svg

SIZE = (560, 360)


def sweep(
    model: str,
    prompts: Sequence[Prompt],
    method: Any,
    betas: Sequence[float],
    resources: Mapping[str, Any],
    oracle: str | None = None,
    *,
    allow_unverified: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """One row per beta, one for the small tuned model, and one for the fine-tuned large model.

    Args:
        model: The large model's folder.
        prompts: Prompts to continue.
        method: The `EFT` record; its beta is replaced.
        betas: Values to try; 0, the model alone, is added.
        resources: `tuned` and `untuned`, as `EFT.load` takes them.
        oracle: Folder of the fine-tuned large model; None if there is none.
        allow_unverified: Whether to take adapters that do not record their base.
        options: Options of `generate_texts`.

    Returns:
        Rows with who, beta, reward, kl, texts.

    Raises:
        UserError: The tuned model is missing, or models do not fit together.
    """
    if not resources.get("tuned"):
        raise UserError("--beta-sweep needs --tuned, and --untuned unless it is an adapter")
    large, tokenizer, parts = method.load(model, **resources, allow_unverified=allow_unverified)
    rows = []
    for beta in sorted({0.0, *betas}):
        record = dataclasses.replace(method, beta=beta)
        with record.steer(large, **parts):
            texts = generate_texts(large, tokenizer, prompts, **options)
        rows.append(_row("EFT" if beta else "model alone", beta, texts))
        rows[-1] |= _scores(record, large, tokenizer, parts, texts, record)
    comparisons = [("small tuned alone", parts["tuned"][0])]
    if oracle is not None:
        from foretune.decoding.peft_model import load_generator

        tuned, _ = load_generator(oracle, allow_unverified=allow_unverified)
        comparisons.append(("large truly tuned", tuned))
    for who, author in comparisons:
        texts = generate_texts(author, tokenizer, prompts, **options)
        rows.append(_row(who, None, texts))
        rows[-1] |= _scores(method, large, tokenizer, parts, texts, author)
    return rows


def _row(who: str, beta: float | None, texts: Sequence[Generated]) -> dict[str, Any]:
    return {"who": who, "beta": beta, "texts": [text.text for text in texts]}


@torch.no_grad()
def _scores(
    method: Any,
    large: Any,
    tokenizer: Any,
    parts: Mapping[str, Any],
    texts: Sequence[Generated],
    author: Any,
) -> dict[str, float]:
    """Expected reward and KL from the model, means over the tokens of texts, in nats per token.

    `author` is the record or the model that generated the texts.
    """
    rewards: list[Tensor] = []
    distances: list[Tensor] = []
    count = len(parts["tuned"])
    captured: list[tuple[Tensor, list[Tensor]]] = []

    def capture(base: Tensor, logits: list[Tensor]) -> Tensor:
        captured.append((base, logits))
        return base

    for text in texts:
        start = prompt_ids(tokenizer, text.prompt)
        ids = torch.tensor([[*start, *text.token_ids][:-1]])
        with method.steer(large, **parts) as beside:
            beside.combine = capture
            large(input_ids=ids.to(next(large.parameters()).device), use_cache=False)
        large_logits, side_logits = captured.pop()
        new = slice(len(start) - 1, None)  # from the prompt's last token on
        base, logits = large_logits[0, new], [side[0, new] for side in side_logits]
        if hasattr(author, "combine"):
            log_p = author.combine(base, logits[:count], logits[count:], parts["shared"])
        else:
            log_p = torch.log_softmax(author(input_ids=ids).logits[0, new].float(), -1)
        delta = method.delta(logits[:count], logits[count:], base.shape[-1])
        width = min(delta.shape[-1], log_p.shape[-1])
        log_p, delta = log_p[:, :width], delta[:, :width]
        log_base = torch.log_softmax(base.float(), -1)[:, :width]
        rewards.append((log_p.exp() * delta).sum(-1))
        distances.append((log_p.exp() * (log_p - log_base)).sum(-1))
    return {"reward": float(torch.cat(rewards).mean()), "kl": float(torch.cat(distances).mean())}


def table_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[object]]]:
    """Header and rows for a terminal, with the first text of each row."""
    header = ["model", "beta", "reward", "KL", "first text"]
    return header, [
        [
            row["who"],
            "" if row["beta"] is None else f"{row['beta']:g}",
            f"{row['reward']:.3f}",
            f"{row['kl']:.3f}",
            svg.shorten(" ".join(row["texts"][0].split()), 300),
        ]
        for row in rows
    ]


def figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """The frontier as SVG: KL on the x axis, reward on the y axis."""
    width, height = SIZE
    ink = svg.LIGHT
    x = svg.linear(svg.padded([row["kl"] for row in rows]), (60, width - 20))
    y = svg.linear(svg.padded([row["reward"] for row in rows]), (height - 50, 20))
    curve = [row for row in rows if row["beta"] is not None]
    parts = [svg.tag("rect", width=width, height=height, style=f"fill:{ink.paper}")]
    for tick in svg.ticks(*svg.padded([row["kl"] for row in rows])):
        at = x(tick)
        parts.append(svg.line(at, 20, at, height - 50, ink.line))
        parts.append(svg.text(f"{tick:g}", at, height - 32, ink.muted, anchor="middle", size=11))
    for tick in svg.ticks(*svg.padded([row["reward"] for row in rows])):
        at = y(tick)
        parts.append(svg.line(60, at, width - 20, at, ink.line))
        parts.append(svg.text(f"{tick:g}", 54, at + 4, ink.muted, anchor="end", size=11))
    parts.append(svg.polyline([(x(r["kl"]), y(r["reward"])) for r in curve], ink.series[1]))
    for row in rows:
        label = row["who"] if row["beta"] is None else f"{row['beta']:g}"
        right, up = x(row["kl"]), y(row["reward"])
        colour = ink.series[2] if row["beta"] is None else ink.series[1]
        parts.append(svg.marker("circle", right, up, colour, ink.paper))
        side, shift = ("start", 9) if right < width / 2 else ("end", -9)
        parts.append(svg.text(label, right + shift, up + 4, colour, anchor=side, halo=ink.paper))
    parts.append(
        svg.text(
            "KL from the model alone, nats per token",
            width / 2,
            height - 10,
            ink.text,
            anchor="middle",
        )
    )
    parts.append(svg.text("implicit reward, nats per token", 60, 14, ink.text))
    return svg.tag(
        "svg",
        svg.tag("title", "Reward over KL for values of beta, by foretune"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        style=f"font-family:{svg.FONT}",
    )
