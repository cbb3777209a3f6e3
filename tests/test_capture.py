"""Signals equal what the model itself returns, on every family, padding and mode."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from llm_distill.capture import Reader, plain, predicts_next, refuse_layers
from llm_distill.collation import RowCollator
from llm_distill.language_head import head_of
from llm_distill.losses.divergences import forward_kl
from llm_distill.losses.fused import head_pass
from llm_distill.losses.rowwise import Nll, Tempered
from llm_distill.objectives import QueryPlan
from llm_distill.preparation import make_batch
from llm_distill.rows import Batch
from llm_distill.signals import Dense, Factored, ModelSpec, Request
from tests import tiny

FAMILIES = ["llama", "qwen3", "gpt2", "gemma2", "gemma3", "bert"]
CAUSAL = FAMILIES[:-1]


def build(family: str) -> Any:
    return tiny.bert() if family == "bert" else tiny.MODELS[family]()


def batch_of(model: Any, *, side: str = "right", queries: int | None = 6) -> Batch:
    collate = RowCollator(
        lambda examples: tiny.batch(side=side), shift=predicts_next(model), valid=True
    )
    return make_batch(collate([]), QueryPlan(queries, "valid"), seed=0, epoch=0)


def eager(model: Any) -> Any:
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def everything(model: Any) -> Request:
    depth = model.config.num_hidden_layers
    return Request(logits=True, hidden=frozenset({0, 1, depth}), heads=frozenset({1, depth}))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_signals_are_what_the_model_returns(family: str, side: str) -> None:
    model = build(family)
    twin = eager(model)
    batch = batch_of(model, side=side)
    signals = Reader(model, everything(model), family).read(batch)
    out = twin(**batch.inputs, output_hidden_states=True, output_attentions=True)

    rows = batch.supervised.index
    logits = out.logits.flatten(0, 1)[rows]
    assert torch.allclose(signals.whole.logits(slice(None)), logits, atol=2e-4)
    for layer in (0, 1, model.config.num_hidden_layers):
        expected = out.hidden_states[layer].flatten(0, 1)[rows]
        assert torch.allclose(signals.hidden(layer, batch.supervised), expected, atol=1e-4)
    assert batch.queries is not None
    for layer in (1, model.config.num_hidden_layers):
        maps = signals.heads(layer).maps(batch.queries)
        whole = out.attentions[layer - 1].transpose(1, 2)  # [B, T, H, T]
        place = batch.queries.position[:, :, None, None].expand(-1, -1, *whole.shape[2:])
        expected = whole.gather(1, place).flatten(0, 1)[batch.queries.flat]
        assert torch.allclose(maps, expected, atol=1e-5)
        assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_left_and_right_padding_agree(family: str) -> None:
    """The same sequences, padded on either side, give the same rows."""
    model = build(family)
    right, left = tiny.batch(side="right"), tiny.batch(side="right")
    for row, mask in enumerate(right["attention_mask"]):
        pads = int((mask == 0).sum())
        for key in left:
            left[key][row] = left[key][row].roll(pads)
    reader = Reader(model, everything(model), family)
    values = []
    for inputs in (right, left):
        collate = RowCollator(lambda _, inputs=inputs: dict(inputs), shift=True, valid=True)  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        batch = make_batch(collate([]), QueryPlan(4, "valid"), seed=0, epoch=0)
        signals = reader.read(batch)
        assert batch.valid is not None
        assert batch.queries is not None
        maps = signals.heads(1).maps(batch.queries)
        values.append(
            (
                signals.whole.logits(slice(None)),
                signals.hidden(1, batch.valid),
                maps.sort(-1).values[..., -4:],
            )
        )
    for a, b in zip(*values, strict=True):
        assert torch.allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_pads_change_nothing(family: str) -> None:
    """Other tokens under the padding mask change no signal of a real row."""
    model = build(family)
    reader = Reader(model, everything(model), family)
    batch = batch_of(model)
    before = reader.read(batch)
    ids = batch.inputs["input_ids"].clone()
    ids[batch.inputs["attention_mask"] == 0] = 77
    other = Batch({**batch.inputs, "input_ids": ids}, batch.supervised, batch.valid, batch.queries)
    after = reader.read(other)
    assert batch.queries is not None
    assert torch.equal(before.whole.logits(slice(None)), after.whole.logits(slice(None)))
    assert torch.equal(before.hidden(1, batch.supervised), after.hidden(1, batch.supervised))
    assert torch.equal(before.heads(1).maps(batch.queries), after.heads(1).maps(batch.queries))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_eager_attention(family: str, checkpointing: bool) -> None:
    """Gradients through logits, hidden states and maps, with and without recomputation."""
    model, twin = build(family), eager(build(family))
    batch = batch_of(model)
    depth = model.config.num_hidden_layers
    assert batch.queries is not None
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    reader = Reader(model, everything(model), family)
    signals = reader.read(batch)
    ours = signals.heads(1).maps(batch.queries).square().sum()
    ours = ours + signals.heads(depth).maps(batch.queries).square().sum()
    ours = ours + signals.hidden(1, batch.supervised).square().mean()
    ours = ours + signals.whole.logits(slice(None)).square().mean()
    ours.backward()
    reader.release()

    out = twin(**batch.inputs, output_hidden_states=True, output_attentions=True)
    theirs = torch.zeros(())
    for layer in (1, depth):
        whole = out.attentions[layer - 1].transpose(1, 2)
        place = batch.queries.position[:, :, None, None].expand(-1, -1, *whole.shape[2:])
        theirs = theirs + whole.gather(1, place).flatten(0, 1)[batch.queries.flat].square().sum()
    rows = batch.supervised.index
    theirs = theirs + out.hidden_states[1].flatten(0, 1)[rows].square().mean()
    theirs = theirs + out.logits.flatten(0, 1)[rows].square().mean()
    theirs.backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None, name
        else:
            assert a.grad is not None, name
            bound = 2e-4 * max(1.0, float(b.grad.abs().max()))
            assert torch.allclose(a.grad, b.grad, atol=bound), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_relations_keep_whole_vectors_of_their_blocks_alone(
    checkpointing: bool, teacher: Any
) -> None:
    """Gradients flow through all three, with and without recomputation."""
    if checkpointing:
        teacher.activation_checkpointing_enable({"use_reentrant": False})
        teacher.train()
    batch = batch_of(teacher)
    request = Request(heads=frozenset({1}), relations=frozenset({3}))
    reader = Reader(teacher, request, "teacher")
    signals = reader.read(batch)
    assert signals.heads(1).value is None
    assert signals.heads(1).whole_query is None
    block = signals.heads(3)
    assert block.whole_query is not None
    assert block.value is not None
    assert batch.queries is not None
    place = batch.queries.position[:, None, :, None].expand_as(block.query)
    assert torch.equal(block.whole_query.gather(2, place), block.query)
    total = torch.zeros(())
    for kind in ("query", "key", "value"):
        total = total + block.relation(kind, 2, batch.queries).maps(batch.queries).square().sum()
    total.backward()
    reader.release()
    own = teacher.model.layers[2].self_attn
    for projection in (own.q_proj, own.k_proj, own.v_proj):
        assert projection.weight.grad.any()
    assert teacher.model.layers[3].self_attn.q_proj.weight.grad is None


def test_only_asked_signals_are_kept(teacher: Any) -> None:
    reader = Reader(teacher, Request(hidden=frozenset({2})), "teacher")
    signals = reader.read(batch_of(teacher))
    assert sorted(signals.states) == [2]
    assert not signals.attention
    with pytest.raises(LookupError, match="was not asked for logits"):
        _ = signals.logits
    with pytest.raises(LookupError, match="not asked for hidden state 1; it has \\[2\\]"):
        signals.hidden(1, batch_of(teacher).supervised)


def test_a_hidden_state_that_does_not_come_is_refused_by_name(student: Any) -> None:
    """Never silently zero: a backbone that returns fewer states than its config promises."""
    student.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"odd \(LlamaForCausalLM\) gives no hidden state 3"):
        Reader(student, Request(hidden=frozenset({3})), "odd")


def test_no_cache_is_made(teacher: Any) -> None:
    asked: list[Any] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        asked.append((kwargs["use_cache"], output.past_key_values))

    reader = Reader(teacher, everything(teacher), "teacher")
    teacher.model.register_forward_hook(look, with_kwargs=True)
    assert teacher.config.use_cache
    reader.read(batch_of(teacher))
    assert asked == [(False, None)]


def test_soft_capped_heads_are_read() -> None:
    model = tiny.gemma3(softcap=3.0)
    batch = batch_of(model)
    logits = Reader(model, Request(logits=True), "gemma").read(batch).whole.logits(slice(None))
    assert logits.abs().max() < 3.0
    expected = model(**batch.inputs).logits.flatten(0, 1)[batch.supervised.index]
    assert torch.allclose(logits, expected, atol=1e-5)


def test_unknown_head_is_refused(student: Any) -> None:
    """A model whose logits are not its head on its last hidden state."""
    forward = student.forward

    def doubled(**kwargs: Any) -> Any:
        out = forward(**kwargs)
        out.logits = out.logits * 2
        return out

    student.forward = doubled
    with pytest.raises(ValueError, match="odd: the head of LlamaForCausalLM is more than a linear"):
        Reader(student, Request(logits=True), "odd")


def test_layers_out_of_range_are_refused(student: Any) -> None:
    spec = ModelSpec.of(student.config, "small")
    with pytest.raises(ValueError, match=r"small: hidden state 9 is out of range 0\.\.2"):
        refuse_layers(Request(hidden=frozenset({9})), spec)
    with pytest.raises(ValueError, match=r"small: block 0 is out of range 1\.\.2"):
        refuse_layers(Request(heads=frozenset({0})), spec)


def test_model_without_attention_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)
    config.num_attention_heads = 1
    model = MambaForCausalLM(config)
    with pytest.raises(ValueError, match="attention"):
        Reader(model, Request(heads=frozenset({1})), "mamba")


def test_adapters_are_seen_through_and_adapted_heads_refused(student: Any) -> None:
    adapted = get_peft_model(
        student, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    batch = batch_of(student)
    logits = Reader(adapted, Request(logits=True), "lora").read(batch).whole.logits(slice(None))
    expected = adapted(**batch.inputs).logits.flatten(0, 1)[batch.supervised.index]
    assert torch.allclose(logits, expected, atol=1e-4)
    assert isinstance(plain(adapted), PreTrainedModel)

    headed = get_peft_model(tiny.llama("student"), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="take the head out of target_modules"):
        Reader(headed, Request(logits=True), "lora")


def test_saved_head_module_is_read(student: Any) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = get_peft_model(student, config)
    with torch.no_grad():
        plain(adapted).get_output_embeddings().modules_to_save["default"].weight.mul_(2)
    batch = batch_of(student)
    logits = Reader(adapted, Request(logits=True), "lora").read(batch).whole.logits(slice(None))
    expected = adapted(**batch.inputs).logits.flatten(0, 1)[batch.supervised.index]
    assert torch.allclose(logits, expected, atol=1e-4)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One process, as a mesh."""
    dist.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("biased", [True, False])
def test_a_sharded_head_is_gathered_with_its_gradient(mesh: DeviceMesh, biased: bool) -> None:
    """The pass over the head gets plain tensors, the shards their gradients."""
    model: Any = tiny.llama("student")
    whole = torch.nn.Linear(32, tiny.VOCABULARY, bias=biased)
    sharded = torch.nn.Linear(32, tiny.VOCABULARY, bias=biased)
    for name, value in whole.named_parameters():
        sharded.register_parameter(
            name, torch.nn.Parameter(distribute_tensor(value.detach(), mesh, [Shard(0)]))
        )
    losses = []
    for layer in (whole, sharded):
        model.lm_head = layer
        head = head_of(model)
        assert not isinstance(head.weight, DTensor)
        assert (head.bias is None) is not biased
        rows = torch.linspace(-1.0, 1.0, 5 * 32).view(5, 32)
        student = Factored(rows, head).projection()
        given = (student, torch.zeros(5, tiny.VOCABULARY), torch.tensor([1, 5, 2, 0, 99]))
        loss, _ = head_pass(*given, [Nll(), Tempered()], torch.tensor([0.5, 2.0]))
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]
    for name, value in whole.named_parameters():
        slope = sharded.get_parameter(name).grad
        assert isinstance(slope, DTensor)
        assert torch.equal(slope.full_tensor(), value.grad)  # type: ignore[arg-type]  # it has one


def test_offloaded_head_gives_dense_logits(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny.llama("teacher")
    model.save_pretrained(tmp_path / "teacher")
    parts = {"model": "cpu", "lm_head": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", device_map=parts, offload_folder=tmp_path / "offload"
    )
    batch = batch_of(model)
    with torch.no_grad():
        signals = Reader(offloaded, Request(logits=True), "offloaded").read(batch)
    assert isinstance(signals.logits, Dense)
    expected = Reader(model, Request(logits=True), "whole").read(batch).whole.logits(slice(None))
    assert torch.allclose(signals.whole.logits(slice(None)), expected, atol=1e-5)


def test_no_attention_is_refused_from_the_config_alone() -> None:
    """A family outside the interface, and one without heads: before any weight is read."""
    from transformers import BloomConfig, MambaConfig

    for config in (BloomConfig(n_layer=2), MambaConfig(num_hidden_layers=2)):
        spec = ModelSpec.of(config, "me/teacher")
        with pytest.raises(ValueError, match=r"me/teacher \(\w+\) has no attention that can be"):
            refuse_layers(Request(heads=frozenset({1})), spec)
        refuse_layers(Request(logits=True, hidden=frozenset({1})), spec)


def test_models_without_position_ids_take_left_padding() -> None:
    """BLOOM counts positions from the mask, and takes no `position_ids`."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    model = tiny.sharpened(BloomForCausalLM, config)
    batch = batch_of(model, side="left", queries=None)
    assert "position_ids" in batch.inputs
    given = {k: v for k, v in batch.inputs.items() if k != "position_ids"}
    expected = model(**given).logits.flatten(0, 1)[batch.supervised.index]
    signals = Reader(model, Request(logits=True), "bloom").read(batch)
    assert torch.allclose(signals.whole.logits(slice(None)), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_in_front_of_the_sequence_are_refused(kind: Any) -> None:
    adapted = get_peft_model(build("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
    message = "the model has an adapter of the kind P[a-zA-Z]+, prompts in front of the sequence"
    with pytest.raises(ValueError, match=message):
        Reader(adapted, Request(logits=True), "the model")


SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("kind", "config", "scale"),
    [
        (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=4.0), 0.25),
        (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.125), 0.125),
    ],
)
def test_heads_with_a_scale(kind: Any, config: Any, scale: float) -> None:
    """What the pass over the head finds is what autograd finds through the model's own logits."""
    model = tiny.sharpened(kind, config)
    ids = torch.arange(24).view(2, 12) % 96
    collated = RowCollator(
        lambda _: {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids},
        shift=True,
        valid=False,
    )([])
    batch = make_batch(collated, None, seed=0, epoch=0)
    own = Reader(model, Request(logits=True), "ours").read(batch).whole
    assert isinstance(own, Factored)
    assert own.head.scale == scale
    rows, target = batch.supervised, torch.randn(22, 96)
    logits = model(**batch.inputs).logits.flatten(0, 1).index_select(0, rows.index)
    forward_kl(logits, target).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, _ = head_pass(own.projection(), target, rows.labels, [Tempered()], torch.ones(1))
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
