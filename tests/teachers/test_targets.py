"""From rows of a server to a top-k target, against the one that is made of whole logits."""

import math

import numpy as np
import pytest
import torch

from llm_distill.losses.divergences import forward_kl, reverse_kl
from llm_distill.losses.sparse import TopK, coarsen
from llm_distill.teachers.targets import FORBIDDEN, RESOLUTION, log_tail, top_k

VOCABULARY = 50


def told(logits: torch.Tensor, k: int, *extra: int) -> list[dict[int, float]]:
    """As servers tell it: fp32 log-probabilities, the token that came next before the others."""
    rows = []
    for n, row in enumerate(logits.float().log_softmax(-1)):
        values, ids = row.topk(k)
        top = dict(zip(ids.tolist(), values.tolist(), strict=True))
        rows.append({t: float(row[t]) for t in extra[n : n + 1] if t not in top} | top)
    return rows


@pytest.mark.parametrize("k", [1, 7, VOCABULARY - 1, VOCABULARY])
def test_it_is_the_one_that_whole_logits_give(k: int) -> None:
    logits = 3 * torch.randn(9, VOCABULARY, generator=torch.Generator().manual_seed(k))
    extra = logits.argsort(-1)[:, VOCABULARY // 2].tolist()
    made, expected = top_k(told(logits, k, *extra), k, VOCABULARY), TopK.of(logits.double(), k)
    assert torch.equal(made.ids, expected.ids)
    assert (made.log_probs - expected.log_probs).abs().max() < 1e-5
    assert (made.tail.exp() - expected.tail.exp()).abs().max() < 1e-6
    assert made.log_probs.dtype == made.tail.dtype == torch.float32
    student = torch.randn(9, VOCABULARY, generator=torch.Generator().manual_seed(0))
    coarse = coarsen(student, made.ids)
    ours, theirs = made.targets(), expected.targets().float()
    assert torch.allclose(forward_kl(coarse, ours), forward_kl(coarse, theirs), atol=1e-5)
    # Of a single token of 1e-5 the server's rounding leaves a relative error of 1e-2.
    bound = 2e-2 if k == VOCABULARY - 1 else 1e-5
    assert torch.allclose(reverse_kl(coarse, ours), reverse_kl(coarse, theirs), atol=bound)


def test_of_more_tokens_the_likeliest_stay() -> None:
    made = top_k([{9: -6.0, 3: -1.0, 4: -0.6}, {1: -0.5, 2: -1.2, 0: -1.4}], 2, 10)
    assert made.ids.tolist() == [[4, 3], [1, 2]]


def test_no_rows() -> None:
    made = top_k([], 3, 10)
    assert (made.ids.shape, made.log_probs.shape, made.tail.shape) == ((0, 3), (0, 3), (0,))
    assert made.ids.dtype == torch.int64


class TestTail:
    def test_a_thin_tail_is_bounded_by_the_least_of_the_kept(self) -> None:
        """1 minus the sum is noise there; the truth is below k's own probability times the rest."""
        kept = np.array([[0.0, -40.0]])
        assert log_tail(kept, 1000)[0] == pytest.approx(-40 + math.log(998))

    def test_nothing_is_left_of_rounding(self) -> None:
        kept = np.log([[0.7, 0.3]])
        assert log_tail(kept, 4)[0] == pytest.approx(math.log(RESOLUTION))
        assert log_tail(kept + 1e-6, 4)[0] == pytest.approx(math.log(RESOLUTION))

    def test_an_ordinary_one_is_the_rest(self) -> None:
        assert log_tail(np.log([[0.5, 0.2]]), 100)[0] == pytest.approx(math.log(0.3))

    def test_all_tokens_leave_none(self) -> None:
        assert log_tail(np.log([[0.5, 0.5]]), 2)[0] == -1e30

    def test_a_peaked_row_has_a_finite_loss_in_both_directions(self) -> None:
        made = top_k([{0: 0.0, 1: FORBIDDEN}, {0: -1e-9, 1: -22.0}], 2, VOCABULARY)
        student = coarsen(torch.randn(2, VOCABULARY), made.ids)
        assert forward_kl(student, made.targets()).isfinite().all()
        assert reverse_kl(student, made.targets()).isfinite().all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({1: -0.5}, "1 tokens of a row, and 2 were asked for"),
        ({1: -0.5, 10: -2.0}, "token 10, and the model has 10"),
        ({1: -0.5, -1: -2.0}, "token -1"),
        ({1: -0.5, 2: float("nan")}, "a log-probability of nan"),
        ({1: 4.5, 2: -3.0}, r"a log-probability of 4\.5"),
        ({1: -0.1, 2: -0.2}, r"probabilities of a row sum to 1\.724, which is more than 1"),
        ({1: -34.0, 2: -36.0}, r"a row sum to 3\.\d*e-15 at most, .* --logprobs-mode raw_logprobs"),
        ({1: -2.0, 2: -2.5}, r"a row sum to 0\.8741 at most, which is less than 1"),
    ],
)
def test_what_cannot_be_is_refused(row: dict[int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k([{1: -0.5, 2: -1.5}, row], 2, 10)


@pytest.mark.parametrize("k", [1, 2, 9])
def test_a_flat_row_is_none_of_them(k: int) -> None:
    """As much as there can be is just enough."""
    made = top_k([dict.fromkeys(range(k), -math.log(10))], k, 10)
    assert made.tail.exp() == pytest.approx(1 - k / 10)


class TestPadding:
    """Tokens of the model that the student does not have."""

    COMMON = VOCABULARY - 4

    def logits(self, *, padding: float) -> torch.Tensor:
        made = 3 * torch.randn(9, VOCABULARY, generator=torch.Generator().manual_seed(3))
        made[:, self.COMMON :] = padding + torch.arange(4)
        return made

    @pytest.mark.parametrize("k", [12, VOCABULARY - 2, VOCABULARY])
    def test_it_is_the_target_of_logits_that_are_cut(self, k: int) -> None:
        """Likely padding, all of it told: nothing else is lost."""
        logits = self.logits(padding=4.0)
        made = top_k(told(logits, k), k, VOCABULARY, self.COMMON)
        expected = TopK.of(logits[:, : self.COMMON].double(), k - 4)
        assert torch.equal(made.ids, expected.ids)
        assert (made.log_probs - expected.log_probs).abs().max() < 1e-5
        assert (made.tail.exp() - expected.tail.exp()).abs().max() < 1e-6

    def test_unlikely_padding_changes_nothing(self) -> None:
        rows = told(self.logits(padding=-60.0), 7)
        one, other = top_k(rows, 7, VOCABULARY, self.COMMON), top_k(rows, 7, VOCABULARY)
        assert torch.equal(one.ids, other.ids)
        assert (one.log_probs - other.log_probs).abs().max() < 1e-5
        assert (one.tail - other.tail).abs().max() < 1e-4

    def test_the_poorest_row_says_how_many_stay(self) -> None:
        rows = [{0: -0.7, 9: -0.8, 1: -3.0}, {2: -0.5, 3: -1.0, 4: -4.0}]
        made = top_k(rows, 3, 10, 9)
        assert made.ids.tolist() == [[0, 1], [2, 3]]
        assert torch.allclose(made.targets().exp().sum(-1), torch.ones(2))
        mass = 1 - math.exp(-0.8)
        assert made.log_probs[0].exp().tolist() == pytest.approx(
            [math.exp(-0.7) / mass, math.exp(-3.0) / mass], rel=1e-5
        )
        rest = 1 - math.exp(-0.5) - math.exp(-1.0)
        assert float(made.tail[1].exp()) == pytest.approx(rest, rel=1e-5)

    def test_a_row_of_padding_alone(self) -> None:
        with pytest.raises(ValueError, match="tells only of tokens from 9 on, which the student"):
            top_k([{9: -0.1}], 1, 10, 9)


def test_minus_infinity_is_what_vllm_writes_for_it() -> None:
    made = top_k([{1: -1e-5, 2: float("-inf")}], 2, 10)
    assert made.log_probs[0, 1] == FORBIDDEN
