"""`FrozenPrefix`: the same numbers as the whole model, from the lowest moving block on."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import tiny_models
from foretune.models import frozen_prefix as fp
from foretune.models.reading import metered_reading
from foretune.models.surgery import block_list, freeze_lower

BUILDERS = {
    "bert": tiny_models.bert,
    "bert classifier": lambda: tiny_models.bert(num_labels=3),
    "roberta": tiny_models.roberta,
    "roberta classifier": lambda: tiny_models.roberta(num_labels=3),
    "gpt2": tiny_models.gpt2,
    "gpt2 classifier": lambda: tiny_models.gpt2(num_labels=3),
    "llama": tiny_models.llama,
    "qwen2": tiny_models.qwen2,
}


def ragged(lengths=(3, 9, 20, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        ids[i, :n] = torch.randint(4, tiny_models.VOCABULARY, (n,), generator=generator)
        mask[i, :n] = 1
    return {"input_ids": ids, "attention_mask": mask}


def run(model, batch):
    """(outputs at real positions, gradients of what trains)."""
    output = model(**batch)
    values = output.logits if "logits" in output else output.last_hidden_state
    if values.dim() == 3:
        values = values[batch["attention_mask"] > 0]
    model.zero_grad()
    values.square().mean().backward()
    return values.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def lower_calls(model):
    """A list that grows with each call of the real attention of block 0."""
    calls = []
    attention = next(m for n, m in block_list(model)[1][0].named_children() if "att" in n)
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", BUILDERS)
def test_outputs_and_gradients_equal_those_of_the_whole_model(name):
    model = BUILDERS[name]()
    freeze_lower(model, 2)
    plain, plain_gradients = run(model, ragged())
    with fp.FrozenPrefix(model, fp.first_moving_block(model, [])) as prefix:
        run(model, ragged())
        states, gradients = run(model, ragged())
    assert prefix.obstacle is None
    torch.testing.assert_close(states, plain, atol=1e-6, rtol=1e-6)
    assert gradients.keys() == plain_gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[key], atol=1e-6, rtol=1e-5)


def test_lower_blocks_do_not_run_again_for_known_rows():
    model = tiny_models.bert()
    freeze_lower(model, 1)
    with fp.FrozenPrefix(model, 3):
        model(**ragged())
        calls = lower_calls(model)
        model(**ragged())
        assert not calls
        model(**ragged(lengths=(3, 9, 20, 2)))
        assert len(calls) == 1


def test_what_is_read_is_counted_and_timed():
    model = tiny_models.bert()
    freeze_lower(model, 1)
    with fp.FrozenPrefix(model, 3), metered_reading() as reading:
        for asked in (4, 8):
            model(**ragged(seed=7))
            assert reading.asked == asked
        computed, seconds = reading.computed, reading.seconds
        assert computed >= 4 and seconds > 0
        with metered_reading() as inner:
            model(**ragged(seed=7))
        assert (inner.asked, inner.computed, inner.seconds) == (4, 0, 0.0)
        assert (reading.computed, reading.seconds) == (computed, seconds)
    assert reading.seconds_per_text() == seconds / computed
    model(**ragged(seed=7))
    assert reading.asked == 8


def test_only_the_head_moves_means_no_block_runs():
    model = tiny_models.roberta(num_labels=3)
    freeze_lower(model, 0)
    assert fp.first_moving_block(model, []) == 4
    plain = model(**ragged()).logits
    with fp.FrozenPrefix(model, 4):
        logits = model(**ragged()).logits
    torch.testing.assert_close(logits, plain, atol=1e-6, rtol=1e-6)


def test_states_do_not_depend_on_the_rows_that_were_missing_with_them():
    model = tiny_models.bert(hidden_size=64, intermediate_size=128)
    model.requires_grad_(False)
    alone, together = fp.PrefixCache(), fp.PrefixCache()
    batch = ragged(lengths=(12, 13, 20, 5, 16, 9))
    with fp.FrozenPrefix(model, 3, together):
        model(**batch)
    with fp.FrozenPrefix(model, 3, alone):
        known = len(alone)  # the dummy rows that the prefix is tried on
        for i in range(6):
            model(**{k: v[i : i + 1] for k, v in batch.items()})
    assert len(alone) == len(together) == known + 6
    for key, states in together._states.items():
        assert torch.equal(alone.get(key), states)


def test_missing_rows_are_computed_in_batches_whose_shape_a_row_alone_decides():
    model = tiny_models.bert(max_position_embeddings=20)
    model.requires_grad_(False)
    shapes = []
    model.encoder.layer[0].attention.register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape[:2]))
    )
    with fp.FrozenPrefix(model, 2, fp.PrefixCache()):
        shapes.clear()
        model(**ragged(lengths=(3, 9, 20, 1, *[5] * 17)))
    assert shapes == [(8, 8), (8, 8), (8, 8), (4, 16), (3, 20)]


def test_a_row_is_known_whatever_it_is_padded_to():
    model = tiny_models.bert()
    model.requires_grad_(False)
    cache = fp.PrefixCache()
    with fp.FrozenPrefix(model, 2, cache):
        known = len(cache)
        model(**ragged())
        model(**{k: v[:2, :9] for k, v in ragged().items()})
    assert len(cache) == known + 4


def test_dropout_of_the_frozen_part_is_off_in_training():
    model = tiny_models.bert(hidden_dropout_prob=0.5).train()
    model.requires_grad_(False)
    cache = fp.PrefixCache()
    with fp.FrozenPrefix(model, 2, cache):
        first, second = (model(**ragged()).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)  # the upper blocks still drop
    assert model.encoder.layer[0].training
    model.eval()
    states = model(**ragged(), output_hidden_states=True).hidden_states[2]
    longest = max(cache._states.values(), key=len)
    torch.testing.assert_close(longest, states[2], atol=1e-6, rtol=1e-6)


def test_patched_upper_linears_take_part():
    model = tiny_models.llama()
    model.requires_grad_(False)
    layer = model.model.layers[3].mlp.down_proj
    scale = nn.Parameter(torch.tensor(2.0))
    plain = layer.forward
    layer.forward = lambda x: plain(x) * scale
    assert fp.first_moving_block(model, ["model.layers.3.mlp.down_proj"]) == 3
    expected = model(**ragged()).logits[ragged()["attention_mask"] > 0]
    with fp.FrozenPrefix(model, 3):
        logits = model(**ragged()).logits[ragged()["attention_mask"] > 0]
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    logits.sum().backward()
    assert scale.grad is not None


def test_first_moving_block_follows_parameters_and_adapters():
    model = tiny_models.bert()
    assert fp.first_moving_block(model, []) == 0
    model.requires_grad_(False)
    assert fp.first_moving_block(model, []) == 4
    assert fp.first_moving_block(model, ["encoder.layer.2.output.dense"]) == 2
    assert fp.first_moving_block(model, ["embeddings.word_embeddings"]) == 0
    assert fp.first_moving_block(model, ["pooler.dense"]) == 4
    model.encoder.layer[1].output.dense.bias.requires_grad_(True)
    assert fp.first_moving_block(model, ["encoder.layer.2.output.dense"]) == 1
    assert fp.first_moving_block(tiny_models.t5(), []) is None
    assert fp.first_moving_block(tiny_models.plain(), []) is None


def test_tied_embeddings_that_train_leave_no_prefix():
    model = tiny_models.gpt2()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    assert fp.first_moving_block(model, []) == 0


def test_equal_bottoms_share_a_cache_and_unequal_ones_do_not():
    def cache_of(model, first_block):
        with fp.FrozenPrefix(model.requires_grad_(False), first_block) as prefix:
            return prefix.cache

    model, second = tiny_models.bert(), tiny_models.bert()
    with torch.no_grad():
        second.encoder.layer[3].output.dense.weight.add_(1)
    assert cache_of(model, 2) is cache_of(second, 2)
    assert cache_of(model, 3) is not cache_of(model, 2)
    with torch.no_grad():
        second.encoder.layer[1].output.dense.weight.add_(1)
    assert cache_of(model, 2) is not cache_of(second, 2)


def test_beyond_the_budget_states_are_computed_but_not_kept():
    model = tiny_models.bert()
    model.requires_grad_(False)
    plain = model(**ragged()).last_hidden_state[2]
    cache = fp.PrefixCache(max_bytes=16 * 4 * 10)
    with fp.FrozenPrefix(model, 2, cache):
        states = model(**ragged()).last_hidden_state[2]
    assert 0 < cache.num_bytes <= cache.max_bytes
    torch.testing.assert_close(states, plain, atol=1e-6, rtol=1e-6)


def test_segment_ids_are_part_of_what_a_row_is():
    model = tiny_models.bert()
    model.requires_grad_(False)
    types = torch.ones_like(ragged()["input_ids"])
    plain = model(**ragged(), token_type_ids=types).last_hidden_state[2]
    with fp.FrozenPrefix(model, 2):
        model(**ragged())
        model(**ragged(), token_type_ids=types * 0)
        states = model(**ragged(), token_type_ids=types).last_hidden_state[2]
    torch.testing.assert_close(states, plain, atol=1e-6, rtol=1e-6)


def test_left_padding_is_left_to_the_whole_model():
    model = tiny_models.bert()
    batch = {k: v.flip(1) for k, v in ragged().items()}
    plain = model(**batch).last_hidden_state
    model.requires_grad_(False)
    cache = fp.PrefixCache()
    with fp.FrozenPrefix(model, 2, cache):
        known = len(cache)
        assert torch.equal(model(**batch).last_hidden_state, plain)
    assert len(cache) == known


class Repeating(nn.Module):
    """Runs its only block twice, as ALBERT does: what the block returns is not the whole bottom."""

    config = transformers.PretrainedConfig(vocab_size=tiny_models.VOCABULARY)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(tiny_models.VOCABULARY, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        return self.head(self.blocks[0](self.blocks[0](self.embed(input_ids))))


def test_a_model_that_the_short_cut_does_not_fit_runs_whole():
    torch.manual_seed(0)
    model = Repeating().requires_grad_(False)
    plain = model(**ragged())
    with fp.FrozenPrefix(model, 1) as prefix:
        assert torch.equal(model(**ragged()), plain)
    assert prefix.obstacle is not None


def test_states_first_asked_for_in_inference_mode_serve_training():
    model = tiny_models.bert()
    freeze_lower(model, 2)
    with fp.FrozenPrefix(model, 2):
        with torch.inference_mode():
            model(**ragged())
        run(model, ragged())


def test_removing_leaves_no_trace():
    model = tiny_models.bert().requires_grad_(False)
    with fp.FrozenPrefix(model, 2):
        assert "forward" in vars(model.encoder.layer[0])
    assert "forward" not in vars(model.encoder.layer[0])
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_an_inner_prefix_leaves_the_work_to_the_outer_one():
    model = tiny_models.bert()
    model.requires_grad_(False)
    plain = model(**ragged()).last_hidden_state[2]
    with fp.FrozenPrefix(model, 2), fp.FrozenPrefix(model, 3):
        states = model(**ragged()).last_hidden_state[2]
    torch.testing.assert_close(states, plain, atol=1e-6, rtol=1e-6)
    with fp.FrozenPrefix(model, 2), pytest.raises(RuntimeError, match="block 1 moves"):
        fp.FrozenPrefix(model, 1).install()
