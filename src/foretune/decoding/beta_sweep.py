"""EFT over a range of beta: implicit reward against distance from the model alone.

Each text is scored where its own author would have written it: at every token the expected reward
E_p[log p_tuned − log p_untuned] and KL(p || p_base), means over tokens, in nats. For a given
distance EFT's law has the highest reward that there is (paper, section 3), so the curve is a
frontier token by token; the small tuned model and a large one that is truly tuned lie on or below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foretune.decoding.generation import generate_texts, prompt_ids
from foretune.errors import UserError
from foretune.evaluation.report import svg

SIZE = (560, 360)


def sweep(
    model: str,
    prompts: Sequence[str],
    method: Any,
    betas: Sequence[float],
    resources: Mapping[str, Any],
    oracle: str | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """One row for each beta, the small tuned model alone, and the truly tuned large one.

    Args:
        model: The large model's folder.
        prompts: Texts.
        method: The `EFT` record; its beta is replaced.
        betas: What to try; 0, the model alone, is added.
        resources: `tuned` and `untuned`.
        oracle: Folder of the large model truly tuned, where there is one.
        options: As of `generate`.

    Returns:
        Rows of who, beta, reward, kl, texts.
    """
    if not resources.get("tuned"):
        raise UserError("--beta-sweep needs --tuned, and --untuned unless it is an adapter")
    large, tokenizer, parts = method.load(model, **resources)
    rows = []
    for beta in sorted({0.0, *betas}):
        record = dataclasses.replace(method, beta=beta)
        with record.steer(large, **parts):
            found = generate_texts(large, tokenizer, prompts, **options)
        rows.append(_row("EFT" if beta else "model alone", beta, found))
        rows[-1] |= _scores(record, large, tokenizer, parts, found, record)
    others = [("small tuned alone", parts["tuned"][0])]
    if oracle is not None:
        from foretune.decoding.peft_model import load_generator

        others.append(("large truly tuned", load_generator(oracle)[0]))
    for who, other in others:
        found = generate_texts(other, tokenizer, prompts, **options)
        rows.append(_row(who, None, found))
        rows[-1] |= _scores(method, large, tokenizer, parts, found, other)
    return rows


def _row(who: str, beta: float | None, found: Sequence[Any]) -> dict[str, Any]:
    return {"who": who, "beta": beta, "texts": [one.text for one in found]}


@torch.no_grad()
def _scores(
    method: Any, large: Any, tokenizer: Any, parts: Mapping[str, Any], found: Any, author: Any
) -> dict[str, float]:
    """Means over the tokens of the texts of expected reward and KL from the model, nats a token.

    `author` is the record or the model whose law wrote them.
    """
    rewards: list[Tensor] = []
    distances: list[Tensor] = []
    count = len(parts["tuned"])
    kept: list[tuple[Tensor, list[Tensor]]] = []

    def keep(base: Tensor, logits: list[Tensor]) -> Tensor:
        kept.append((base, logits))
        return base

    for one in found:
        start = prompt_ids(tokenizer, one.prompt)
        ids = torch.tensor([[*start, *one.token_ids][:-1]])
        with method.steer(large, **parts) as beside:
            beside.combine = keep
            large(input_ids=ids.to(next(large.parameters()).device), use_cache=False)
        whole, sides = kept.pop()
        behind = slice(len(start) - 1, None)  # from the prompt's last token on
        base, logits = whole[0, behind], [side[0, behind] for side in sides]
        if hasattr(author, "combine"):
            log_p = author.combine(base, logits[:count], logits[count:], parts["shared"])
        else:
            log_p = torch.log_softmax(author(input_ids=ids).logits[0, behind].float(), -1)
        delta = method.delta(logits[:count], logits[count:], base.shape[-1])
        width = min(delta.shape[-1], log_p.shape[-1])
        log_p, delta = log_p[:, :width], delta[:, :width]
        log_base = torch.log_softmax(base.float(), -1)[:, :width]
        rewards.append((log_p.exp() * delta).sum(-1))
        distances.append((log_p.exp() * (log_p - log_base)).sum(-1))
    return {"reward": float(torch.cat(rewards).mean()), "kl": float(torch.cat(distances).mean())}


def table_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[object]]]:
    """Header and rows for a terminal; the first text stands for all."""
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
    """The frontier as SVG: KL to the right, reward upwards."""
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
            "KL from the model alone, nats a token",
            width / 2,
            height - 10,
            ink.text,
            anchor="middle",
        )
    )
    parts.append(svg.text("implicit reward, nats a token", 60, 14, ink.text))
    return svg.tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        style=f"font-family:{svg.FONT}",
    )
