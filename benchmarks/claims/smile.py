"""SMILE against static merges: MiniLM-L6 tuned on CLINC150 domains, in full and by LoRA.

python benchmarks/claims/smile.py --data FOLDER/clinc150/clinc150.jsonl.gz

Each of four domains (15 intents each) is learnt from 10 rows an intent: the last of MiniLM's six
blocks in full, or LoRAs on all its linear layers; each domain has a head of its own. The lower five
blocks are frozen, so that what they say is computed once. The domains' models are fused; 60 test
rows of each domain are scored with the domain's head. Nothing was chosen on test rows: the grid
is shown whole and all else has its default.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parents[1] / "results" / "smile.json"
DOMAINS = ("banking", "credit_cards", "travel", "work")
SHOTS, SAMPLES, STEPS, ROWS, BLOCKS = 10, 15, 100, 60, 1
COUNTS = {"train": SHOTS * 15, "test": ROWS}
RATES = {"full": 1e-3, "lora": 5e-3}
GATES, RANKS = (1, 16, 64, 384), (4, 32, 384)
SIZES_7B = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)} | {
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}


SHARED: list[Any] = []
PAPERS = {"full": "token k=32 gate_k=16", "lora": "token k=8 gate_k=8"}  # the paper's gate

# --- models -------------------------------------------------------------------------------------


class Given:
    """MiniLM's upper blocks under a fresh head, and the rows as its lower blocks leave them.

    Args:
        data: clinc150.jsonl.gz.
        counts: Split → rows of each domain.
        num_blocks: How many of the blocks are upper ones.
    """

    def __init__(
        self,
        data: str,
        counts: Mapping[str, int] = COUNTS,
        num_blocks: int = BLOCKS,
    ) -> None:
        from torch import nn

        import foretune

        class Passed(nn.Module):
            """In the place of the embeddings: the lower blocks' output comes in."""

            word_embeddings = None  # there is no vocabulary

            def forward(self, inputs_embeds: Any = None, **_: Any) -> Any:
                return inputs_embeds

        source = foretune.Source(source=data)
        tasks, _ = foretune.load_tasks(source, "classification")
        whole, tokenizer = foretune.load_model("minilm", head="classification", num_labels=15)
        self.model = whole
        bert, keep = whole.bert, {}
        blocks = bert.encoder.layer
        bert.encoder.layer = blocks[:-num_blocks]
        self.texts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for task in tasks.subset(DOMAINS):
            labels = sorted({row["label"] for row in task.train})
            for split, count in counts.items():
                rows = balanced(list(task.split(split)), count)
                self.texts[task.name, split] = rows
                keep[task.name, split] = list(self._passed(bert, tokenizer, rows, labels))
        self.rows = keep
        bert.encoder.layer, bert.embeddings = blocks[-num_blocks:], Passed()
        whole.config.num_hidden_layers = num_blocks
        self.state = copy.deepcopy(whole.state_dict())
        self.parameters = sum(p.numel() for p in whole.parameters())

    @staticmethod
    def _passed(bert: Any, tokenizer: Any, rows: Any, labels: Any) -> Iterator[dict[str, Any]]:
        """Batches of 45 rows, as the model is called."""
        import torch

        for start in range(0, len(rows), 45):
            part = rows[start : start + 45]
            inputs = tokenizer(
                [r["text"] for r in part],
                padding="max_length",
                max_length=16,
                truncation=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                below = bert(**inputs).last_hidden_state
            wanted = torch.tensor([labels.index(r["label"]) for r in part])
            mask = inputs["attention_mask"]
            yield {"inputs_embeds": below, "attention_mask": mask, "labels": wanted}

    def base(self, seed: int) -> Any:
        """The upper blocks with a head drawn from the seed."""
        import torch

        from foretune.models.surgery import reset_head

        model = copy.deepcopy(self.model)
        model.load_state_dict(self.state)
        torch.manual_seed(seed)
        reset_head(model, 15, seed)
        return model.eval()

    def together(self, task: str, split: str) -> dict[str, Any]:
        """All rows of a task's split in one batch."""
        import torch

        parts = self.rows[task, split]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def balanced(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """So many rows, each label as often as the others."""
    of: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        of.setdefault(row["label"], []).append(row)
    turns = [row for group in zip(*of.values(), strict=False) for row in group]
    return turns[:count]


def tune(base: Any, rows: Mapping[str, Any], kind: str, seed: int) -> Any:
    """A fine-tuned copy of the base: blocks, pooler and head, or LoRAs and head."""
    import peft
    import torch

    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    if kind == "lora":
        config = peft.LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["query", "key", "value", "dense"],
            exclude_modules=["bert.pooler.dense"],
            modules_to_save=["classifier"],
        )
        model = peft.get_peft_model(model, config)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[kind])
    ramp = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 6, (STEPS - i) / STEPS)
    )
    for _ in range(STEPS):
        index = torch.randperm(len(rows["labels"]))[:16]
        model(**{key: value[index] for key, value in rows.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ramp.step()
    return model.eval()


class Test:
    """The test rows, ready for many models."""

    def __init__(self, given: Given) -> None:
        self.batches = {task: given.rows[task, "test"] for task in DOMAINS}

    def accuracy(self, model: Any, task: str) -> float:
        """Share of a task's rows that a model gets right."""
        import torch

        right = total = 0
        with torch.no_grad():
            for batch in self.batches[task]:
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                right += int((model(**inputs).logits.argmax(-1) == batch["labels"]).sum())
                total += len(batch["labels"])
        return right / total

    def fused(self, fused: Any) -> dict[str, Any]:
        """Accuracy of each task under its own head, and where its tokens went."""
        scores, used = {}, {}
        for task in DOMAINS:
            fused.set_task(task)
            with fused.usage() as usage:
                scores[task] = self.accuracy(fused.model, task)
            used[task] = usage.mean()
        return {"accuracy": scores, "usage": used if usage.layers else None}


# --- variants -----------------------------------------------------------------------------------


def truncated(fused: Any, k: int, gate_k: int) -> Any:
    """The fusion of lower ranks: the first columns of one of full rank, which are the same."""
    from torch import nn

    from foretune.fusion.mixture import expert_layers

    made = copy.deepcopy(fused)
    for layer in expert_layers(made.model).values():
        layer.up = nn.Parameter(layer.up[:, :, :k].contiguous())
        layer.down = nn.Parameter(layer.down[:, :k].contiguous())
        layer.gate = nn.Parameter(layer.gate[:, :gate_k].contiguous())
    made.report["extra_parameters"] = sum(p.numel() for p in made.model.parameters()) - sum(
        p.numel() for p in plain_of(made).parameters()
    )
    return made


def plain_of(fused: Any) -> Any:
    """The model of the base's size, for counting."""
    from foretune.fusion.mixture import expert_layers, replace_module

    plain = copy.deepcopy(fused.model)
    for name, layer in expert_layers(plain).items():
        replace_module(plain, name, layer.base)
    for name, heads in fused.heads.items():
        replace_module(plain, name, heads.heads[0])
    return plain


def variants(
    base: Any, folders: Mapping[str, Any], kind: str, samples: Any
) -> Iterator[tuple[str, Any]]:
    """(name, fused model) of all that is compared, one at a time."""
    import foretune
    from foretune import SMILE

    # the LoRAs are PEFT's own, which do not record their base
    fuse = functools.partial(foretune.fuse, allow_unverified=True)
    yield "average", fuse(base, folders, foretune.Average())
    yield "task-arithmetic", fuse(base, folders, foretune.TaskArithmetic())
    yield "ties", fuse(base, folders, foretune.TIES())
    whole = fuse(base, folders, SMILE(k=384, gate_k=384))
    top = {"full": (32, 16), "lora": (8, 8)}[kind]
    grid = {(32, g) for g in GATES} | {(k, 16) for k in RANKS} | {(384, 384)}
    if kind == "lora":
        grid = {(8, 1), (4, 8)}
    for k, gate_k in sorted(grid | {top}):
        yield f"token k={k} gate_k={gate_k}", truncated(whole, k, gate_k)
    paper = truncated(whole, *top)
    for top_k in (4,):
        paper.routing.top_k = top_k
        yield f"token top_k={top_k}", paper
    paper.routing.top_k = 1
    paper.routing.granularity = "sequence"
    yield "sequence", paper
    paper.routing.granularity = "task"
    yield "task", paper
    paper.routing.choose(None)
    learnt = fuse(
        base,
        folders,
        SMILE(k=top[0], gate_k=16, gate="activations"),
        samples=samples,
    )
    yield "activations, token", learnt
    learnt.routing.granularity = "sequence"
    yield "activations, sequence", learnt


def seconds_per_token(models: Mapping[str, Callable[[], Any]], tokens: int) -> dict[str, float]:
    """Median microseconds a token, the models taking turns."""
    import torch

    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(7):
            for name, call in models.items():
                start = time.process_time()
                call()
                taken[name].append((time.process_time() - start) / tokens * 1e6)
    return {name: statistics.median(values) for name, values in taken.items()}


def one_seed(given: Given, seed: int, kind: str) -> dict[str, Any]:
    """All numbers of one seed and one kind of fine-tuning."""
    base, test = given.base(seed), Test(given)
    samples, start = {}, time.process_time()
    for task in DOMAINS:
        batch = given.together(task, "train")
        samples[task] = [{k: v[:SAMPLES] for k, v in batch.items() if k != "labels"}]
    tuned = {task: tune(base, given.together(task, "train"), kind, seed) for task in DOMAINS}
    print(f"seed {seed}, {kind}: tuned in {time.process_time() - start:.0f} s", file=sys.stderr)
    rows = {"individual": {"accuracy": {t: test.accuracy(m, t) for t, m in tuned.items()}}}
    alone = 100 * sum(rows["individual"]["accuracy"].values()) / len(DOMAINS)
    print(f"  {seed} {kind} individual {alone:5.1f}", file=sys.stderr, flush=True)
    inputs = {k: v for k, v in test.batches[DOMAINS[0]][0].items() if k != "labels"}
    timed: dict[str, Callable[[], Any]] = {"base": lambda: base(**inputs)}
    for name, fused in variants(base, tuned, kind, samples):
        rows[name] = test.fused(fused) | {"extra": fused.report["extra_parameters"]}
        if name in (*PAPERS.values(), "average"):
            kept = copy.deepcopy(fused).set_task(DOMAINS[0])
            timed[name] = lambda kept=kept: kept.model(**inputs)
        mean = sum(rows[name]["accuracy"].values()) / len(DOMAINS)
        print(f"  {seed} {kind} {name:28s} {100 * mean:5.1f}", file=sys.stderr, flush=True)
    tokens = inputs["attention_mask"].numel()
    return {"rows": rows, "microseconds": seconds_per_token(timed, tokens)}


def of_shared(job: tuple[int, str]) -> dict[str, Any]:
    """`one_seed` in a forked process, which finds what the lower blocks said in memory."""
    return one_seed(SHARED[0], *job)


# --- a 7 B shape ---------------------------------------------------------------------------------


def plan_7b(experts: int = 4, layers: int = 32) -> dict[str, Any]:
    """What fusing four models of Mistral 7 B's shape adds, and how long one layer takes."""
    import torch

    from foretune.linalg.low_rank import svd_of_product, truncated_svd

    def extra(k: int, gate_k: int) -> int:
        sizes = SIZES_7B.values()
        return layers * sum(experts * (k * (m + n) + gate_k * n) for m, n in sizes)

    b, a, full = torch.randn(4096, 16), torch.randn(16, 14336), torch.randn(1024, 4096)
    start = time.process_time()
    svd_of_product(b, a)
    lora = time.process_time() - start
    start = time.process_time()
    truncated_svd(full, 64)
    wide = time.process_time() - start
    square = torch.randn(4096, 4096)
    start = time.process_time()
    truncated_svd(square, 64)
    return {
        "experts": experts,
        "extra_full_k64_gate8": extra(64, 8),
        "extra_lora_k16_gate8": extra(16, 8),
        "lora_layer_seconds": lora,
        "full_layer_seconds": wide,
        "square_layer_seconds": time.process_time() - start,
        "largest_layer_float32_gb": 14336 * 4096 * 4 / 1e9,
    }


# --- tables -------------------------------------------------------------------------------------


def means(result: Mapping[str, Any], kind: str) -> dict[str, list[float]]:
    """Variant → the mean accuracy over the domains, one for each seed."""
    found: dict[str, list[float]] = {}
    for seed in result["seeds"]:
        for name, row in seed[kind].items():
            scores = row["accuracy"].values()
            found.setdefault(name, []).append(100 * sum(scores) / len(scores))
    return found


LABELS = {
    "individual": "individual models, each on its domain",
    "average": "average (control)",
    "task-arithmetic": "task arithmetic, λ 0.4 (control)",
    "ties": "TIES (control)",
    "sequence": "the same, routed by sequence",
    "task": "the same, routed by the true task",
    "activations, token": "gate from 15 texts per task, by token",
    "activations, sequence": "gate from 15 texts per task, by sequence",
}


def main_table(result: Mapping[str, Any], kind: str) -> str:
    """Accuracy of individual models, controls and SMILE's gates."""
    found = means(result, kind)
    paper = PAPERS[kind]
    names = ["individual", "average", "task-arithmetic", "ties", paper]
    names += ["sequence", "task", "activations, token", "activations, sequence"]
    labels = LABELS | {paper: f"SMILE, the paper's gate ({paper.partition(' ')[2]})"}
    lines = ["| | accuracy, % | each seed | % of individual | tokens to their task's expert, % |"]
    lines.append("|---|---|---|---|---|")
    individual = found["individual"]
    for name in names:
        share = statistics.mean(100 * a / b for a, b in zip(found[name], individual, strict=True))
        seeds = " / ".join(f"{value:.1f}" for value in found[name])
        lines.append(
            f"| {labels[name]} | {statistics.mean(found[name]):.1f} | {seeds} | {share:.1f} "
            f"| {own(result, kind, name)} |"
        )
    return "\n".join(lines)


def own(result: Mapping[str, Any], kind: str, name: str) -> str:
    """Share of tokens that go to the task's own expert."""
    rows = [seed[kind][name].get("usage") for seed in result["seeds"]]
    if not all(rows):
        return ""
    shares = [usage[task][task] for usage in rows for task in usage]
    return f"{100 * statistics.mean(shares):.0f}"


def grid_table(result: Mapping[str, Any]) -> str:
    """Rank of the expert and of the gate, full fine-tuning."""
    found = means(result, "full")
    individual = found["individual"]

    def share(k: int, gate_k: int) -> str:
        values = found.get(f"token k={k} gate_k={gate_k}")
        if values is None:
            return ""
        return (
            f"{statistics.mean(100 * a / b for a, b in zip(values, individual, strict=True)):.1f}"
        )

    lines = ["| k \\ gate_k | " + " | ".join(str(g) for g in GATES) + " |"]
    lines.append("|---" * (len(GATES) + 1) + "|")
    lines += [f"| {k} | " + " | ".join(share(k, g) for g in GATES) + " |" for k in RANKS]
    four = zip(found["token top_k=4"], individual, strict=True)
    more = statistics.mean(100 * a / b for a, b in four)
    return "\n".join([*lines, "", f"k=32, gate_k=16 with top_k=4: {more:.1f}."])


def usage_table(result: Mapping[str, Any], kind: str) -> str:
    """Where each domain's tokens go under the paper's gate, mean over layers and seeds."""
    paper = PAPERS[kind]
    lines = ["| examples of | " + " | ".join(f"→ {d}" for d in DOMAINS) + " |"]
    lines.append("|---" * (len(DOMAINS) + 1) + "|")
    for task in DOMAINS:
        cells = [
            100 * statistics.mean(s[kind][paper]["usage"][task][to] for s in result["seeds"])
            for to in DOMAINS
        ]
        lines.append(f"| {task} | " + " | ".join(f"{c:.0f} %" for c in cells) + " |")
    return "\n".join(lines)


def cost_table(result: Mapping[str, Any]) -> str:
    """Parameters and time."""
    base = result["seeds"][0]["base_parameters"]
    lines = ["| | added parameters | share of the base | µs per token | × base |", "|---" * 5 + "|"]
    for kind, name in (
        ("full", "average"),
        ("full", "token k=32 gate_k=16"),
        ("lora", "token k=8 gate_k=8"),
    ):
        times = [seed[f"{kind}_microseconds_per_token"] for seed in result["seeds"]]
        extra = result["seeds"][0][kind][name]["extra"]
        label = "average" if name == "average" else f"SMILE, {kind}, {name.partition(' ')[2]}"
        lines.append(
            f"| {label} | {extra / 1e6:.2f} M | {100 * extra / base:.1f} % "
            f"| {statistics.mean(t[name] for t in times):.0f} "
            f"| {statistics.mean(t[name] / t['base'] for t in times):.2f} |"
        )
    plan = result["plan_7b"]
    return "\n".join(
        [
            *lines,
            "",
            f"Planned, not run: {plan['experts']} experts on the shapes of Mistral 7 B add "
            f"{plan['extra_full_k64_gate8'] / 1e9:.2f} B parameters at k=64, gate_k=8 and "
            f"{plan['extra_lora_k16_gate8'] / 1e9:.2f} B for LoRAs of rank 16; one layer takes "
            f"{plan['lora_layer_seconds']:.3f} s on one core from a LoRA (4096 × 14336) and "
            f"{plan['full_layer_seconds']:.1f} s (1024 × 4096) to "
            f"{plan['square_layer_seconds']:.1f} s (4096 × 4096) from a full checkpoint; the "
            f"largest layer in float32 is {plan['largest_layer_float32_gb']:.2f} GB.",
        ]
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "full": lambda result: main_table(result, "full"),
    "lora": lambda result: main_table(result, "lora"),
    "grid": grid_table,
    "usage-full": lambda result: usage_table(result, "full"),
    "usage-lora": lambda result: usage_table(result, "lora"),
    "cost": cost_table,
}


def main() -> None:
    """Runs the seeds and writes the result."""
    import torch

    from foretune.training.record import environment

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True, help="clinc150.jsonl.gz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = Given(options.data)
    result: dict[str, Any] = {"claim": "smile", "domains": DOMAINS, "seeds": []}
    result |= {"shots": SHOTS, "samples": SAMPLES, "steps": STEPS, "rows": ROWS, "blocks": BLOCKS}
    result |= {"learning_rates": RATES, "environment": environment()}
    SHARED.append(given)
    jobs = [(seed, kind) for seed in range(options.seeds) for kind in ("full", "lora")]
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        found = dict(zip(jobs, pool.map(of_shared, jobs, chunksize=1), strict=True))
    for seed in range(options.seeds):
        row: dict[str, Any] = {"seed": seed, "base_parameters": given.parameters}
        for kind in ("full", "lora"):
            row[kind] = found[seed, kind]["rows"]
            row[f"{kind}_microseconds_per_token"] = found[seed, kind]["microseconds"]
        result["seeds"].append(row)
    result["plan_7b"] = plan_7b()
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
