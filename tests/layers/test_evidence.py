"""What strategies ask for, and the words when it is not there."""

from functools import partial

import pytest
import torch

from llm_distill import layers
from llm_distill.layers import LayerEvidence, LayerMap, LayerStrategy, Similarity, asks, decide
from llm_distill.layers.evidence import figures

SIMILARITY = Similarity(torch.eye(7), torch.zeros(7, 7))
CROSS = Similarity(torch.eye(4, 7), torch.full((4, 7), 1e-3))
ALL = LayerEvidence(SIMILARITY, CROSS, (1, 4, 6))

ASKS: dict[str, set[str]] = {
    "arc_length": {"similarity"},
    "auto": {"similarity"},
    "auto_race": {"race"},
    "cka": {"cross", "similarity"},
    "coverage": {"similarity"},
    "explicit": set(),
    "first": set(),
    "last": set(),
    "learned": set(),
    "provenance": {"blocks"},
    "random": {"epoch"},
    "reverse": set(),
    "saved": set(),
    "segmentation": {"similarity"},
    "skip": set(),
    "transport": {"cross"},
    "uniform": set(),
}


def strategy(name: str) -> LayerStrategy:
    found: LayerStrategy = vars(layers)[name]
    return found


@pytest.mark.parametrize("name", sorted(set(layers.__all__) - {"LayerMap"}))
def test_what_each_strategy_asks_for(name: str) -> None:
    assert asks(strategy(name)) == ASKS[name]


def test_what_is_bound_is_not_asked_for() -> None:
    assert asks(partial(layers.random, seed=4)) == {"epoch"}
    assert asks(partial(layers.random, epoch=0)) == frozenset()
    assert asks(partial(layers.cka, cross=CROSS)) == {"similarity"}
    assert asks(partial(layers.cka, cross=None, prior=0.0)) == {"cross", "similarity"}
    assert asks(layers.uniform(2, 4)) == frozenset()


def test_a_strategy_of_ones_own() -> None:
    def mine(student_depth: int, teacher_depth: int, *, similarity: Similarity) -> LayerMap:
        return LayerMap.of(
            [(1, int(similarity.values.sum()))], student_depth, teacher_depth, "mine"
        )

    own: LayerStrategy = mine  # type: ignore[assignment]  # a user's own
    assert asks(own) == {"similarity"}
    assert decide(own, 3, 9, ALL).pairs == ((1, 7),)
    with pytest.raises(ValueError, match="mine goes by how similar the teacher's layers are"):
        decide(own, 3, 9, LayerEvidence())


def test_strategies_are_told_what_they_ask_for() -> None:
    assert decide(layers.provenance, 3, 6, ALL).pairs == ((1, 3), (2, 5), (3, 6))
    assert decide(layers.segmentation, 3, 6, ALL) == layers.segmentation(
        3, 6, similarity=SIMILARITY
    )
    assert decide(layers.transport, 3, 6, ALL) == layers.transport(3, 6, cross=CROSS)
    assert decide(layers.uniform, 3, 6, LayerEvidence()) == layers.uniform(3, 6)
    assert decide(layers.random, 3, 6, LayerEvidence()) == layers.random(3, 6, epoch=0)
    chosen = layers.uniform(3, 6)
    assert decide(chosen, 3, 6, LayerEvidence()) is chosen


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("provenance", r"layers: provenance goes by the teacher blocks that the student was cut "
         r"from, and this student was not cut from its teacher; write FromTeacher .* write auto"),
        ("segmentation", r"segmentation goes by how similar the teacher's layers are to each"),
        ("arc_length", r"arc_length goes by how similar .* was not measured: calibration does"),
        ("auto", r"auto goes by how similar .* write uniform, or a map of your own"),
        ("cka", r"cka goes by how similar"),
        ("transport", r"transport goes by how similar the student's layers are to the teacher's"),
        ("auto_race", r"auto_race goes by the winner of a race, .*: a race decides it"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_in_words(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decide(strategy(name), 3, 6, LayerEvidence())
    with pytest.raises(ValueError, match=message):
        strategy(name)(3, 6)


@pytest.mark.parametrize("name", ["segmentation", "coverage", "arc_length", "auto", "cka"])
def test_evidence_of_another_teacher_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"similarity has shape \[7, 7\]; these depths need \[9, 9\], the embedding",
    ):
        decide(
            strategy(name),
            3,
            8,
            LayerEvidence(SIMILARITY, Similarity(torch.eye(4, 9), torch.ones(4, 9))),
        )


@pytest.mark.parametrize("name", ["cka", "transport"])
def test_evidence_of_another_student_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"cross has shape \[4, 7\]; these depths need \[3, 7\]"):
        decide(strategy(name), 2, 6, ALL)


def test_figures_that_are_not_finite_are_refused() -> None:
    wrong = Similarity(torch.full((7, 7), torch.nan), torch.zeros(7, 7))
    with pytest.raises(ValueError, match="similarity has values that are not finite; measure it"):
        figures(wrong, 6, 6, "similarity")


@pytest.mark.parametrize("name", sorted(set(layers.__all__) - {"LayerMap", "saved", "auto_race"}))
@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (1, 6), (3, 1), (7, 3), (4, 4)])
def test_every_strategy_works_or_refuses_in_words(name: str, student: int, teacher: int) -> None:
    """A student of one block, and one deeper than its teacher, included."""
    found = strategy(name)
    if name == "explicit":
        found = partial(layers.explicit, pairs=[[-1, -1]])
    draw = torch.Generator().manual_seed(0)
    evidence = LayerEvidence(
        Similarity(torch.rand(teacher + 1, teacher + 1, generator=draw), torch.zeros(1)),
        Similarity(
            torch.rand(student + 1, teacher + 1, generator=draw),
            torch.full((student + 1, teacher + 1), 0.01),
        ),
        sorted(1 + k * teacher // student for k in range(student)),
    )
    if name == "skip" and student == 1:
        with pytest.raises(ValueError, match=r"skip, stride .* maps no layer for depths 1"):
            decide(found, student, teacher, evidence)
        return
    mapping = decide(found, student, teacher, evidence)
    assert mapping.student_layers <= set(range(1, student + 1))
    assert mapping.teacher_layers <= set(range(1, teacher + 1))
    assert LayerMap(mapping.rows, student, teacher, "again").rows == mapping.rows
    if name in (
        "arc_length",
        "auto",
        "cka",
        "coverage",
        "explicit",
        "last",
        "provenance",
        "segmentation",
    ):
        assert mapping.pairs[-1] == (student, teacher)
