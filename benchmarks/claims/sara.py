"""SaRA on a small diffusion model: digits are known, alphabets are new.

    python benchmarks/claims/sara.py --data FOLDER        # benchmarks/results/sara.json
    python benchmarks/claims/sara.py --data FOLDER --network unet     # …/sara_unet.json, diffusers
    python benchmarks/claims/sara.py --data FOLDER --quick    # tries the logic, writes nothing

A residual network of linear layers (16 x 16 pixels, 100 moments) learns MNIST, anew for each seed.
It is then adapted to three Omniglot alphabets, by everything, by LoRA, and by a tenth of its
entries: the smallest (SaRA and its parts), the largest, random ones. The seed also draws the images
of each alphabet, the noise and their order. The learning rate of full fine-tuning, of LoRA and of
each kind of entries is chosen on the validation images of a fourth alphabet, with a base of its
own; SaRA's variants share that of the smallest entries. A UNet of diffusers does the same with
fewer steps, alphabets and arms, because a step takes twelve times as long. FOLDER holds
`images/mnist.npz` and `images/omniglot_images_background_small{1,2}.zip`.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import statistics
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from PIL import Image
from torch import Tensor, nn

import foretune
from foretune import Denoising, Full, Run, SaRA, Task, TaskCollection
from foretune.adapters.entries import entries_below, threshold_of
from foretune.evaluation.samples import draw_samples, save_sheet
from foretune.training.data import SlotRows, TaskData
from foretune.training.record import environment
from foretune.training.scoring import score_slots

HERE = Path(__file__).resolve().parents[1]
RESULTS, FIGURE = HERE / "results", HERE.parent / "docs" / "figures" / "sara.png"
SIDE, WIDTH, BLOCKS, MOMENT = 16, 128, 4, 64
ALPHABETS = ("Greek", "Korean", "Sanskrit")
TUNED_ON = "Early_Aramaic"
OBJECTIVE = Denoising(num_steps=100)
ROWS = {"train": 200, "validation": 40, "test": 100}
SEEDS, TUNING_SEED = (0, 1, 2), 10
RATES = (5e-4, 2e-3, 8e-3)
FRACTION = 0.1
RUN = Run(steps=150, batch_size=32, schedule="cosine", warmup=0.05, eval_every=0, device="cpu")
PRETRAIN = RUN.replace(warmup=Run().warmup)
OLD_ROWS = 200  # of MNIST's test images on which what was known is measured
ZEROED = {"smallest": (0.05, 0.1, 0.2, 0.3), "random": (0.1,), "largest": (0.1,)}

# --- data -----------------------------------------------------------------------------------------


def small(images: np.ndarray) -> np.ndarray:
    """(n, h, w) in 0..1 → (n, 1, 16, 16) in −1..1, the brightest pixel of an image at 1."""
    made = []
    for image in images:
        picture = Image.fromarray((image * 255).astype(np.uint8)).resize(
            (SIDE, SIDE), Image.Resampling.BOX
        )
        grey = np.asarray(picture, dtype=np.float32)
        made.append(grey / max(grey.max(), 1) * 2 - 1)
    return np.stack(made)[:, None]


def digits(data: Path, train: int, test: int) -> Task:
    """MNIST as one task."""
    with np.load(data / "images" / "mnist.npz") as stored:
        x, y = (small(stored[k][:n] / 255) for k, n in (("x_train", train), ("x_test", test)))
    return Task("digits", rows(x), (), rows(y))


def alphabet(data: Path, name: str, seed: int) -> Task:
    """Drawings of an alphabet: no drawing is in two splits, all characters are in each."""
    drawings: dict[str, bytes] = {}  # the archives have alphabets in common
    for number in (1, 2):
        with zipfile.ZipFile(
            data / "images" / f"omniglot_images_background_small{number}.zip"
        ) as z:
            names = [n for n in z.namelist() if f"/{name}/" in n and n.endswith(".png")]
            drawings |= {n.partition("/")[2]: z.read(n) for n in names}
    found = [
        1 - np.asarray(Image.open(io.BytesIO(drawings[n])), np.float32) for n in sorted(drawings)
    ]
    if not found:
        raise SystemExit(f"no alphabet {name} in {data / 'images'}")
    order = np.random.default_rng([seed, len(found)]).permutation(len(found))
    cut, splits = 0, []
    for count in ROWS.values():
        splits.append(rows(small(np.stack([found[i] for i in order[cut : cut + count]]))))
        cut += count
    return Task(name, *splits)


def rows(x: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"x": image} for image in x]


# --- models and methods ---------------------------------------------------------------------------


class Denoiser(nn.Module):
    """(n, 1, 16, 16) and (n,) moments → the noise; residual blocks of two linear layers.

    The noise is a share of what is shown, by the moment, less what the blocks make of the image:
    they need not carry 256 numbers of noise through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(SIDE * SIDE + MOMENT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)
            )
            for _ in range(BLOCKS)
        )
        self.outer = nn.Linear(WIDTH, SIDE * SIDE)
        self.gate = nn.Linear(MOMENT, 1)

    def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
        rates = torch.exp(-torch.arange(MOMENT // 2) * 8 / (MOMENT // 2))
        angles = t[:, None] * rates
        moment = torch.cat([angles.sin(), angles.cos()], 1)
        flat = noisy.flatten(1)
        h = self.inner(torch.cat([flat, moment], 1))
        for block in self.blocks:
            h = h + block(h)
        return (self.gate(moment) * flat + self.outer(h)).view_as(noisy)


def unet() -> nn.Module:
    """A small UNet of diffusers: convolutions, group norms, attention."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


@dataclass(frozen=True, kw_only=True)
class Network:
    """What is adapted, and how much of the experiment is done with it."""

    build: Callable[[], nn.Module]
    result: str
    pretrain_steps: int
    alphabets: tuple[str, ...] = ALPHABETS
    left_out: tuple[str, ...] = ()
    figure: bool = False


NETWORKS = {
    "residual": Network(build=Denoiser, result="sara", pretrain_steps=2500, figure=True),
    "unet": Network(
        build=unet,
        result="sara_unet",
        pretrain_steps=1200,
        alphabets=ALPHABETS[:2],
        left_out=("smallest alone", "SaRA, no reselection"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Entries(SaRA):
    """As many entries, chosen otherwise; `threshold` then only names what `reselect` would use."""

    kind: str = "random"

    def support(self, model: nn.Module, heads: Sequence[str]) -> tuple[dict[str, Tensor], float]:
        scores = ranked(model, self.kind)
        every = torch.cat(list(scores.values()))
        limit = every.kthvalue(round(FRACTION * len(every)) + 1).values
        chosen = {n: torch.nonzero(s < limit).flatten().int() for n, s in scores.items()}
        return chosen, threshold_of(model, FRACTION)


def ranked(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """A number for each entry; those with the lowest are taken first."""
    draw = torch.Generator().manual_seed(5)
    sizes = {n: p.detach().abs().flatten() for n, p in model.named_parameters()}
    if kind == "random":
        return {n: torch.rand(s.shape, generator=draw) for n, s in sizes.items()}
    return {n: s if kind == "smallest" else -s for n, s in sizes.items()}


def lora_of(base: nn.Module, budget: int) -> nn.Module:
    """The base with peft's LoRA on all its matrices, of the rank nearest the budget."""
    names = [n for n, m in base.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    made = {}
    for rank in range(1, 17):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        made[abs(count - budget)] = model
    return made[min(made)]


def pretrained(network: Network, old: Task, seed: int, run: Run) -> nn.Module:
    """A base that has learnt the digits."""
    torch.manual_seed(seed)
    tasks = TaskCollection((old,), OBJECTIVE)
    method, run = Full(learning_rate=2e-3), run.replace(seed=seed)
    adapted = foretune.adapt(network.build(), tasks, method, run)
    print("pretrained", adapted.scores, flush=True)
    return adapted.models[old.name, 0]


def starts_of(base: nn.Module) -> dict[str, nn.Module]:
    """The base, and the base with fresh LoRA adapters of as many numbers as SaRA trains."""
    threshold = threshold_of(base, FRACTION)
    budget = sum(len(v) for v in entries_below(base, threshold).values())
    return {"base": base, "lora": lora_of(base, budget)}


def arms(rates: Mapping[str, float]) -> dict[str, tuple[str, Any]]:
    """Name → (what to start from, method)."""
    plain: dict[str, Any] = {"fraction": FRACTION, "learning_rate": rates["smallest"]}
    off: dict[str, Any] = {"nuclear": 0.0, "reselect": None}
    found: dict[str, tuple[str, Any]] = {
        "full": ("base", Full(learning_rate=rates["full"])),
        "LoRA": ("lora", Full(learning_rate=rates["LoRA"])),
        "SaRA": ("base", SaRA(**plain)),
        "SaRA, the equation's nuclear term": (
            "base",
            SaRA(**plain, nuclear=5e-3, nuclear_over="all"),
        ),
        "SaRA, no nuclear term": ("base", SaRA(**plain, nuclear=0.0)),
        "SaRA, no reselection": ("base", SaRA(**plain, reselect=None)),
        "smallest alone": ("base", SaRA(**plain, **off)),
    }
    for kind in ("largest", "random"):
        fields = {**plain, **off, "learning_rate": rates[kind]}
        found[f"{kind} alone"] = ("base", Entries(kind=kind, **fields))
    return found


# --- measurements ---------------------------------------------------------------------------------


def loss_on(model: nn.Module, task: Task, split: str = "test") -> float:
    """The held-out denoising loss, at the same noise for every model."""
    data = TaskData([SlotRows(task.name, (), task.validation, task.test)], OBJECTIVE)
    return -score_slots(model, data, split)[0]


def zeroing(base: nn.Module, old: Task) -> list[dict[str, Any]]:
    """Held-out loss with a share of the entries set to zero."""
    found: list[dict[str, Any]] = [{"kind": "none", "share": 0.0, "loss": loss_on(base, old)}]
    for kind, shares in ZEROED.items():
        for share in shares:
            model = copy.deepcopy(base)
            scores = ranked(model, kind)
            every = torch.cat(list(scores.values()))
            limit = every.kthvalue(round(share * len(every)) + 1).values
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.view(-1)[scores[name] < limit] = 0
            found.append({"kind": kind, "share": share, "loss": loss_on(model, old)})
    return found


def memory(start: nn.Module, method: Any, task: Task, run: Run) -> dict[str, int]:
    """Bytes after one real step: gradients at their most, those kept, the optimiser's state."""
    from foretune.training.process_group import Partition

    model = copy.deepcopy(start)
    data = TaskData([SlotRows(task.name, task.train, (), ())], OBJECTIVE)
    learner = method.learner(model, OBJECTIVE, data.keys, run)
    learner.place(torch.device("cpu"), Partition(data))
    learner.start(run)
    seen = {"peak": 0}

    def held() -> int:
        leaves = {id(p): p for p in [*model.parameters(), *learner.base]}.values()
        return sum(p.grad.nbytes for p in leaves if p.grad is not None)

    for p in model.parameters():  # before the learner's own hooks, which free what has arrived
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(
                lambda _: seen.update(peak=max(seen["peak"], held()))
            )
    with learner.ready():
        step = data.step([(0, i) for i in range(run.batch_size)], "train", train=True, seed=[0])
        learner.gradients([step])
        kept = held()
        learner.base_optimizer.step()
    state = learner.base_optimizer.state.values()
    moments = sum(v.nbytes for s in state for k, v in s.items() if k != "step")
    trained = sum(p.numel() for p in learner.base)
    return {"trained": trained, "peak": seen["peak"], "kept": kept, "optimizer": moments}


def one(
    name: str, start: nn.Module, method: Any, task: Task, old: Task, threshold: float, run: Run
) -> tuple[dict[str, Any], nn.Module]:
    """One arm on one alphabet: what is kept of it, and the model."""
    begun = time.process_time()
    tasks = TaskCollection((task,), OBJECTIVE)
    adapted = foretune.adapt(start, tasks, method, run)
    model = adapted.models[task.name, 0]
    found = {
        "arm": name,
        "alphabet": task.name,
        "seed": run.seed,
        "new": -adapted.scores[task.name, 0],
        "old": loss_on(model, old),
        "trained": adapted.cost["trainable_parameters"],
        "seconds": round(time.process_time() - begun, 1),
    }
    if isinstance(method, SaRA) and not isinstance(method, Entries):
        delta = adapted.learners[task.name, 0].delta
        known = dict(model.named_parameters())
        chosen = [known[n].detach().view(-1)[i] for n, i in delta.support.items()]
        values = torch.cat(chosen).abs()
        found["left"] = (values < threshold).float().mean().item()
    return found, model


def tuned(starts: Mapping[str, nn.Module], data: Path, run: Run) -> dict[str, Any]:
    """Validation loss by kind of method and rate."""
    task = alphabet(data, TUNED_ON, TUNING_SEED)
    tasks = TaskCollection((task,), OBJECTIVE)
    found: dict[str, dict[str, float]] = {}
    for kind in ("full", "LoRA", "smallest", "largest", "random"):
        for rate in RATES:
            fields: dict[str, Any] = {"learning_rate": rate, "nuclear": 0.0, "reselect": None}
            method = (
                Full(learning_rate=rate)
                if kind in ("full", "LoRA")
                else Entries(kind=kind, **fields)
            )
            start = starts["lora" if kind == "LoRA" else "base"]
            adapted = foretune.adapt(
                start, tasks, method, run.replace(seed=TUNING_SEED), split="validation"
            )
            found.setdefault(kind, {})[f"{rate:g}"] = -adapted.scores[task.name, 0]
            print(kind, rate, found[kind][f"{rate:g}"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=list(NETWORKS), default="residual")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = NETWORKS[options.network]
    run, before = RUN, PRETRAIN.replace(steps=network.pretrain_steps)
    if options.quick:
        run, before = run.replace(steps=2, batch_size=2), before.replace(steps=3)
    begun = time.process_time()
    old = digits(options.data, 6000, OLD_ROWS)
    result: dict[str, Any] = {
        "claim": "sara",
        "rows": ROWS,
        "steps": run.steps,
        "batch_size": run.batch_size,
        "pretrain_steps": before.steps,
        "bases": [],
        "runs": [],
    }
    torch.manual_seed(0)
    fresh = starts_of(network.build())
    result["base_parameters"] = sum(p.numel() for p in fresh["base"].parameters())
    first = alphabet(options.data, network.alphabets[0], SEEDS[0])
    same_rates = arms(dict.fromkeys(("full", "LoRA", "smallest", "largest", "random"), 1e-3))
    result["memory"] = {
        name: memory(fresh[same_rates[name][0]], same_rates[name][1], first, run)
        for name in ("full", "LoRA", "SaRA")
    }
    print(result["memory"], flush=True)
    tuning_base = pretrained(network, old, TUNING_SEED, before)
    result["tuning"] = tuned(starts_of(tuning_base), options.data, run)
    result["rates"] = {
        kind: float(min(found, key=found.__getitem__)) for kind, found in result["tuning"].items()
    }
    chosen = {n: arm for n, arm in arms(result["rates"]).items() if n not in network.left_out}
    sheet: dict[str, np.ndarray] = {}
    for seed in SEEDS:
        base = pretrained(network, old, seed, before)
        starts = starts_of(base)
        if seed == SEEDS[0]:
            sheet["base"] = draw_samples(base, OBJECTIVE, (1, SIDE, SIDE), 16)
        threshold = threshold_of(base, FRACTION)
        tasks = [alphabet(options.data, name, seed) for name in network.alphabets]
        result["bases"].append(
            {
                "seed": seed,
                "threshold": threshold,
                "old": loss_on(base, old),
                "new": {task.name: loss_on(base, task) for task in tasks},
                "zeroing": zeroing(base, old),
            }
        )
        for arm, (start, method) in chosen.items():
            for task in tasks:
                row, model = one(
                    arm, starts[start], method, task, old, threshold, run.replace(seed=seed)
                )
                result["runs"].append(row)
                if (seed, task.name) == (SEEDS[0], network.alphabets[0]):
                    sheet[arm] = draw_samples(model, OBJECTIVE, (1, SIDE, SIDE), 16)
            print(json.dumps(row), flush=True)
        result["cpu_seconds"] = round(time.process_time() - begun)
        result["environment"] = environment()
        if not options.quick:
            target = RESULTS / f"{network.result}.json"
            target.write_text(json.dumps(result, separators=(",", ":")) + "\n", "utf-8")
    if network.figure and not options.quick:
        shown = {name: sheet[name] for name in ("base", "full", "LoRA", "SaRA")}
        shown["data"] = np.stack([row["x"] for row in first.test[:16]])
        save_sheet(shown, FIGURE)


# --- tables ---------------------------------------------------------------------------------------


def adapting_table(result: Mapping[str, Any]) -> str:
    """New and old loss of each arm, mean over alphabets and seeds."""
    lines = [
        "| trained | parameters | rate | new loss | by seed | old loss | rise | θ left |",
        "|---|---|---|---|---|---|---|---|",
    ]
    before = statistics.fmean(v for base in result["bases"] for v in base["new"].values())
    old = statistics.fmean(base["old"] for base in result["bases"])
    lines.append(f"| the base, not adapted | 0 | | {before:.4f} | | {old:.4f} | | |")
    for arm in dict.fromkeys(row["arm"] for row in result["runs"]):
        own = [row for row in result["runs"] if row["arm"] == arm]
        seeds = sorted({row["seed"] for row in own})
        means = [statistics.fmean(r["new"] for r in own if r["seed"] == s) for s in seeds]
        kept = statistics.fmean(row["old"] for row in own)
        left = f"{statistics.fmean(r['left'] for r in own):.1%}" if "left" in own[0] else ""
        kind = arm.split(",")[0].split(" ")[0].replace("SaRA", "smallest")
        lines.append(
            f"| {arm} | {own[0]['trained']:,} | {result['rates'][kind]:g} | "
            f"{statistics.fmean(means):.4f} | {' '.join(f'{m:.4f}' for m in means)} | "
            f"{kept:.4f} | {kept / old - 1:+.0%} | {left} |"
        )
    return "\n".join(lines)


def zeroing_table(result: Mapping[str, Any]) -> str:
    """What zeroing a share of the entries does to the base."""
    lines = [
        "| set to zero | share | increase of the held-out loss | by seed |",
        "|---|---|---|---|",
    ]
    for i, row in enumerate(result["bases"][0]["zeroing"]):
        rises = [
            base["zeroing"][i]["loss"] / base["zeroing"][0]["loss"] - 1 for base in result["bases"]
        ]
        if i:
            by_seed = " ".join(f"{rise:+.2%}" for rise in rises)
            mean = statistics.fmean(rises)
            lines.append(f"| {row['kind']} | {row['share']:.0%} | {mean:+.2%} | {by_seed} |")
    return "\n".join(lines)


def memory_table(result: Mapping[str, Any]) -> str:
    """Bytes of gradients and optimiser state, measured in one step."""
    lines = [
        "| | trained parameters | peak gradients | kept for the step | optimiser state |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["memory"].items():
        cells = " | ".join(f"{row[key] / 1000:,.0f} kB" for key in ("peak", "kept", "optimizer"))
        lines.append(f"| {name} | {row['trained']:,} | {cells} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "adapting": adapting_table,
    "zeroing": zeroing_table,
    "memory": memory_table,
}

if __name__ == "__main__":
    main()
