"""Signals: what may be asked, heads as functions, and attention maps against naive loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, Gemma3Config, GPT2Config, LlamaConfig

from llm_distill.losses.sparse import Counts, TopK
from llm_distill.rows import Queries, sample_queries, valid_rows
from llm_distill.signals import Dense, Factored, Head, Heads, ModelSpec, Request, Signals
from tests import reference


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def test_requests_unite() -> None:
    one = Request(hidden=frozenset({1, 3}), heads=frozenset({2}))
    both = one | Request(logits=True, hidden=frozenset({3, 4}))
    assert both == Request(logits=True, hidden=frozenset({1, 3, 4}), heads=frozenset({2}))
    assert one | Request() == one


def test_the_top_of_a_request() -> None:
    assert Request().top == Request(logits=True).top == 0
    assert Request(hidden=frozenset({1, 3}), heads=frozenset({5})).top == 5


def test_the_spec_of_a_config() -> None:
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=17,
    )
    assert ModelSpec.of(config, "tiny") == ModelSpec("tiny", "llama", 3, 32, 4, 99, 17)


def test_the_spec_of_configs_with_names_of_their_own() -> None:
    gpt2 = GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=50, n_positions=40)
    assert ModelSpec.of(gpt2, "g") == ModelSpec("g", "gpt2", 2, 24, 3, 50, 40)
    bert = BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, vocab_size=50)
    assert ModelSpec.of(bert, "b") == ModelSpec("b", "bert", 2, 24, 3, 50, 512)


def test_the_spec_of_a_composite_config_is_its_text_part() -> None:
    config = Gemma3Config(text_config={"hidden_size": 48, "num_hidden_layers": 5})
    spec = ModelSpec.of(config, "tiny")
    assert (spec.kind, spec.width, spec.depth) == ("gemma3_text", 48, 5)


def test_a_head_is_its_formula() -> None:
    hidden, weight, bias = random(6, 4), random(9, 4, seed=1), random(9, seed=2)
    plain = F.linear(hidden, weight, bias)
    torch.testing.assert_close(Head(weight, bias).logits(hidden), plain)
    capped = Head(weight, bias, scale=0.25, softcap=2.0)
    torch.testing.assert_close(capped.logits(hidden), 2 * torch.tanh(0.25 * plain / 2))
    turned = Head(weight, transform=torch.tanh)
    torch.testing.assert_close(turned.logits(hidden), torch.tanh(hidden) @ weight.T)
    assert turned.features(hidden).equal(torch.tanh(hidden))
    assert Head(weight).features(hidden) is hidden


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_heads_are_fp32(dtype: torch.dtype) -> None:
    head = Head(random(9, 4, seed=1, dtype=dtype), scale=0.5, softcap=3.0)
    logits = head.logits(random(6, 4, dtype=torch.float32))
    assert logits.dtype == torch.float32
    assert head.finish(torch.full((1, 1), 100.0, dtype=dtype)).item() == pytest.approx(3.0)


def test_factored_and_dense_logits_agree() -> None:
    hidden, head = random(6, 4), Head(random(9, 4, seed=1), softcap=5.0)
    factored, dense = Factored(hidden, head), Dense(head.logits(hidden))
    assert len(factored) == len(dense) == 6
    for rows in (slice(0, 6), slice(2, 4), slice(4, 99), slice(0, 0)):
        torch.testing.assert_close(factored.logits(rows), dense.logits(rows))
    assert Dense(random(6, 9, dtype=torch.bfloat16)).logits(slice(2)).dtype == torch.float32


def test_a_projection_is_the_same_head_for_the_pass() -> None:
    """Transform, bias, scale and soft cap included."""
    head = Head(random(11, 4, seed=1), random(11, seed=2), 0.5, 3.0, transform=torch.tanh)
    rows = random(6, 4)
    given = Factored(rows, head).projection()
    product = given.product(slice(1, 4), torch.empty(3, 11, dtype=torch.float64))
    expected = Factored(rows, head).logits(slice(1, 4))
    assert torch.allclose(given.finish(product), expected, rtol=1e-12)
    assert (len(given), given.vocabulary) == (6, 11)


@pytest.mark.parametrize("kind", ["TopK", "Counts"])
def test_sparse_targets_are_not_whole(kind: str) -> None:
    logits = random(3, 7)
    sparse: TopK | Counts = TopK.of(logits, 2)
    if kind == "Counts":
        sparse = Counts(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), 1)
    said = Signals("teacher X", sparse)
    assert said.logits is sparse
    with pytest.raises(LookupError, match=f"teacher X gives {kind} targets, and whole logits are"):
        _ = said.whole
    assert Signals("teacher X", Dense(logits)).whole.logits(slice(None)) is not None


def test_hidden_states_are_read_at_the_rows() -> None:
    states, mask = random(2, 5, 3), torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    signals = Signals("teacher tiny", states={2: states})
    rows = valid_rows(torch.zeros(2, 5, dtype=torch.long), mask)
    assert torch.equal(signals.hidden(2, rows), torch.cat([states[0, :2], states[1, 2:]]))
    assert signals.hidden(2, rows.first(0)).shape == (0, 3)


def test_what_was_not_asked_for_raises() -> None:
    signals = Signals("teacher tiny", states={2: random(1, 1, 3), 1: random(1, 1, 3)})
    rows = valid_rows(torch.zeros(1, 1, dtype=torch.long), None)
    with pytest.raises(LookupError, match=r"teacher tiny was not asked for logits.*logits=True"):
        _ = signals.logits
    with pytest.raises(LookupError, match=r"not asked for hidden state 3; it has \[1, 2\]"):
        signals.hidden(3, rows)
    with pytest.raises(LookupError, match=r"not asked for the heads of block 1; it has \[\]"):
        signals.heads(1)


def test_what_was_asked_for_is_there() -> None:
    attention, dense = heads()[0], Dense(random(6, 9))
    signals = Signals("student", distribution=dense, attention={4: attention})
    assert signals.logits is dense
    assert signals.heads(4) is attention


B, H, KV, T, WIDTH = 3, 4, 2, 7, 5
LENGTHS = (7, 4, 5)


def queries(most: int | None = None) -> Queries:
    """Real positions of sequences of LENGTHS, padded on the right."""
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    rows = valid_rows(torch.arange(B * T).view(B, T), mask)
    return sample_queries(rows, range(B), most=most, seed=0, epoch=0)


def heads(
    *, most: int | None = None, softcap: float | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Heads, Tensor, Queries]:
    """Heads at sampled positions, where keys are visible `[B, R, T]`, and those positions."""
    asked = queries(most)
    real = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    visible = real[:, None, :] & (torch.arange(T) <= asked.position[:, :, None])
    every = random(B, H, T, WIDTH, dtype=dtype)
    place = asked.position[:, None, :, None].expand(-1, H, -1, WIDTH)
    attention = Heads(
        query=every.gather(2, place),
        key=random(B, KV, T, WIDTH, seed=1, dtype=dtype),
        mask=visible[:, None],
        scaling=WIDTH**-0.5,
        softcap=softcap,
    )
    return attention, visible, asked


def naive(attention: Heads, bias: Tensor, asked: Queries) -> Tensor:
    """The maps of all queries that count, `[n, H, T]`, sequence by sequence."""
    found = []
    for number, count in enumerate(asked.per_sequence):
        maps = reference.attention(
            attention.query[number].double().numpy(),
            attention.key[number].double().numpy(),
            bias[number].double().numpy(),
            attention.scaling,
            attention.softcap,
        )
        found.append(maps[:count])
    return torch.from_numpy(np.concatenate(found))


def bias_of(visible: Tensor) -> Tensor:
    """0 at visible keys, -inf elsewhere: `[B, H, R, T]`."""
    return torch.where(visible, 0.0, -math.inf)[:, None].expand(-1, H, -1, -1)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("most", [None, 3])
def test_maps_match_the_reference(most: int | None, softcap: float | None) -> None:
    attention, visible, asked = heads(most=most, softcap=softcap)
    maps = attention.maps(asked)
    torch.testing.assert_close(maps, naive(attention, bias_of(visible), asked))
    torch.testing.assert_close(maps.sum(-1), torch.ones(len(asked), H, dtype=torch.float64))
    unseen = ~visible.flatten(0, 1)[asked.flat]
    assert maps.transpose(0, 1)[:, unseen].abs().max() == 0


def test_maps_without_a_mask_see_everything() -> None:
    attention, visible, asked = heads()
    bare = replace(attention, mask=None)
    expected = naive(bare, bias_of(torch.ones_like(visible)), asked)
    torch.testing.assert_close(bare.maps(asked), expected)


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min, -65504.0])
def test_an_additive_mask_is_a_boolean_one(hidden: float) -> None:
    attention, visible, asked = heads()
    additive = torch.where(visible, 0.0, hidden)[:, None]
    maps = replace(attention, mask=additive).maps(asked)
    assert torch.equal(maps, attention.maps(asked))


def test_biases_of_an_additive_mask_count() -> None:
    attention, visible, asked = heads()
    bias = random(B, H, asked.position.shape[1], T, seed=2) + bias_of(visible)
    biased = replace(attention, mask=bias)
    torch.testing.assert_close(biased.maps(asked), naive(attention, bias, asked))


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_maps_of_a_part_are_part_of_the_maps(columns: int) -> None:
    attention, _, asked = heads()
    whole = attention.maps(asked)
    width = asked.position.shape[1]
    total = torch.zeros(H, T, dtype=torch.float64)
    rows = 0
    for start in range(0, width, columns):
        part = slice(start, min(start + columns, width))
        maps = attention.maps(asked, part)
        inside = (asked.flat % width >= part.start) & (asked.flat % width < part.stop)
        torch.testing.assert_close(maps, whole[inside])
        total += maps.sum(0)
        rows += len(maps)
    assert rows == len(asked)
    torch.testing.assert_close(total, whole.sum(0))


@pytest.mark.parametrize("additive", [True, False])
def test_the_gradient_of_maps_is_right_and_finite(additive: bool) -> None:
    attention, visible, asked = heads(most=2)
    mask = torch.where(visible, 0.0, -math.inf)[:, None] if additive else visible[:, None]
    masked = replace(attention, mask=mask)

    def maps(query: Tensor, key: Tensor) -> Tensor:
        return replace(masked, query=query, key=key).maps(asked)

    inputs = attention.query.requires_grad_(), attention.key.requires_grad_()
    assert torch.autograd.gradcheck(maps, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_maps_are_computed_in_fp32(dtype: torch.dtype) -> None:
    attention, visible, asked = heads(dtype=dtype)
    maps = attention.maps(asked)
    assert maps.dtype == torch.float32
    expected = naive(attention, bias_of(visible), asked)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_is_finite() -> None:
    attention, visible, asked = heads()
    blind = replace(attention, mask=torch.zeros_like(visible)[:, None])
    torch.testing.assert_close(
        blind.maps(asked), torch.full((len(asked), H, T), 1 / T, dtype=torch.float64)
    )


def test_no_queries_give_no_maps_with_a_graph() -> None:
    attention, _, asked = heads()
    nothing = Queries(
        asked.position[:, :1], torch.zeros(B, 1).bool(), (0,) * B, torch.zeros(0).long()
    )
    query = attention.query[:, :, :1].requires_grad_()
    maps = replace(attention, query=query, mask=None).maps(nothing)
    assert maps.shape == (0, H, T)
    maps.sum().backward()
    assert query.grad is not None
    assert not query.grad.any()
