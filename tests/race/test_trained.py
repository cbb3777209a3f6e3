"""Training after a race, for every kind of run."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from torch.utils.data import Dataset

from llm_distill import AttentionMaps, HiddenStates, LayerMap, Logits
from llm_distill.balance import normalised
from llm_distill.layers import auto_race, cka, reverse, saved, transport
from llm_distill.students import FromConfig, FromTeacher
from tests import tiny
from tests.racing import RACE, equal, named, trainer, weights


class Prompts(Dataset[dict[str, Any]]):
    """A torch dataset of tokens."""

    def __init__(self) -> None:
        self.rows = tiny.rows(32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return dict(self.rows[place])


CONFIG = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapter": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)},
    "accumulation in bf16": {"bf16": True, "gradient_accumulation_steps": 2},
    "random weights": {"model": FromConfig("llama", CONFIG)},
    "cut": {"model": FromTeacher(layers=[2, 3])},
    "balanced": {"balance": normalised},
    "stream": {"train_dataset": tiny.rows(32).to_iterable_dataset()},
    "prompts": {"train_dataset": Prompts()},
    "epochs": {"max_steps": -1, "num_train_epochs": 10},
}


@pytest.mark.usefixtures("brief")
class TestTrained:
    @pytest.mark.parametrize("kind", KINDS)
    def test_after_a_race_as_if_written_by_hand(self, tmp_path: Path, kind: str) -> None:
        raced = trainer(tmp_path / "raced", **KINDS[kind])
        assert any(line.startswith("race: steps") for line in raced.run.told)
        assert len(raced.run.objectives) == 2
        raced.args.max_steps = 3
        raced.train()  # before the other is made, which draws random numbers
        by_hand = trainer(tmp_path / "hand", *raced.run.objectives, **KINDS[kind])
        by_hand.args.max_steps = 3
        by_hand.train()
        assert equal(weights(raced), weights(by_hand))
        assert "race.json" not in [p.name for p in (tmp_path / "hand").glob("*")]

    def test_several_objectives_and_maps_of_the_users(self, tmp_path: Path) -> None:
        made = LayerMap.of([(1, 2), (2, 4)], 2, 4, "by hand")
        made.save(tmp_path / "map.yaml")
        other = LayerMap.of([(1, 4), (2, 4)], 2, 4, "mine")
        also: list[Any] = [
            cka,
            transport,
            partial(saved, path=str(tmp_path / "map.yaml")),
            other,
            reverse,
        ]
        race = partial(auto_race, share=0.9, weights=(0.5,), also=also, shortest=1)
        objectives = HiddenStates(layers=race), Logits(), AttentionMaps(layers=race)
        told = trainer(tmp_path / "out", *objectives).run.told
        names = "\n".join(told)
        for name in ("transport", "mine", "reverse", "none", "last"):
            assert name in names, names

    def test_a_hint_alone_from_a_named_teacher(self, tmp_path: Path) -> None:
        """Nobody but the race reads its logits."""
        made = trainer(tmp_path / "out", HiddenStates(layers=RACE), **named(tmp_path))
        assert len(made.run.objectives) == 1
        assert "none" not in "\n".join(made.run.told)
        made.args.max_steps = 2
        made.train()

    def test_masked_language_models(self, tmp_path: Path) -> None:
        """A loaded teacher whose config does not say what it is."""
        rows = [dict(row) for row in tiny.rows(32)]
        models = {"model": tiny.bert(depth=2), "teacher": tiny.bert(depth=4)}
        for row in rows:
            masked = row["labels"] = [i if k % 2 else -100 for k, i in enumerate(row["input_ids"])]
            row["input_ids"] = [
                3 if m >= 0 else i for m, i in zip(masked, row["input_ids"], strict=True)
            ]
        assert trainer(tmp_path, train_dataset=rows, **models).run.told
