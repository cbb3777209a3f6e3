"""Which blocks a cut student takes, and what it is told where that cannot be."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig, LlamaConfig

from llm_distill import Local
from llm_distill.errors import InputError
from llm_distill.provenance import Provenance
from llm_distill.recipe import Recipe
from llm_distill.students import FromTeacher
from tests import tiny


class TestBlocks:
    @pytest.mark.parametrize(
        ("layers", "depth", "of", "expected"),
        [
            ("ends", 4, 12, (1, 4, 8, 12)),
            ("ends", 3, 12, (1, 6, 12)),
            ("ends", 2, 12, (1, 12)),
            ("ends", 1, 12, (1,)),
            ("uniform", 4, 12, (3, 6, 9, 12)),
            ("uniform", 3, 8, (3, 5, 8)),
            ("uniform", 1, 12, (12,)),
            ("first", 3, 12, (1, 2, 3)),
        ],
    )
    def test_by_a_word(self, layers: Any, depth: int, of: int, expected: tuple[int, ...]) -> None:
        assert FromTeacher(depth, layers).blocks(of) == expected

    @pytest.mark.parametrize("layers", ["ends", "uniform", "first"])
    def test_every_depth_gives_that_many_ascending_blocks(self, layers: Any) -> None:
        for of in range(1, 30):
            for depth in range(1, of + 1):
                blocks = FromTeacher(depth, layers).blocks(of)
                assert blocks == tuple(sorted(set(blocks)))
                assert len(blocks) == depth
                assert blocks[0] >= 1
                assert blocks[-1] <= of
            assert FromTeacher(of, layers).blocks(of) == tuple(range(1, of + 1))

    @pytest.mark.parametrize("layers", ["ends", "uniform"])
    def test_gaps_differ_by_one_at_most(self, layers: Any) -> None:
        for of in range(2, 30):
            for depth in range(2, of + 1):
                blocks = FromTeacher(depth, layers).blocks(of)
                gaps = {b - a for a, b in pairwise(blocks)}
                assert max(gaps) - min(gaps) <= 1
                assert blocks[-1] == of

    def test_by_numbers(self) -> None:
        assert FromTeacher(layers=[1, 4, -1]).blocks(12) == (1, 4, 12)
        assert FromTeacher(3, [-3, -2, -1]).blocks(12) == (10, 11, 12)

    @pytest.mark.parametrize(
        ("depth", "layers", "message"),
        [
            (13, "ends", r"depth is 13 and the teacher has 12 blocks; write a depth in 1\.\.12"),
            (None, [1, 13], r"names block 13 and the teacher has 12; write numbers in 1\.\.12"),
            (None, [-13, 1], r"names block -13 and the teacher has 12; .* or -12\.\.-1 from the"),
            (None, [4, 1], r"is \[4, 1\], of 12 blocks \[4, 1\]; .* ascending order: \[1, 4\]"),
            (None, [1, 12, -1], r"of 12 blocks \[1, 12, 12\]; write each once, .*: \[1, 12\]"),
        ],
    )
    def test_what_a_teacher_does_not_have(
        self, depth: int | None, layers: Any, message: str
    ) -> None:
        with pytest.raises(InputError, match=f"FromTeacher: .*{message}"):
            FromTeacher(depth, layers).blocks(12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "depth is missing; write how many blocks, such as depth: 4"),
        ({"depth": 0}, "depth is 0; write a number of blocks from 1 on"),
        ({"depth": True}, "depth is True; write a number of blocks"),
        ({"depth": 2.5}, r"depth is 2\.5; write a number of blocks"),
        ({"depth": 2, "layers": "end"}, "layers is 'end'; write one of ends, uniform, first, or"),
        ({"layers": []}, r"layers is \[\]; write numbers of blocks"),
        ({"layers": [0, 1]}, r"layers is \[0, 1\]; .* counted from 1 or, negative, from the end"),
        ({"layers": [1, "2"]}, r"layers is \[1, '2'\]; write numbers"),
        ({"layers": [True, 2]}, r"layers is \[True, 2\]; write numbers"),
        ({"depth": 3, "layers": [1, 2]}, "depth is 3 and layers names 2 blocks; leave depth out"),
        ({"depth": 2, "dtype": "fp32"}, "dtype is 'fp32'; write one of float32"),
    ],
)
def test_what_no_teacher_could_give(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"FromTeacher: {message}"):
        FromTeacher(**given)


def test_its_name() -> None:
    assert str(FromTeacher(4)) == "FromTeacher(ends 4)"
    assert str(FromTeacher(layers=[1, 2, -1])) == "FromTeacher(1, 2, -1)"
    assert hash(FromTeacher(layers=[1, 2])) == hash(FromTeacher(layers=(1, 2)))


class TestResolve:
    def test_the_config_is_the_teachers_with_fewer_blocks(self) -> None:
        teacher = LlamaConfig(num_hidden_layers=12, rms_norm_eps=1e-3)
        made = FromTeacher(4).resolve(teacher)
        assert (made.num_hidden_layers, made.rms_norm_eps) == (4, 1e-3)
        assert Provenance.read(made) == Provenance((1, 4, 8, 12), 12, "llama")
        assert teacher.num_hidden_layers == 12
        assert Provenance.read(teacher) is None

    @pytest.mark.parametrize(
        ("name", "shown"), [("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), ("/home/me/secret/t", "t")]
    )
    def test_paths_do_not_get_into_the_config(self, name: str, shown: str) -> None:
        teacher = LlamaConfig(num_hidden_layers=2)
        teacher.name_or_path = name
        made = FromTeacher(1).resolve(teacher)
        found = Provenance.read(made)
        assert found is not None
        assert found.teacher == shown
        assert "secret" not in made.to_json_string()

    def test_a_student_of_a_student_names_the_blocks_of_its_own_teacher(self) -> None:
        first = FromTeacher(4).resolve(LlamaConfig(num_hidden_layers=12))
        second = Provenance.read(FromTeacher(2).resolve(first))
        assert second == Provenance((1, 4), 4, "llama")

    def test_kinds_of_blocks_are_cut_along(self) -> None:
        kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
        teacher = Gemma3TextConfig(num_hidden_layers=4, layer_types=kinds)
        made = FromTeacher(layers=[2, 4]).resolve(teacher)
        assert made.layer_types == ["full_attention", "sliding_attention"]

    def test_quantised_weights_are_refused(self) -> None:
        quantised: dict[str, Any] = {"quantization_config": {"quant_method": "fp8"}}
        teacher = LlamaConfig(**quantised)
        with pytest.raises(InputError, match=r"weights are quantised, .* trained in float32; take"):
            FromTeacher(2).resolve(teacher)


def test_a_teacher_without_weights_here_is_refused() -> None:
    class Remote:
        def __init__(self) -> None:
            self.config = tiny.llama("teacher").config

    teacher: Any = Remote()
    with pytest.raises(InputError, match="the teacher is a Remote, whose weights are not here"):
        FromTeacher(2).load(teacher)


def recipe(arguments: dict[str, Any]) -> Recipe:
    student = {"llm_distill.students:FromTeacher": arguments}
    content = {"student": student, "teacher": "t", "data": {"path": "d"}}
    return Recipe.of(content, allow_code=["llm_distill.students"])


class TestInARecipe:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ({"depth": 4}, FromTeacher(4)),
            ({"depth": 4, "layers": "uniform"}, FromTeacher(4, "uniform")),
            (
                {"layers": [1, 4, -1], "dtype": "bfloat16"},
                FromTeacher(None, (1, 4, -1), "bfloat16"),
            ),
        ],
    )
    def test_words_and_lists(self, arguments: dict[str, Any], expected: FromTeacher) -> None:
        made = recipe(arguments)
        assert made.student == expected
        assert made.teacher == Local("t")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"depth": 4, "layers": "unifrm"}, r"layers: 'unifrm' .* did you mean 'uniform'"),
            ({"depth": 0}, "depth is 0; write a number of blocks from 1 on"),
            ({"dept": 4}, "FromTeacher has no 'dept'; did you mean 'depth'"),
            ({"layers": [1, "x"]}, r"layers\[1\]: 'x' is not .* an integer"),
        ],
    )
    def test_what_it_refuses(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            recipe(arguments)


def test_paths_of_pathlib(tmp_path: Path) -> None:
    tiny.llama("teacher").save_pretrained(tmp_path)
    model: Any = tmp_path
    assert FromTeacher(2).load(Local(model)).config.num_hidden_layers == 2
