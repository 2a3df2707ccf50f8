"""The systems that are compared: one training step each, on the same tokens.

floor    plain full fine-tuning of the model, all rows in one batch, fused AdamW: what anything that
         trains all weights must cost
ours     PEFT-ML's joint step through foretune's own Learner
peft     one peft adapter a task, `set_adapter` task by task, gradients added up, one fused AdamW
authors  the same adapters, one task after the other, each with an optimiser step of its own by
         AdamW as torch makes it by default
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from foretune.adapters.bank import AdapterBank
from foretune.models import products
from foretune.models.routing import route
from foretune.run import Run
from foretune.tasks.batch import Batch
from foretune.training.data import SlotRows, Step, TaskData
from foretune.training.learners.joint import Learner
from foretune.training.token_budget import default_token_budget

RATE = 1e-5
RUN = Run(max_grad_norm=None, weight_decay=0.01)
TARGETS = ["query", "key", "value", "dense"]  # every linear layer of the encoder
LORA = {"r": 8, "lora_alpha": 8, "target_modules": TARGETS, "exclude_modules": ["pooler.dense"]}

SIZES: dict[str, dict[str, int]] = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
               "intermediate_size": 1536, "vocab_size": 30522},
    "roberta-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                     "intermediate_size": 3072, "vocab_size": 50265},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64, "vocab_size": 100},
}  # fmt: skip


def encoder(size: str) -> Any:
    """A classifier of that size with random weights, the same ones every time, without dropout."""
    config = BertConfig(
        **SIZES[size], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config).train()


class TokenRows:
    """The least that an objective must be: rows of token ids with one of two labels."""

    kind = "classification"

    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        return dict(example)

    def sample(self, row: Mapping[str, Any], rng: Any) -> Mapping[str, Any]:
        return row

    def size(self, row: Mapping[str, Any]) -> int:
        return len(row["ids"])

    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        return Batch(inputs_of(rows), tuple(slots), sum(len(row["ids"]) for row in rows), {})

    def losses(self, model: Any, batch: Batch) -> Tensor:
        with route(batch.slots):
            return losses_of(model, batch.inputs)

    def scores(self, model: Any, batch: Batch) -> Tensor:
        return -self.losses(model, batch)


def inputs_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Padded ids, mask and labels."""
    width = max(len(row["ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row["ids"])] = torch.tensor(row["ids"])
        mask[i, : len(row["ids"])] = 1
    labels = torch.tensor([row["label"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(n,) cross-entropies; of a model without a head, of its mean-pooled first two numbers."""
    output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    if hasattr(output, "logits"):
        logits = output.logits
    else:
        kept = inputs["attention_mask"].unsqueeze(-1)
        logits = ((output.last_hidden_state * kept).sum(1) / kept.sum(1))[:, :2]
    return F.cross_entropy(logits.float(), inputs["labels"], reduction="none")


def made_up_tasks(
    num_tasks: int, batch: int, lengths: Sequence[int], vocabulary: int
) -> list[list[dict[str, Any]]]:
    """Rows of random tokens: [task][row]; lengths are dealt out row after row."""
    generator = torch.Generator().manual_seed(1)
    tasks, place = [], 0
    for _ in range(num_tasks):
        rows = []
        for _ in range(batch):
            length = lengths[place % len(lengths)]
            place += 1
            ids = torch.randint(5, vocabulary, (length,), generator=generator).tolist()
            rows.append({"ids": ids, "label": int(torch.randint(2, (), generator=generator))})
        tasks.append(rows)
    return tasks


@dataclass
class Autocast:
    """bf16 or nothing."""

    precision: str

    def __call__(self) -> Any:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast("cpu", torch.bfloat16)


def floor(
    model: nn.Module, tasks: list[list[dict[str, Any]]], precision: str = "fp32"
) -> Callable[[], None]:
    """A plain full fine-tuning step on all rows."""
    inputs = inputs_of([row for rows in tasks for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    autocast = Autocast(precision)

    def step() -> None:
        with autocast():
            loss = losses_of(model, inputs).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class _Linear(torch.autograd.Function):
    """A linear layer by the products that foretune's adapted layers use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, weight), gy = ctx.saved_tensors, grads[0].contiguous()
        gbias = gy.sum(0) if ctx.needs_input_grad[2] else None
        return products.linear(gy, weight.T), products.weight_gradient(gy, x), gbias


def in_our_products(model: nn.Module) -> nn.Module:
    """The model with every linear layer that foretune would adapt by foretune's own products."""
    for name, module in model.named_modules():
        adapted = name.rpartition(".")[2] in LORA["target_modules"] and "pooler" not in name
        if isinstance(module, nn.Linear) and adapted:
            module.forward = functools.partial(_by_rows, module)
    return model


def _by_rows(module: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), module.weight, module.bias)
    return y.view(*x.shape[:-1], -1)


def learner(
    model: nn.Module,
    num_tasks: int,
    *,
    adapters: bool = True,
    train_base: bool = True,
    precision: str = "fp32",
    lora: Mapping[str, Any] | None = None,
) -> Learner:
    """foretune's joint learner; without adapters it trains the base alone on the same rows."""
    bank = None
    if adapters:
        keys = [str(i) for i in range(num_tasks)]
        bank = AdapterBank(model, keys, lora=LORA if lora is None else lora)
        with torch.no_grad():
            for p in bank.parameters():
                p.normal_(0, 0.02)
    found = Learner(
        model,
        TokenRows(),  # type: ignore[arg-type]
        bank=bank,
        learning_rate=RATE if train_base else None,
        bank_learning_rate=RATE,
    )
    found.start(RUN)
    found.autocast = Autocast(precision)
    return found


def joint_step(
    tasks: list[list[dict[str, Any]]], model: nn.Module | None = None, budget: int | None = None
) -> Step:
    """All rows of all tasks, in chunks of what `budget` or the model's usual budget allows."""
    if budget is None and model is not None:
        budget = default_token_budget(model)
    data = TaskData([SlotRows(str(i), rows) for i, rows in enumerate(tasks)], TokenRows())  # type: ignore[arg-type]
    picks = [(i, j) for i, rows in enumerate(tasks) for j in range(len(rows))]
    return data.step(picks, "train", train=True, seed=[0], budget=budget)


def peft_model(model: nn.Module, num_tasks: int, *, train_base: bool = True) -> Any:
    """peft's own adapters, one a task, beside a base that trains."""
    made = peft.get_peft_model(model, peft.LoraConfig(**LORA), adapter_name="0")  # type: ignore[arg-type]
    for i in range(1, num_tasks):
        made.add_adapter(str(i), peft.LoraConfig(**LORA))  # type: ignore[arg-type]
    for name, p in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, 0, 0.02)
        p.requires_grad_("lora_" in name or train_base)
    return made.train()


def select_task(made: Any, task: int, *, train_base: bool = True) -> None:
    """`set_adapter`; which freezes the other adapters."""
    made.set_adapter(str(task))
    if train_base and not next(made.parameters()).requires_grad:
        raise RuntimeError("peft has frozen the base")


def peft_loop(
    made: Any, tasks: list[list[dict[str, Any]]], precision: str = "fp32"
) -> Callable[[], None]:
    """One task after the other, gradients added up, one step of a fused AdamW."""
    batches = [inputs_of(rows) for rows in tasks]
    optimizer = torch.optim.AdamW(made.parameters(), lr=RATE, fused=True)
    autocast = Autocast(precision)

    def step() -> None:
        for i, inputs in enumerate(batches):
            select_task(made, i)
            with autocast():
                loss = losses_of(made, inputs).mean() / len(batches)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def authors_loop(made: Any, tasks: list[list[dict[str, Any]]]) -> Callable[[], None]:
    """One task after the other, each with a step of torch's default AdamW."""
    batches = [inputs_of(rows) for rows in tasks]
    optimizer = torch.optim.AdamW(made.parameters(), lr=RATE)

    def step() -> None:
        for i, inputs in enumerate(batches):
            select_task(made, i)
            optimizer.zero_grad()
            losses_of(made, inputs).mean().backward()
            optimizer.step()

    return step


@contextlib.contextmanager
def ready(*learners: Learner) -> Any:
    """All of them attached; yields one function a learner that makes its step."""
    with contextlib.ExitStack() as stack:
        for one in learners:
            stack.enter_context(one.ready())
        yield [lambda step, one=one: one.update([step], RUN, 1.0) for one in learners]
