"""FD-Align beside plain fine-tuning, LoRA, probes and averaged weights, in and out of distribution.

    python benchmarks/claims/fd_align.py CLINC150_FILE

Images: one small CLIP is trained here against captions "a <style> photo <class>" of scikit-learn's
digits on eight coloured grounds; then four rows a class, all on one ground, tune its image tower.
Shifted: the seven other grounds. Style: which ground it is, read off by the spurious prototypes.

Texts: MiniLM-L6 as a sentence encoder that knows an intent of CLINC150 by its name; four rows of
each of the 30 intents of two domains tune its last two blocks. Shifted: the 120 intents of the
other domains, told apart by their names alone.

A seed draws the CLIP, ground and shots, or domains. Each arm takes the best of four rates by
validation rows of the task (100 pictures of the same ground, 4 texts an intent), of equals the
lowest. The weight 3 and the marks come from a first experiment with other code; steps were set.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "fd_align.json"
FIGURE = ROOT / "docs" / "figures" / "fd_align-shift.svg"
STYLES = ("red", "green", "blue", "yellow", "purple", "cyan", "grey", "orange")
COLOURS = (
    *((0.8, 0.1, 0.1), (0.1, 0.7, 0.1), (0.1, 0.2, 0.8), (0.8, 0.8, 0.1)),
    *((0.6, 0.1, 0.7), (0.1, 0.7, 0.8), (0.45, 0.45, 0.45), (0.9, 0.5, 0.1)),
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHOTS = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "images": {"steps": 100, "batch_size": 40, "weight": 3.0},
    "texts": {"steps": 30, "batch_size": 16, "weight": 1.0},
}
FULL_RATES, ADAPTER_RATES = (3e-5, 1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3, 1e-2)
BATCH, PRETRAINING = 64, 500
LABELS = {
    "zero-shot": "zero-shot",
    "probe": "linear probe",
    "head": "projector only",
    "full": "fine-tuning (β 0)",
    "fd": "FD-Align",
    "lora": "LoRA",
    "fd-lora": "FD-Align on LoRA",
    "wise": "fine-tuning, WiSE-FT 0.5",
    "fd-wise": "FD-Align, WiSE-FT 0.5",
}
CELLS = {"in": "in distribution", "shifted": "shifted", "style": "style"}


# --- images -------------------------------------------------------------------------------------


def digit_images(seed: int) -> dict[str, Any]:
    """Pictures (n, 16, 16) in [0, 1] and digits, in a seeded order."""
    import numpy as np
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng(seed).permutation(len(raw.target))
    pictures = (raw.images[order] / 16).repeat(2, axis=1).repeat(2, axis=2)
    return {"picture": pictures.astype("f4"), "digit": raw.target[order]}


def coloured(pictures: Any, style: Any, seed: int) -> Any:
    """(n, 3, 16, 16) about 0: a light digit on a ground of each row's style, with noise."""
    import numpy as np

    rng = np.random.default_rng(seed)
    ground = np.array(COLOURS)[style][:, :, None, None]
    ground = 0.6 * ground + rng.normal(0, 0.05, ground.shape)
    mixed = ground * (1 - pictures[:, None]) + pictures[:, None] * rng.uniform(
        0.8, 1, (len(ground), 1, 1, 1)
    )
    noisy = mixed + rng.normal(0, 0.05, mixed.shape)
    return ((noisy - 0.5) / 0.25).astype("f4")


def tokenizer_of_captions() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "photo", *STYLES, *DIGITS)
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
    )


def small_clip(data: Mapping[str, Any], seed: int, steps: int = PRETRAINING) -> Any:
    """A CLIPModel trained from nothing: each picture against all 80 captions."""
    import numpy as np
    import torch
    import transformers

    tokenizer = tokenizer_of_captions()
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    tower["initializer_factor"] = 3.0  # with 1 it has not begun to see digits after 400 steps
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "num_hidden_layers": 2}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 3}
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(
        text_config={**tower, **text}, vision_config={**tower, **vision}, projection_dim=64
    )
    model = transformers.CLIPModel(config).train()
    captions = [f"a {style} photo {digit}" for style in STYLES for digit in DIGITS]
    inputs = tokenizer(captions, return_tensors="pt", padding=True)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    rng = np.random.default_rng([seed, 1])
    for step in range(steps):
        rows = rng.integers(0, 1000, BATCH)
        style = rng.integers(0, len(STYLES), BATCH)
        x = coloured(data["picture"][rows], style, int(rng.integers(1 << 30)))
        wanted = torch.from_numpy(style * 10 + data["digit"][rows])
        images = model.get_image_features(pixel_values=torch.from_numpy(x)).pooler_output
        texts = model.get_text_features(**inputs).pooler_output
        cosines = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
        loss = torch.nn.functional.cross_entropy(model.logit_scale.exp() * cosines, wanted)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def image_world(seed: int, _: str) -> dict[str, Any]:
    """Model, few-shot task and the sets that it is scored on."""
    import numpy as np
    import torch

    import foretune

    data = digit_images(0)
    model = small_clip(data, seed)
    own = seed % len(STYLES)
    new = np.random.default_rng([seed, 2]).permutation(range(1000, 1200)).tolist()
    shots = [i for d in range(10) for i in [j for j in new if data["digit"][j] == d][:SHOTS]]
    spare = [i for i in new if i not in shots][:100]

    def rows(index: Sequence[int], style: int, number: int) -> list[dict[str, Any]]:
        x = coloured(data["picture"][index], np.full(len(index), style), 1000 * seed + number)
        return [{"x": a, "y": DIGITS[data["digit"][i]]} for a, i in zip(x, index, strict=True)]

    test = range(1200, 1500)
    sets = {style: rows(test, style, 10 + style) for style in range(len(STYLES))}
    task = foretune.Task("digits", rows(shots, own, 1), rows(spare, own, 2), sets[own])
    templates = tuple(f"a {style} photo {{}}" for style in STYLES)
    objective = foretune.PromptClassification(tokenizer_of_captions(), templates=templates)
    bound = objective.fit(foretune.TaskCollection((task,))).bind(model)
    embedded = bound.embedded["digits"]
    names = sorted(DIGITS)

    found = [(row, style) for style in range(len(STYLES)) for row in sets[style]]
    style_of = torch.tensor([style for _, style in found])
    every = {
        "inputs": {"x": torch.from_numpy(np.stack([row["x"] for row, _ in found]))},
        "embedded": embedded,
    }
    class_of = torch.tensor([names.index(row["y"]) for row, _ in found])
    here = style_of == own
    scored = {
        "in": {**every, "rows": here, "class": class_of[here]},
        "shifted": {**every, "rows": ~here, "class": class_of[~here]},
        "style": {**every, "style": style_of},
    }
    return {"model": model, "task": task, "objective": objective, "sets": scored}


# --- texts --------------------------------------------------------------------------------------

PROMPTED: dict[str, Any] = {}
KEPT: dict[str, Any] = {}


def text_world(seed: int, file: str) -> dict[str, Any]:
    """MiniLM, the intents of two domains, and those of the others."""
    import random

    import torch

    import foretune
    from foretune.tasks.objectives.prompt_templates import TEXTS

    templates = TEXTS[:8]
    if not PROMPTED:
        from foretune.models.dual_encoder import text_embeddings

        model, tokenizer = foretune.load_model("minilm", trainable_layers=2)
        tasks, _ = foretune.load_tasks(foretune.Source(source=file), "prompts")
        names = sorted({row["label"] for task in tasks for row in task.train})
        prompts = [t.replace("{}", n.replace("_", " ")) for t in templates for n in names]
        embedded = text_embeddings(model, tokenizer, prompts).view(len(templates), len(names), -1)
        PROMPTED.update(model=model, tokenizer=tokenizer, tasks=tasks, names=names, all=embedded)
    tasks, tokenizer, names = PROMPTED["tasks"], PROMPTED["tokenizer"], PROMPTED["names"]
    order = random.Random(seed).sample(sorted(tasks.names), len(tasks))

    def rows(domains: Sequence[str], split: str, count: int) -> list[dict[str, Any]]:
        taken: dict[str, int] = {}
        found = []
        for name in domains:
            own = list(tasks[name].split(split))
            random.Random(seed).shuffle(own)
            for row in own:
                taken[row["label"]] = taken.get(row["label"], 0) + 1
                if taken[row["label"]] <= count:
                    found.append({"text": row["text"], "label": row["label"]})
        return found

    def inputs(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        mine = sorted({row["label"] for row in found})
        made = tokenizer([row["text"] for row in found], return_tensors="pt", padding=True)
        return {
            "inputs": {key: made[key] for key in ("input_ids", "attention_mask")},
            "class": torch.tensor([mine.index(row["label"]) for row in found]),
            "embedded": PROMPTED["all"][:, [names.index(name) for name in mine]],
        }

    train, spare = rows(order[:2], "train", SHOTS), rows(order[:2], "validation", 4)
    scored = {"in": inputs(rows(order[:2], "test", 5))}
    scored["shifted"] = inputs(rows(order[2:], "test", 2))
    task = foretune.Task("intents", train, spare, spare)
    objective = foretune.PromptClassification(tokenizer, max_tokens=32, templates=templates)
    about = {"domains": order[:2]}
    return {
        **{"model": PROMPTED["model"], "task": task, "objective": objective},
        **{"sets": scored, "about": about},
    }


# --- both ---------------------------------------------------------------------------------------


def vectors(model: Any, inputs: Mapping[str, Any], batch: int = 64) -> Any:
    """(n, d) embeddings; texts of like lengths together."""
    import torch

    from foretune.models.dual_encoder import embeddings

    count = len(next(iter(inputs.values())))
    order = torch.arange(count)
    if "attention_mask" in inputs:
        order = inputs["attention_mask"].sum(1).argsort()
    parts = []
    with torch.no_grad():
        for index in order.split(batch):
            part = {key: value[index] for key, value in inputs.items()}
            if "attention_mask" in part:
                longest = int(part["attention_mask"].sum(1).max())
                part = {key: value[:, :longest] for key, value in part.items()}
            parts.append(embeddings(model, part))
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy_(0, order, found)


def embed(model: Any, rows: Mapping[str, Any]) -> Any:
    """Embeddings of a set; the last model's are kept, for the sets that share inputs."""
    key = (id(model), id(rows["inputs"]))
    if KEPT.get("key") != key:
        KEPT.update(key=key, model=model, vectors=vectors(model, rows["inputs"]))
    found = KEPT["vectors"]
    return found[rows["rows"]] if "rows" in rows else found


def score(model: Any, sets: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy on each set: of the classes, and of the styles in the set of that name."""
    from foretune.linalg.prototypes import class_prototypes, spurious_prototypes

    model.eval()
    found = {}
    for name, rows in sets.items():
        what = "style" if name == "style" else "class"
        read = spurious_prototypes if what == "style" else class_prototypes
        picked = (embed(model, rows) @ read(rows["embedded"]).T).argmax(1)
        found[name] = round(float((picked == rows[what]).float().mean()), 4)
    return found


def probe(world: Mapping[str, Any]) -> dict[str, float]:
    """Logistic regression on the untouched embeddings: it has no say on classes without rows."""
    from foretune.decoding.logistic import logistic_probe

    model = world["model"]
    inputs, classes = few_shot_inputs(world)
    train = vectors(model, inputs)
    found = {}
    for name, rows in world["sets"].items():
        if name == "style" or len(rows["embedded"][0]) != len(set(classes.tolist())):
            continue
        said = logistic_probe(train, classes, embed(model, rows), len(classes.unique()))
        found[name] = round(float((said.argmax(1) == rows["class"]).float().mean()), 4)
    return found


def few_shot_inputs(world: Mapping[str, Any]) -> Any:
    import numpy as np
    import torch

    rows = list(world["task"].train)
    key = "label" if "label" in rows[0] else "y"
    names = sorted({row[key] for row in rows})
    classes = torch.tensor([names.index(row[key]) for row in rows])
    if "x" in rows[0]:
        return {"x": torch.from_numpy(np.stack([row["x"] for row in rows]))}, classes
    made = world["objective"].tokenizer(
        [r["text"] for r in rows], return_tensors="pt", padding=True
    )
    return {key: made[key] for key in ("input_ids", "attention_mask")}, classes


def tuned(world: Mapping[str, Any], method: Any, kind: str, seed: int) -> Any:
    """(model as adapted, its score on validation rows, seconds of CPU time)."""
    import peft

    import foretune

    of = SETTINGS[kind]
    run = foretune.Run(
        seed=seed, steps=of["steps"], batch_size=of["batch_size"], device="cpu", schedule="cosine"
    )
    tasks = foretune.TaskCollection((world["task"],), world["objective"])
    before = time.process_time()
    adapted = foretune.adapt(world["model"], tasks, method, run, split="validation")
    seconds = time.process_time() - before
    [number] = adapted.scores.values()
    if adapted.models:
        [model] = adapted.models.values()
        return model, number, seconds
    with tempfile.TemporaryDirectory() as folder:
        adapted.save(folder)
        [place] = Path(folder).iterdir()
        model = peft.PeftModel.from_pretrained(copy.deepcopy(world["model"]), place)
    return model, number, seconds


def methods(kind: str) -> dict[str, tuple[Any, Sequence[float]]]:
    """Each tuned arm: its method, and the rates that are tried."""
    from foretune import FDAlign, Head

    weight, lora = SETTINGS[kind]["weight"], {"r": 8, "lora_alpha": 16}
    found = {
        "head": (Head(), ADAPTER_RATES),
        "full": (FDAlign(weight=0.0, num_prototypes=20), FULL_RATES),
        "fd": (FDAlign(weight=weight, num_prototypes=20), FULL_RATES),
        "lora": (FDAlign(weight=0.0, num_prototypes=20, lora=lora), ADAPTER_RATES),
        "fd-lora": (FDAlign(weight=weight, num_prototypes=20, lora=lora), ADAPTER_RATES),
    }
    # The last linear layer of a sentence encoder is one of many, not a projector.
    left_out = () if kind == "images" else ("head", "fd-lora")
    return {name: arm for name, arm in found.items() if name not in left_out}


def one_seed(kind: str, seed: int, file: str) -> dict[str, Any]:
    """Every arm of one seed."""
    from foretune.training.model_copies import interpolate

    world = WORLDS[kind](seed, file)
    arms = {"zero-shot": score(world["model"], world["sets"]), "probe": probe(world)}
    for name, (method, rates) in methods(kind).items():
        tried = {
            rate: tuned(world, dataclasses.replace(method, learning_rate=rate), kind, seed)
            for rate in rates
        }
        best = max(rates, key=lambda rate: tried[rate][1])
        model, _, seconds = tried[best]
        arms[name] = {
            **score(model, world["sets"]),
            "learning_rate": best,
            "validation": {str(rate): round(found[1], 4) for rate, found in tried.items()},
            "cpu_seconds": round(seconds, 1),
        }
        if name in ("full", "fd"):
            half = copy.deepcopy(model).requires_grad_(True)
            interpolate(half, world["model"], 0.5)
            arms["wise" if name == "full" else "fd-wise"] = score(half, world["sets"])
        print(kind, seed, name, arms[name], flush=True)
    return {"seed": seed, **world.get("about", {}), "arms": arms}


WORLDS: dict[str, Callable[[int, str], dict[str, Any]]] = {
    "images": image_world,
    "texts": text_world,
}


# --- tables -------------------------------------------------------------------------------------


def arm_table(result: Mapping[str, Any], kind: str) -> str:
    """In / shifted / style of each seed and in the mean, in per cent."""
    seeds = result[kind]
    cells = [c for c in CELLS if c in seeds[0]["arms"]["zero-shot"]]
    head = ["", *[f"seed {s['seed']}" for s in seeds], *[f"mean {CELLS[c]}" for c in cells]]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    best = {c: max(_mean(seeds, arm, c) or 0 for arm in seeds[0]["arms"]) for c in cells}
    for arm, label in LABELS.items():
        if arm not in seeds[0]["arms"]:
            continue
        row = [label]
        for s in seeds:
            row.append(" / ".join(_percent(s["arms"][arm].get(c)) for c in cells))
        for c in cells:
            mean = _mean(seeds, arm, c)
            shown = _percent(mean)
            row.append(f"**{shown}**" if mean is not None and mean == best[c] else shown)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", f"Cells: {' / '.join(CELLS[c] for c in cells)}, per cent."])


def _mean(seeds: Sequence[Mapping[str, Any]], arm: str, cell: str) -> float | None:
    found = [s["arms"][arm].get(cell) for s in seeds]
    return None if None in found else statistics.fmean(found)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def marks_table(result: Mapping[str, Any]) -> str:
    """The targets set before the run, what was measured, whether they are met."""
    seeds = result["images"]
    at = {(arm, c): _mean(seeds, arm, c) or 0.0 for arm in LABELS for c in CELLS}
    style, gain = at["fd", "style"], at["fd", "style"] - at["full", "style"]
    inside = at["fd", "in"] - at["full", "in"]
    outside = at["fd", "shifted"] - at["full", "shifted"]
    rows = (
        ("style of FD-Align, at least 98 %", f"{100 * style:.1f} %", style >= 0.98),
        ("style above fine-tuning by 5 points", f"{100 * gain:+.1f}", gain >= 0.05),
        ("in distribution not 2 points below fine-tuning", f"{100 * inside:+.1f}", inside >= -0.02),
        ("shifted above fine-tuning", f"{100 * outside:+.1f}", outside > 0),
    )
    lines = ["| target, mean of three seeds | measured | met |", "|---|---|---|"]
    lines += [f"| {mark} | {said} | {'yes' if met else '**no**'} |" for mark, said, met in rows]
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "images": lambda result: arm_table(result, "images"),
    "texts": lambda result: arm_table(result, "texts"),
    "marks": marks_table,
}


def draw(result: Mapping[str, Any]) -> str:
    """Each arm's mean as a point, in-distribution against shifted accuracy: one panel a world."""
    from foretune.evaluation.report import svg
    from foretune.evaluation.report.figure import Figure

    ink, side, gap, top = svg.LIGHT, 300, 90, 20
    body = []
    for panel, kind in enumerate(("images", "texts")):
        seeds = result[kind]
        arms = [a for a in LABELS if a in seeds[0]["arms"] and _mean(seeds, a, "shifted")]
        at = {a: (_mean(seeds, a, "in") or 0, _mean(seeds, a, "shifted") or 0) for a in arms}
        left = 50 + panel * (side + gap)
        x = svg.linear(svg.padded([p[0] for p in at.values()]), (left, left + side))
        y = svg.linear(svg.padded([p[1] for p in at.values()]), (top + side, top))
        for low, scale, across in ((0, x, True), (1, y, False)):
            values = [p[low] for p in at.values()]
            for tick in svg.ticks(min(values), max(values)):
                place = scale(tick)
                ends = (
                    (place, top, place, top + side) if across else (left, place, left + side, place)
                )
                body.append(svg.line(*ends, ink.line))
                spot = (place, top + side + 18) if across else (left - 26, place + 4)
                body.append(svg.text(f"{100 * tick:.3g}", *spot, ink.muted, size=12))
        title = f"{kind}: shifted (up) against in distribution (right), %"
        body.append(svg.text(title, left, top + side + 38, ink.text, size=12))
        for arm, (across, up) in at.items():
            number = list(LABELS).index(arm)
            colour = ink.series[number % len(ink.series)]
            kind_of = svg.MARKERS[(number + number // 8) % 8]
            body.append(svg.marker(kind_of, x(across), y(up), colour, colour))
    for number, label in enumerate(LABELS.values()):
        place = (70 + 260 * (number % 3), top + side + 66 + 20 * (number // 3))
        colour = ink.series[number % len(ink.series)]
        body.append(svg.marker(svg.MARKERS[(number + number // 8) % 8], *place, colour, colour))
        body.append(svg.text(label, place[0] + 14, place[1] + 4, ink.text, size=12))
    figure = Figure(
        "FD-Align and its controls, in and out of distribution",
        "Mean accuracies of three seeds; further up and to the right is better.",
        2 * side + gap + 60,
        top + side + 130,
        "".join(body),
    )
    return figure.standalone(ink)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("clinc150", help="clinc150.jsonl.gz")
    given = parser.parse_args(arguments)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    from foretune.training.record import environment

    found = {kind: [one_seed(kind, seed, given.clinc150) for seed in (0, 1, 2)] for kind in WORLDS}
    result = {"claim": "fd_align", "shots": SHOTS, "settings": SETTINGS, **found}
    result["rates"] = {"full": FULL_RATES, "adapters": ADAPTER_RATES}
    result["environment"] = environment()
    RESULT.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    FIGURE.write_text(draw(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
