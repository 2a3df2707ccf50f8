"""One table: a store of references beside baselines that use the same rows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foretune.decoding.classify import states_and_model
from foretune.decoding.encoder_states import room_of
from foretune.decoding.logistic import logistic_probe
from foretune.decoding.lookup import Lookup
from foretune.decoding.model_scores import states_and_log_probs
from foretune.decoding.output_states import read_states
from foretune.decoding.reference_store import ReferenceStore
from foretune.decoding.references import References, prompt_and_label, read_references
from foretune.decoding.store_controls import calibrated, nearest_mean, train_lora
from foretune.decoding.tuning import error_of
from foretune.errors import ForetuneError, UserError
from foretune.tasks.objectives.accuracy import accuracies
from foretune.training.loop import Progress


def evaluate_store(
    model: Any,
    tokenizer: Any,
    store: ReferenceStore,
    rows: Sequence[Mapping[str, Any]],
    *,
    lookup: Lookup | None = None,
    shots: int = 8,
    lora_steps: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores a store and its baselines on held-out rows.

    Rows with labels: accuracy and log-loss among the labels of the store, for the model alone
    (zero-shot), the same divided by its mean distribution on the store's prompts (calibrated),
    examples in the prompt, the nearest mean of a label's states, a logistic probe on the store's
    states, LoRA trained on the store's rows, and RTD. Other rows: perplexity, for the model alone,
    the same mixed with the store's token counts, the store's texts in the prompt, LoRA, and RTD.
    A store of an encoder is compared with what reads the same states: the nearest mean, a probe.

    Args:
        model: The model that the store was built with.
        tokenizer: Its tokenizer.
        store: The store.
        rows: Rows of the same kind as the store's.
        lookup: How to query the store; None for `store.lookup`.
        shots: Rows of the store to put into the prompt, fewer if they do not fit; 0 for none.
        lora_steps: Batches of 16 texts in each of LoRA's three training runs; 0 to leave it out.
        seed: Random seed of the shots and of LoRA.
        progress: Called after every training step of LoRA.

    Returns:
        `metric`, `entries` of the store, `examples`, `rows`: each `method`, `score`,
        `standard_error`, `log_loss`, `seconds` (of preparation, without scoring), `trains`; and
        `ahead`: the baselines that are better than RTD on these rows, each `method`, `by` (in
        accuracy, or nats per token) and the `standard_error` of that difference.

    Raises:
        UserError: The rows are of another kind than the store's, or the model is another one.
    """
    store.check_model(model)
    table = _Table(model, tokenizer, store, rows, lookup or store.lookup, seed)
    table.run(shots, lora_steps, progress)
    return {
        "metric": "accuracy" if store.labels else "perplexity",
        "entries": len(store),
        "examples": len(table.answers),
        "rows": table.rows,
        "ahead": table.ahead(),
    }


class _Table:
    """The rows of the table, and what they all need."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: ReferenceStore,
        rows: Sequence[Mapping[str, Any]],
        lookup: Lookup,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.lookup, self.seed = lookup, seed
        self.room = room_of(model)
        if not store.rows:
            raise UserError("the store has no rows, which the baselines need; rebuild it")
        self.train = read_references(
            store.rows, tokenizer, max_tokens=self.room, for_encoder=store.is_of_encoder
        )
        self.test_rows = rows
        self.test = read_references(rows, tokenizer, max_tokens=self.room, like=self.train)
        self.num_labels = len(self.train.labels)
        self.answers = self.test.flat_values()
        self.rows: list[dict[str, Any]] = []
        self.scores: dict[str, Tensor] = {}  # (n,) of each method, higher is better

    def run(self, shots: int, lora_steps: int, progress: Progress | None) -> None:
        """Fills the table, the cheapest baseline first."""
        if self.store.is_of_encoder:
            states, model_log_p = states_and_model(self.model, self.store, self.test, self.lookup)
            self.add_readers(states)
            self.add("RTD", self.store.label_log_probs(states, model_log_p, self.lookup), 0.0)
            return
        states, zero_shot = states_and_log_probs(self.model, self.test)
        states = states.float()
        self.add("zero-shot", zero_shot, 0.0)
        if self.num_labels:
            with _timed() as spent:
                model_log_p = self.store.model_log_probs
                if model_log_p is None:  # a store of an earlier version
                    _, model_log_p = states_and_log_probs(self.model, self.train)
            self.add("calibrated", calibrated(zero_shot, model_log_p), spent[0])
        else:
            counts = torch.bincount(self.store.values, minlength=int(self.answers.max()) + 1)
            prior = counts[self.answers][:, None] / len(self.store)
            mix = (self.store.tuned or {}).get("counts_mix", self.lookup.mix)
            self.add("token counts", ((1 - mix) * zero_shot.exp() + mix * prior).log(), 0.0)
        if shots:
            with _timed() as spent:
                prompted, used = self.with_shots(shots)
            _, log_p = states_and_log_probs(self.model, prompted)
            name = f"{used} in the prompt" if self.num_labels else "texts in the prompt"
            self.add(name, log_p, spent[0])
        if self.num_labels:
            self.add_readers(states)
        if lora_steps and not hasattr(self.model, "peft_config"):
            with _timed() as spent:
                adapted = train_lora(
                    self.model, self.train, steps=lora_steps, seed=self.seed, progress=progress
                )
            _, log_p = states_and_log_probs(adapted, self.test)
            self.add("LoRA", log_p, spent[0], trains=True)
        if self.num_labels:
            log_p = self.store.label_log_probs(states, zero_shot, self.lookup)
        else:
            log_p = self.with_store()
        self.add("RTD", log_p, 0.0)

    def add_readers(self, states: Tensor) -> None:
        """Adds what reads the same states (n, d) otherwise: the nearest mean, and a probe."""
        for name, reader, trains in (
            ("nearest class mean", nearest_mean, False),
            ("logistic probe", logistic_probe, True),
        ):
            with _timed() as spent:
                log_p = reader(self.store.keys, self.store.values, states, self.num_labels)
            self.add(name, log_p, spent[0], trains=trains)

    def with_store(self) -> Tensor:
        """The log-probabilities of RTD for the next tokens of the test texts, (n, 1)."""
        mix, log_probs, start = self.lookup.mix, [], 0
        for states, logits in read_states(self.model, self.test.texts, self.test.places):
            answer = self.store.reference(states, self.lookup, logits.shape[-1])
            p = (1 - mix) * torch.softmax(logits.float(), -1) + mix * answer.reference
            next_tokens = self.answers[start : start + len(states), None].to(p.device)
            start += len(states)
            log_probs.append(p.gather(1, next_tokens).log().cpu())
        return torch.cat(log_probs)

    def with_shots(self, shots: int) -> tuple[References, int]:
        """(test references with rows of the store before each of them, number of these rows)."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.store.rows), generator=generator).tolist()
        if not self.num_labels:
            return self._after_texts([self.store.rows[i] for i in order]), shots
        for count in range(min(shots, len(order)), 0, -1):
            prefix = ""
            for row in (self.store.rows[i] for i in order[:count]):
                prompt, label = prompt_and_label(row, self.store.kind)
                prefix += f"{prompt}{'' if prompt[-1].isspace() else ' '}{label}\n"
            rows = [_with_prefix(row, self.store.kind, prefix) for row in self.test_rows]
            prompted = read_references(rows, self.tokenizer, like=self.train)
            spelled = max(len(tokens) for tokens in self.train.labels.values())
            longest = max(len(text) for text in prompted.texts) + spelled - 1
            if self.room is None or longest <= self.room:
                return prompted, count
        return self.test, 0

    def _after_texts(self, rows: Sequence[Mapping[str, Any]]) -> References:
        """Test texts after as many tokens of the store's texts as there are positions for."""
        longest = max(len(text) for text in self.test.texts)
        room = self.room or 2 * longest
        context: list[int] = []
        for row in rows:
            texts = read_references([row], self.tokenizer).texts
            context += [token for text in texts for token in text]
            if len(context) >= room:
                break
        prompted = References(self.test.kind, {})
        parts = (self.test.texts, self.test.places, self.test.values)
        for i, (text, places, values) in enumerate(zip(*parts, strict=True)):
            prefix = context[: room - len(text)]
            prompted.add([*prefix, *text], [p + len(prefix) for p in places], values, i)
        return prompted

    def add(self, method: str, log_p: Tensor, seconds: float, *, trains: bool = False) -> None:
        """Adds the scores of log-probabilities: (n, labels), or (n, 1) of the next token.

        Raises:
            ForetuneError: A score is not finite.
        """
        row: dict[str, Any] = {"method": method, "trains": trains, "seconds": seconds}
        if self.num_labels:
            right = accuracies(log_p, self.answers)
            loss = -log_p.gather(1, self.answers[:, None])[:, 0].double()
            self.scores[method] = right.double()
            row["score"] = float(right.mean())
            if math.isnan(row["score"]):
                raise ForetuneError(f"{method} gives log-probabilities that are nan: try float32")
            row["standard_error"] = error_of(right)
        else:
            loss = -log_p[:, 0].double()
            self.scores[method] = -loss
            row["score"] = math.exp(float(loss.mean()))
            row["standard_error"] = None
        mean = float(loss.mean())
        # RTD at λ = 1 may give a true label probability 0.
        row["log_loss"] = mean if math.isfinite(mean) else None
        if not self.num_labels and not math.isfinite(row["score"]):
            row["score"] = None
        self.rows.append(row)

    def ahead(self) -> list[dict[str, Any]]:
        """The baselines whose mean score is above RTD's, and by how much."""
        above = []
        for method, scores in self.scores.items():
            differences = scores - self.scores["RTD"]
            by = float(differences.mean())
            if math.isfinite(by) and by > 0:
                error = error_of(differences)
                above.append({"method": method, "by": by, "standard_error": error})
        return above


def _with_prefix(row: Mapping[str, Any], kind: str, prefix: str) -> dict[str, Any]:
    if kind != "choice":
        return {"prompt": prefix + prompt_and_label(row, kind)[0], "label": row["label"]}
    context = row["context"]
    first, *rest = [context] if isinstance(context, str) else context
    return {**row, "context": [prefix + first, *rest]}


@contextmanager
def _timed() -> Any:
    spent = [0.0]
    began = time.perf_counter()
    yield spent
    spent[0] = time.perf_counter() - began
