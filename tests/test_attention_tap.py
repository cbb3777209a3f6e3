"""The wrapped attention: nothing changes but what marked blocks hand over."""

from typing import Any

import pytest
import torch

from llm_distill.attention_tap import MARK, PREFIX, Tap, clear, discover, install, mark
from llm_distill.queries import Queries
from tests import tiny


def queries(*positions: list[int]) -> Queries:
    position = torch.tensor(positions)
    used = torch.ones_like(position, dtype=torch.bool)
    flat = torch.arange(position.numel())
    count = position.numel()
    return Queries(position, used, (position.shape[1],) * len(position), flat, used.float(), count)


BASES = [
    (f, b) for f in sorted(tiny.MODELS) for b in ("sdpa", "eager") if (f, b) != ("gemma2", "sdpa")
]


@pytest.mark.parametrize(("family", "base"), BASES)
def test_outputs_stay_bit_equal(family: str, base: str) -> None:
    model = tiny.MODELS[family]()
    model.set_attn_implementation(base)
    inputs = {k: v for k, v in tiny.batch().items() if k != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits
        install(model)
        taps = mark(discover(model, lambda: model(**inputs)).values())
        for tap in taps:
            tap.queries, tap.open = queries([0, 3], [0, 1], [2, 5]), True
        after = model(**inputs).logits
    assert torch.equal(before, after)
    assert model.config._attn_implementation == PREFIX + base
    assert all(tap.caught is not None for tap in taps)


def test_installing_twice_is_once(student: Any) -> None:
    install(student)
    name = student.config._attn_implementation
    install(student)
    assert student.config._attn_implementation == name


def test_marking_twice_gives_the_same_tap(student: Any) -> None:
    module = student.model.layers[0].self_attn
    assert mark([module])[0] is mark([module])[0]


def test_blocks_are_found_in_order(teacher: Any) -> None:
    install(teacher)
    inputs = {k: v for k, v in tiny.batch().items() if k != "labels"}
    found = discover(teacher, lambda: teacher(**inputs))
    assert list(found) == [1, 2, 3, 4]
    assert found[3] is teacher.model.layers[2].self_attn


def test_unmarked_blocks_hand_over_nothing(teacher: Any) -> None:
    install(teacher)
    tap = mark([teacher.model.layers[1].self_attn])[0]
    tap.queries, tap.open = queries([0], [0], [0]), True
    teacher(**{k: v for k, v in tiny.batch().items() if k != "labels"})
    marked = [m for m in teacher.modules() if MARK in m.__dict__]
    assert marked == [teacher.model.layers[1].self_attn]
    assert tap.caught is not None


def test_a_closed_tap_keeps_nothing(teacher: Any) -> None:
    """As in the recomputation of a checkpointed block."""
    install(teacher)
    tap = mark([teacher.model.layers[1].self_attn])[0]
    tap.queries = queries([0], [0], [0])
    teacher(**{k: v for k, v in tiny.batch().items() if k != "labels"})
    assert tap.caught is None


def test_cleared_taps_are_idle(teacher: Any) -> None:
    """Left over from a reader that was never released."""
    install(teacher)
    tap = mark([teacher.model.layers[1].self_attn])[0]
    tap.queries, tap.open = queries([11], [11], [11]), True
    clear(teacher)
    teacher(torch.arange(4)[None])
    assert tap.caught is None


def test_generation_works_with_idle_taps(student: Any) -> None:
    ids = tiny.batch()["input_ids"][:1]
    before = student.generate(ids, max_new_tokens=5, do_sample=False)
    install(student)
    mark(layer.self_attn for layer in student.model.layers)
    assert torch.equal(before, student.generate(ids, max_new_tokens=5, do_sample=False))


def test_saved_config_does_not_name_the_wrapper(student: Any, tmp_path: Any) -> None:
    install(student)
    student.save_pretrained(tmp_path)
    assert PREFIX not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("mask", ["none", "keys"])
@pytest.mark.parametrize("window", [None, 3])
def test_masks_of_flash_attention_are_rebuilt(mask: str, window: int | None) -> None:
    """Flash attention gets no mask or one over keys; causality and windows are arguments."""
    module = torch.nn.Module()
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    keys = None if mask == "none" else torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    tap = Tap(queries=queries([1, 5], [2, 3]), open=True)
    tap.take(module, (query, key, key), keys, {"is_causal": True, "sliding_window": window})
    assert tap.caught is not None
    assert tap.queries is not None
    visible = tap.caught.maps(tap.queries) > 0
    for row, (sequence, position) in enumerate([(0, 1), (0, 5), (1, 2), (1, 3)]):
        for place in range(6):
            seen = place <= position and (window is None or position - place < window)
            seen = seen and not (mask == "keys" and sequence == 1 and place >= 4)
            assert bool(visible[row, 0, place]) == seen


def test_model_outside_the_interface_is_refused(student: Any) -> None:
    student.set_attn_implementation = lambda name: None  # as models without the interface do
    with pytest.raises(ValueError, match="LlamaForCausalLM does not use transformers' attention"):
        install(student)
