import pytest
import torch

from llm_distill import HiddenStates, Logits, binding
from llm_distill.balance import Balance, uncertainty
from llm_distill.cli.console import Screen
from llm_distill.layers import (
    LayerEvidence,
    LayerMap,
    Row,
    Similarity,
    segmentation,
    transport,
    uniform,
)
from llm_distill.signals import ModelSpec

STUDENT = ModelSpec("[me]/student", "llama", 2, 32, 4, 128, 64)
TEACHER = ModelSpec("teacher", "gpt2", 4, 64, 8, 50257)


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """Every table."""
    objectives = (Logits(temperature=2.0), HiddenStates(weight=0.5, layers=uniform))
    screen = Screen(speaks=True)
    screen.models(STUDENT, TEACHER)
    screen.objectives(objectives, binding.bind(objectives, STUDENT, TEACHER, seed=0))
    told = {
        "eval_extra": 1.0,
        "eval_kl": 0.12345,
        "eval_agreement": 0.5,
        "eval_perplexity": 12345.6,
    }
    screen.figures(told)
    screen.say("a [bold] line that is longer than a terminal is wide, and " + "x" * 80)
    return capsys.readouterr().out


def test_models_stand_side_by_side(shown: str) -> None:
    assert "│ name       │ [me]/student │ teacher │" in shown
    assert "│ vocabulary │ 128          │ 50,257  │" in shown
    assert "│ positions  │ 64           │ -       │" in shown


def test_objectives_have_their_layer_maps(shown: str) -> None:
    assert "forward_kl, temperature 2, scaling T2" in shown
    assert "student layer | teacher layer   uniform" in shown
    assert "2 | 4 of 4" in shown
    assert "trained parameters, not part of the student" in shown


def test_the_kl_of_a_sparse_teacher_is_called_what_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Screen(speaks=True).figures({"eval_kl": 0.12345, "eval_perplexity": 12345.6})
    shown = capsys.readouterr().out
    assert "KL on the tokens that the teacher told alone" in shown
    assert "KL(teacher || student)" not in shown


def test_figures_are_ordered_as_people_ask(shown: str) -> None:
    at = [shown.index(word) for word in ("perplexity", "KL(teacher || student)", "extra")]
    assert at == sorted(at)
    assert "1.235e+04" in shown
    assert "0.1235" in shown


def test_lines_are_neither_markup_nor_wrapped(shown: str) -> None:
    assert "a [bold] line that is longer than a terminal is wide, and " + "x" * 80 in shown


def test_a_balance_is_told_where_weights_move(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(speaks=True)
    screen.balance(Balance())
    assert capsys.readouterr().out == ""
    screen.balance(uncertainty({}, 2))
    assert capsys.readouterr().out == "Balance: uncertainty: s learned at 0.01, not below -5\n"


def test_other_processes_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(speaks=False)
    screen.say("x")
    screen.models(STUDENT, TEACHER)
    assert capsys.readouterr().out == ""


def cells(text: str) -> list[list[str]]:
    """The rows of a table."""
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in text.splitlines()
        if line.startswith("│")
    ]


class TestLayerMaps:
    TEACHER = Similarity(
        torch.block_diag(torch.ones(1, 1), torch.full((2, 2), 0.9), torch.full((2, 2), 0.8)),
        torch.full((5, 5), 0.01),
    )
    CROSS = Similarity(torch.arange(15.0).reshape(3, 5) / 20, torch.full((3, 5), 0.02))

    def test_runs_and_their_similarities(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = segmentation(2, 4, similarity=self.TEACHER)
        Screen(speaks=True).layer_map("a name", found, LayerEvidence(self.TEACHER, self.CROSS))
        said = capsys.readouterr().out
        assert said.startswith("a name: segmentation\n")
        for words in ("student layer", "teacher layer of 4", "finishes blocks"):
            assert words in said
        assert cells(said) == [
            ["1", "2", "1-2", "0.900", "0.350 ± 0.020"],
            ["2", "4", "3-4", "0.800", "0.700 ± 0.020"],
        ]
        assert "mean similarity to the end of the segment: 0.85" in said

    def test_mixtures_and_weights(self, capsys: pytest.CaptureFixture[str]) -> None:
        rows = (Row(1, ((1, 0.2), (2, 0.8)), 2.0), Row(2, ((4, 1.0),)))
        mixed = LayerMap(rows, 2, 4, "by [bold]hand", trained=True)
        Screen(speaks=True).layer_map("HiddenStates", mixed, LayerEvidence(cross=self.CROSS))
        said = capsys.readouterr().out
        assert "HiddenStates: by [bold]hand, shares are trained" in said
        assert cells(said) == [
            ["1", "1 (20%) + 2 (80%)", "0.340", "2"],
            ["2", "4", "0.700 ± 0.020", "1"],
        ]

    def test_nothing_measured(self, capsys: pytest.CaptureFixture[str]) -> None:
        Screen(speaks=True).layer_map("HiddenStates", uniform(2, 4), LayerEvidence())
        said = capsys.readouterr().out
        assert cells(said) == [["1", "2", "1-2"], ["2", "4", "3-4"]]
        assert "similarity" not in said

    def test_a_block_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        mapping = transport(1, 4, cross=Similarity(torch.eye(2, 5), torch.zeros(2, 5)))
        Screen(speaks=True).layer_map("x", mapping, LayerEvidence())
        assert "finishes" not in capsys.readouterr().out
        Screen(speaks=True).layer_map("x", uniform(4, 4), LayerEvidence())
        assert ["3", "3", "3"] in cells(capsys.readouterr().out)
