"""EFT: does what a small model learned in fine-tuning carry over to a large one?

    python benchmarks/claims/eft.py ../shared/data            # about ten minutes of one core
    python benchmarks/publish.py                              # tables in docs/results/eft.md

Facts, on a corpus that is made here: 128 entities with 2 relations to one of 64 values. Documents
are statements ("e r v ." again and again) or streams of questions of which 15 % are answered, so
that a base continues a question with another question. A small and a large Llama learn the corpus;
24 entities teach each to answer "? e r" by "! v <eos>". Scored greedily on the 104 other entities:
`format` is the share of answers of that form, `accuracy` the share of these with the right value.
Knowledge comes from pre-training, the form from fine-tuning, so EFT should have both.

Speakers: stories260K (a trained Llama of 260,000 parameters) is the large model; the small one
learns text that stories260K wrote; each is tuned on the lines of one speaker of Shakespeare.
Scored by nats per token on lines of the test split. Rates, steps and sizes of the facts were
settled on another seed, those of the speakers were not searched for; beta is chosen on a tenth of
the training lines.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from claims import stories260k
from foretune import EFT
from foretune.training.record import environment

RESULT = Path(__file__).resolve().parents[1] / "results" / "eft.json"
SEEDS = (0, 1, 2)
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
SPEAKERS = ("GLOUCESTER", "KING RICHARD II")
SPEAKER_BETAS = (0.5, 1.0, 1.5)

ENTITIES, RELATIONS, VALUES, SHOWN = 128, 2, 64, 24
PAD, BOS, EOS, ASK, SAY, STOP = range(6)
FIRST_ENTITY, FIRST_RELATION = 6, 6 + ENTITIES
FIRST_VALUE = FIRST_RELATION + RELATIONS
VOCABULARY = FIRST_VALUE + VALUES
PASS_MARKS = {
    "EFT format": 0.95,
    "EFT accuracy − small tuned": 0.20,
    "EFT accuracy": 0.85,
    "large base format, at most": 0.05,
    "EFT up − EFT down": 0.20,
}


# --- training, as plain as can be ---------------------------------------------------------------


def llama(hidden: int, layers: int, seed: int, vocabulary: int, heads: int = 4) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def train(
    model: Any, batches: Callable[[int], tuple[Tensor, Tensor]], steps: int, rate: float
) -> Any:
    """AdamW, the rate falling linearly to zero; `batches(step)` gives ids and labels."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps)
    )
    for step in range(steps):
        ids, labels = batches(step)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


# --- facts --------------------------------------------------------------------------------------


def corpus(values: Tensor, rng: torch.Generator, rows: int, facts: int = 8) -> Tensor:
    """Documents of the corpus as ids, (rows, tokens)."""
    made = []
    for _ in range(rows):
        entities = torch.randint(ENTITIES, (facts,), generator=rng).tolist()
        relations = torch.randint(RELATIONS, (facts,), generator=rng).tolist()
        chance = torch.rand(facts + 1, generator=rng).tolist()
        row = [BOS]
        for e, r, luck in zip(entities, relations, chance[1:], strict=True):
            fact = [FIRST_ENTITY + e, FIRST_RELATION + r]
            value = FIRST_VALUE + int(values[e, r])
            if chance[0] < 0.5:
                row += [*fact, value, STOP]
            else:
                row += [ASK, *fact]
                if luck < 0.15:
                    row += [SAY, value, EOS if luck < 0.075 else STOP]
        made.append(row)
    longest = max(map(len, made))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in made])


def questions(values: Tensor, entities: Sequence[int]) -> tuple[Tensor, Tensor]:
    """("? e r", "! v <eos>") of all relations of these entities."""
    pairs = [(e, r) for e in entities for r in range(RELATIONS)]
    asked = [[BOS, ASK, FIRST_ENTITY + e, FIRST_RELATION + r] for e, r in pairs]
    answers = [[SAY, FIRST_VALUE + int(values[e, r]), EOS] for e, r in pairs]
    return torch.tensor(asked), torch.tensor(answers)


def facts(seed: int, steps: int = 400) -> dict[str, Any]:
    """All figures of one seed."""
    rng = torch.Generator().manual_seed(1000 + seed)
    values = torch.randint(VALUES, (ENTITIES, RELATIONS), generator=rng)
    order = torch.randperm(ENTITIES, generator=rng).tolist()
    asked, answers = questions(values, order[:SHOWN])
    shown = torch.cat([asked, answers], 1)
    labels = shown.clone()
    labels[:, : asked.shape[1]] = -100

    def documents(_: int) -> tuple[Tensor, Tensor]:
        ids = corpus(values, rng, 32)
        return ids, ids.masked_fill(ids == PAD, -100)

    def examples(_: int) -> tuple[Tensor, Tensor]:
        some = torch.randint(len(shown), (16,), generator=rng)
        return shown[some], labels[some]

    def tuned(model: Any) -> Any:
        return train(copy.deepcopy(model), examples, 120, 1e-3)

    small = train(llama(12, 1, seed, VOCABULARY, 2), documents, steps, 1e-2)
    large = train(llama(64, 2, seed + 100, VOCABULARY), documents, steps, 5e-3)
    small_tuned, large_tuned = tuned(small), tuned(large)
    test = questions(values, order[SHOWN:])
    rows = {
        "large base": answered(large, *test),
        "small base": answered(small, *test),
        "small tuned alone": answered(small_tuned, *test),
        "large truly tuned": answered(large_tuned, *test),
    }
    up = {"tuned": small_tuned, "untuned": small}
    for beta in BETAS:
        with EFT(beta=beta).steer(large, **up):
            rows[f"EFT up, beta {beta:g}"] = answered(large, *test)
    for share in (0.9, 0.95):
        with EFT(top_p=share).steer(large, **up):
            rows[f"EFT up, beta 1, top_p {share:g}"] = answered(large, *test)
    with EFT().steer(small, tuned=large_tuned, untuned=large):
        rows["EFT down, beta 1"] = answered(small, *test)
    return {"seed": seed, "rows": rows, "cost": cost(large, large_tuned, up, test[0][:12])}


@torch.no_grad()
def answered(model: Any, asked: Tensor, answers: Tensor) -> dict[str, float]:
    out = model.generate(asked, do_sample=False, max_new_tokens=3, pad_token_id=PAD)
    new = torch.nn.functional.pad(out[:, asked.shape[1] :], (0, 3), value=PAD)[:, :3]
    value = (new[:, 1] >= FIRST_VALUE) & (new[:, 1] < FIRST_VALUE + VALUES)
    form = (new[:, 0] == SAY) & value & (new[:, 2] == EOS)
    right = form & (new[:, 1] == answers[:, 1])
    return {"format": form.float().mean().item(), "accuracy": right.float().mean().item()}


@torch.no_grad()
def cost(large: Any, large_tuned: Any, up: dict[str, Any], asked: Tensor) -> dict[str, Any]:
    """Forward calls and seconds for 24 tokens after each question, one row at a time."""
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    options["pad_token_id"] = PAD
    found: dict[str, Any] = {}

    def timed(who: str, model: Any, **more: Any) -> None:
        model.generate(asked[:1], **options, **more)  # the first call of all is slower
        began, out = time.perf_counter(), []
        for row in asked:
            out.append(model.generate(row[None], **options, **more))
        found[who] = {"seconds": time.perf_counter() - began, "tokens": 24 * len(asked)}
        found[who]["ids"] = torch.cat(out)

    timed("large alone", large)
    timed("large truly tuned", large_tuned)
    with EFT().steer(large, **up) as beside:
        timed("EFT", large)
        calls = (beside.forwards, beside.side_forwards)
        timed("EFT, speculative", large, assistant_model=up["tuned"])
        spent = (beside.forwards - calls[0], beside.side_forwards - calls[1])
    for who, (base, sides) in {"EFT": calls, "EFT, speculative": spent}.items():
        # the call before the clock counts too, and is one of as many as there are rows and one
        share = len(asked) / (len(asked) + 1)
        found[who] |= {"large_calls": base * share, "side_calls": sides * share}
    same = torch.equal(found["EFT"].pop("ids"), found["EFT, speculative"].pop("ids"))
    for who in ("large alone", "large truly tuned"):
        found[who].pop("ids")
        found[who] |= {"large_calls": found[who]["tokens"], "side_calls": 0}
    return {"rows": found, "speculative_same_tokens": same}


# --- speakers -----------------------------------------------------------------------------------


def speakers(seed: int, data: Path, names: Sequence[str] = SPEAKERS) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        stories260k.convert(data / "stories260k", Path(folder))
        large = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    lines: dict[str, dict[str, list[str]]] = {n: {"train": [], "test": []} for n in names}
    with gzip.open(data / "shakespeare" / "speakers.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["task"] in lines:
                lines[row["task"]][row["split"]].append(row["text"])
    torch.manual_seed(seed)
    written = torch.cat(
        [
            large.generate(
                torch.full((128, 1), 1),
                do_sample=True,
                max_new_tokens=127,
                eos_token_id=None,
                pad_token_id=0,
                top_k=0,
            )
            for _ in range(2)
        ]
    )
    rng = torch.Generator().manual_seed(seed)

    def stories(_: int) -> tuple[Tensor, Tensor]:
        some = written[torch.randint(len(written), (16,), generator=rng)]
        return some, some

    small = train(llama(32, 2, seed, 512), stories, 300, 5e-3)
    found = {}
    for name, split in lines.items():
        ids = {k: [tokenizer(t)["input_ids"][:256] for t in texts] for k, texts in split.items()}
        held = len(ids["train"]) // 10
        kept, known = ids["train"][:-held], ids["train"][-held:]
        rows = {
            "large base": nats(large, ids["test"]),
            "small base": nats(small, ids["test"]),
        }

        def tuned(model: Any, kept: list[list[int]] = kept) -> Any:
            def some(_: int) -> tuple[Tensor, Tensor]:
                picked = torch.randint(len(kept), (8,), generator=rng).tolist()
                return padded([kept[i] for i in picked])

            return train(copy.deepcopy(model), some, 40, 1e-3)

        small_tuned, large_tuned = tuned(small), tuned(large)
        rows["small tuned alone"] = nats(small_tuned, ids["test"])
        rows["large truly tuned"] = nats(large_tuned, ids["test"])
        on_known = {}
        for beta in SPEAKER_BETAS:
            with EFT(beta=beta).steer(large, tuned=small_tuned, untuned=small):
                rows[f"EFT up, beta {beta:g}"] = nats(large, ids["test"])
                on_known[beta] = nats(large, known)
        with EFT().steer(small, tuned=large_tuned, untuned=large):
            rows["EFT down, beta 1"] = nats(small, ids["test"])
        best = min(on_known, key=lambda beta: on_known[beta])
        rows["EFT up, beta chosen"] = rows[f"EFT up, beta {best:g}"]
        found[name] = {"nats": rows, "beta": best}
    return {"seed": seed, "speakers": found}


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(ids, labels), filled on the right: nothing reads what follows a text."""
    longest = max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([list(row) + [-100] * (longest - len(row)) for row in rows])
    return ids, labels


@torch.no_grad()
def nats(model: Any, rows: Sequence[Sequence[int]]) -> float:
    """Mean negative log-likelihood of a token."""
    total, count = 0.0, 0
    for start in range(0, len(rows), 16):
        ids, labels = padded(rows[start : start + 16])
        log_p = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), -1)
        wanted = labels[:, 1:]
        got = log_p.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
        total -= float(got[wanted >= 0].sum())
        count += int((wanted >= 0).sum())
    return total / count


# --- tables -------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _facts_rows(result: dict[str, Any], names: Sequence[str]) -> str:
    seeds = result["facts"]
    head = ["model", *[f"seed {one['seed']}" for one in seeds], "mean format", "mean accuracy"]
    rows = []
    for name in names:
        cells = [one["rows"][name] for one in seeds]
        each = [f"{100 * c['format']:.1f} / {100 * c['accuracy']:.1f}" for c in cells]
        means = [100 * _mean([c[key] for c in cells]) for key in ("format", "accuracy")]
        rows.append([name, *each, *[f"{m:.1f}" for m in means]])
    return _table(head, rows)


def facts_table(result: dict[str, Any]) -> str:
    """Format / accuracy of every model."""
    return _facts_rows(
        result,
        [
            "large base",
            "small base",
            "small tuned alone",
            "EFT up, beta 1",
            "EFT up, beta 0.5",
            "large truly tuned",
            "EFT down, beta 1",
        ],
    )


def sweep_table(result: dict[str, Any]) -> str:
    """The same by beta, and with a truncated difference."""
    names = [name for name in result["facts"][0]["rows"] if name.startswith("EFT up")]
    return _facts_rows(result, ["small tuned alone", *names, "large truly tuned"])


def marks_table(result: dict[str, Any]) -> str:
    """The targets set before the run, what was measured, whether they are met."""

    def mean(name: str, key: str) -> float:
        return _mean([one["rows"][name][key] for one in result["facts"]])

    up = mean("EFT up, beta 1", "accuracy")
    got = {
        "EFT format": mean("EFT up, beta 1", "format"),
        "EFT accuracy − small tuned": up - mean("small tuned alone", "accuracy"),
        "EFT accuracy": up,
        "large base format, at most": mean("large base", "format"),
        "EFT up − EFT down": up - mean("EFT down, beta 1", "accuracy"),
    }
    rows = []
    for name, mark in PASS_MARKS.items():
        met = got[name] <= mark if "at most" in name else got[name] >= mark
        rows.append([name, f"{mark:.2f}", f"{got[name]:.3f}", "yes" if met else "**no**"])
    return _table(["mean over seeds", "target", "measured", "met"], rows)


def cost_table(result: dict[str, Any]) -> str:
    """Calls and seconds for each new token, against the large model alone."""
    costs = [one["cost"]["rows"] for one in result["facts"]]
    rows = []
    for name in costs[0]:
        calls = [
            _mean([c[name][k] / c[name]["tokens"] for c in costs])
            for k in ("large_calls", "side_calls")
        ]
        ratio = _mean([c[name]["seconds"] / c["large alone"]["seconds"] for c in costs])
        rows.append([name, f"{calls[0]:.2f}", f"{calls[1]:.2f}", f"{ratio:.2f}"])
    head = ["", "large calls per token", "side calls per token", "seconds, large alone = 1"]
    return _table(head, rows)


def speakers_table(result: dict[str, Any]) -> str:
    """Nats per token on held-out lines, means over seeds."""
    seeds = result["speakers"]
    names = list(seeds[0]["speakers"])
    order = [
        "large base",
        "small base",
        "small tuned alone",
        *[f"EFT up, beta {beta:g}" for beta in SPEAKER_BETAS],
        "EFT up, beta chosen",
        "large truly tuned",
        "EFT down, beta 1",
    ]
    rows = []
    for who in order:
        cells = [[one["speakers"][n]["nats"][who] for one in seeds] for n in names]
        everything = [_mean(c) for c in zip(*cells, strict=True)]
        spread = max(everything) - min(everything)
        rows.append(
            [who, *[f"{_mean(c):.3f}" for c in cells], f"{_mean(everything):.3f}", f"{spread:.3f}"]
        )
    return _table(["model", *names, "mean", "range over seeds"], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "facts": facts_table,
    "sweep": sweep_table,
    "marks": marks_table,
    "cost": cost_table,
    "speakers": speakers_table,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with stories260k/ and shakespeare/")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"claim": "eft", "facts": [], "speakers": []}
    began = time.perf_counter()
    parts: dict[str, Callable[[int], dict[str, Any]]] = {
        "facts": facts,
        "speakers": lambda seed: speakers(seed, given.data),
    }
    for name, part in parts.items():
        for seed in SEEDS:
            result[name].append(part(seed))
            print(f"{name}, seed {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
            print(json.dumps(result[name][-1]), file=sys.stderr, flush=True)
    result["environment"] = environment()
    result["seconds"] = round(time.perf_counter() - began)
    RESULT.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    print("\n\n".join(write(result) for write in TABLES.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
