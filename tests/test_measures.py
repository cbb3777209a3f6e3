"""What is measured beside the terms, against plain formulas in float64."""

import pytest
import torch
from torch import Tensor

from llm_distill.evaluation import OWN
from llm_distill.losses.projection import Projection
from llm_distill.losses.sparse import Counts, TopK
from llm_distill.measures import entropy, measures, unknown
from llm_distill.objectives import MEASURES
from llm_distill.signals import Dense, Distribution, Factored, Head
from tests import reference

LABELS = torch.tensor([0, 3, 6, 2, 1])


def draw(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(5, width, generator=generator, dtype=torch.float64)


def measured(student: Tensor, teacher: Tensor, distribution: Distribution) -> dict[str, Tensor]:
    terms = measures(distribution, student.shape[1])
    return {k: t(student, teacher, LABELS) for k, t in zip(MEASURES, terms, strict=True)}


def factored(logits: Tensor) -> Factored:
    """The same logits through an identity as the head."""
    return Factored(logits, Head(torch.eye(logits.shape[1], dtype=logits.dtype)))


@pytest.mark.parametrize(("ours", "theirs"), [(9, 9), (9, 12), (12, 9)])
@pytest.mark.parametrize("dense", [True, False])
def test_a_whole_teacher(ours: int, theirs: int, dense: bool) -> None:
    """Perplexities on each model's own tokens, the others on those that both have."""
    s, t = draw(ours, 0), draw(theirs, 1)
    got = measured(s, t, Dense(t) if dense else factored(t))
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    rows = torch.arange(5)
    expected = {
        "student_nll": -log_q[rows, LABELS],
        "teacher_nll": -log_p[rows, LABELS],
        "kl": torch.from_numpy(reference.forward_kl(s[:, :9].numpy(), t[:, :9].numpy())),
        "agreement": (s[:, :9].argmax(-1) == t[:, :9].argmax(-1)).double(),
        "entropy": -(log_q.exp() * log_q).sum(-1),
    }
    for name in MEASURES:
        assert torch.allclose(got[name], expected[name], rtol=1e-12, atol=1e-12), name


def test_a_teacher_of_other_tokens_tells_nothing() -> None:
    """What the student says of itself is left."""
    s = draw(9, 0)
    found = measures(None, 9)
    got = {k: t(s, None, LABELS) for k, t in zip(MEASURES, found, strict=True)}
    whole = measured(s, s, Dense(s))
    for name in OWN:
        assert torch.equal(got[name], whole[name])
    assert all(got[name].isnan().all() for name in MEASURES if name not in OWN)


def test_agreement_is_one_and_kl_zero_for_equal_models() -> None:
    s = draw(9, 0)
    got = measured(s, s, Dense(s))
    assert got["agreement"].tolist() == [1.0] * 5
    assert got["kl"].abs().max() < 1e-14
    assert torch.equal(got["student_nll"], got["teacher_nll"])


def test_entropy() -> None:
    """From none to log V; a token that is forbidden takes no part."""
    z = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf, -torch.inf], [99.0, 0, 0, 0]])
    assert entropy(z).tolist() == pytest.approx([1.3862944, 0.6931472, 0.0], abs=1e-6)


@pytest.mark.parametrize("kind", ["top", "counts"])
def test_what_a_sparse_teacher_does_not_tell(kind: str) -> None:
    """Its perplexity and its surest token; the rest is measured in the pass over the head."""
    from llm_distill.losses.fused import head_pass

    s, t = draw(9, 0), draw(9, 1)
    sparse: TopK | Counts = TopK.of(t, 8)
    if kind == "counts":
        sparse = Counts(t.topk(8).indices, torch.ones(5, 8, dtype=t.dtype), 8)
    student = Projection(s, torch.eye(9, dtype=s.dtype))
    _, values = head_pass(student, sparse, LABELS, (), s.new_zeros(0), measures=measures(sparse, 9))
    got = dict(zip(MEASURES, values, strict=True))
    assert got["teacher_nll"].isnan().all()
    assert got["agreement"].isnan().all()
    whole = measured(s, t, Dense(t))
    for name in ("student_nll", "entropy"):
        assert torch.allclose(got[name], whole[name])
    if kind == "top":  # all but one token: the coarse KL is the whole one
        assert torch.allclose(got["kl"], whole["kl"])
    assert got["kl"].isfinite().all()


def test_unknown() -> None:
    assert unknown(torch.zeros(3, 2)).isnan().tolist() == [True] * 3
