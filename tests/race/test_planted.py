"""A student that needs a hint gets one, and a harmful map is not taken.

The third pilot of the design in small: a teacher that was trained, and a student cut from its
middle, so that its first and last blocks are missing.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_distill import DistillTrainer, HiddenStates, LayerMap, Logits
from llm_distill.layers import auto_race, reverse
from llm_distill.students import FromTeacher
from tests import tiny

VOCABULARY, LENGTH = 24, 24


def corpus(count: int, seed: int) -> torch.Tensor:
    """Sequences in which two tokens make three others likely: `[count, LENGTH]`."""
    rule = torch.Generator().manual_seed(0)
    table = torch.randint(3, VOCABULARY, (VOCABULARY, VOCABULARY, 3), generator=rule)
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, VOCABULARY, (count,), generator=draw) for _ in range(2)]
    for _ in range(LENGTH - 2):
        chances = torch.tensor([0.8, 0.15, 0.05]).expand(count, 3)
        choice = torch.multinomial(chances, 1, generator=draw)[:, 0]
        made.append(table[made[-1], made[-2], choice])
    return torch.stack(made, 1)


@cache
def teacher() -> LlamaForCausalLM:
    """Six blocks that know the rule."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=tiny.POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = LlamaForCausalLM(config)
    ids, draw = corpus(1024, seed=1), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        batch = ids[torch.randint(0, len(ids), (32,), generator=draw)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return cast("LlamaForCausalLM", model)


def raced(folder: Path, *also: LayerMap, weight: float = 3.0) -> DistillTrainer:
    """A student of the teacher's blocks 2 and 4 after a race."""
    rows = [{"input_ids": ids, "labels": ids} for ids in corpus(512, seed=3).tolist()]
    race = partial(auto_race, share=0.99, weights=(1.0,), also=also, shortest=1)
    return DistillTrainer(
        FromTeacher(layers=[2, 4]),
        teacher(),
        [Logits(), HiddenStates(layers=race, weight=weight)],
        tiny.arguments(folder, max_steps=260, learning_rate=2e-3, optim="adamw_torch"),
        train_dataset=datasets.Dataset.from_list(rows),
    )


def test_a_hint_that_helps_is_found(tmp_path: Path) -> None:
    harmful = LayerMap.of([(1, 6), (2, 1)], 2, 6, "harmful")
    trainer = raced(tmp_path, harmful)
    hint = trainer.run.objectives[-1]
    assert isinstance(hint, HiddenStates)
    assert isinstance(hint.layers, LayerMap)
    assert hint.layers.pairs[-1] == (2, 6)
    figures = [line.split("|") for line in trainer.run.told if line.count("|") == 2][1:]
    last = {arm.split(" x ")[0].strip(): float(kl) for _, kl, arm in figures[:3]}
    assert min(last.values()) < 0.98 * last["none"]
    first = {arm.split(" x ")[0].strip(): float(kl) for _, kl, arm in figures[6:]}
    assert first["harmful"] > first["none"]


def test_a_harmful_map_with_a_large_weight_is_not_taken(tmp_path: Path) -> None:
    """Only no hint at all competes with it."""
    harmful = reverse(2, 6)
    trainer = raced(tmp_path, harmful, weight=30.0)
    kept = [o.layers for o in trainer.run.objectives if isinstance(o, HiddenStates)]
    assert harmful not in kept
    figures = [line.split("|") for line in trainer.run.told if line.count("|") == 2][1:]
    first = {arm.split(" x ")[0].strip(): float(kl) for steps, kl, arm in figures[6:]}
    assert first["reverse"] > first["none"]
