"""RTD beside its rivals: labels that a model knows and does not say, and speakers of Shakespeare.

    python benchmarks/claims/rtd.py [STORIES_FOLDER SPEAKERS_FILE [CLINC150_FILE]]

Without arguments the first part alone, which needs no data. It writes `results/rtd.json`; a part or
seed that is in there is not measured again (`--again` does).

*Labels.* Eight topics; a text is 14 words, 55 % from its topic and 45 % from what all topics share,
then `<q>`, then the label of the topic. In pre-training the label is right in 35 % of texts, the
first label in 45 %, any in 20 %: the state knows the topic, the output prefers the first label. A
Llama of two layers learns that; the store and all rivals get 4096 texts with true labels.

*Speakers.* A trained model of 260,000 parameters (children's stories) reads lines of one speaker;
STORIES_FOLDER is what `claims/stories260k.py` writes, SPEAKERS_FILE is `speakers.jsonl.gz`.

*Intents.* CLINC150, the 45 intents of three domains, with 10 and 40 references of each, by the
states of an encoder (MiniLM) and by those of the stories' model, to which many labels begin alike.
Settings are chosen on the store; test rows are scored once. *By likelihood* is how `tune` chose
before: the mean log-probability of the true label among entries left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import transformers

from foretune.decoding.datastore_folders import rows_of
from foretune.decoding.logistic import logistic_probe
from foretune.decoding.lookup import MIXES as TRIED_MIXES
from foretune.decoding.lookup import MULTIPLES, NEIGHBOURS, Lookup, mean_distance, untuned_lookup
from foretune.decoding.model_scores import states_and_log_probs
from foretune.decoding.nearest import neighbour_weights
from foretune.decoding.reference_store import ReferenceStore
from foretune.decoding.references import References, read_references
from foretune.decoding.store_controls import calibrated, nearest_mean, train_lora
from foretune.decoding.store_table import evaluate_store
from foretune.models.loading import load_model
from foretune.training.record import environment

RESULT = Path(__file__).resolve().parents[1] / "results" / "rtd.json"
TOPICS, WORDS, LENGTH = 8, 120, 14
QUESTION, FIRST = WORDS, WORDS + 1  # token of <q>, of the first label
SIZES = (16, 64, 256, 1024, 4096)
MIXES = (0.0, 0.1, 0.25, 0.5, 1.0)
SEEDS = (0, 1, 2)
STEPS, LORA_STEPS, SHOTS = 500, 300, 8
SPEAKERS = ("ROMEO", "PETRUCHIO", "QUEEN MARGARET")
CHARACTERS, SPEAKER_STEPS = 120, 60
DOMAINS = (  # of each seed
    ("banking", "travel", "work"),
    ("credit_cards", "home", "utility"),
    ("auto_and_commute", "kitchen_and_dining", "small_talk"),
)
PER_INTENT, TESTED = (10, 40), {"minilm": 1000, "stories": 400}


class Topics:
    """The texts of one seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        topics = self.random.dirichlet(np.full(WORDS, 0.2), TOPICS)
        shared = self.random.dirichlet(np.ones(WORDS))
        self.law = 0.55 * topics + 0.45 * shared

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(words (count, 14), topics (count,))."""
        topic = self.random.integers(TOPICS, size=count)
        edges = self.law.cumsum(1)[topic]
        drawn = self.random.random((count, LENGTH, 1)) * edges[:, None, -1:]
        return (drawn > edges[:, None, :]).sum(-1), topic

    def noisy(self, topic: np.ndarray) -> np.ndarray:
        """Labels as pre-training has them."""
        kind = self.random.random(len(topic))
        anything = self.random.integers(TOPICS, size=len(topic))
        return np.where(kind < 0.45, 0, np.where(kind < 0.8, topic, anything))

    def bayes(self, words: np.ndarray, topic: np.ndarray) -> float:
        """Accuracy of the best guess that there is."""
        said = np.log(self.law)[:, words].sum(-1).argmax(0)
        return float((said == topic).mean())


def references(words: np.ndarray, topic: np.ndarray) -> References:
    """Texts with `<q>` at their end, and the label that follows."""
    made = References("label", {str(i): [FIRST + i] for i in range(TOPICS)})
    for i, (some, one) in enumerate(zip(words.tolist(), topic.tolist(), strict=True)):
        made.add([*some, QUESTION], [LENGTH], [one], i)
    return made


def pretrained(topics: Topics, seed: int) -> Any:
    """The model that has seen noisy labels."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=FIRST + TOPICS,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        max_position_embeddings=(SHOTS + 1) * (LENGTH + 2),
    )
    model = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 - step / STEPS)
        words, topic = topics.draw(64)
        ids = np.concatenate(
            [words, np.full((64, 1), QUESTION), FIRST + topics.noisy(topic)[:, None]], 1
        )
        batch = torch.from_numpy(ids)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def with_shots(test: References, known: References) -> References:
    """Test texts behind the first texts of the store and their labels."""
    pairs = zip(known.texts[:SHOTS], known.values[:SHOTS], strict=True)
    before = [token for text, [topic] in pairs for token in (*text, FIRST + topic)]
    made = References("label", known.labels)
    for i, text in enumerate(test.texts):
        made.add([*before, *text], [len(before) + LENGTH], test.values[i], i)
    return made


def first_of(known: References, count: int) -> References:
    """The first texts."""
    made = References("label", known.labels)
    for i in range(count):
        made.add(known.texts[i], known.places[i], known.values[i], i)
    return made


def labels(seed: int) -> dict[str, Any]:
    """One seed of the first part."""
    topics = Topics(seed)
    model = pretrained(topics, seed)
    drawn, asked = topics.draw(SIZES[-1]), topics.draw(2000)
    known, test = references(*drawn), references(*asked)
    right = torch.from_numpy(asked[1])

    def accuracy(law: torch.Tensor) -> float:
        return float((law.argmax(-1) == right).float().mean())

    states, alone = states_and_log_probs(model, test)
    began = time.process_time()
    store = ReferenceStore.of_references(model, known)
    build = time.process_time() - began

    def rtd(which: ReferenceStore, **fields: Any) -> float:
        lookup = Lookup(**{"neighbours": 32, "mix": 1.0, **fields})
        return accuracy(which.label_log_probs(states, alone, lookup))

    began = time.process_time()
    found = store.tune(sample=1000)
    tuning = time.process_time() - began
    tuned = {k: found[k] for k in ("neighbours", "temperature", "mix", "heads")}
    began = time.process_time()
    lora = train_lora(model, known, steps=LORA_STEPS, seed=seed)
    training = (time.process_time() - began) / 3  # two trials and the training itself
    automatic = [store.temperature(Lookup(heads=h)) for h in (1, 4)]
    sizes = []
    for size in SIZES:
        part = ReferenceStore.of_references(model, first_of(known, size))
        classes = part.values
        capped = rtd(part, neighbours=part.lookup.neighbours)
        best = part.tune(sample=1000)
        sizes.append(
            {
                "entries": size,
                "automatic": capped,
                "tuned": rtd(part, **{k: best[k] for k in tuned}),
                "probe": accuracy(logistic_probe(part.keys, classes, states, TOPICS)),
            }
        )
    return {
        "seed": seed,
        "methods": {
            "zero-shot": accuracy(alone),
            "calibrated": accuracy(calibrated(alone, states_and_log_probs(model, known)[1])),
            f"{SHOTS} in the prompt": accuracy(
                states_and_log_probs(model, with_shots(test, known))[1]
            ),
            "logistic probe": sizes[-1]["probe"],
            "LoRA": accuracy(states_and_log_probs(lora, test)[1]),
            "RTD": rtd(store),
            "RTD, 4 heads": rtd(store, heads=4),
            "RTD, tuned": rtd(store, **tuned),
            "best possible": topics.bayes(*asked),
        },
        "cold": {
            "RTD": rtd(store, temperature=automatic[0] / 30),
            "RTD, 4 heads": rtd(store, heads=4, temperature=automatic[1] / 30),
        },
        "mix": {str(mix): rtd(store, mix=mix) for mix in MIXES},
        "sizes": sizes,
        "lookup": tuned,
        "cpu_seconds": {"store": build, "tuning": tuning, "LoRA": training},
    }


def speaker(stories: Path, file: str, name: str, seed: int) -> dict[str, Any]:
    """One speaker of the second part."""
    model, tokenizer = load_model(stories, head="causal-lm")
    parts = {}
    for split in ("train", "test"):
        texts = [row["text"][:CHARACTERS] for row in rows_of(file, task=name, split=split)]
        parts[split] = [{"text": text} for text in texts if len(text) > 20]
    store = ReferenceStore.build(model, parts["train"], tokenizer=tokenizer)
    found = store.tune(sample=1000)
    table = evaluate_store(
        model, tokenizer, store, parts["test"], lora_steps=SPEAKER_STEPS, seed=seed
    )
    return {"speaker": name, "seed": seed, "tuned": found, **table}


def intents(file: str, reader: str, folder: str, seed: int) -> list[dict[str, Any]]:
    """CLINC150 by the states of a model: a row for each size of the store."""
    rows = [row for row in rows_of(file) if row["task"] in DOMAINS[seed]]
    random = np.random.default_rng(seed)
    order = [rows[i] for i in random.permutation(len(rows))]
    labels = sorted({row["label"] for row in rows})
    train = [
        row
        for label in labels
        for row in [r for r in order if r["split"] == "train" and r["label"] == label][:40]
    ]
    test = [row for row in order if row["split"] == "test"][: TESTED[reader]]
    model, tokenizer = load_model(folder, head="none" if reader == "minilm" else "causal-lm")
    full = ReferenceStore.build(model, train, tokenizer=tokenizer)
    asked = read_references(
        test,
        tokenizer,
        like=References("label", full.labels),
        for_encoder=full.is_of_encoder,
    )
    right = asked.flat_values()
    if full.is_of_encoder:
        states, alone = ReferenceStore.of_references(model, asked).keys, None
    else:
        states, alone = states_and_log_probs(model, asked)
    result = []
    for count in PER_INTENT:
        kept = torch.arange(len(train)) % 40 < count
        part = subset(full, kept)

        def accuracy(log_p: torch.Tensor) -> float:
            return float((log_p.argmax(-1) == right).float().mean())

        def rtd(lookup: Lookup, store: ReferenceStore = part) -> float:
            return accuracy(store.label_log_probs(states, alone, lookup))

        before, untuned = by_likelihood(part), part.lookup
        scores = {"RTD, not tuned": rtd(untuned), "RTD, by likelihood": rtd(before)}
        tuned = part.tune()
        scores["RTD, tuned"] = rtd(part.lookup)
        for name, read in (
            ("nearest class mean", nearest_mean),
            ("logistic probe", logistic_probe),
        ):
            scores[name] = accuracy(read(part.keys, part.values, states, len(labels)))
        if alone is not None:
            scores |= {
                "zero-shot": accuracy(alone),
                "calibrated": accuracy(calibrated(alone, full.model_log_probs)),
            }
        result.append(
            {
                "model": reader,
                "seed": seed,
                "per_label": count,
                "labels": len(labels),
                "tested": len(test),
                "scores": scores,
                "neighbours": {
                    "RTD, not tuned": untuned.neighbours,
                    "RTD, by likelihood": before.neighbours,
                    "RTD, tuned": tuned["neighbours"],
                },
                "tuned": tuned,
            }
        )
    return result


def subset(store: ReferenceStore, kept: torch.Tensor) -> ReferenceStore:
    """The entries of a store of labels where `kept` (N,) is true, not tuned."""
    scored, model_log_probs = store.scored, store.model_log_probs
    if scored is not None and model_log_probs is not None:
        stays = kept[scored]
        model_log_probs = model_log_probs[stays]
        scored = (kept.cumsum(0) - 1)[scored[stays]]
    count = int(kept.sum())
    return ReferenceStore(
        store.keys[kept],
        store.values[kept],
        model_log_probs,
        torch.arange(count),
        scored=scored,
        kind="label",
        labels=store.labels,
        lookup=untuned_lookup(count, len(store.labels)),
    )


def by_likelihood(store: ReferenceStore) -> Lookup:
    """The setting under which entries that are left out have the highest mean log-probability.

    Of an encoder, which has no answer of its own, the labels are then equally probable.
    """
    entries = torch.arange(len(store)) if store.scored is None else store.scored
    entries = entries[store.sampled(2000, 0)]
    chance = torch.full((len(entries),), 1 / len(store.labels))
    if store.model_log_probs is not None:
        own = store.model_log_probs[store.sampled(2000, 0)].exp()
        chance = own.gather(1, store.values[entries][:, None])[:, 0]
    counts = [k for k in NEIGHBOURS if k <= len(store) // 2]
    squared, places = store.nearest_in_other_rows(entries, counts[-1], 1)
    hits = (store.values[places] == store.values[entries][None, :, None]).float()
    best = (-float("inf"), Lookup())
    for k in counts:
        automatic = mean_distance(squared[..., :k])
        for multiple in MULTIPLES:
            weights = neighbour_weights(squared[..., :k], automatic * multiple)
            said = (weights * hits[..., :k]).sum(-1).mean(0)
            for mix in TRIED_MIXES:
                score = float(((1 - mix) * chance + mix * said).double().log().mean())
                if score > best[0]:
                    chosen = Lookup(neighbours=k, temperature=automatic * multiple, mix=mix)
                    best = (score, chosen)
    return best[1]


def measure(arguments: list[str]) -> None:
    """Runs what is not in the result yet."""
    torch.set_num_threads(1)
    again = "--again" in arguments
    paths = [argument for argument in arguments if argument != "--again"]
    result: dict[str, Any] = {"claim": "rtd", "labels": [], "speakers": [], "intents": []}
    if RESULT.is_file() and not again:
        result = json.loads(RESULT.read_text("utf-8"))
    for seed in SEEDS:
        if all(run["seed"] != seed for run in result["labels"]):
            result["labels"].append(labels(seed))
            save(result)
            print(json.dumps(result["labels"][-1]["methods"]), flush=True)
    result.setdefault("intents", [])
    for reader in TESTED if len(paths) > 2 else ():
        folder = paths[0] if reader == "stories" else reader
        for seed in SEEDS:
            if all((run["model"], run["seed"]) != (reader, seed) for run in result["intents"]):
                result["intents"] += intents(paths[2], reader, folder, seed)
                save(result)
                print(json.dumps(result["intents"][-1]), flush=True)
    for seed, name in enumerate(SPEAKERS if len(paths) > 1 else ()):
        if all(run["speaker"] != name for run in result["speakers"]):
            result["speakers"].append(speaker(Path(paths[0]), paths[1], name, seed))
            save(result)
            print(json.dumps(result["speakers"][-1]["rows"]), flush=True)


def save(result: dict[str, Any]) -> None:
    """Writes what there is, figures cut to what they are good for."""
    short = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))
    short["environment"] = environment()
    RESULT.write_text(json.dumps(short, separators=(",", ":")) + "\n", encoding="utf-8")


# --- tables ---------------------------------------------------------------------------------------


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def points(values: list[float]) -> str:
    """Accuracies in per cent: the mean and the ends."""
    return f"{100 * mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def methods_table(result: dict[str, Any]) -> str:
    """Every method on the labels."""
    runs = result["labels"]
    names = list(runs[0]["methods"])
    return grid(
        ["method", "accuracy, % (lowest to highest seed)"],
        [[name, points([run["methods"][name] for run in runs])] for name in names],
    )


def sizes_table(result: dict[str, Any]) -> str:
    """RTD and the probe by the size of the store."""
    runs = result["labels"]
    rows = []
    for i, size in enumerate(SIZES):
        cells = [
            points([run["sizes"][i][k] for run in runs]) for k in ("automatic", "tuned", "probe")
        ]
        rows.append([str(size), *cells])
    return grid(["entries", "RTD, automatic", "RTD, tuned", "logistic probe"], rows)


def mix_table(result: dict[str, Any]) -> str:
    """RTD by the share of the store."""
    runs = result["labels"]
    rows = [[key, points([run["mix"][key] for run in runs])] for key in runs[0]["mix"]]
    return grid(["mix (λ)", "accuracy, %"], rows)


def intents_table(result: dict[str, Any], reader: str) -> str:
    """Every method on the intents, by references of each."""
    runs = [run for run in result["intents"] if run["model"] == reader]
    rows = []
    for name in runs[0]["scores"]:
        cells = []
        for count in PER_INTENT:
            part = [run for run in runs if run["per_label"] == count]
            cell = points([run["scores"][name] for run in part])
            used = ", ".join(str(run["neighbours"].get(name, "")) for run in part)
            cells += [cell, used.strip(", ")]
        rows.append([name, *cells])
    head = [part for count in PER_INTENT for part in (f"{count} of each intent", "K")]
    return grid(["method", *head], rows)


def marks(result: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """(what should hold, the figure, whether it does), on the means over seeds."""
    runs = result["labels"]

    def over(get: Callable[[dict[str, Any]], float]) -> float:
        return mean(get(run) for run in runs)

    method = {name: over(lambda run, n=name: run["methods"][n]) for name in runs[0]["methods"]}
    large, small = (over(lambda run, i=i: run["sizes"][i]["automatic"]) for i in (-1, 1))
    cold = over(lambda run: run["cold"]["RTD, 4 heads"] - run["cold"]["RTD"])
    heads = method["RTD, 4 heads"] - method["RTD"]
    share = over(lambda run: run["cpu_seconds"]["store"] / run["cpu_seconds"]["LoRA"])
    gain, lost = method["RTD"] - method["zero-shot"], method["RTD"] - method["LoRA"]
    return [
        ("RTD − zero-shot ≥ 0.4", gain, gain >= 0.4),
        ("RTD − LoRA ≥ −0.04", lost, lost >= -0.04),
        ("4096 entries − 64 entries ≥ −0.005", large - small, large - small >= -0.005),
        ("4 heads − 1 head ≥ −0.01", heads, heads >= -0.01),
        ("4 heads − 1 head ≥ 0 at a thirtieth of the temperature", cold, cold >= 0),
        ("time of the store / time of one LoRA training < 0.2", share, share < 0.2),
    ]


def marks_table(result: dict[str, Any]) -> str:
    """The targets set before the run, what was measured, whether they are met."""
    rows = [
        [what, f"{figure:+.3f}", "yes" if ok else "**no**"] for what, figure, ok in marks(result)
    ]
    return grid(["target", "measured", "met"], rows)


def speakers_table(result: dict[str, Any]) -> str:
    """Perplexity by speaker."""
    runs = result["speakers"]
    names = [row["method"] for row in runs[0]["rows"]]
    rows = []
    for i, name in enumerate(names):
        rows.append([name, *(f"{run['rows'][i]['score']:.1f}" for run in runs)])
    rows.append(["*mix chosen*", *(f"{run['tuned']['mix']:g}" for run in runs)])
    rows.append(["*tokens scored*", *(str(run["examples"]) for run in runs)])
    rows.append(["*entries*", *(str(run["entries"]) for run in runs)])
    return grid(["perplexity", *(run["speaker"] for run in runs)], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "methods": methods_table,
    "sizes": sizes_table,
    "mix": mix_table,
    "marks": marks_table,
    "speakers": speakers_table,
    "minilm": partial(intents_table, reader="minilm"),
    "stories": partial(intents_table, reader="stories"),
}


if __name__ == "__main__":
    measure(sys.argv[1:])
