import pytest

from llm_distill import HiddenStates, Logits, binding
from llm_distill.cli.console import Screen
from llm_distill.signals import ModelSpec

STUDENT = ModelSpec("[me]/student", "llama", 2, 32, 4, 128, 64)
TEACHER = ModelSpec("teacher", "gpt2", 4, 64, 8, 50257)


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """Every table."""
    objectives = (Logits(temperature=2.0), HiddenStates(weight=0.5))
    screen = Screen(speaks=True)
    screen.models(STUDENT, TEACHER)
    screen.objectives(objectives, binding.bind(objectives, STUDENT, TEACHER, seed=0))
    screen.figures({"eval_extra": 1.0, "eval_kl": 0.12345, "eval_perplexity": 12345.6})
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


def test_figures_are_ordered_as_people_ask(shown: str) -> None:
    at = [shown.index(word) for word in ("perplexity", "KL(teacher || student)", "extra")]
    assert at == sorted(at)
    assert "1.235e+04" in shown
    assert "0.1235" in shown


def test_lines_are_neither_markup_nor_wrapped(shown: str) -> None:
    assert "a [bold] line that is longer than a terminal is wide, and " + "x" * 80 in shown


def test_other_processes_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(speaks=False)
    screen.say("x")
    screen.models(STUDENT, TEACHER)
    assert capsys.readouterr().out == ""
