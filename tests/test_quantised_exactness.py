"""A quantised teacher says what its model says, on one process and on two, and trains the same."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.launch import launch

WORDS = ("bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each rank of both launches found, and where."""
    folder = tmp_path_factory.mktemp("quantised")
    tiny.llama("teacher").save_pretrained(folder / "teacher")
    for ranks in (1, 2):
        launch("tests.quantised_worker", str(folder), *WORDS, ranks=ranks)
    names = ("1-0", "2-0", "2-1")
    each = {name: torch.load(folder / f"found-{name}.pt", weights_only=False) for name in names}
    return {"folder": folder} | each


@pytest.mark.distributed
@pytest.mark.parametrize("word", WORDS)
class TestQuantised:
    @pytest.mark.parametrize("name", ["1-0", "2-0", "2-1"])
    def test_signals_are_those_of_the_model(
        self, found: dict[str, Any], name: str, word: str
    ) -> None:
        differ = found[name][word]["differ"]
        kinds = {kind.partition(" ")[0] for kind in differ}
        # The second rank's first rows predict nothing.
        assert kinds >= {"hidden", "maps"}
        assert name == "2-1" or "logits" in kinds
        assert max(differ.values()) <= 1e-6, differ

    def test_two_ranks_train_as_one(self, found: dict[str, Any], word: str) -> None:
        one, two = found["1-0"][word], found["2-0"][word]
        assert (two["wrapped"], two["world"]) == ("DistributedDataParallel", 2)
        # LLM.int8() computes a column in 16 bits where any token of a batch is out of line there,
        # so what it says of a sequence depends on the others.
        bound = 2e-5 if word == "bitsandbytes_8bit" else 3e-7
        for name, value in one["weights"].items():
            torch.testing.assert_close(two["weights"][name], value, rtol=0, atol=bound)

    def test_what_it_adds_is_the_same_on_all(self, found: dict[str, Any], word: str) -> None:
        told = [
            next(line for line in found[name][word]["told"] if "adds a KL" in line)
            for name in ("1-0", "2-0", "2-1")
        ]
        assert len(set(told)) == 1
        assert f"{word} adds a KL of " in told[0]

    def test_nothing_of_it_is_trained_or_saved(self, found: dict[str, Any], word: str) -> None:
        student = tiny.llama("student")
        for name in ("1-0", "2-0"):
            assert found[name][word]["trained"] == student.num_parameters()
            assert found[name][word]["teacher"] == "LlamaForCausalLM"
        saved = AutoModelForCausalLM.from_pretrained(found["folder"] / f"{word}-2" / "student")
        assert saved.state_dict().keys() == student.state_dict().keys()
        assert not hasattr(saved.config, "quantization_config")
        files = {p.name for p in (found["folder"] / f"{word}-2" / "student").iterdir()}
        assert files <= {"config.json", "generation_config.json", "model.safetensors"}
