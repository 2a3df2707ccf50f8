"""EFT on SmolLM2: a smaller model is distilled from it, tuned on people's chats, and steers it.

    python benchmarks/claims/eft_smollm2.py ../shared/data/convai2/valid.jsonl.gz
    python benchmarks/publish.py                              # tables in docs/results/eft.md

About 25 minutes of one core. It writes `results/eft_smollm2.json`; models lie in
`runs/eft-smollm2`; what is there already is not trained or measured again.

*Models.* Large: SmolLM2-135M-Instruct, 30 layers. Small: 8 of these layers with its embeddings,
trained to give the large model's distribution, KL(large ‖ small), on conversations of half of the
personas of ConvAI2. Both are tuned by `foretune.adapt` alike: LoRA of rank 16 on all linear layers,
20 batches of 8 conversations of a quarter of the personas, of which the last turn is learnt. Rates
and steps were not searched for, neither here nor in distilling. Products are in bfloat16, but for
the texts that are drawn.

*Figures.* People's replies of the last quarter of the personas, token by token after what was
really said: nats per token of the replies (lower is better), KL of a model from the large base and
expected reward E_p[log p_tuned − log p_untuned], all in nats per token. Then reward and KL once
more on what each model itself says, drawn at temperature 1: the paper's frontier, as `foretune
generate --beta-sweep` measures it. Beta is chosen on validation rows, the large model alone
(beta 0) among the choices. A seed draws the conversations to tune on and the adapters' first
weights; the small model is one.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from claims.rtd import grid
from language.data import chats, rows_of

import foretune
from foretune import EFT, LoRA, Run
from foretune.decoding.beta_sweep import sweep
from foretune.decoding.peft_model import with_adapter
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.tasks.task import Task, TaskCollection
from foretune.training.record import environment

RESULT = Path(__file__).resolve().parents[1] / "results" / "eft_smollm2.json"
WORK = Path("runs/eft-smollm2")
SEEDS = (0, 1, 2)
LAYERS = (0, 1, 2, 8, 15, 22, 28, 29)  # that the small model keeps
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
DRAWN_BETAS = (0.5, 1.0, 1.5)
RATE, STEPS, BATCH, MAX_TOKENS = 1e-3, 20, 8, 96
DISTIL_RATE, DISTIL_STEPS, DISTIL_BATCH = 1e-3, 80, 4
VALIDATION, TESTED, PROMPTS, NEW_TOKENS = 24, 72, 4, 12
NAME = "chat"  # of the single task
CHUNK = 256  # tokens whose distributions are compared at once

Row = dict[str, Any]
Logits = list[tuple[Tensor, Tensor]]  # (tokens, V) of a row, (tokens,) what was really said


def split(file: Path) -> dict[str, list[Row]]:
    """Conversations by what they are for; no persona is in two of them."""
    rows = list(chats(rows_of(file)))
    names = sorted({row["task"] for row in rows})
    order = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    half, most = len(order) // 2, 3 * len(order) // 4
    parts = {"distil": order[:half], "tune": order[half:most], "test": order[most:]}
    of = {use: [row for row in rows if row["task"] in set(who)] for use, who in parts.items()}
    rng = np.random.default_rng(1)

    def some(part: list[Row], kind: str, count: int) -> list[Row]:
        """The last remark and its reply, of rows drawn at random."""
        kept = [{"messages": row["messages"][-2:]} for row in part if row["split"] == kind]
        return [kept[i] for i in rng.permutation(len(kept))[:count]]

    return {
        "distil": of["distil"],
        "tune": some(of["tune"], "train", len(rows)),
        "validation": some(of["tune"], "test", VALIDATION),
        "test": some(of["test"], "test", TESTED),
    }


# --- the small model ------------------------------------------------------------------------------


def distilled(large: Any, tokenizer: Any, rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """Writes the small model, and returns what distilling it cost and gave."""
    record = folder / "distilled.json"
    if record.is_file():
        return dict(json.loads(record.read_text("utf-8")))
    torch.manual_seed(0)
    config = copy.deepcopy(large.config)
    config.num_hidden_layers = len(LAYERS)
    small = type(large)(config)
    small.model.embed_tokens.load_state_dict(large.model.embed_tokens.state_dict())
    small.model.norm.load_state_dict(large.model.norm.state_dict())
    for layer, place in zip(small.model.layers, LAYERS, strict=True):
        layer.load_state_dict(large.model.layers[place].state_dict())
        layer.self_attn.layer_idx = LAYERS.index(place)
    small.model.embed_tokens.requires_grad_(False)  # and the output layer, which is tied to it
    moved = [p for p in small.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=DISTIL_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / DISTIL_STEPS)
    )
    teacher = copy.deepcopy(large).to(torch.bfloat16)
    objective = CausalLM(tokenizer, max_tokens=128)
    texts = [objective.encode(row, NAME)["input_ids"] for row in rows]
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(texts)) for _ in range(9)])
    began, losses, tokens = time.process_time(), [], 0
    small.train()
    for step in range(DISTIL_STEPS):
        batch = [texts[i] for i in order[step * DISTIL_BATCH : (step + 1) * DISTIL_BATCH]]
        longest = max(map(len, batch))
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in batch])
        real = torch.tensor([[*[True] * len(t), *[False] * (longest - len(t))] for t in batch])
        with torch.no_grad():
            aim = torch.log_softmax(teacher(input_ids=ids).logits[real].float(), -1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = small(input_ids=ids).logits[real]
        log_p = torch.log_softmax(logits.float(), -1)
        loss = F.kl_div(log_p, aim, log_target=True, reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moved, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        tokens += int(real.sum())
        if step % 20 == 0:
            print(f"distilling, step {step}: {losses[-1]:.3f}", file=sys.stderr, flush=True)
    small.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = {
        "layers": LAYERS,
        "parameters": sum(p.numel() for p in small.parameters()),
        "tokens": tokens,
        "kl_first": mean(losses[:5]),
        "kl_last": mean(losses[-20:]),
        "cpu_seconds": time.process_time() - began,
    }
    record.write_text(json.dumps(found), "utf-8")
    return found


# --- tuning ---------------------------------------------------------------------------------------


def tune(model: Any, tokenizer: Any, rows: Sequence[Row], seed: int, folder: Path) -> None:
    """Writes an adapter, unless it is there."""
    if (folder / NAME / "adapter_config.json").is_file():
        return
    drawn = np.random.default_rng(seed).permutation(len(rows))[: STEPS * BATCH]
    task = Task(NAME, train=[rows[i] for i in drawn])
    adapted = foretune.adapt(
        model,
        TaskCollection((task,), CausalLM(tokenizer, max_tokens=MAX_TOKENS)),
        LoRA(
            learning_rate=RATE,
            lora={"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        ),
        Run(seed=seed, steps=STEPS, batch_size=BATCH, precision="bf16", device="cpu"),
    )
    adapted.save(folder)


# --- figures --------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model: Any, tokenizer: Any, rows: Sequence[Row]) -> Logits:
    """The model's logits of every token of the replies."""
    objective = CausalLM(tokenizer, max_tokens=MAX_TOKENS)
    found = []
    for row in rows:
        encoded = objective.encode(row, NAME)
        ids, [(start, stop)] = torch.tensor([encoded["input_ids"]]), encoded["learnt"]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, : stop - 1]).logits[0, start - 1 :]
        found.append((logits.float(), ids[0, start:stop]))
    return found


def chunks(parts: Mapping[str, Logits]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Logits of all models and the tokens that were said, a few rows at a time."""
    names = list(parts)
    for start in range(0, len(parts[names[0]]), 16):
        said = torch.cat([ids for _, ids in parts[names[0]][start : start + 16]])
        yield {n: torch.cat([x for x, _ in parts[n][start : start + 16]]) for n in names}, said


def figures(
    parts: Mapping[str, Logits], betas: Sequence[float] = BETAS
) -> dict[str, dict[str, float]]:
    """Nats, KL and reward per token of every model, and of EFT by beta.

    Args:
        parts: Logits of "large", "small", "small tuned" and perhaps "large tuned".
        betas: Those of EFT.
    """
    totals: dict[str, Tensor] = {}
    count = 0
    for logits, said in chunks(parts):
        base = torch.log_softmax(logits["large"], -1)
        sides = [logits["small tuned"]], [logits["small"]]
        delta = EFT().delta(*sides, base.shape[-1])
        laws = {
            "large base": base,
            "small base": torch.log_softmax(logits["small"], -1),
            "small tuned alone": torch.log_softmax(logits["small tuned"], -1),
        }
        if "large tuned" in logits:
            laws["large truly tuned"] = torch.log_softmax(logits["large tuned"], -1)
        for beta in betas:
            laws[f"EFT, beta {beta:g}"] = EFT(beta=beta).combine(logits["large"], *sides)
        for name, log_p in laws.items():
            p = log_p.exp()
            row = torch.stack(
                [
                    -log_p.gather(1, said[:, None]).double().sum(),
                    (p * (log_p - base)).double().sum(),
                    (p * delta).double().sum(),
                ]
            )
            totals[name] = totals.get(name, torch.zeros(3, dtype=torch.double)) + row
        count += len(said)
    return {
        name: dict(zip(("nats", "kl", "reward"), (total / count).tolist(), strict=True))
        for name, total in totals.items()
    }


class Seed:
    """One seed: its adapters, and what is measured with them."""

    def __init__(
        self,
        models: Mapping[str, Any],
        tokenizer: Any,
        rows: Mapping[str, list[Row]],
        bases: Mapping[str, Mapping[str, Logits]],
        seed: int,
    ) -> None:
        self.models, self.tokenizer, self.rows = models, tokenizer, rows
        self.bases, self.seed = bases, seed

    def adapter(self, size: str) -> Path:
        """The adapter of this size, which is trained unless it is there."""
        folder = WORK / f"{size}-{self.seed}"
        tune(self.models[size], self.tokenizer, self.rows["tune"], self.seed, folder)
        return folder / NAME

    def logits(self, size: str, use: str) -> Logits:
        """Those of the tuned model of this size."""
        model = with_adapter(copy.deepcopy(self.models[size]), self.adapter(size))
        return logits_of(model, self.tokenizer, self.rows[use])

    def replies(self) -> dict[str, Any]:
        """EFT, its side models and the large base, and the beta that validation rows choose."""
        on = {
            use: figures({**self.bases[use], "small tuned": self.logits("small", use)})
            for use in ("validation", "test")
        }
        beta = min(BETAS, key=lambda beta: on["validation"][f"EFT, beta {beta:g}"]["nats"])
        return {"beta": beta, **on}

    def ceiling(self) -> dict[str, Any]:
        """The large model, tuned itself."""
        after = {f"{size} tuned": self.logits(size, "test") for size in self.models}
        return {"ceiling": figures({**self.bases["test"], **after}, ())["large truly tuned"]}

    def frontier(self) -> dict[str, Any]:
        """Reward and KL on what the models say themselves."""
        rows = sweep(
            "smollm2",
            [row["messages"][:-1] for row in self.rows["test"][:PROMPTS]],
            EFT(),
            DRAWN_BETAS,
            {"tuned": str(self.adapter("small")), "untuned": str(WORK / "small")},
            str(self.adapter("large")),
            max_new_tokens=NEW_TOKENS,
            batch_size=PROMPTS,
            do_sample=True,
            top_k=0,
            seed=self.seed,
        )
        return {"frontier": [{**row, "texts": row["texts"][:3]} for row in rows]}


def main(arguments: Sequence[str]) -> None:
    """Measures what is not in the result yet."""
    torch.set_num_threads(1)
    [file] = arguments
    rows = split(Path(file))
    large, tokenizer = foretune.load_model("smollm2", head="causal-lm")
    result: dict[str, Any] = {"claim": "eft_smollm2", "seeds": []}
    if RESULT.is_file():
        result = json.loads(RESULT.read_text("utf-8"))
    result["small"] = distilled(large, tokenizer, rows["distil"], WORK / "small")
    result["large"] = {"parameters": sum(p.numel() for p in large.parameters())}
    result["rows"] = {use: len(part) for use, part in rows.items()}
    small, _ = foretune.load_model(WORK / "small", head="causal-lm")
    save(result)
    models = {"small": small, "large": large}
    bases = {
        use: {size: logits_of(model, tokenizer, rows[use]) for size, model in models.items()}
        for use in ("validation", "test")
    }
    parts = {"beta": Seed.replies, "ceiling": Seed.ceiling, "frontier": Seed.frontier}
    for part, measure in parts.items():
        for seed in SEEDS:
            if all(run["seed"] != seed for run in result["seeds"]):
                result["seeds"].append({"seed": seed})
            [run] = [run for run in result["seeds"] if run["seed"] == seed]
            if part in run:
                continue
            run |= measure(Seed(models, tokenizer, rows, bases, seed))
            save(result)
            print(part, json.dumps(run), flush=True)


def save(result: dict[str, Any]) -> None:
    """Writes what there is, figures cut to what they are good for."""
    short = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))
    short["environment"] = environment()
    RESULT.write_text(json.dumps(short, separators=(",", ":")) + "\n", encoding="utf-8")


# --- tables ---------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """The mean and the ends over seeds."""
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def replies_table(result: dict[str, Any]) -> str:
    """People's replies: nats, KL and reward, means and ends over seeds."""
    seeds = result["seeds"]
    chosen = ", ".join(f"{run['beta']:g}" for run in seeds)
    eft = [name for name in seeds[0]["test"] if name.startswith("EFT") and name != "EFT, beta 0"]
    cells = {
        name: [run["test"][name] for run in seeds]
        for name in ("large base", "small base", "small tuned alone", *eft)
    }
    cells[f"EFT, beta chosen ({chosen})"] = [r["test"][f"EFT, beta {r['beta']:g}"] for r in seeds]
    ceilings = [run["ceiling"] for run in seeds if "ceiling" in run]
    if ceilings:
        few = "" if len(ceilings) == len(seeds) else f", {len(ceilings)} of {len(seeds)} seeds"
        cells[f"large truly tuned{few}"] = ceilings
    rows = [
        [name, *(spread([cell[key] for cell in runs]) for key in ("nats", "kl", "reward"))]
        for name, runs in cells.items()
    ]
    return grid(["model", "nats per token of replies", "KL from the large base", "reward"], rows)


def frontier_table(result: dict[str, Any]) -> str:
    """Reward and KL on the models' own texts, and the first reply of the first seed."""
    seeds = [run for run in result["seeds"] if "frontier" in run]
    rows = []
    for place, row in enumerate(seeds[0]["frontier"]):
        name = row["who"] if not row["beta"] else f"EFT, beta {row['beta']:g}"
        cells = [spread([r["frontier"][place][key] for r in seeds]) for key in ("kl", "reward")]
        text = " ".join(row["texts"][0].split()).replace("|", "/")
        rows.append([name, *cells, text])
    return grid(["model", "KL from the large base", "reward", "first reply, seed 0"], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "replies": replies_table,
    "frontier": frontier_table,
}


if __name__ == "__main__":
    main(sys.argv[1:])
