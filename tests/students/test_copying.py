"""Weights of cut students: bit for bit the teacher's, read without reading the rest."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from llm_distill import Local
from llm_distill.blocks import find
from llm_distill.capture import plain
from llm_distill.cli.run import run
from llm_distill.errors import InputError
from llm_distill.provenance import Provenance
from llm_distill.recipe import Recipe
from llm_distill.students import FromTeacher
from tests import on_disk, tiny
from tests.reading import watched
from tests.students.families import DEPTH, FAMILIES, auto

CHOSEN = (1, 3, 5)
ROUTES = ["loaded", "one file", "shards"]


def given(model: PreTrainedModel, route: str, folder: Path) -> Local:
    """A teacher as it may be named."""
    if route == "loaded":
        return Local(model)
    model.save_pretrained(folder, max_shard_size="10KB" if route == "shards" else "1GB")
    assert (len(list(folder.glob("*.safetensors"))) > 3) == (route == "shards")
    return Local(str(folder), attn_implementation=model.config._attn_implementation)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=tiny.batch()["input_ids"]).logits
    return found


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_as_many_blocks_give_the_same_logits(
        self, family: str, route: str, tmp_path: Path
    ) -> None:
        teacher = FAMILIES[family]()
        student = FromTeacher(DEPTH).load(given(teacher, route, tmp_path))
        assert type(student) is type(teacher)
        assert torch.equal(logits(student), logits(teacher))

    def test_every_weight_is_that_of_the_chosen_block(
        self, family: str, route: str, tmp_path: Path
    ) -> None:
        teacher = FAMILIES[family]()
        student = FromTeacher(layers=CHOSEN).load(given(teacher, route, tmp_path))
        path, theirs = find(teacher), teacher.state_dict()
        assert len(student.get_submodule(path)) == len(CHOSEN)  # type: ignore[arg-type]  # a list
        for name, weight in student.state_dict().items():
            if name.startswith(f"{path}."):
                number, rest = name.removeprefix(f"{path}.").split(".", 1)
                original = f"{path}.{CHOSEN[int(number)] - 1}.{rest}"
            else:
                original = name
            assert torch.equal(weight, theirs[original]), name

    def test_it_is_saved_as_a_plain_model(self, family: str, route: str, tmp_path: Path) -> None:
        teacher = FAMILIES[family]()
        student = FromTeacher(layers=CHOSEN).load(given(teacher, route, tmp_path / "teacher"))
        student.save_pretrained(tmp_path / "student")
        model, told = auto(teacher).from_pretrained(
            tmp_path / "student",
            output_loading_info=True,
            attn_implementation=teacher.config._attn_implementation,
        )
        assert not any(told.values()), told
        assert torch.equal(logits(model), logits(student))
        found = Provenance.read(model.config)
        assert found is not None
        assert (found.blocks, found.of) == (CHOSEN, DEPTH)


@pytest.mark.parametrize("route", ROUTES)
class TestOneTeacher:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
    def test_it_computes_what_the_teacher_does_without_the_others(
        self, family: str, route: str, tmp_path: Path
    ) -> None:
        """Against the teacher itself with the other blocks taken out by hand."""
        teacher = FAMILIES[family]()
        student = FromTeacher(layers=CHOSEN).load(given(teacher, route, tmp_path))
        blocks: Any = teacher.get_submodule(find(teacher))
        for index in set(range(DEPTH)) - {block - 1 for block in CHOSEN}:
            blocks[index].forward = lambda hidden, *args, **kwargs: hidden
        assert torch.equal(logits(student), logits(teacher))

    @pytest.mark.parametrize(("family", "tied"), [("llama", False), ("tied llama", True)])
    def test_tied_heads_stay_tied(
        self, family: str, tied: bool, route: str, tmp_path: Path
    ) -> None:
        student: Any = FromTeacher(2).load(given(FAMILIES[family](), route, tmp_path))
        assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied

    def test_its_dtype(self, route: str, tmp_path: Path) -> None:
        teacher = FAMILIES["llama"]()
        wanted = FromTeacher(2, dtype="bfloat16").load(given(teacher, route, tmp_path))
        assert {p.dtype for p in wanted.parameters()} == {torch.bfloat16}
        assert wanted.config.dtype is torch.bfloat16
        # Angles of positions are no weights: rounded, they would be others.
        rotary = wanted.get_submodule("model.rotary_emb").inv_freq
        assert rotary.dtype is torch.float32
        assert torch.equal(rotary, teacher.get_submodule("model.rotary_emb").inv_freq)  # type: ignore[arg-type]  # a buffer

    def test_a_teacher_in_half_precision_gives_masters_in_float32(
        self, route: str, tmp_path: Path
    ) -> None:
        teacher = FAMILIES["tied llama"]().bfloat16()
        student = FromTeacher(2).load(given(teacher, route, tmp_path))
        assert {p.dtype for p in student.parameters()} == {torch.float32}
        first: Any = teacher.get_submodule("model.layers.0.mlp.up_proj")
        assert torch.equal(
            student.get_submodule("model.layers.0.mlp.up_proj").weight,  # type: ignore[arg-type]  # a tensor
            first.weight.float(),
        )

    def test_how_it_generates_is_the_teachers(self, route: str, tmp_path: Path) -> None:
        teacher: Any = FAMILIES["llama"]()
        teacher.generation_config = GenerationConfig(
            do_sample=True, temperature=0.7, eos_token_id=[2, 5], pad_token_id=0
        )
        student: Any = FromTeacher(2).load(given(teacher, route, tmp_path))
        assert student.generation_config.temperature == 0.7
        assert student.generation_config.eos_token_id == [2, 5]
        assert student.generation_config is not teacher.generation_config

    def test_it_can_be_trained_and_the_teacher_stays(self, route: str, tmp_path: Path) -> None:
        teacher = FAMILIES["llama"]().requires_grad_(requires_grad=False)
        before = copy.deepcopy(teacher.state_dict())
        student = FromTeacher(2).load(given(teacher, route, tmp_path))
        assert all(p.requires_grad for p in student.parameters())
        assert not student.training
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.zero_()
        assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())

    def test_no_random_numbers_are_drawn(self, route: str, tmp_path: Path) -> None:
        source = given(FAMILIES["llama"](), route, tmp_path)
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        FromTeacher(2).load(source)
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("family", ["llama", "mixtral", "bert"])
@pytest.mark.parametrize("route", ["one file", "shards"])
def test_only_what_is_copied_is_read(
    family: str, route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor once, none of the other blocks: memory is the student's, not the teacher's."""
    source = given(FAMILIES[family](), route, tmp_path)
    seen = watched(monkeypatch)
    FromTeacher(layers=(1, 4)).load(source)
    names = [name for name, _ in seen]
    numbers = {name.split(".layers.")[-1].split(".layer.")[-1].split(".")[0] for name in names}
    assert {n for n in numbers if n.isdigit()} == {"0", "3"}
    assert len(names) == len(set(names)) > 10


class TestRefused:
    def test_a_teacher_with_adapters(self) -> None:
        model = get_peft_model(tiny.llama("teacher"), LoraConfig(target_modules=["q_proj"]))
        teacher: Any = model
        with pytest.raises(InputError, match=r"adapters; give teacher.merge_and_unload\(\)"):
            FromTeacher(2).load(Local(teacher))
        merged: Any = model.merge_and_unload()
        assert torch.equal(logits(FromTeacher(4).load(Local(merged))), logits(plain(merged)))

    def test_weights_that_are_elsewhere(self) -> None:
        teacher = tiny.llama("teacher")
        teacher.lm_head.weight = nn.Parameter(teacher.lm_head.weight.to("meta"))
        with pytest.raises(InputError, match=r"lm_head.weight of the loaded teacher .* is not in "):
            FromTeacher(2).load(Local(teacher))

    def test_weights_that_are_missing(self, tmp_path: Path) -> None:
        teacher = tiny.llama("teacher")
        state = {k: v for k, v in teacher.state_dict().items() if "layers.3.mlp.up" not in k}
        teacher.save_pretrained(tmp_path, state_dict=state)
        with pytest.raises(InputError, match=r"have no model.layers.3.mlp.up_proj.weight, which "):
            FromTeacher(2).load(Local(str(tmp_path)))
        FromTeacher(2, "first").load(Local(str(tmp_path)))  # whose blocks are all there

    def test_no_weights_at_all(self, tmp_path: Path) -> None:
        tiny.llama("teacher").config.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"the weights of '.*' cannot be read: "):
            FromTeacher(2).load(Local(str(tmp_path)))


def test_the_revision_is_the_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the teacher itself, and for nothing else."""
    model = tiny.llama("teacher")
    model.save_pretrained(tmp_path)
    seen: list[dict[str, Any]] = []
    whole = type(model).from_pretrained.__func__  # type: ignore[attr-defined]  # to spy

    def record(kind: Any, /, name: str, **options: Any) -> Any:
        seen.append({"name": name, **options})
        return whole(kind, name, **{k: v for k, v in options.items() if k != "revision"})

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(record))
    FromTeacher(2).load(Local(str(tmp_path), revision="v1"))
    FromTeacher(2).load(Local(str(tmp_path)))
    assert [options.get("revision") for options in seen] == ["v1", None]


def test_a_recipe_distils_into_a_cut_student(tmp_path: Path) -> None:
    """Two steps; what is saved is a plain model that knows its blocks."""
    on_disk.fill(tmp_path)
    document = on_disk.document(tmp_path)
    document["student"] = {"llm_distill.students:FromTeacher": {"depth": 2}}
    document["objectives"] = ["Logits", {"HiddenStates": {"layers": "last"}}]
    recipe = Recipe.of(document, allow_code=["llm_distill.students"])
    figures = run(recipe)
    assert figures["eval_kl"] > 0
    teacher = tiny.llama("teacher", vocabulary=on_disk.VOCABULARY)
    model, told = auto(teacher).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert model.config.num_hidden_layers == 2
    assert Provenance.read(model.config) == Provenance((1, 4), 4, "teacher")
    start = FromTeacher(2).load(Local(teacher))
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert torch.allclose(model.lm_head.weight, start.lm_head.weight, atol=0.1)
