"""UNCURL and the other ways to prune a mixture for one task: the same models, before and after.

    python benchmarks/claims/uncurl.py                          # benchmarks/results/uncurl.json
    python benchmarks/claims/uncurl.py --worlds stories --shared FOLDER --out FILE

Worlds, each with 3 seeds, 8 experts, two for each token:

    markov         a Mixtral from scratch on six Markov chains; the task is the first one
    markov-olmoe   the same in OLMoE's shape, whose router's softmax runs over all experts
    stories        the trained stories260K decoder made a Mixtral (each expert a copy of its MLP
                   with noise), trained on four kinds of text; the task is Shakespeare. Several
                   minutes of a free core a seed; not in the committed result

A mixture is trained on all kinds, fine-tuned to the task, pruned by the router's statistics on the
task's training rows, scored on its test rows, fine-tuned for a few more steps, scored again. The
rate and batch of the last steps in `stories` were chosen on rows of the task kept from training.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import foretune
from foretune.methods import make
from foretune.pruning.experts import find_blocks
from foretune.pruning.prune import prune_with
from foretune.pruning.statistics import Collector
from foretune.training.record import environment

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "results" / "uncurl.json"
EXPERTS, NOISE = 8, 0.05
SETTINGS: dict[str, dict[str, Any]] = {
    "stories": {"together": 250, "task": 40, "recover": 20, "batch": 8, "recover_batch": 32},
    "markov": {"together": 400, "task": 40, "recover": 40, "batch": 32, "recover_batch": 32},
    "markov-olmoe": {"together": 400, "task": 40, "recover": 20, "batch": 32, "recover_batch": 32},
}
RATE = {"together": 1e-3, "task": 5e-4, "recover": 3e-4}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "frequency": ("frequency", {}),
    "REAP": ("reap", {}),
    "HC-SMoE": ("hc-smoe", {}),
    "HC-SMoE, remap": ("hc-smoe", {"router": "remap"}),
    "UNCURL": ("uncurl", {}),
    "UNCURL, remap": ("uncurl", {"router": "remap"}),
    "UNCURL, dominant groups, remap": ("uncurl", {"router": "remap", "grouping": "dominant"}),
    "random experts": ("random-experts", {}),
}
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "UNCURL, remap, not aligned": ("uncurl", {"router": "remap", "align": False}),
    "UNCURL, remap, uniform weights": ("uncurl", {"router": "remap", "weights": "uniform"}),
    "UNCURL, remap, not centred": ("uncurl", {"router": "remap", "centred": False}),
}
DENOMINATOR: dict[str, tuple[str, dict[str, Any]]] = {
    "frequency": ("frequency", {}),
    "frequency, denominator kept": ("frequency", {"keep_denominator": True}),
    "REAP": ("reap", {}),
    "REAP, denominator kept": ("reap", {"keep_denominator": True}),
}


@dataclass(frozen=True)
class World:
    """Sequences of every kind, and how a mixture of so many experts begins.

    Args:
        kinds: (rows, length) token ids to train on, the task's first.
        test: (rows, length) of the task.
        build: A fresh mixture, by its number of experts and a seed.
        methods: By number of experts, what is tried.
    """

    kinds: list[Tensor]
    test: Tensor
    build: Callable[[int, int], Any]
    methods: dict[int, dict[str, tuple[str, dict[str, Any]]]]


# --- worlds ---------------------------------------------------------------------------------------


def stories(shared: Path) -> World:
    sys.path.insert(0, str(HERE))
    import stories260k

    with tempfile.TemporaryDirectory() as folder:
        stories260k.convert(shared / "stories260k", Path(folder))
        dense = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plays = rows_of(shared / "shakespeare" / "speakers.jsonl.gz")
    talk = rows_of(shared / "convai2" / "valid.jsonl.gz")
    asked = rows_of(shared / "clinc150" / "clinc150.jsonl.gz")
    train, test = (
        blocks([r["text"] for r in plays if r["split"] == split], tokenizer)
        for split in ("train", "test")
    )
    kinds = [
        train,
        blocks([r["response"] for r in talk if r["split"] != "test"], tokenizer),
        blocks([r["text"] for r in asked if r["split"] == "train"], tokenizer),
        tales(dense),
    ]

    def build(experts: int, seed: int) -> Any:
        return upcycled(dense, experts, seed)

    some = ("frequency", "REAP", "HC-SMoE, remap", "UNCURL, remap", "random experts")
    few = {name: METHODS[name] for name in some}
    return World(kinds, test[:200], build, {6: few, 4: METHODS | ABLATIONS, 2: few})


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def blocks(texts: Sequence[str], tokenizer: Any, length: int = 48, most: int = 4000) -> Tensor:
    """Texts one after the other, cut into rows of that length."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text).input_ids
        if len(ids) >= length * most:
            break
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@torch.no_grad()
def tales(dense: Any, count: int = 400, length: int = 48) -> Tensor:
    """What the dense model tells when it is sampled from."""
    torch.manual_seed(0)
    start = torch.ones(count, 1, dtype=torch.long)
    made: Tensor = dense.generate(
        start, attention_mask=start, do_sample=True, max_new_tokens=length - 1, eos_token_id=None
    )
    return made


def upcycled(dense: Any, experts: int, seed: int) -> Any:
    """A Mixtral whose experts are the dense model's MLP, each with noise of its own."""
    torch.manual_seed(seed)
    c = dense.config
    config = transformers.MixtralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=c.rope_parameters,
        tie_word_embeddings=True,
        num_local_experts=experts,
        num_experts_per_tok=2,
        output_router_logits=True,
        sliding_window=None,
    )
    model = transformers.MixtralForCausalLM(config)
    same = {k: v for k, v in dense.state_dict().items() if ".mlp." not in k}
    model.load_state_dict(same, strict=False)
    with torch.no_grad():
        for old, new in zip(dense.model.layers, model.model.layers, strict=True):
            joint = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight])
            new.mlp.experts.gate_up_proj.copy_(noisy(joint, experts))
            new.mlp.experts.down_proj.copy_(noisy(old.mlp.down_proj.weight, experts))
            new.mlp.gate.weight.normal_(0, 0.05)
    return model


def noisy(weight: Tensor, count: int) -> Tensor:
    return weight + NOISE * weight.std() * torch.randn(count, *weight.shape)


def markov(family: str) -> World:
    """Six chains over 32 symbols, each symbol followed by one of four."""
    rng = np.random.default_rng(0)
    kinds = [chain(rng) for _ in range(6)]
    rows = [walk(next_of, rng, 2000) for next_of in kinds]

    def build(experts: int, seed: int) -> Any:
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {
            "vocab_size": 32,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts_per_tok": 2,
            "output_router_logits": True,
            "pad_token_id": 0,
        }
        if family == "Mixtral":
            sizes |= {"num_local_experts": experts, "sliding_window": None}
        else:
            sizes |= {"num_experts": experts, "norm_topk_prob": False}
        config = getattr(transformers, f"{family}Config")(**sizes)
        return getattr(transformers, f"{family}ForCausalLM")(config)

    grid = full_grid() if family == "Mixtral" else {6: DENOMINATOR, 4: DENOMINATOR, 2: DENOMINATOR}
    return World(rows, walk(kinds[0], rng, 300), build, grid)


def chain(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    followers = np.stack([rng.choice(32, 4, replace=False) for _ in range(32)])
    return followers, rng.dirichlet(np.ones(4), 32)


def walk(next_of: tuple[np.ndarray, np.ndarray], rng: np.random.Generator, rows: int) -> Tensor:
    followers, shares = next_of
    found = np.empty((rows, 32), dtype=np.int64)
    found[:, 0] = rng.integers(32, size=rows)
    for t in range(1, 32):
        now = found[:, t - 1]
        pick = (rng.random(rows)[:, None] > shares[now].cumsum(1)).sum(1).clip(max=3)
        found[:, t] = followers[now, pick]
    return torch.from_numpy(found)


def full_grid() -> dict[int, dict[str, tuple[str, dict[str, Any]]]]:
    return {6: METHODS, 4: METHODS | ABLATIONS, 2: METHODS}


# --- training and scoring -------------------------------------------------------------------------


def train(
    model: Any, kinds: Sequence[Tensor], steps: int, rate: float, batch: int, seed: int
) -> Any:
    """Plain AdamW on rows drawn evenly from the kinds; the rate falls linearly to zero."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps) * min(1, (step + 1) / 10)
        each = [kinds[int(k)] for k in rng.integers(len(kinds), size=batch)]
        ids = torch.stack([kind[int(rng.integers(len(kind)))] for kind in each])
        loss = model(input_ids=ids, labels=ids).loss  # with the loss that balances experts
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def test_loss(model: Any, ids: Tensor) -> float:
    """Nats per token."""
    model.eval()
    total = 0.0
    for part in ids.split(100):
        logits = model(input_ids=part, output_router_logits=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
        total += float(loss) * len(part)
    return total / len(ids)


@torch.no_grad()
def tokens_per_s(model: Any, ids: Tensor, repeats: int = 5) -> float:
    """Median over forward passes of 100 rows, by the processor time of one thread."""
    part, found = ids[:100], []
    for _ in range(repeats):
        started = time.process_time()
        model(input_ids=part, output_router_logits=False)
        found.append(part.numel() / (time.process_time() - started))
    return statistics.median(found)


def one_seed(name: str, world: World, seed: int) -> list[dict[str, Any]]:
    how, task = SETTINGS[name], world.kinds[0]
    rows: list[dict[str, Any]] = []

    def note(method: str, experts: int, model: Any, **more: Any) -> None:
        row = {"world": name, "seed": seed, "method": method, "experts": experts, **more}
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["before"] = test_loss(model, world.test)
        if method in ("frequency", "all experts"):
            row["tokens_per_s"] = round(tokens_per_s(model, world.test))
        train(model, [task], how["recover"], RATE["recover"], how["recover_batch"], seed)
        row["after"] = test_loss(model, world.test)
        rows.append(row)
        print(name, seed, method, experts, f"{row['before']:.4f} {row['after']:.4f}", flush=True)

    def tuned(experts: int) -> Any:
        model = world.build(experts, seed)
        train(model, world.kinds, how["together"], RATE["together"], how["batch"], seed)
        return train(model, [task], how["task"], RATE["task"], how["batch"], seed)

    full = tuned(EXPERTS)
    with torch.no_grad(), Collector(find_blocks(full), outputs=True) as collector:
        for part in task[:256].split(64):
            full(input_ids=part)
    for experts, methods in world.methods.items():
        for label, (method, fields) in methods.items():
            seeded = {"seed": seed} if method == "random-experts" else {}
            record = make(method, experts=experts, **fields, **seeded)
            pruned = prune_with(full, collector.statistics, record)
            largest = max(len(g) for plan in pruned.plan.values() for g in plan.groups)
            note(label, experts, pruned.model, largest=largest, loads_with=pruned.loads_with)
    for experts in (4, 2) if name == "markov" else (4,):
        note("smaller mixture, same training", experts, tuned(experts))
    note("all experts", EXPERTS, full)
    return rows


# --- tables ---------------------------------------------------------------------------------------

NAMES = {"stories": "stories", "markov": "Markov chains", "markov-olmoe": "Markov chains, OLMoE"}


def cells(result: dict[str, Any], world: str) -> dict[tuple[str, int], list[dict[str, Any]]]:
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["world"] == world:
            found.setdefault((row["method"], row["experts"]), []).append(row)
    return found


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def losses(result: dict[str, Any], world: str) -> str:
    """Test loss by method and number of experts, before and after the steps that follow."""
    found = cells(result, world)
    methods = list(dict.fromkeys(method for method, _ in found))
    counts = (6, 4, 2)
    head = ["method", *[f"{k} experts" for k in counts]]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    best = {
        (k, key): min(
            round(mean(rows, key), 3)
            for (method, n), rows in found.items()
            if n == k and not method.startswith("smaller")
        )
        for k in counts
        for key in ("before", "after")
    }
    for method in [m for m in methods if m != "all experts"]:
        parts = []
        for k in counts:
            rows = found.get((method, k))
            if rows is None:
                parts.append("")
                continue
            shown = {key: f"{mean(rows, key):.3f}" for key in ("before", "after")}
            if not method.startswith("smaller"):
                for key, text in shown.items():
                    if float(text) == best[k, key]:
                        shown[key] = f"**{text}**"
            parts.append(" → ".join(shown.values()))
        lines.append("| " + " | ".join([method, *parts]) + " |")
    [(_, full)] = [(k, rows) for k, rows in found.items() if k[0] == "all experts"]
    seeds = len(full)
    lines += [
        "",
        f"{NAMES[world]}: test loss in nats per token after pruning → after "
        f"{result['settings'][world]['recover']} more steps on the task, mean of {seeds} seeds; "
        "the lowest of each column in bold. All 8 experts: "
        f"{mean(full, 'before'):.3f} → {mean(full, 'after'):.3f}.",
    ]
    return "\n".join(lines)


PAIRS = (
    ("alignment helps", "UNCURL, remap", "UNCURL, remap, not aligned", "before"),
    ("weighting by frequency helps", "UNCURL, remap", "UNCURL, remap, uniform weights", "before"),
    ("centring helps", "UNCURL, remap", "UNCURL, remap, not centred", "before"),
    ("remap is no worse than mean rows", "UNCURL, remap", "UNCURL", "before"),
    ("UNCURL beats frequency", "UNCURL", "frequency", "before"),
    ("UNCURL with remap beats frequency", "UNCURL, remap", "frequency", "before"),
    ("UNCURL with remap beats frequency, recovered", "UNCURL, remap", "frequency", "after"),
    ("REAP beats frequency", "REAP", "frequency", "before"),
    ("frequency beats random experts", "frequency", "random experts", "before"),
    (
        "frequency, recovered, beats the smaller mixture",
        "frequency",
        "smaller mixture, same training",
        "after",
    ),
    (
        "UNCURL with remap, recovered, beats the smaller mixture",
        "UNCURL, remap",
        "smaller mixture, same training",
        "after",
    ),
)


def claims(result: dict[str, Any]) -> str:
    """Differences seed by seed at 4 of 8 experts."""
    lines = ["| at 4 of 8 experts | seeds | differences |", "|---|---|---|"]
    found = cells(result, "markov")
    for claim, a, b, key in PAIRS:
        gaps = [x[key] - y[key] for x, y in zip(found[a, 4], found[b, 4], strict=True)]
        holds = f"{sum(gap < 0 for gap in gaps)} of {len(gaps)}"
        lines.append(f"| {claim} | {holds} | {' '.join(f'{gap:+.3f}' for gap in gaps)} |")
    lines += [
        "",
        "Markov chains: seeds in which the claim holds; differences of test losses (below 0: it "
        "holds).",
    ]
    return "\n".join(lines)


def sizes(result: dict[str, Any]) -> str:
    """Parameters, speed and largest cluster by number of experts."""
    head = "| experts | parameters | tokens/s | largest cluster of UNCURL | of HC-SMoE |"
    lines = [head, "|---|---|---|---|---|"]
    found = cells(result, "markov")
    full = found["all experts", 8]
    speed = f"{mean(full, 'tokens_per_s'):,.0f}"
    lines.append(f"| 8 | {full[0]['parameters']:,} | {speed} | 1 | 1 |")
    for k in (6, 4, 2):
        rows = found["frequency", k]
        largest = [
            ", ".join(str(r["largest"]) for r in found[name, k])
            for name in ("UNCURL, remap", "HC-SMoE, remap")
        ]
        lines.append(
            f"| {k} | {rows[0]['parameters']:,} | {mean(rows, 'tokens_per_s'):,.0f} | "
            f"{' | '.join(largest)} |"
        )
    torch_version = result["environment"]["versions"]["torch"]
    lines += [
        "",
        "The Markov mixture. Speed of forward passes of 100 sequences, by the CPU time of one "
        f"thread (torch {torch_version}), median of 5, mean over seeds; cluster sizes by seed. "
        "Each token is routed to two experts whatever their number, so fewer experts save memory "
        "but hardly any time.",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "markov": lambda result: losses(result, "markov"),
    "denominator": lambda result: losses(result, "markov-olmoe"),
    "claims": claims,
    "sizes": sizes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, help="folder with stories260k, shakespeare, …")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--worlds", nargs="*", default=["markov", "markov-olmoe"])
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    started = time.process_time()
    rows: list[dict[str, Any]] = []
    make_world: dict[str, Callable[[], World]] = {
        "stories": lambda: stories(given.shared),
        "markov": lambda: markov("Mixtral"),
        "markov-olmoe": lambda: markov("Olmoe"),
    }
    for name in given.worlds:
        world = make_world[name]()
        for seed in given.seeds:
            rows += one_seed(name, world, seed)
    if given.out.is_file():  # of the worlds and seeds that were not asked for
        kept = json.loads(given.out.read_text("utf-8"))["rows"]
        new = {(row["world"], row["seed"]) for row in rows}
        rows = [row for row in kept if (row["world"], row["seed"]) not in new] + rows
    result = {
        "claim": "uncurl",
        "settings": SETTINGS,
        "rate": RATE,
        "noise": NOISE,
        "cpu_seconds": round(time.process_time() - started),
        "foretune": foretune.__version__,
        "rows": [
            {k: round(v, 6) if isinstance(v, float) else v for k, v in r.items()} for r in rows
        ],
        "environment": environment(),
    }
    given.out.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
