"""What a store of references must be held against, on the same rows: rivals that use them too."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foretune.decoding.generation import device_of
from foretune.decoding.output_states import read_states
from foretune.decoding.references import References

Progress = Callable[[int, int, dict[str, Any]], None]
RANK, BATCH = 8, 16
RATES = (1e-3, 4e-3)


def laws(model: Any, references: References, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a model says at the places of references.

    Args:
        model: The model.
        references: Where.
        labels: Ids of the labels, for their log-probabilities among themselves; None for the
            log-probability of the token that follows.

    Returns:
        (states (n, d), (n, labels) or (n, 1) log-probabilities), float32 on the CPU.
    """
    values = torch.tensor([v for some in references.values for v in some])
    states, said, done = [], [], 0
    for some, logits in read_states(model, references.texts, references.places):
        if labels is not None:
            law = torch.log_softmax(logits[:, labels.to(logits.device)].float(), -1)
        else:
            wanted = values[done : done + len(some), None].to(logits.device)
            law = torch.log_softmax(logits.float(), -1).gather(1, wanted)
        done += len(some)
        states.append(some.float().cpu())
        said.append(law.cpu())
    return torch.cat(states), torch.cat(said)


def calibrated(law: Tensor, seen: Tensor) -> Tensor:
    """Log-probabilities divided by their mean over other prompts, whose labels are not used.

    Args:
        law: (n, labels).
        seen: (m, labels), of the store's prompts.
    """
    prior = seen.logsumexp(0) - torch.tensor(float(len(seen))).log()
    return torch.log_softmax(law - prior, -1)


def train_lora(
    model: Any,
    references: References,
    *,
    steps: int,
    seed: int,
    rates: Sequence[float] = RATES,
    progress: Progress | None = None,
) -> Any:
    """A copy of the model with a LoRA adapter trained on the references.

    The learning rate is the one that does best on every fifth text after training on the others;
    the adapter is then trained on all of them.

    Args:
        model: A plain model of transformers.
        references: Its places and values are what is learned.
        steps: Batches of 16 texts.
        seed: Seeds the adapter and the batches.
        rates: Learning rates that are tried.
        progress: Is told the step.
    """
    every = range(len(references.texts))
    held, kept = [i for i in every if i % 5 == 0], [i for i in every if i % 5]
    rate = rates[0]
    if len(rates) > 1 and kept:
        trials = (_trained(model, references, kept, steps, seed, r, progress) for r in rates)
        left = _some(references, held)
        scores = [float(laws(trial, left, None)[1].mean()) for trial in trials]
        rate = rates[scores.index(max(scores))]
    return _trained(model, references, list(every), steps, seed, rate, progress)


def _trained(
    model: Any,
    references: References,
    rows: Sequence[int],
    steps: int,
    seed: int,
    rate: float,
    progress: Progress | None,
) -> Any:
    import peft

    device = device_of(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that it turns fan_in_fan_out on for GPT-2
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        adapted = peft.get_peft_model(copy.deepcopy(model), config).train()
        optimizer = torch.optim.AdamW(
            [p for p in adapted.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
        )
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            drawn = torch.randint(len(rows), (min(BATCH, len(rows)),)).tolist()
            batch = _some(references, [rows[i] for i in drawn])
            loss = _loss(adapted, batch, device)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
            optimizer.step()
            if progress is not None:
                progress(step + 1, steps, {"loss": float(loss.detach())})
    return adapted.eval()


def _loss(model: Any, batch: References, device: torch.device) -> Tensor:
    longest = max(len(text) for text in batch.texts)
    ids = torch.zeros(len(batch.texts), longest, dtype=torch.long)
    mask, wanted = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, text in enumerate(batch.texts):
        ids[i, : len(text)], mask[i, : len(text)] = torch.tensor(text), 1
        wanted[i, batch.places[i]] = torch.tensor(batch.values[i])
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), wanted.to(device).flatten(), ignore_index=-100
    )


def _some(references: References, rows: Sequence[int]) -> References:
    made = References(references.kind, references.labels)
    for i in rows:
        made.add(
            references.texts[i], references.places[i], references.values[i], references.sources[i]
        )
    return made
