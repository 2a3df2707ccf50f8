"""One table: a store of references beside what else could be done with the same rows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foretune.decoding.logistic import logistic_probe
from foretune.decoding.lookup import Lookup
from foretune.decoding.output_states import read_states
from foretune.decoding.reference_store import ReferenceStore
from foretune.decoding.references import References, prompt_and_label, read_references
from foretune.decoding.side_models import bare_model
from foretune.decoding.store_controls import calibrated, laws, train_lora
from foretune.errors import UserError
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
    """Scores a store and its rivals on rows that are not in it.

    Rows with labels: accuracy and log-loss among the labels of the store, for the model alone, the
    same divided by its mean law on the store's prompts (calibrated), examples in the prompt, a
    logistic probe on the store's states, LoRA trained on the store's rows, RTD. Other rows:
    perplexity, for the model alone, the same mixed with the store's token counts, the store's
    texts in the prompt, LoRA, RTD.

    Args:
        model: What the store was made with.
        tokenizer: Its tokenizer.
        store: The store.
        rows: Of the kind that the store was made of.
        lookup: How the store is asked; None for its own way.
        shots: Rows of the store that go into the prompt, or as many as have room; 0 for none.
        lora_steps: Batches of 16 rows in one training, of which there are three; 0 for none.
        seed: Draws the shots, seeds LoRA.
        progress: Is told the steps of LoRA.

    Returns:
        `metric`, `entries` of the store, `examples`, and `rows`: each `method`, `score`,
        `standard_error`, `log_loss`, `seconds` (of what precedes scoring), `trains`.

    Raises:
        UserError: Rows of another kind, or another model.
    """
    store.check_model(model)
    table = _Table(model, tokenizer, store, rows, lookup or store.lookup, seed)
    table.run(shots, lora_steps, progress)
    return {
        "metric": "accuracy" if store.labels else "perplexity",
        "entries": len(store),
        "examples": len(table.wanted),
        "rows": table.rows,
    }


class _Table:
    """What all rows of the table share."""

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
        self.room = getattr(bare_model(model).config, "max_position_embeddings", None)
        if not store.rows:
            raise UserError("the store has no rows beside it, which the controls are made of")
        self.known = read_references(store.rows, tokenizer, max_tokens=self.room)
        self.test_rows = rows
        self.test = read_references(rows, tokenizer, max_tokens=self.room, like=self.known)
        ids = list(self.known.labels.values())
        self.labels = torch.tensor(ids) if ids else None
        self.wanted = torch.tensor([v for some in self.test.values for v in some])
        self.rows: list[dict[str, Any]] = []

    def run(self, shots: int, lora_steps: int, progress: Progress | None) -> None:
        """Fills the table, the cheapest rival first."""
        states, alone = laws(self.model, self.test, self.labels)
        self.add("zero-shot", alone, 0.0)
        if self.labels is not None:
            with _timed() as spent:
                seen = laws(self.model, self.known, self.labels)[1]
            self.add("calibrated", calibrated(alone, seen), spent[0])
        else:
            counts = torch.bincount(self.store.values, minlength=int(self.wanted.max()) + 1)
            prior = counts[self.wanted][:, None] / len(self.store)
            mix = (self.store.tuned or {}).get("counts_mix", self.lookup.mix)
            self.add("token counts", ((1 - mix) * alone.exp() + mix * prior).log(), 0.0)
        if shots:
            with _timed() as spent:
                prompted, used = self.with_shots(shots)
            said = laws(self.model, prompted, self.labels)[1]
            name = f"{used} in the prompt" if self.labels is not None else "texts in the prompt"
            self.add(name, said, spent[0])
        if self.labels is not None:
            with _timed() as spent:
                said = logistic_probe(
                    self.store.keys,
                    self.class_of(self.store.values),
                    states,
                    len(self.labels),
                )
            self.add("logistic probe", said, spent[0], trains=True)
        if lora_steps and not hasattr(self.model, "peft_config"):
            with _timed() as spent:
                adapted = train_lora(
                    self.model, self.known, steps=lora_steps, seed=self.seed, progress=progress
                )
            self.add("LoRA", laws(adapted, self.test, self.labels)[1], spent[0], trains=True)
        self.add("RTD", self.with_store(), 0.0)

    def with_store(self) -> Tensor:
        """The law of RTD at the test rows' places."""
        mix, found, done = self.lookup.mix, [], 0
        for some, logits in read_states(self.model, self.test.texts, self.test.places):
            answer = self.store.reference(some, self.lookup, logits.shape[-1])
            law = (1 - mix) * torch.softmax(logits.float(), -1) + mix * answer.reference
            wanted = self.wanted[done : done + len(some), None].to(law.device)
            done += len(some)
            if self.labels is None:
                found.append(law.gather(1, wanted).log().cpu())
            else:
                among = law[:, self.labels.to(law.device)]
                found.append((among / among.sum(-1, keepdim=True)).log().cpu())
        return torch.cat(found)

    def with_shots(self, shots: int) -> tuple[References, int]:
        """The test rows with rows of the store before them, and how many."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.store.rows), generator=generator).tolist()
        if self.labels is None:
            return self._behind([self.store.rows[i] for i in order]), shots
        for count in range(min(shots, len(order)), 0, -1):
            before = ""
            for row in (self.store.rows[i] for i in order[:count]):
                prompt, label = prompt_and_label(row, self.store.kind)
                before += f"{prompt}{'' if prompt[-1].isspace() else ' '}{label}\n"
            made = [_with_prefix(row, self.store.kind, before) for row in self.test_rows]
            found = read_references(made, self.tokenizer, like=self.known)
            if self.room is None or max(len(text) for text in found.texts) <= self.room:
                return found, count
        return self.test, 0

    def _behind(self, rows: Sequence[Mapping[str, Any]]) -> References:
        """Test texts behind as many tokens of the store's texts as there are positions for."""
        longest = max(len(text) for text in self.test.texts)
        room = self.room or 2 * longest
        before: list[int] = []
        for row in rows:
            one = read_references([row], self.tokenizer)
            before += [token for text in one.texts for token in text]
            if len(before) >= room:
                break
        made = References(self.test.kind, {})
        parts = (self.test.texts, self.test.places, self.test.values)
        for i, (text, places, values) in enumerate(zip(*parts, strict=True)):
            some = before[: room - len(text)]
            made.add([*some, *text], [p + len(some) for p in places], values, i)
        return made

    def class_of(self, tokens: Tensor) -> Tensor:
        """Token of a label → its place among the labels."""
        assert self.labels is not None
        return (tokens[:, None] == self.labels[None]).long().argmax(-1)

    def add(self, method: str, law: Tensor, seconds: float, *, trains: bool = False) -> None:
        """Scores log-probabilities, (n, labels) or (n, 1) of the token that followed."""
        row: dict[str, Any] = {"method": method, "trains": trains, "seconds": seconds}
        if self.labels is not None:
            classes = self.class_of(self.wanted)
            right = (law.argmax(-1) == classes).float()
            loss = -law.gather(1, classes[:, None])[:, 0].double()
            row["score"] = float(right.mean())
            row["standard_error"] = float(right.std(correction=0)) / math.sqrt(len(right))
        else:
            loss = -law[:, 0].double()
            row["score"] = math.exp(float(loss.mean()))
            row["standard_error"] = None
        mean = float(loss.mean())
        # RTD at λ = 1 gives some true labels no probability at all.
        row["log_loss"] = mean if math.isfinite(mean) else None
        if self.labels is None and not math.isfinite(row["score"]):
            row["score"] = None
        self.rows.append(row)


def _with_prefix(row: Mapping[str, Any], kind: str, before: str) -> dict[str, Any]:
    if kind != "choice":
        return {"prompt": before + prompt_and_label(row, kind)[0], "label": row["label"]}
    context = row["context"]
    first, *rest = [context] if isinstance(context, str) else context
    return {**row, "context": [before + first, *rest]}


@contextmanager
def _timed() -> Any:
    spent = [0.0]
    began = time.perf_counter()
    yield spent
    spent[0] = time.perf_counter() - began
