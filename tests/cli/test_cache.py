"""`llm-distill cache`: written from the recipe that `run` then trains from, without the teacher."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from llm_distill.cache.manifest import FILE, Manifest
from llm_distill.cli.cache import figures
from llm_distill.recipe import document
from tests import launch, on_disk
from tests.cli.conftest import Cli


@pytest.fixture
def teacher(models: Path, tmp_path: Path) -> Path:
    """A teacher that the test may delete."""
    return Path(shutil.copytree(models / "teacher", tmp_path / "its" / "teacher"))


@pytest.fixture
def sections(teacher: Path, tmp_path: Path) -> dict[str, Any]:
    keep = {"topk": {"k": 32}}
    return {
        "teacher": {"Cached": {"path": str(tmp_path / "cache"), "of": str(teacher), "keep": keep}}
    }


def test_cache_then_run_without_the_teacher(
    cli: Cli, sections: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    ended = cli("cache", **sections)
    assert ended.code == 0, ended.err
    assert "top 32 and the tail" in ended.out
    assert "bytes per supervised token" in ended.out
    assert "KL of what is read to what is kept" in ended.out
    shutil.rmtree(teacher.parent)
    ended = cli("check", **sections)
    assert ended.code == 0, ended.err
    ended = cli("run", **sections)
    assert ended.code == 0, ended.err
    assert "teacher: the cache" in ended.out
    assert "KL on the tokens that the teacher told alone" in ended.out
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "teacher" in (tmp_path / "out" / "README.md").read_text()


def test_another_teacher_of_the_same_name(
    cli: Cli, sections: dict[str, Any], teacher: Path, models: Path
) -> None:
    """The same shapes with other numbers, in the same folder or in another one."""
    assert cli("cache", **sections).code == 0
    assert cli("check", **sections).code == 0
    other = AutoModelForCausalLM.from_pretrained(models / "teacher")
    other.model.layers[0].mlp.down_proj.weight.data.mul_(1.01)
    other.save_pretrained(teacher)
    for command in ("check", "run"):
        ended = cli(command, **sections)
        assert ended.code == 2
        assert "same name: model.safetensors (other content); write the teacher" in ended.err
    ended = cli("cache", **sections)
    assert ended.code == 2
    assert "that differs in the weights of the teacher" in ended.err
    moved = teacher.parent / "moved" / "teacher"
    shutil.copytree(models / "teacher", moved, copy_function=shutil.copyfile)
    sections["teacher"]["Cached"]["of"] = str(moved)
    assert cli("run", **sections).code == 0


def test_hints_without_the_teacher(
    cli: Cli, sections: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    """A map that the data decide is decided when the cache is written."""
    sections["teacher"]["Cached"] |= {"states": True, "states_width": 24}
    sections["objectives"] = ["HiddenStates", {"Contrastive": {"rows": "valid"}}, "Logits"]
    ended = cli("cache", **sections)
    assert ended.code == 0, ended.err
    assert "Keeping top 32 and the tail" in ended.out
    assert "(how many, the map decides)" in ended.out
    assert "of all tokens, 24 of" in ended.out
    assert "HiddenStates: auto: coverage" in ended.out
    assert "lost of hidden state" in ended.out
    shutil.rmtree(teacher.parent)
    (tmp_path / "out" / "calibration.safetensors").unlink()
    for command in ("check", "run", "map"):
        ended = cli(command, **sections)
        assert ended.code == 0, ended.err
        assert "auto: coverage" in ended.out
    assert not (tmp_path / "out" / "calibration.safetensors").exists()
    ended = cli("check", **sections | {"objectives": [{"HiddenStates": {"layers": "transport"}}]})
    assert ended.code == 2
    assert "decided auto for it; run llm-distill cache on this recipe" in ended.err


def test_of_a_quantised_teacher(
    cli: Cli, sections: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    """The manifest says so, the figure travels, and another number of bits is another cache."""
    small = {"Local": {"model": str(teacher), "quantize": "bitsandbytes_8bit"}}
    sections["teacher"]["Cached"]["of"] = small
    ended = cli("cache", **sections)
    assert ended.code == 0, ended.err
    assert "KL that quantising the teacher adds" in ended.out
    manifest = Manifest.read(tmp_path / "cache" / FILE)
    assert manifest.quantised == "bitsandbytes_8bit"
    assert manifest.fidelity["quantised_kl"] > 0
    before = (tmp_path / "cache" / FILE).stat().st_mtime_ns
    assert cli("cache", **sections).code == 0
    assert (tmp_path / "cache" / FILE).stat().st_mtime_ns == before
    assert cli("cache", "--overwrite", **sections).code == 0
    assert Manifest.read(tmp_path / "cache" / FILE).fidelity == manifest.fidelity
    ended = cli("run", **sections)
    assert ended.code == 0, ended.err
    assert "teacher in bitsandbytes_8bit, top 32" in ended.out
    told = f"bitsandbytes_8bit adds a KL of {manifest.fidelity['quantised_kl']:.3g}"
    assert told in ended.out
    assert told in (tmp_path / "out" / "README.md").read_text()
    small["Local"]["quantize"] = "torchao_int8"
    ended = cli("cache", **sections)
    assert ended.code == 2
    assert "how the teacher is quantised (bitsandbytes_8bit there, torchao_int8 now)" in ended.err
    ended = cli("run", "--overwrite", **sections)
    assert ended.code == 2
    assert "in bitsandbytes_8bit, and the recipe says teacher in torchao_int8" in ended.err


def test_only_the_path_is_needed_to_run(cli: Cli, sections: dict[str, Any], tmp_path: Path) -> None:
    assert cli("cache", **sections).code == 0
    assert cli("run", teacher={"Cached": {"path": str(tmp_path / "cache")}}).code == 0


def test_written_twice_nothing_is_asked_again(
    cli: Cli, sections: dict[str, Any], tmp_path: Path
) -> None:
    assert cli("cache", **sections).code == 0
    before = (tmp_path / "cache" / FILE).stat().st_mtime_ns
    assert cli("cache", **sections).code == 0
    assert (tmp_path / "cache" / FILE).stat().st_mtime_ns == before
    assert cli("cache", "--overwrite", **sections).code == 0
    assert (tmp_path / "cache" / FILE).stat().st_mtime_ns > before


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_run_before_the_cache(cli: Cli, sections: dict[str, Any], command: str) -> None:
    ended = cli(command, **sections)
    assert ended.code == 2
    assert "write it first: llm-distill cache" in ended.err


def test_another_length_in_the_run(
    cli: Cli, sections: dict[str, Any], content: dict[str, Any]
) -> None:
    assert cli("cache", **sections).code == 0
    ended = cli("run", **sections, data={**content["data"], "max_length": 12})
    assert ended.code == 2
    assert "examples are not in the cache" in ended.err


def test_documents_in_another_order(cli: Cli, sections: dict[str, Any], tmp_path: Path) -> None:
    """Blocks of packed text: the same documents, cut at other places."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, sentence in zip("ab", on_disk.SENTENCES, strict=False):
        (texts / f"{name}.txt").write_text(f"{sentence}\n" * 9)
    sections["data"] = {"path": str(texts), "max_length": 16}
    assert cli("cache", **sections).code == 0
    assert cli("run", **sections).code == 0
    (texts / "a.txt").rename(texts / "c.txt")
    ended = cli("run", "--overwrite", **sections)
    assert ended.code == 2
    assert "examples are not in the cache" in ended.err
    assert "The data, their order in blocks, the chat template or max_length changed" in ended.err


def test_a_worker_that_finds_no_example(
    cli: Cli, sections: dict[str, Any], content: dict[str, Any]
) -> None:
    """Of a stream, which nobody can look through before: one sentence, whoever reads it."""
    assert cli("cache", **sections).code == 0
    data = {k: v for k, v in content["data"].items() if k != "eval"}
    data |= {"streaming": True, "max_length": 9}
    training = content["training"] | {"dataloader_num_workers": 1}
    ended = cli("run", **sections, data=data, training=training)
    assert ended.code == 2
    (line,) = [line for line in ended.err.splitlines() if line.startswith("llm-distill: ")]
    assert "of this batch are not in the cache" in line
    assert "Traceback" not in ended.err


def test_another_k_in_the_run(cli: Cli, sections: dict[str, Any]) -> None:
    assert cli("cache", **sections).code == 0
    ended = cli("run", "--teacher.Cached.keep.topk.k", "16", **sections)
    assert ended.code == 2
    assert "keeps top 32 and the tail, and the recipe says top 16" in ended.err


def test_another_tokenizer_in_the_run(
    cli: Cli, sections: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    assert cli("cache", **sections).code == 0
    student = shutil.copytree(models / "student", tmp_path / "student")
    on_disk.tokenizer("zebras graze where lions doze").save_pretrained(student)
    ended = cli("run", **sections, student=str(student))
    assert ended.code == 2
    assert "tokenizers differ" in ended.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "some/model"}, "teacher: Local is not cached; write teacher: {Cached: {path:"),
        ({"teacher": {"Cached": {"path": "x"}}}, "the cache x does not say of which teacher"),
        ({"objectives": ["HiddenStates"]}, "hidden states"),
        ({"states": True}, "no objective (CrossEntropy, Logits) reads hidden states"),
        (
            {"states": True, "objectives": [{"HiddenStates": {"layers": "auto_race"}}]},
            "auto_race trains copies of the student on the teacher",
        ),
        ({"states": True, "objectives": ["AttentionMaps"]}, "the attention of blocks"),
        (
            {"states": True, "states_width": 9999, "objectives": ["HiddenStates"]},
            "states_width is 9999, and the states of",
        ),
        (
            {"states_width": 8, "objectives": ["HiddenStates"]},
            "states_width is 8, and states False",
        ),
        (
            {"keep": "sampled", "objectives": [{"Logits": {"loss": "reverse_kl"}}]},
            "Logits: the cache keeps 50 draws",
        ),
        ({"keep": {"topk": {"k": 9999}}}, "topk: k is 9999; write a number from 1 to 300"),
        ({"keep": {"topk": {"k": "many"}}}, "k: 'many' is not what this takes; write an integer"),
        ({"keep": {"hybrid": {"n": 1.5}}}, "n: 1.5 is not what this takes; write an integer"),
        (
            {"keep": "sampled", "objectives": [{"Logits": {"temperature": 2.0}}]},
            "at temperature 1 alone, and the term is forward_kl at temperature 2; write",
        ),
        (
            {"keep": "hybrid", "objectives": [{"Logits": {"target": "Taid"}}]},
            "the term is forward_kl with a target that moves; write",
        ),
        ({"keep": "topp"}, "no 'topp' in llm_distill.cache.estimators; did you mean 'topk'?"),
    ],
)
def test_what_cannot_be_cached(
    cli: Cli, sections: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    own = {k: v for k, v in changes.items() if k in ("keep", "states", "states_width")}
    given = {**sections, **{k: v for k, v in changes.items() if k not in own}}
    if own:
        given["teacher"] = {"Cached": {**sections["teacher"]["Cached"], **own}}
    ended = cli("cache", **given)
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "cache").exists()


def test_code_of_the_teacher_has_to_be_allowed(cli: Cli) -> None:
    of = {"Local": {"model": "x/y", "trust_remote_code": True}}
    ended = cli("cache", teacher={"Cached": {"path": "x", "of": of}})
    assert ended.code == 2
    assert "--allow-code x/y" in ended.err


def test_what_the_table_tells(cli: Cli, sections: dict[str, Any], tmp_path: Path) -> None:
    assert cli("cache", **sections).code == 0
    told = figures(Manifest.read(tmp_path / "cache" / FILE))
    assert 50 < told["bytes per supervised token"] < 200
    assert 0 <= told["KL of what is read to what is kept, nats per token"] < 2e-5


def test_two_processes(sections: dict[str, Any], content: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(document.dump({**content, **sections}), encoding="utf-8")
    said = launch.launch("llm_distill", "cache", str(recipe), ranks=2)
    assert said.count("bytes per supervised token") == 1
    assert Manifest.read(tmp_path / "cache" / FILE).rows > 0
