"""`LocalSource` answers where the training is."""

import torch
from transformers import PreTrainedModel

from llm_distill import Local
from llm_distill.signals import Dense, Factored, Request
from llm_distill.teachers.local_source import moved
from tests.teachers.test_local import ALL, CPU, batch


class TestMoved:
    def test_everything_moves(self, teacher: PreTrainedModel) -> None:
        signals = Local(teacher).open(ALL, CPU)(batch())
        there = moved(signals, torch.device("meta"))
        assert isinstance(there.logits, Factored)
        tensors = [there.logits.hidden, there.logits.head.weight, *there.states.values()]
        for heads in there.attention.values():
            tensors += [heads.query, heads.key]
            tensors += [t for t in (heads.value, heads.whole_query) if t is not None]
        assert len(tensors) == 2 + 3 + 4 + 2
        assert {tensor.device.type for tensor in tensors} == {"meta"}

    def test_dense_logits_move_and_none_stays(self, teacher: PreTrainedModel) -> None:
        signals = Local(teacher).open(Request(hidden=frozenset({1})), CPU)(batch())
        assert moved(signals, CPU).distribution is None
        assert moved(signals, CPU).states[1] is signals.states[1]
        dense = type(signals)("t", Dense(torch.ones(2, 3)))
        there = moved(dense, torch.device("meta")).logits
        assert isinstance(there, Dense)
        assert there.values.device.type == "meta"
