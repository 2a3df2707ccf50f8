"""SMILE where everything is small and known: four synthetic domains, one masked language model.

    python benchmarks/claims/smile_synthetic.py          # benchmarks/results/smile_synthetic.json

A domain is a set of Markov chains over its own 32 of 64 symbols: one chain for each of its four
classes, which follow a symbol by the same four others, with other shares. A BERT of three layers
learns masked symbols of all domains together, then a copy for each domain learns to tell the
domain's classes: its hidden states' mean is compared with four random vectors that stay fixed, as
a class's text stays fixed in CLIP, and only the encoder's linear layers learn. The copies are
fused. The seed draws the chains, the rows, the vectors and the weights. Sizes, rates and the
spread of the shares were set on seed 10 for individual models of about 90 %, before any fusing.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import foretune
from foretune import SMILE, Average, TaskArithmetic
from foretune.training.record import environment

RESULT = Path(__file__).resolve().parents[1] / "results" / "smile_synthetic.json"
DOMAINS = ("north", "east", "south", "west")
CLASSES, SYMBOLS, OWN, FOLLOWERS, LENGTH = 4, 64, 32, 4, 24
WIDTH, LAYERS = 64, 3
ROWS = {"train": 4000, "test": 500}
STEPS = {"together": 800, "task": 600}
RATE = {"together": 2e-3, "task": 1e-3}
BATCH, MASKED = 32, 0.15
SPREAD = 0.6  # of the shares: the smaller, the more a class has followers of its own
SHARPNESS = 10.0  # of the comparison with a class's vector, which has length 1

Split = dict[str, tuple[Tensor, Tensor]]

# --- data -----------------------------------------------------------------------------------------


def domain(rng: np.random.Generator) -> Split:
    """Rows of a fresh domain and their classes, by split."""
    symbols = rng.choice(SYMBOLS, OWN, replace=False)
    followers = np.stack([rng.choice(OWN, FOLLOWERS, replace=False) for _ in range(OWN)])
    shares = rng.dirichlet(np.full(FOLLOWERS, SPREAD), (CLASSES, OWN)).cumsum(-1)
    found = {}
    for split, count in ROWS.items():
        labels = np.arange(count) % CLASSES
        rows = np.empty((count, LENGTH), dtype=np.int64)
        rows[:, 0] = rng.integers(OWN, size=count)
        for t in range(1, LENGTH):
            now = rows[:, t - 1]
            pick = (rng.random(count)[:, None] > shares[labels, now]).sum(1).clip(max=FOLLOWERS - 1)
            rows[:, t] = followers[now, pick]
        found[split] = (torch.from_numpy(symbols[rows]), torch.from_numpy(labels))
    return found


# --- models ---------------------------------------------------------------------------------------


def pretrained(rows: Tensor, seed: int) -> Any:
    """A model that has learnt the masked symbols of all domains."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=SYMBOLS + 1,  # and the mask
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,
    )
    model = transformers.BertForMaskedLM(config)

    def loss() -> Tensor:
        ids = rows[torch.randint(len(rows), (BATCH,))]
        hidden = torch.rand(ids.shape) < MASKED
        given = ids.masked_fill(hidden, SYMBOLS)
        return model(input_ids=given, labels=ids.masked_fill(~hidden, -100)).loss

    train(list(model.parameters()), loss, "together")
    return model.eval()


def tuned(base: Any, rows: Tensor, labels: Tensor, texts: Tensor, seed: int) -> Any:
    """A copy whose encoder's linear layers have learnt a domain's classes."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base).requires_grad_(False)
    linear = [m for m in model.bert.encoder.modules() if isinstance(m, nn.Linear)]
    learning = [p.requires_grad_() for layer in linear for p in layer.parameters()]

    def loss() -> Tensor:
        index = torch.randint(len(rows), (BATCH,))
        return nn.functional.cross_entropy(scores(model, rows[index], texts), labels[index])

    train(learning, loss, "task")
    return model.eval()


def train(parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], kind: str) -> None:
    """AdamW; the rate rises for twenty steps and falls to zero."""
    steps = STEPS[kind]
    optimizer = torch.optim.AdamW(parameters, lr=RATE[kind], weight_decay=0.01)
    ramp = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 20, (steps - i) / steps)
    )
    for _ in range(steps):
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ramp.step()


def scores(model: Any, rows: Tensor, texts: Tensor) -> Tensor:
    """The rows' mean hidden states beside each class's vector."""
    hidden = model(input_ids=rows, output_hidden_states=True).hidden_states[-1].mean(1)
    return SHARPNESS * nn.functional.normalize(hidden, dim=-1) @ texts.T


@torch.no_grad()
def accuracy(model: Any, rows: Tensor, labels: Tensor, texts: Tensor) -> float:
    """Per cent of a domain's rows."""
    right = scores(model, rows, texts).argmax(-1) == labels
    return 100 * float(right.float().mean())


# --- variants -------------------------------------------------------------------------------------


def variants() -> Iterator[tuple[str, Any]]:
    """(name, method) of all that is compared."""
    yield "average", Average()
    yield "task arithmetic", TaskArithmetic(scale=0.5)
    for k in (8, 4, 2, None):
        yield f"token k={k} gate_k=16", SMILE(k=k, gate_k=16)
    for gate_k in (1, WIDTH):
        yield f"token k=8 gate_k={gate_k}", SMILE(k=8, gate_k=gate_k)
    yield "sequence k=8 gate_k=16", SMILE(k=8, gate_k=16, routing="sequence")
    for k in (8, 4, 2):
        yield f"told k={k}", SMILE(k=k, routing="task")


def one_seed(seed: int, fusing: bool) -> dict[str, Any]:
    """Per cent right of each domain by variant, and where the tokens went."""
    started = time.process_time()
    rng = np.random.default_rng(seed)
    data = {name: domain(rng) for name in DOMAINS}
    torch.manual_seed(seed)
    texts = {n: nn.functional.normalize(torch.randn(CLASSES, WIDTH), dim=-1) for n in DOMAINS}
    base = pretrained(torch.cat([found["train"][0] for found in data.values()]), seed)
    models = {n: tuned(base, *data[n]["train"], texts[n], seed) for n in DOMAINS}
    test = {n: (*data[n]["test"], texts[n]) for n in DOMAINS}
    rows: dict[str, Any] = {
        "base": {"accuracy": {n: accuracy(base, *test[n]) for n in DOMAINS}},
        "individual": {"accuracy": {n: accuracy(models[n], *test[n]) for n in DOMAINS}},
    }
    for name, method in variants() if fusing else ():
        fused = foretune.fuse(base, models, method)
        row: dict[str, Any] = {"accuracy": {}, "usage": {}}
        for task in DOMAINS:
            fused.set_task(task)
            with fused.usage() as usage:
                row["accuracy"][task] = accuracy(fused.model, *test[task])
            row["usage"][task] = {n: round(share, 4) for n, share in usage.mean().items()}
        rows[name] = row | {"extra": fused.report["extra_parameters"]}
    for name, row in rows.items():
        row["accuracy"] = {n: round(value, 2) for n, value in row["accuracy"].items()}
        print(f"{seed} {name:24s} {statistics.fmean(row['accuracy'].values()):5.1f}", flush=True)
    seconds = round(time.process_time() - started)
    size = sum(p.numel() for p in base.parameters())
    return {"seed": seed, "base_parameters": size, "cpu_seconds": seconds, "rows": rows}


# --- tables ---------------------------------------------------------------------------------------

LABELS = {
    "base": "base, not tuned",
    "individual": "individual models, each on its domain",
    "average": "average (control)",
    "task arithmetic": "task arithmetic, λ 0.5 (control)",
    "token k=8 gate_k=16": "SMILE, k=8, gate_k=16, by token",
    "token k=4 gate_k=16": "k=4",
    "token k=2 gate_k=16": "k=2",
    "token k=None gate_k=16": "k=null, the full change",
    "token k=8 gate_k=1": "k=8, gate_k=1",
    "token k=8 gate_k=64": "k=8, gate_k=64, as wide as the model",
    "sequence k=8 gate_k=16": "k=8, gate_k=16, by sequence",
    "told k=8": "routed by the true task, k=8",
    "told k=4": "routed by the true task, k=4",
    "told k=2": "routed by the true task, k=2",
}


def levels(result: Mapping[str, Any], name: str) -> list[float]:
    """Mean accuracy over the domains, one for each seed."""
    return [statistics.fmean(s["rows"][name]["accuracy"].values()) for s in result["seeds"]]


def shares(result: Mapping[str, Any], name: str) -> list[float]:
    """The same in per cent of the individual models, one for each seed."""
    pairs = zip(levels(result, name), levels(result, "individual"), strict=True)
    return [100 * value / alone for value, alone in pairs]


def all_table(result: Mapping[str, Any]) -> str:
    """Every variant."""
    head = "| | accuracy, % | % of individual | each seed | tokens to their task's expert, % |"
    lines = [head, "|---|---|---|---|---|"]
    for name, label in LABELS.items():
        found = shares(result, name)
        each = " / ".join(f"{value:.1f}" for value in found)
        accurate = statistics.fmean(levels(result, name))
        mean = statistics.fmean(found)
        lines.append(f"| {label} | {accurate:.1f} | {mean:.1f} | {each} | {own(result, name)} |")
    return "\n".join(lines)


def own(result: Mapping[str, Any], name: str) -> str:
    """Share of tokens that go to the task's own expert, mean over layers, domains and seeds."""
    used = [seed["rows"][name].get("usage", {}) for seed in result["seeds"]]
    found = [usage[task].get(task) for usage in used for task in usage]
    known = [share for share in found if share is not None]
    return f"{100 * statistics.fmean(known):.0f}" if any(known) else ""


def marks_table(result: Mapping[str, Any]) -> str:
    """The targets set before the run, what was measured, whether they are met."""
    mean = {name: statistics.fmean(shares(result, name)) for name in LABELS}
    smile = mean["token k=8 gate_k=16"]
    best = max(mean["average"], mean["task arithmetic"])
    dense, wide = mean["token k=None gate_k=16"], mean["token k=8 gate_k=64"]
    rows = (
        (
            "routed by the true task, k=4: at least 97 %",
            f"{mean['told k=4']:.1f} %",
            mean["told k=4"] >= 97,
        ),
        ("by token, k=8, gate_k=16: at least 70 %", f"{smile:.1f} %", smile >= 70),
        (
            "the same: at least 1.8 times the better static merge",
            f"{smile / best:.2f} times ({best:.1f} %)",
            smile >= 1.8 * best,
        ),
        (
            "k=8 within 1.5 points of the full change",
            f"{smile - dense:+.1f} points",
            abs(smile - dense) <= 1.5,
        ),
        (
            "gate_k=64 at least 20 points below gate_k=16",
            f"{smile - wide:.1f} points below",
            smile - wide >= 20,
        ),
    )
    lines = ["| target, in % of the individual models | measured | met |", "|---|---|---|"]
    lines += [f"| {mark} | {said} | {'yes' if met else '**no**'} |" for mark, said, met in rows]
    seeds = len(result["seeds"])
    return "\n".join([*lines, "", f"Means of {seeds} seeds; set before the run."])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"all": all_table, "marks": marks_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--individual", action="store_true", help="only these; writes nothing")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    with multiprocessing.get_context("fork").Pool(given.processes) as pool:
        jobs = [(seed, not given.individual) for seed in given.seeds]
        seeds = pool.starmap(one_seed, jobs, chunksize=1)
    if given.individual:
        return
    result = {
        "claim": "smile_synthetic",
        "steps": STEPS,
        "rate": RATE,
        "rows": ROWS,
        "spread": SPREAD,
        "seeds": seeds,
        "environment": environment(),
    }
    RESULT.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
