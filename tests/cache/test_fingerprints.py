"""What tells tokenizers, templates, weights and files apart, and what does not."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llm_distill.cache import fingerprints
from llm_distill.quantising import settings
from tests import on_disk, tiny


def test_tokenizers() -> None:
    one = on_disk.tokenizer()
    assert fingerprints.of_tokenizer(one) == fingerprints.of_tokenizer(on_disk.tokenizer())
    assert fingerprints.of_tokenizer(one) != fingerprints.of_tokenizer(
        on_disk.tokenizer("zebras graze where lions doze")
    )


def test_what_padding_and_saving_change_does_not_matter(tmp_path: Path) -> None:
    one = on_disk.tokenizer()
    before = fingerprints.of_tokenizer(one)
    one(["the cat", "a dog on the mat"], padding=True, truncation=True, max_length=4)
    one.padding_side = "left"
    assert fingerprints.of_tokenizer(one) == before
    one.save_pretrained(tmp_path)
    assert fingerprints.of_tokenizer(type(one).from_pretrained(tmp_path)) == before


def test_an_added_token_is_another_tokenizer() -> None:
    one = on_disk.tokenizer()
    before = fingerprints.of_tokenizer(one)
    one.add_tokens(["<new>"])
    assert fingerprints.of_tokenizer(one) != before


def test_templates() -> None:
    one, other = on_disk.tokenizer(), on_disk.tokenizer()
    assert fingerprints.of_template(one) == fingerprints.of_template(other) != ""
    other.chat_template = "{{ messages }}"
    assert fingerprints.of_template(one) != fingerprints.of_template(other)
    other.chat_template = None
    assert fingerprints.of_template(other) == ""


def test_weights() -> None:
    model = tiny.llama("teacher")
    before = fingerprints.of_weights(model)
    assert before == fingerprints.of_weights(tiny.llama("teacher"))
    assert before != fingerprints.of_weights(tiny.llama("student"))
    assert before != fingerprints.of_weights(tiny.llama("teacher").bfloat16())
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert before != fingerprints.of_weights(model)


def test_weights_that_are_not_in_memory() -> None:
    with torch.device("meta"):
        empty = LlamaForCausalLM(tiny.llama("teacher").config)
    assert fingerprints.of_weights(empty) != fingerprints.of_weights(tiny.llama("teacher"))


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = b"abc" * 7_000_000  # more than a piece
    path.write_bytes(content)
    told: list[int] = []
    assert fingerprints.of_file(path, told.append) == hashlib.sha256(content).hexdigest()
    assert sum(told) == len(content)


@pytest.mark.parametrize("word", ["bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8"])
def test_quantised_weights(word: str, tmp_path: Path) -> None:
    """The same twice, after a forward too; others for another model, and for whole weights."""

    def made(name: str) -> Any:
        how = settings(word, torch.float32)
        where = {"": torch.device("cpu")}
        model = LlamaForCausalLM.from_pretrained(
            tmp_path / name, quantization_config=how, device_map=where
        )
        with torch.no_grad():
            model(input_ids=torch.arange(9)[None])
        return model

    tiny.llama("teacher").save_pretrained(tmp_path / "one")
    other = tiny.llama("teacher")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "two")
    one = made("one")
    with torch.no_grad():
        said = one(input_ids=torch.arange(9)[None]).logits
        found = fingerprints.of_weights(one)
        assert torch.equal(one(input_ids=torch.arange(9)[None]).logits, said)
    assert fingerprints.of_weights(one) == found == fingerprints.of_weights(made("one"))
    assert found != fingerprints.of_weights(made("two"))
    assert found != fingerprints.of_weights(tiny.llama("teacher"))


class TestFolder:
    """Files of a teacher, a few blocks of each."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        tiny.llama("teacher").save_pretrained(tmp_path / "teacher")
        tiny.tokenizer().save_pretrained(tmp_path / "teacher")
        return tmp_path / "teacher"

    def test_a_copy_is_the_same(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)
        (tmp_path / "moved" / "README.md").write_text("mine")
        told = json.loads((tmp_path / "moved" / "config.json").read_text())
        told |= {"transformers_version": "9", "_name_or_path": "elsewhere"}
        (tmp_path / "moved" / "config.json").write_text(json.dumps(told))
        found = fingerprints.of_folder(folder)
        assert set(found) == {"config.json", "model.safetensors"}
        assert fingerprints.of_folder(tmp_path / "moved") == found

    def test_other_weights_of_the_same_size(self, folder: Path) -> None:
        before = fingerprints.of_folder(folder)
        size = (folder / "model.safetensors").stat().st_size
        other = tiny.sharpened(type(tiny.llama("teacher")), tiny.llama("teacher").config, seed=1)
        other.save_pretrained(folder)
        assert (folder / "model.safetensors").stat().st_size == size
        told = ["model.safetensors (other content)"]
        assert fingerprints.compared(before, fingerprints.of_folder(folder)) == told

    def test_another_config(self, folder: Path) -> None:
        before = fingerprints.of_folder(folder)
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(told | {"rms_norm_eps": 0.1}))
        now = fingerprints.of_folder(folder)
        assert fingerprints.compared(before, now) == ["config.json (other content)"]

    def test_code_of_its_own_counts_where_it_is_run(self, folder: Path) -> None:
        (folder / "modeling.py").write_text("x = 1")
        assert "modeling.py" not in fingerprints.of_folder(folder)
        told = json.loads((folder / "config.json").read_text()) | {"auto_map": {}}
        (folder / "config.json").write_text(json.dumps(told))
        assert "modeling.py" in fingerprints.of_folder(folder)

    @pytest.mark.parametrize("place", [0, 5_000, -1])
    def test_blocks_of_a_large_file(self, tmp_path: Path, place: int) -> None:
        """The beginning with names and shapes, the end, and some of the rest."""
        content = bytearray(3 * fingerprints.BLOCK * fingerprints.BLOCKS)
        path = tmp_path / "pytorch_model-00001.bin"
        path.write_bytes(content)
        before = fingerprints.of_folder(tmp_path)
        assert set(before) == {path.name} == fingerprints.of_weights_alone(before)
        step = (len(content) - fingerprints.BLOCK) // fingerprints.BLOCKS
        content[place if place < 5_000 else 9 * step] = 1
        path.write_bytes(content)
        assert fingerprints.of_folder(tmp_path) != before
        path.write_bytes(bytes(len(content) + 1))
        assert fingerprints.of_folder(tmp_path) != before

    def test_no_model(self, tmp_path: Path) -> None:
        assert fingerprints.of_folder(tmp_path) == {}
