"""What configs tell of attention."""

from transformers import BloomConfig, LlamaConfig, MambaConfig, Qwen3Config

from llm_distill.shapes import attends_by, head_shapes


def test_heads_and_their_widths() -> None:
    grouped = Qwen3Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    assert head_shapes(grouped) == (4, 2, 16, 16)
    plain = LlamaConfig(hidden_size=32, num_attention_heads=4)
    assert head_shapes(plain) == (4, 4, 8, 8)
    assert head_shapes(MambaConfig()) == (0, 0, 0, 0)


def test_who_calls_attention_through_the_interface() -> None:
    assert attends_by(LlamaConfig())
    assert not attends_by(BloomConfig())
