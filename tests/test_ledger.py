"""What is counted between two logs, and what the terms hear of each step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState

from llm_distill import CrossEntropy, HiddenStates, Logits, Taid
from llm_distill.balance import gradient, uncertainty
from llm_distill.binding import bind
from llm_distill.faults import CONTEXT, FIELDS
from llm_distill.ledger import AfterStep, Ledger, Ranks, logs_next
from llm_distill.objectives import MEASURES, Term
from llm_distill.objectives.moving import MovingTerm
from llm_distill.outcomes import Outcome
from llm_distill.signals import ModelSpec, Request
from tests import tiny

CPU = torch.device("cpu")
SPEC = ModelSpec("m", "llama", 2, 8, 2, 7)


def terms(*objectives: Any) -> dict[str, Term]:
    return bind(objectives or (CrossEntropy(), Logits()), SPEC, SPEC, seed=0)


def ledger(*objectives: Any, ranks: int = 1) -> Ledger:
    """Of one rank, or of several that all saw the same."""

    def reduce(values: Tensor) -> Tensor:
        return values * ranks

    def gather(values: Tensor) -> Tensor:
        return torch.cat([values] * ranks)

    return Ledger(terms(*objectives), Ranks(CPU, reduce, gather))


def outcome(*sums: float, fault: bool = False) -> Outcome:
    faults = torch.zeros(len(FIELDS) + CONTEXT, dtype=torch.int64)
    faults[0] = int(fault)
    return Outcome(torch.tensor(0.0), torch.tensor(sums), faults, None)


def add(kept: Ledger, *sums: float, rows: int, items: float | None = None, **options: Any) -> None:
    """A micro-batch of `rows` rows of a step of `items`."""
    whole = torch.full((2,), float(rows) if items is None else items)
    kept.add(outcome(*sums, **options), [rows] * 2, rows, items=whole, step=1)


class TestReport:
    def test_terms_are_means_over_all_steps(self) -> None:
        kept = ledger()
        add(kept, 6.0, 3.0, rows=3)
        add(kept, 2.0, 5.0, rows=1)
        assert kept.report() == {"loss/CrossEntropy": 2.0, "loss/Logits": 2.0}
        assert kept.report() == {}

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_measures_are_means_over_the_steps_that_took_them(self, ranks: int) -> None:
        kept = ledger(ranks=ranks)
        add(kept, 8.0, 8.0, rows=4)
        measured = dict(zip(MEASURES, (1.0, 2.0, 6.0, 1.5, 9.0), strict=True))
        add(kept, 3.0, 3.0, *measured.values(), rows=3)
        loss = pytest.approx(11 / 7)
        shown = {"loss/CrossEntropy": loss, "loss/Logits": loss}
        assert kept.report() == shown | {"kl": 2.0, "agreement": 0.5, "entropy": 3.0}

    def test_what_a_sparse_teacher_does_not_tell_is_left_out(self) -> None:
        kept = ledger()
        add(kept, 3.0, 3.0, 1.0, math.nan, 6.0, math.nan, 9.0, rows=3)
        assert kept.report().keys() == {"loss/CrossEntropy", "loss/Logits", "kl", "entropy"}

    def test_an_infinite_measure_is_told(self) -> None:
        kept = ledger()
        add(kept, 3.0, 3.0, 1.0, 2.0, math.inf, 1.0, 9.0, rows=3)
        assert kept.report()["kl"] == math.inf

    def test_a_fault_is_raised_once(self) -> None:
        kept = ledger()
        add(kept, 3.0, math.nan, rows=3, fault=True)
        with pytest.raises(FloatingPointError, match="1 row had a loss that is no number"):
            kept.report()
        kept.check()

    def test_the_term_at_fault_is_one_of_those_on_logits(self) -> None:
        """They are numbered among themselves."""
        kept = ledger(HiddenStates(), Logits())
        add(kept, 3.0, math.nan, rows=3, fault=True)
        with pytest.raises(FloatingPointError, match="The first: Logits at step 1"):
            kept.check()

    def test_a_reset_forgets(self) -> None:
        kept = ledger()
        add(kept, 3.0, math.nan, rows=3, fault=True)
        kept.reset()
        assert kept.report() == {}


class TestAfterStep:
    MOVING = Logits(target=Taid(start=0.2, pace=0.5, momentum=0.5))

    def moving(self, kept: Ledger) -> MovingTerm:
        term = kept._terms["Logits"]
        assert isinstance(term, MovingTerm)
        return term

    def test_terms_hear_the_mean_of_the_whole_step(self) -> None:
        """Micro-batches of 3 and 1 rows on each of two ranks."""
        kept = ledger(CrossEntropy(), self.MOVING, ranks=2)
        add(kept, 1.0, 6.0, rows=3, items=8.0)
        add(kept, 1.0, 4.0, rows=1, items=8.0)
        kept.after_step(0.25)
        assert float(self.moving(kept).before) == 2.5
        assert float(self.moving(kept).mix) == pytest.approx(0.4)
        add(kept, 1.0, 8.0, rows=4, items=8.0)
        kept.after_step(0.25)
        assert float(self.moving(kept).before) == 2.0  # nothing of the step before

    def test_a_step_without_items_is_no_news(self) -> None:
        kept = ledger(CrossEntropy(), self.MOVING)
        add(kept, 1.0, 6.0, rows=3)
        kept.after_step(0.0)
        add(kept, 0.0, 0.0, rows=0, items=0.0)
        kept.after_step(0.0)
        assert (float(self.moving(kept).before), float(self.moving(kept).momentum)) == (2.0, 0.0)

    def test_a_share_of_the_target_is_logged(self) -> None:
        kept = ledger(CrossEntropy(), self.MOVING)
        add(kept, 1.0, 6.0, rows=3)
        assert kept.report()["target/Logits"] == pytest.approx(0.2)

    def test_the_host_reads_nothing(self) -> None:
        """`meta` tensors have no values that could be read."""
        meta = torch.device("meta")
        moving = bind([CrossEntropy(), self.MOVING], SPEC, SPEC, seed=0)
        for term in moving.values():
            term.to(meta)
        kept = Ledger(moving, Ranks(meta, torch.clone, torch.clone))
        one = outcome(1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0)
        given = one._replace(sums=one.sums.to(meta), faults=one.faults.to(meta))
        kept.add(given, [3, 3], 3, items=torch.ones(2, device=meta), step=1)
        kept.after_step(0.5)
        with pytest.raises(RuntimeError, match="meta"):
            kept.report()

    def test_nothing_is_reduced_where_no_term_adapts(self) -> None:
        def never(values: Tensor) -> Tensor:
            raise AssertionError(values)

        kept = Ledger(terms(), Ranks(CPU, never, never))
        kept.after_step(0.5)

    def test_the_callback_tells_the_progress(self) -> None:
        kept = ledger(CrossEntropy(), self.MOVING)
        add(kept, 1.0, 6.0, rows=3)
        state = TrainerState(global_step=3, max_steps=4)
        AfterStep(kept).on_step_end(tiny.arguments("out"), state, TrainerControl())
        assert float(self.moving(kept).mix) == pytest.approx(0.2 + 0.8 * 0.75)


class Watching(Term):
    """Hears what it observed."""

    observes = 2

    def __init__(self) -> None:
        super().__init__(Request(), Request())
        self.heard: list[tuple[float, list[float]]] = []

    def after_step(self, value: Tensor, progress: float, observed: Tensor | None = None) -> None:
        assert observed is not None
        self.heard.append((float(value), observed.tolist()))


class TestObserved:
    def watching(self, ranks: int = 1) -> tuple[Ledger, Watching]:
        term = Watching()
        kept = {"CrossEntropy": terms()["CrossEntropy"], "watching": term}
        return Ledger(kept, Ranks(CPU, lambda values: values * ranks, torch.clone)), term

    def observe(self, term: Watching, *values: float) -> None:
        assert term.observed is not None
        term.observed += torch.tensor(values)

    def test_sums_are_over_micro_batches_and_ranks_and_start_anew(self) -> None:
        kept, term = self.watching(ranks=2)
        for first, second in ((1.0, 4.0), (2.0, 8.0)):
            self.observe(term, first, second)
            add(kept, 1.0, 6.0, rows=2, items=8.0)
        kept.after_step(0.5)
        kept.after_step(0.5)
        assert term.heard == [(3.0, [6.0, 24.0]), (0.0, [0.0, 0.0])]

    def test_it_is_no_part_of_the_state(self) -> None:
        """DDP replaces buffers by rank 0's before every forward."""
        _, term = self.watching()
        assert term.observed is not None
        assert (term.observed.shape, term.observed.dtype) == ((2,), torch.float32)
        assert term.state_dict() == {}
        assert not list(term.buffers())

    @pytest.mark.parametrize("forget", [Ledger.reset, Ledger.forget_observed])
    def test_it_is_forgotten_in_place(self, forget: Callable[[Ledger], None]) -> None:
        """Hooks may hold on to it."""
        kept, term = self.watching()
        held = term.observed
        self.observe(term, 1.0, 2.0)
        forget(kept)
        assert term.observed is held
        kept.after_step(0.5)
        assert term.heard == [(0.0, [0.0, 0.0])]

    def test_most_observe_nothing_and_are_no_gates(self) -> None:
        kept = ledger()
        assert all(term.observed is None for term in kept._terms.values())
        assert all(term.factor() is None for term in kept._terms.values())


class TestBalance:
    def test_it_hears_the_means_of_the_whole_step(self) -> None:
        balance = uncertainty(terms(), 2, learning_rate=0.1)
        kept = Ledger(terms(), Ranks(CPU, lambda values: 2 * values, torch.clone), balance)
        add(kept, 1.5, 2.0, rows=3, items=8.0)
        add(kept, 0.5, 4.0, rows=1, items=8.0)
        kept.after_step(0.5)
        state = balance.state_dict()["s"]
        assert state.tolist() == pytest.approx([-0.1 * (1 - 0.5), -0.1 * (1 - 1.5)])

    def test_one_that_does_not_listen_costs_no_sum_over_ranks(self) -> None:
        def never(values: Tensor) -> Tensor:
            raise AssertionError(values)

        kept = Ledger(terms(), Ranks(CPU, never, never), gradient(terms(), 2))
        kept.after_step(0.5)


@pytest.mark.parametrize(
    ("options", "done", "expected"),
    [
        ({"logging_steps": 1}, 0, True),
        ({"logging_steps": 3}, 1, False),
        ({"logging_steps": 3}, 2, True),
        ({"logging_steps": 3}, 0, False),
        ({"logging_steps": 3, "logging_first_step": True}, 0, True),
        ({"logging_steps": 3, "logging_first_step": True}, 1, False),
        ({"logging_strategy": "no", "logging_steps": 1}, 0, False),
        ({"logging_strategy": "epoch", "logging_steps": 1}, 0, False),
        ({"logging_steps": 0.25}, 1, True),  # of 8 steps: every second
        ({"logging_steps": 0.25}, 2, False),
    ],
)
def test_steps_that_will_be_logged(options: dict[str, Any], done: int, expected: bool) -> None:
    args = tiny.arguments("out", **options)
    state = TrainerState(global_step=done, max_steps=8)
    state.compute_steps(args, 8)
    assert logs_next(args, state) is expected
