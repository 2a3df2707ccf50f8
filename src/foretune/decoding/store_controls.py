"""Baselines for a store of references that use the same rows: calibration, class means, LoRA."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretune.decoding.generation import device_of
from foretune.decoding.peft_model import with_adapter
from foretune.decoding.references import References
from foretune.methods.lora import LoRA
from foretune.run import Run
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.tasks.task import Task, TaskCollection
from foretune.training.loop import Progress
from foretune.training.outcome import Adapted
from foretune.training.verbs import adapt

NAME = "references"  # of the single task
RANK, BATCH = 8, 16
RATES = (1e-3, 4e-3)  # learning rates to try


def calibrated(log_p: Tensor, reference_log_p: Tensor) -> Tensor:
    """Log-probabilities divided by their mean over other prompts, whose labels are not used.

    Args:
        log_p: (n, C) log-probabilities of the labels.
        reference_log_p: (m, C), for the store's prompts.

    Returns:
        (n, C), normalised.
    """
    prior = reference_log_p.logsumexp(0) - torch.tensor(float(len(reference_log_p))).log()
    return torch.log_softmax(log_p - prior, -1)


def nearest_mean(states: Tensor, classes: Tensor, queries: Tensor, size: int) -> Tensor:
    """Class log-probabilities by the distance to the mean state of each class.

    log p ∝ −d / T with squared distances d, and T the mean one of the states to their own class's.

    Args:
        states: (n, d) states.
        classes: (n,) their classes, from 0 to `size` − 1; a class without states gets none.
        queries: (m, d) states to classify.
        size: Number of classes.

    Returns:
        (m, size) log-probabilities, float32.
    """
    x = states.float()
    counts = torch.bincount(classes, minlength=size)
    means = torch.zeros(size, x.shape[1]).index_add_(0, classes, x) / counts.clamp(min=1)[:, None]
    spread = (x - means[classes]).square().sum(-1).mean().clamp(min=1e-12)
    squared = torch.cdist(queries.float(), means).square()
    return torch.log_softmax(-(squared / spread).masked_fill(counts == 0, torch.inf), -1)


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

    The learning rate is the one with the highest log-likelihood on every fifth text after training
    on the others; the adapter is then trained on all of them. `foretune.adapt` does the training:
    rank 8, alpha 16, all linear layers but the output layer, AdamW without weight decay, gradients
    clipped to norm 1, a learning rate that falls linearly to zero.

    The speakers in `benchmarks/results/rtd.json` were measured with an earlier training loop that
    differed in four ways: texts were drawn with replacement (now each is read once per epoch), the
    loss was the mean over the tokens of a batch (now over its texts, of their tokens' means), the
    learning rates were compared per token (now per text), and a text that fills all positions of
    the model was learned whole (now without its last token, a prompt without its first).

    Args:
        model: A plain model of transformers.
        references: Texts to learn; only the values count in the loss, of labels all tokens.
        steps: Batches of 16 texts per training run.
        seed: Random seed of the adapter and the batches.
        rates: Learning rates to try.
        progress: Called after every step.

    Returns:
        A `PeftModel` in eval mode; `model` is not changed.
    """
    references = references.spelled()
    texts = range(len(references.texts))
    held_out, rest = texts[::5], [i for i in texts if i % 5]
    rate = rates[0]
    if len(rates) > 1 and rest:
        trials = [
            _adapted(model, references, rest, held_out, steps, seed, r, progress) for r in rates
        ]
        scores = [trial.scores[NAME, 0] for trial in trials]
        rate = rates[scores.index(max(scores))]
    adapted = _adapted(model, references, texts, (), steps, seed, rate, progress)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        adapted.save(folder)
        return with_adapter(copy.deepcopy(model), Path(folder) / NAME)


@dataclass(frozen=True)
class ReferenceLM(CausalLM):
    """`CausalLM` on texts that are tokenised already; the loss counts their references alone."""

    def fit(self, tasks: TaskCollection) -> ReferenceLM:
        """Itself: there is nothing to learn."""
        return self

    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        """A text of `References` with its last value behind it; its other values are in the text.

        One token beyond `max_tokens` is left out: the last value, or the first token of a prompt
        that has one value alone.
        """
        ids, values = [*example["text"], example["values"][-1]], example["values"]
        num_prompt = len(ids) - len(values)
        if len(ids) > self.max_tokens and len(values) > 1:
            return {"input_ids": ids[:-1], "learnt": [(num_prompt, len(ids) - 1)]}
        start = max(0, len(ids) - self.max_tokens)
        return {"input_ids": ids[start:], "learnt": [(num_prompt - start, len(ids) - start)]}


def _adapted(
    model: Any,
    references: References,
    train: Sequence[int],
    test: Sequence[int],
    steps: int,
    seed: int,
    rate: float,
    progress: Progress | None,
) -> Adapted:
    """LoRA trained on some of the texts, its log-likelihood on others."""
    splits = [
        [{"text": references.texts[i], "values": references.values[i]} for i in indices]
        for indices in (train, test)
    ]
    room = getattr(model.config, "max_position_embeddings", None)
    longest = 1 + max(len(text) for text in references.texts)
    task = Task(NAME, train=splits[0], test=splits[1])
    return adapt(
        model,
        TaskCollection((task,), ReferenceLM(max_tokens=room or longest)),
        LoRA(
            learning_rate=rate,
            lora={"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"},
        ),
        Run(
            seed=seed,
            steps=steps,
            batch_size=BATCH,
            warmup=0.0,
            schedule="linear",
            weight_decay=0.0,
            max_grad_norm=1.0,
            device=str(device_of(model)),
        ),
        progress=progress,
    )
