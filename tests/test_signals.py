"""Signals: what may be asked, specs of configs, and language-model heads as functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertConfig,
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    Qwen3Config,
)

from llm_distill.attention import Heads
from llm_distill.losses.sparse import Counts, TopK
from llm_distill.rows import valid_rows
from llm_distill.signals import Dense, Factored, Head, ModelSpec, Request, Signals


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def test_requests_unite() -> None:
    one = Request(hidden=frozenset({1, 3}), heads=frozenset({2}))
    both = one | Request(logits=True, hidden=frozenset({3, 4}))
    assert both == Request(logits=True, hidden=frozenset({1, 3, 4}), heads=frozenset({2}))
    assert one | Request() == one


def test_relations_read_the_attention_of_their_blocks() -> None:
    one = Request(relations=frozenset({2}))
    assert one.heads == {2}
    assert one.top == 2
    both = one | Request(heads=frozenset({3}))
    assert both.heads == {2, 3}
    assert both.relations == {2}


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
    assert ModelSpec.of(config, "tiny") == ModelSpec(
        "tiny", "llama", 3, 32, 4, 99, 17, kv_heads=2, head_dim=8, value_dim=8
    )


def test_the_spec_of_configs_with_names_of_their_own() -> None:
    gpt2 = GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=50, n_positions=40)
    assert ModelSpec.of(gpt2, "g") == ModelSpec(
        "g", "gpt2", 2, 24, 3, 50, 40, kv_heads=3, head_dim=8, value_dim=8
    )
    bert = BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, vocab_size=50)
    assert ModelSpec.of(bert, "b") == ModelSpec(
        "b", "bert", 2, 24, 3, 50, 512, kv_heads=3, head_dim=8, value_dim=8, masked=True
    )


def test_head_shapes_of_a_config() -> None:
    qwen = Qwen3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=50
    )
    spec = ModelSpec.of(qwen, "q")
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.value_dim) == (4, 2, 16, 16)
    latent = DeepseekV3Config(qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
    spec = ModelSpec.of(latent, "d")
    assert (spec.head_dim, spec.value_dim) == (12, 6)
    nothing = ModelSpec.of(MambaConfig(num_hidden_layers=1, hidden_size=8), "m")
    assert (nothing.heads, nothing.kv_heads, nothing.head_dim) == (0, 0, 0)


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
    block = Heads(random(1, 2, 3, 4), random(1, 2, 3, 4), None, 0.5)
    attention, dense = block, Dense(random(6, 9))
    signals = Signals("student", distribution=dense, attention={4: attention})
    assert signals.logits is dense
    assert signals.heads(4) is attention
