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
    for engine, ranks, words in (("one", 1, WORDS), ("ddp", 2, WORDS), ("fsdp2", 2, WORDS[2:])):
        launch("tests.quantised_worker", engine, str(folder), *words, ranks=ranks)
    names = ("one-0", "ddp-0", "ddp-1", "fsdp2-0")
    each = {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in names}
    return {"folder": folder} | each


@pytest.mark.distributed
@pytest.mark.parametrize("word", WORDS)
class TestQuantised:
    @pytest.mark.parametrize("name", ["one-0", "ddp-0", "ddp-1"])
    def test_signals_are_those_of_the_model(
        self, found: dict[str, Any], name: str, word: str
    ) -> None:
        differ = found[name][word]["differ"]
        kinds = {kind.partition(" ")[0] for kind in differ}
        # The second rank's first rows predict nothing.
        assert kinds >= {"hidden", "maps"}
        assert name == "ddp-1" or "logits" in kinds
        assert max(differ.values()) <= 1e-6, differ

    def test_two_ranks_train_as_one(self, found: dict[str, Any], word: str) -> None:
        one, two = found["one-0"][word], found["ddp-0"][word]
        assert (two["wrapped"], two["world"]) == ("DistributedDataParallel", 2)
        # LLM.int8() computes a column in 16 bits where any token of a batch is out of line there,
        # so what it says of a sequence depends on the others.
        bound = 2e-5 if word == "bitsandbytes_8bit" else 3e-7
        for name, value in one["weights"].items():
            torch.testing.assert_close(two["weights"][name], value, rtol=0, atol=bound)

    def test_what_it_adds_is_the_same_on_all(self, found: dict[str, Any], word: str) -> None:
        told = [
            next(line for line in found[name][word]["told"] if "adds a KL" in line)
            for name in ("one-0", "ddp-0", "ddp-1")
        ]
        assert len(set(told)) == 1
        assert f"{word} adds a KL of " in told[0]

    def test_nothing_of_it_is_trained_or_saved(self, found: dict[str, Any], word: str) -> None:
        student = tiny.llama("student")
        for name in ("one-0", "ddp-0"):
            assert found[name][word]["trained"] == student.num_parameters()
            assert found[name][word]["teacher"] == "LlamaForCausalLM"
        saved = AutoModelForCausalLM.from_pretrained(found["folder"] / f"{word}-ddp" / "student")
        assert saved.state_dict().keys() == student.state_dict().keys()
        assert not hasattr(saved.config, "quantization_config")
        files = {p.name for p in (found["folder"] / f"{word}-ddp" / "student").iterdir()}
        assert files <= {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.distributed
def test_beside_a_sharded_student(found: dict[str, Any]) -> None:
    """Whole on each rank, with the same weights in the end."""
    one, sharded = (found[name]["torchao_int8"] for name in ("one-0", "fsdp2-0"))
    assert "FSDP" in sharded["wrapped"]
    assert max(sharded["differ"].values()) <= 1e-6
    for name, value in one["weights"].items():
        torch.testing.assert_close(sharded["weights"][name], value, rtol=0, atol=3e-7)
