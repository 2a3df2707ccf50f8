"""A batch that mixes tasks gives each task what it gets alone, whatever the model does inside."""

from __future__ import annotations

import logging
import threading

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tiny_models
from foretune.adapters import mixing
from foretune.adapters.bank import AdapterBank
from foretune.errors import UserError
from foretune.models.packing import packed
from foretune.models.routing import route

LENGTH = 6


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(mixing, "_WARNED", set())


class Encoder(nn.Module):
    """(n, L, 4) → (n, 3), by a transformer encoder that takes time or rows first."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.time_first = time_first
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=not time_first)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x.transpose(0, 1) if self.time_first else x)
        return self.out(self.encoder(h).mean(0 if self.time_first else 1))


class TimeFirst(nn.Module):
    """Reads and returns (L, n, …)."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inp(x).cumsum(0)))


class Flattened(nn.Module):
    """Linear layers on all vectors at once, row by row (as windows are) or time by time."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.time_first = time_first
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.time_first else x
        h = torch.tanh(self.inp(x.reshape(-1, 4))).view(*x.shape[:2], 8)
        return self.out(h.mean(0 if self.time_first else 1))


class Positions(nn.Module):
    """An adapted layer reads positions that all rows share."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.pos, self.inp, self.out = nn.Linear(2, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("p", torch.randn(1, 64, 2) if batched else torch.randn(64, 2))

    def forward(self, x: Tensor) -> Tensor:
        p = self.p[..., : x.shape[1], :]
        return self.out(torch.tanh(self.inp(x) + self.pos(p)).mean(1))


class Experts(nn.Module):
    """Each expert sees the tokens that are routed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        y = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            mine = (h[..., 0] > 0) == bool(i)
            y[mine] = expert(h[mine])
        return self.out(torch.tanh(y).mean(1))


class ByKeyword(nn.Module):
    """Calls its linear layers with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(input=torch.tanh(self.inp(input=x)).mean(1))


class Sorted(nn.Module):
    """Reorders its rows inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        order = x.sum((1, 2)).argsort()
        h = torch.tanh(self.inp(x[order]))[order.argsort()]
        return {"logits": self.out(h.mean(1)), "mean": h.mean()}


def deberta(version: int):
    sizes = {**tiny_models.SIZES, "num_hidden_layers": 2, "num_labels": 3, "initializer_range": 0.3}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options = {"relative_attention": True, "position_biased_input": False}
    options["pos_att_type"] = ["p2c", "c2p"]
    if version == 1:
        config = transformers.DebertaConfig(**sizes, **options)
        return transformers.DebertaForSequenceClassification(config)
    config = transformers.DebertaV2Config(
        **sizes, **options, share_att_key=True, norm_rel_ebd="layer_norm", position_buckets=16
    )
    return transformers.DebertaV2ForSequenceClassification(config)


MIXABLE = {
    "rows first": lambda: Encoder(False),
    "time first": lambda: Encoder(True),
    "time first throughout": TimeFirst,
    "flattened by row": lambda: Flattened(False),
    "called by keyword": ByKeyword,
    "deberta": lambda: deberta(1),
    "deberta v3": lambda: deberta(3),
}
SEPARATE = {
    "flattened by time": lambda: Flattened(True),
    "shared positions": lambda: Positions(False),
    "shared positions in a batch of one": lambda: Positions(True),
    "experts": Experts,
    "sorted rows": Sorted,
}


def built(build) -> nn.Module:
    torch.manual_seed(0)
    return build().double().eval()


def bank_of(model: nn.Module, **lora) -> AdapterBank:
    bank = AdapterBank(model, ["a", "b", "c"], lora={"r": 2, "lora_alpha": 4, **lora}).double()
    with torch.no_grad():
        for p in bank.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return bank


def call(model: nn.Module, x: Tensor) -> Tensor:
    """(n, …) output for rows x (n, L, 4)."""
    if hasattr(model, "config"):
        output = model(input_ids=x[..., 0].abs().mul(7).long() % 20 + 3)
        return output.logits
    if isinstance(model, TimeFirst):
        return model(x.transpose(0, 1)).transpose(0, 1)
    output = model(x)
    return output["logits"] if isinstance(output, dict) else output


def check(model: nn.Module, bank: AdapterBank, x: Tensor, slots: list[int]) -> None:
    """Outputs and gradients of a mixed batch are those of each task alone."""

    def grads() -> dict[str, Tensor]:
        parameters = {**dict(model.named_parameters()), **dict(bank.named_parameters())}
        return {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}

    with bank.attached():
        model.zero_grad()
        bank.zero_grad()
        with route(slots):
            mixed = call(model, x)
        weights = torch.randn_like(mixed)
        (mixed * weights).sum().backward()
        together = grads()
        model.zero_grad()
        bank.zero_grad()
        for slot in set(slots):
            index = [i for i, s in enumerate(slots) if s == slot]
            with route([slot] * len(index)):
                alone = call(model, x[index])
            torch.testing.assert_close(mixed[index], alone, rtol=1e-9, atol=1e-12)
            (alone * weights[index]).sum().backward()
        for name, grad in grads().items():
            torch.testing.assert_close(together[name], grad, rtol=1e-8, atol=1e-11)


# Numbers of rows and positions that are the same or divide one another are among these.
BATCHES = [([0, 1], 6), ([0, 1, 0, 2, 1, 1], 6), ([2, 0, 1], 6), ([0, 0, 1, 1], 4), ([1, 0], 1)]


@pytest.mark.parametrize("first", range(len(BATCHES)))
@pytest.mark.parametrize("name", [*MIXABLE, *SEPARATE])
def test_a_mixed_batch_gives_each_task_what_it_gets_alone(name, first):
    model = built((MIXABLE | SEPARATE)[name])
    bank = bank_of(model)
    if isinstance(model, TimeFirst) and len(BATCHES[first][0]) == BATCHES[first][1]:
        pytest.skip("rows are taken to be the first dimension where the call leaves it open")
    for slots, length in (BATCHES[first], *BATCHES):
        check(model, bank, torch.randn(len(slots), length, 4, dtype=torch.float64), slots)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [*MIXABLE, *SEPARATE])
def test_only_a_model_that_mixes_rows_is_called_for_each_task(name, dtype, caplog):
    model = built((MIXABLE | SEPARATE)[name]).to(dtype)
    bank = bank_of(model)
    calls = []
    x = torch.randn(4, LENGTH, 4, dtype=dtype)
    with torch.no_grad(), bank.attached(), route([0, 1, 2, 0]), caplog.at_level(logging.WARNING):
        call(model, x)
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        call(model, x)
        call(model, x)
    separate = name in SEPARATE
    assert len(calls) == (2 * 4 if separate else 2)  # the call itself, and one for each of 3 tasks
    assert caplog.text.count("for each task of a batch on its own") == separate


class Deep(nn.Module):
    """Amplifies rounding, as deep language models do."""

    def __init__(self, depth: int = 30, *, mixes: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        self.mixes = mixes

    def forward(self, x: Tensor) -> Tensor:
        h = x.repeat(1, 1, 16)
        for layer in self.layers:
            h = nn.functional.layer_norm(h + torch.tanh(layer(h)), (64,))
        return h - h.mean(0) if self.mixes else h


class Leaks(nn.Module):
    """Adds a little of the mean of all rows to each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = x.repeat(1, 1, 16)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h + 0.15 * h.mean(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_mixes_rows_a_little_is_noticed_in_any_precision(dtype):
    torch.manual_seed(0)
    model = Leaks().to(dtype).eval()
    bank = AdapterBank(model, ["a", "b", "c"], lora={"r": 2})
    with torch.no_grad(), bank.attached(), route([0, 1, 2, 0]):
        call(model, torch.randn(4, LENGTH, 4, dtype=dtype))
    assert bank.settle() is not None


@pytest.mark.parametrize("mixes", [False, True])
def test_rounding_to_half_precision_is_not_taken_for_mixing(mixes):
    torch.manual_seed(0)
    model = Deep(mixes=mixes).bfloat16().eval()
    bank = AdapterBank(model, ["a", "b", "c"], lora={"r": 2})
    with torch.no_grad(), bank.attached(), route([0, 1, 2, 0]):
        call(model, torch.randn(4, LENGTH, 4, dtype=torch.bfloat16))
    assert (bank.settle() is not None) == mixes


def test_a_model_that_sorts_rows_is_not_trusted_for_a_batch_that_is_sorted_already():
    model = built(Sorted)
    bank = bank_of(model)
    x = torch.randn(8, LENGTH, 4, dtype=torch.float64)
    x = x[x.sum((1, 2)).argsort()]
    check(model, bank, x, [0, 1, 0, 2, 1, 1, 2, 0])
    check(model, bank, x.flip(0), [0, 1, 0, 2, 1, 1, 2, 0])


@pytest.mark.parametrize("sparse", [None, 0.5])
@pytest.mark.parametrize("build", [lambda: Encoder(True), lambda: Positions(False)])
def test_heads_and_sparse_changes_find_their_rows_too(build, sparse):
    model = built(build)
    bank = AdapterBank(model, ["a", "b", "c"], lora={"r": 2}, sparse=sparse, heads=["out"]).double()
    with torch.no_grad():
        for p in bank.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    for slots, length in BATCHES:
        check(model, bank, torch.randn(len(slots), length, 4, dtype=torch.float64), slots)


def test_checking_a_model_changes_neither_adapters_nor_random_numbers():
    model = built(lambda: Encoder(False)).train()
    bank = bank_of(model)
    before = [p.clone() for p in bank.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with bank.attached(), route([0, 1]):
        model(torch.randn(2, LENGTH, 4, dtype=torch.float64, generator=torch.Generator()))
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert all(torch.equal(p, q) for p, q in zip(bank.parameters(), before, strict=True))


def test_part_of_a_model_called_in_a_mixed_batch_is_refused():
    model = built(lambda: Encoder(False))
    x = torch.randn(2, LENGTH, 4, dtype=torch.float64)
    bank = bank_of(model)
    with bank.attached(), route([0, 1]), pytest.raises(UserError, match="call the model itself"):
        model.inp(x)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scored(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y.softmax(-1), y


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.doubled, self.out = Scored(4, 8), Doubled(8, 8), nn.Linear(8, 3)
        self.read = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.doubled(self.router(x)[0])
        return self.out(F.linear(h, self.read.weight))


def test_a_linear_layer_with_a_forward_of_its_own_keeps_it():
    model = built(Routed)
    bank = bank_of(model, target_modules=["doubled"])
    x = torch.randn(3, 4, dtype=torch.float64)
    a, b = bank.factors("doubled", 1)
    h = model.router(x)[0]
    expected = model.out(F.linear(model.doubled(h) + 2 * h @ a.T @ b.T, model.read.weight))
    with bank.attached(), route([1, 1, 1]):
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("heads", [[], ["out"]])
def test_a_layer_keeps_a_forward_of_the_instance(heads):
    """As accelerate sets it, to move a layer's input."""
    model = built(lambda: Encoder(False))
    bank = AdapterBank(model, ["a", "b", "c"], lora={"r": 2}, heads=heads).double()
    own = nn.Linear.forward.__get__(model.out)
    model.out.forward = lambda x: 2 * own(x)
    check(model, bank, torch.randn(4, LENGTH, 4, dtype=torch.float64), [0, 2, 1, 0])
    x = torch.randn(2, LENGTH, 4, dtype=torch.float64)
    with bank.attached(), route(None):
        doubled = model(x)
    assert model(x).equal(doubled)
    del model.out.forward
    torch.testing.assert_close(doubled, 2 * model(x))


def test_a_model_with_an_adapter_of_peft_is_refused():
    config = peft.LoraConfig(r=2, target_modules=["inp"])
    with pytest.raises(UserError, match="carries an adapter of PEFT already"):
        AdapterBank(peft.get_peft_model(built(lambda: Encoder(False)), config), ["a"])


def test_a_router_that_returns_a_tuple_is_left_out_unless_it_is_named():
    model = built(Routed)
    assert "router" not in AdapterBank(model, ["a"], lora={"r": 2}).layer_names
    with pytest.raises(UserError, match="router cannot carry an adapter: Scored does not return"):
        AdapterBank(model, ["a"], lora={"r": 2, "target_modules": ["router"]})


def test_a_layer_whose_weight_is_read_but_which_is_not_called_is_refused():
    model = built(Routed)
    bank = bank_of(model)
    with bank.attached(), route([0, 0]), pytest.raises(UserError, match="read cannot carry an ad"):
        model(torch.randn(2, 4, dtype=torch.float64))


def test_the_output_layer_of_torchs_attention_is_left_out_unless_it_is_named():
    model = built(lambda: Encoder(False))
    names = AdapterBank(model, ["a"], lora={"r": 2}).layer_names
    assert names == ["inp", "out", "encoder.linear1", "encoder.linear2"]
    with pytest.raises(UserError, match="out_proj cannot carry an adapter"):
        AdapterBank(model, ["a"], lora={"r": 2, "target_modules": ["out_proj"]})


def test_a_model_of_transformers_leaves_out_what_it_reads_without_calling(monkeypatch):
    build = tiny_models.llama
    model = build()
    layer = model.model.layers[0].mlp

    def forward(x: Tensor) -> Tensor:
        gate = F.linear(x, layer.gate_proj.weight)
        return layer.down_proj(layer.act_fn(gate) * layer.up_proj(x))

    monkeypatch.setattr(layer, "forward", forward)
    names = AdapterBank(model, ["a"], lora={"r": 2}).layer_names
    assert "model.layers.0.mlp.up_proj" in names
    assert "model.layers.0.mlp.gate_proj" not in names


@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.bert])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_transformers_recomputes_is_on_the_route_of_its_forward(build, reentrant):
    model = (
        build(attention_dropout=0.0)
        if build is tiny_models.llama
        else build(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    model.double().train()
    bank = bank_of(model)
    ids = torch.randint(4, 20, (3, LENGTH))

    def grads() -> list[Tensor | None]:
        bank.zero_grad()
        with bank.attached():
            with route([0, 2, 0]):
                output = model(input_ids=ids)[0]
            output.square().sum().backward()
        return [None if p.grad is None else p.grad.clone() for p in bank.parameters()]

    expected = grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for grad, reference in zip(grads(), expected, strict=True):
        torch.testing.assert_close(grad, reference)


def test_a_call_that_is_recomputed_outside_its_route_is_refused():
    model = built(lambda: Encoder(False))
    bank = bank_of(model)
    x = torch.randn(2, LENGTH, 4, dtype=torch.float64, requires_grad=True)
    with bank.attached():
        with route([0, 1]):
            output = checkpoint(model, x, use_reentrant=False)
        with pytest.raises(UserError, match="called outside route"):
            output.sum().backward()


def test_another_thread_has_no_route_and_may_have_one_of_its_own():
    model = built(lambda: Encoder(False))
    bank = bank_of(model)
    x = torch.randn(2, LENGTH, 4, dtype=torch.float64)
    results = {}

    def without() -> None:
        try:
            model(x)
        except UserError as error:
            results["without"] = str(error)

    def with_route(slots: list[int]) -> None:
        with torch.no_grad(), route(slots):
            results[tuple(slots)] = [model(x) for _ in range(20)]

    with torch.no_grad(), bank.attached(), route([0, 0]):
        work = [threading.Thread(target=without)]
        work += [threading.Thread(target=with_route, args=([i, j],)) for i, j in ((1, 1), (1, 2))]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        for slots in ((1, 1), (1, 2)):
            with route(slots):
                expected = model(x)
            assert all(torch.equal(y, expected) for y in results[slots])
    assert "outside route" in results["without"]


def test_a_decoder_whose_output_is_not_zero_at_padding_shares_its_calls(caplog, monkeypatch):
    """Where padding is removed, its last norm still has a bias."""
    monkeypatch.setattr(mixing, "_WARNED", set())
    model = tiny_models.gpt2()
    torch.nn.init.normal_(model.transformer.ln_f.bias)
    bank = AdapterBank(model, ["a", "b"], lora={"r": 2})
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_()
    mask = torch.tensor([[1] * 9, [1] * 2 + [0] * 7, [1] * 3 + [0] * 6, [1] * 4 + [0] * 5])
    ids = torch.randint(3, tiny_models.VOCABULARY, (4, 9)) * mask
    with packed(model), bank.attached(), route([0, 1, 0, 1]):
        model(input_ids=ids, attention_mask=mask)
    assert not caplog.records
