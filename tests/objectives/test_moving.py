"""Moving targets: ranges, the schedule against plain floats, and what the target is."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill import Logits, Taid, forward_kl, jsd, reverse_kl, tvd
from llm_distill.objectives.moving import MovingTerm
from llm_distill.signals import ModelSpec, Request
from tests import reference

LABELS = torch.tensor([0, 3, 6, 2])


def spec(vocabulary: int) -> ModelSpec:
    return ModelSpec("m", "llama", 2, 8, 2, vocabulary)


def bound(**options: Any) -> MovingTerm:
    term = Logits(**options).build(spec(7), spec(9))
    assert isinstance(term, MovingTerm)
    return term


def draw(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(4, width, generator=generator, dtype=torch.float64)


class TestRanges:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"start": -0.1}, r"start=-0.1, end=1.0; write 0 <= start <= end <= 1"),
            ({"end": 1.1}, r"end=1.1; write 0 <= start <= end <= 1"),
            ({"start": 0.6, "end": 0.5}, r"start=0.6, end=0.5; write 0 <= start <= end"),
            ({"start": math.nan}, "start=nan"),
            ({"pace": -1e-4}, r"pace=-0.0001; write a finite number >= 0 \(5e-4\)"),
            ({"pace": math.inf}, "pace=inf"),
            ({"momentum": 1.0}, r"momentum=1.0; write 0 <= momentum < 1 \(0.99\)"),
            ({"momentum": -0.1}, "momentum=-0.1"),
            ({"momentum": math.nan}, "momentum=nan"),
        ],
    )
    def test_impossible_numbers_are_refused(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=f"^Taid: {message}|^Taid: .*{message}"):
            Taid(**options)

    @pytest.mark.parametrize("options", [{"start": 0.0, "end": 0.0}, {"start": 1.0}, {"pace": 0.0}])
    def test_the_ends_of_the_ranges_are_fine(self, options: Any) -> None:
        assert Taid(**options).describe().startswith("target Taid")


def falls(kind: str, steps: int = 60) -> list[float]:
    """Losses of a training."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(steps, generator=generator).tolist()
    return {
        "falling": [3.0 * 0.9**k for k in range(steps)],
        "rising": [0.1 * 1.2**k for k in range(steps)],
        "noisy": [2.0 * x + 0.1 for x in noise],
        "from zero": [0.0, 0.0, *[0.5 + x for x in noise[2:]]],
        "with gaps": [math.nan if k % 5 == 2 else 1.0 + noise[k] for k in range(steps)],
        "infinite": [math.inf if k == 4 else 1.0 + noise[k] for k in range(steps)],
    }[kind]


class TestSchedule:
    @pytest.mark.parametrize("kind", ["falling", "rising", "noisy", "from zero", "with gaps"])
    @pytest.mark.parametrize(
        "target",
        [
            Taid(),
            Taid(start=0.0, end=0.8, pace=0.2, momentum=0.5),
            Taid(start=0.2, pace=0.05, momentum=0.9),
            Taid(start=0.3, end=0.3),
            Taid(pace=0.0),
        ],
    )
    def test_it_is_the_reference(self, target: Taid, kind: str) -> None:
        losses = falls(kind)
        settings = (target.start, target.end, target.pace, target.momentum)
        expected = reference.taid(losses, *settings)
        term = bound(target=target)
        got = []
        for k, loss in enumerate(losses):
            term.after_step(torch.tensor(loss, dtype=torch.float64), (k + 1) / len(losses))
            got.append(float(term.mix))
        assert got == pytest.approx(expected, abs=1e-5)
        assert got[-1] == pytest.approx(target.end)

    def test_it_never_goes_back_nor_behind_the_line(self) -> None:
        term, target, last = bound(target=Taid(pace=0.3)), Taid(pace=0.3), 0.0
        for k, loss in enumerate(falls("noisy")):
            term.after_step(torch.tensor(loss), (k + 1) / 60)
            line = target.start + (target.end - target.start) * (k + 1) / 60
            assert float(term.mix) >= max(last, line) - 1e-6
            last = float(term.mix)

    def test_a_falling_loss_runs_ahead_of_a_rising_one(self) -> None:
        """At the same progress."""
        shares = []
        for kind in ("falling", "rising"):
            term = bound(target=Taid(pace=0.02, momentum=0.5))
            for loss in falls(kind, 30):
                term.after_step(torch.tensor(loss), 0.01)
            shares.append(float(term.mix))
        assert shares[0] > shares[1] + 0.01

    def test_an_infinite_step_is_no_news(self) -> None:
        term = bound(target=Taid())
        for loss in falls("infinite"):
            term.after_step(torch.tensor(loss), 0.0)
        assert term.momentum.isfinite()
        assert term.before.isfinite()

    def test_the_first_step_only_tells_the_loss(self) -> None:
        """As in the paper's code; the line holds."""
        term = bound(target=Taid(start=0.4, pace=0.5))
        term.after_step(torch.tensor(2.0), 0.0)
        assert float(term.mix) == pytest.approx(0.4)
        term.after_step(torch.tensor(1.0), 0.0)
        expected = 0.4 + 0.5 * 0.6 / (1 + math.exp(-0.01 * 0.5))
        assert float(term.mix) == pytest.approx(expected, rel=1e-6)

    def test_the_host_reads_nothing(self) -> None:
        """`meta` tensors have no values that could be read."""
        term = bound(target=Taid()).to("meta")
        term.after_step(torch.tensor(1.0, device="meta"), 0.5)
        assert term.mix.device.type == "meta"


class TestTarget:
    @pytest.mark.parametrize("loss", [forward_kl, reverse_kl, jsd, tvd])
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_any_loss_to_a_mixture_of_the_logits(self, loss: Any, temperature: float) -> None:
        s, t = draw(7, 0), draw(9, 1)
        term = bound(loss=loss, temperature=temperature, target=Taid(start=0.3))
        mixed = 0.7 * s + 0.3 * t[:, :7]
        expected = temperature**2 * loss(s / temperature, mixed / temperature)
        assert torch.allclose(term.values(s, t, LABELS), expected, rtol=1e-6)

    def test_it_has_no_gradient_of_its_own(self) -> None:
        """Of the forward KL: q minus the target, and nothing through the target."""
        s, t = draw(7, 0).requires_grad_(), draw(9, 1)
        term = bound(target=Taid(start=0.3))
        (slope,) = torch.autograd.grad(term.values(s, t, LABELS).sum(), s)
        p = (0.7 * s + 0.3 * t[:, :7]).detach().softmax(-1)
        assert torch.allclose(slope, s.detach().softmax(-1) - p, atol=1e-7)

    def test_it_starts_at_the_student_and_ends_at_the_teacher(self) -> None:
        s, t = draw(7, 0), draw(9, 1)
        assert bound(target=Taid(start=0.0)).values(s, t, LABELS).abs().max() < 1e-14
        whole = bound(target=Taid(start=1.0)).values(s, t, LABELS)
        assert torch.allclose(whole, forward_kl(s, t[:, :7]), rtol=1e-12)

    @pytest.mark.parametrize("end", [1.0, 0.8])
    def test_an_evaluation_measures_against_the_last_target(self, end: float) -> None:
        s, t = draw(7, 0), draw(9, 1)
        term = bound(target=Taid(start=0.1, end=end)).eval()
        mixed = (1 - end) * s + end * t[:, :7]
        assert torch.allclose(term.values(s, t, LABELS), forward_kl(s, mixed), rtol=1e-6)

    def test_forbidden_tokens_stay_finite(self) -> None:
        s, t = draw(7, 0), draw(9, 1)
        s[0, 2] = t[1, 3] = t[2, 4] = s[2, 4] = -math.inf
        values = bound(loss=jsd, target=Taid()).values(s, t, LABELS)
        assert values.isfinite().all()
        assert values.max() <= math.log(2)

    def test_the_teacher_is_asked_and_the_term_hears_of_its_value(self) -> None:
        term = bound(target=Taid())
        assert (term.teacher, term.adapts) == (Request(logits=True), True)
        assert Logits().build(spec(7), spec(7)).adapts is False


def test_its_state_is_saved() -> None:
    """Three numbers; what an evaluation needs is known without."""
    term = bound(target=Taid(start=0.25))
    for loss in (2.0, 1.5):
        term.after_step(torch.tensor(loss), 0.5)
    again = bound(target=Taid(start=0.25))
    again.load_state_dict(term.state_dict())
    assert term.state_dict().keys() == {"mix", "momentum", "before"}
    for step in (term, again):
        step.after_step(torch.tensor(1.2), 0.6)
    assert all(torch.equal(a, b) for a, b in zip(term.buffers(), again.buffers(), strict=True))
