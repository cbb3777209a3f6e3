"""The Triton path against dense float64 autograd, interpreted where there is no GPU."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_distill.losses import divergences, reweighted
from llm_distill.losses.kernels import Form, Spec, score, supports, usable
from llm_distill.losses.projection import Finish

Loss = Callable[[Tensor, Tensor], Tensor]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no wheel for this platform"
)
# The interpreter computes with numpy, which warns of what a GPU does in silence: exp overflows,
# inf - inf is NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LOSSES: dict[str, Loss] = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "jsd": divergences.jsd,
    "jsd(.1)": partial(divergences.jsd, beta=0.1),
    "jsd(.1, ends)": partial(divergences.jsd, beta=0.1, normalize_ends=True),
    "jsd(0, ends)": partial(divergences.jsd, beta=0.0, normalize_ends=True),
    "jsd(1, ends)": partial(divergences.jsd, beta=1.0, normalize_ends=True),
    "skew_forward_kl": divergences.skew_forward_kl,
    "skew_reverse_kl": partial(divergences.skew_reverse_kl, alpha=0.3),
    "tvd": divergences.tvd,
    "todi": reweighted.todi,
    "alpha_beta": reweighted.alpha_beta,
    "alpha_beta(.7, .2)": partial(reweighted.alpha_beta, alpha=0.7, beta=0.2),
    "alpha_beta(1, 0)": partial(reweighted.alpha_beta, alpha=1.0, beta=0.0),
    "alpha_beta(0, .5)": partial(reweighted.alpha_beta, alpha=0.0, beta=0.5),
    "alpha_beta(.5, -.5)": partial(reweighted.alpha_beta, alpha=0.5, beta=-0.5),
    "alpha_beta(0, 0)": partial(reweighted.alpha_beta, alpha=0.0, beta=0.0),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@dataclass(frozen=True)
class Case:
    """A chunk and what is asked of it; no multiple of any block."""

    vocabulary: int = 77
    teacher_vocabulary: int = 70
    width: int = 67
    temperature: float = 1.0
    student: Finish = field(default_factory=Finish)
    teacher: Finish = field(default_factory=Finish)
    share: float | list[float] = 0.7
    nll_share: float | list[float] | None = None
    mix: float | None = None
    dtype: torch.dtype = torch.float32
    rows: int = 3
    size: float = 3.0

    def chunk(self) -> tuple[Tensor, Tensor, Tensor]:
        draw = torch.Generator().manual_seed(0)
        z = self.size * torch.randn(self.rows, self.vocabulary, generator=draw)
        t = self.size * torch.randn(self.rows, self.teacher_vocabulary, generator=draw)
        labels = torch.randint(self.vocabulary, (self.rows,), generator=draw)
        return z.to(DEVICE, self.dtype), t.to(DEVICE, self.dtype), labels.to(DEVICE)

    def spec(self, loss: Loss) -> Spec:
        def sent(number: float | list[float] | None) -> Tensor | None:
            return None if number is None else torch.tensor(number, device=DEVICE)

        share = sent(self.share)
        assert share is not None
        return Spec(
            supports(loss),
            share,
            self.width,
            self.temperature,
            self.student,
            self.teacher,
            sent(self.nll_share),
            sent(self.mix),
        )

    def dense(
        self, loss: Loss, z: Tensor, t: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values, negative log-likelihoods and gradient, in float64 by autograd."""
        leaf = z.double().requires_grad_()
        logits = self.student(leaf).clamp_min(divergences.FLOOR)
        q = logits[:, : self.width]
        p = self.teacher(t.double()).clamp_min(divergences.FLOOR)[:, : self.width]
        if self.mix is not None:
            p = (1 - self.mix) * q.detach() + self.mix * p
        values = loss(q / self.temperature, p / self.temperature)
        nll = F.cross_entropy(logits, labels, reduction="none")
        total = (torch.as_tensor(self.share, device=DEVICE) * values).sum()
        if self.nll_share is not None:
            total = total + (torch.as_tensor(self.nll_share, device=DEVICE) * nll).sum()
        return values.detach(), nll.detach(), torch.autograd.grad(total, leaf)[0]


def check(case: Case, loss: Loss, *, rtol: float = 1e-5, atol: float = 5e-6) -> None:
    """Values, negative log-likelihoods and gradient, the last in the logits' own dtype."""
    z, t, labels = case.chunk()
    values, nll, grad = case.dense(loss, z, t, labels)
    found, found_nll = score(z, t, labels, case.spec(loss))
    torch.testing.assert_close(found.double(), values, rtol=rtol, atol=atol)
    if case.nll_share is None:
        assert found_nll is None
    else:
        assert found_nll is not None
        torch.testing.assert_close(found_nll.double(), nll, rtol=1e-5, atol=1e-6)
    # Half a unit in the last place, and what fp32 loses before. The interpreter cuts bf16 off where
    # a GPU rounds.
    bf16 = 2.0**-8 if DEVICE.type == "cuda" else 2.0**-7
    own = {torch.float32: 0.0, torch.bfloat16: bf16, torch.float16: 2.0**-11}[case.dtype]
    tiny = 1e-7 if case.dtype == torch.float16 else 0.0  # its subnormals
    torch.testing.assert_close(
        z.double(), grad, rtol=rtol + 1.01 * own, atol=tiny + atol * grad.abs().max().item()
    )


CASES = {
    "plain": Case(),
    "cold": Case(temperature=2.5),
    "nll": Case(nll_share=0.3),
    "nll at the same temperature over the same tokens": Case(
        nll_share=0.3, teacher_vocabulary=77, width=77
    ),
    "cold nll": Case(nll_share=0.3, temperature=2.5, teacher_vocabulary=77, width=77),
    "less than a block": Case(vocabulary=19, teacher_vocabulary=23, width=17, nll_share=0.3),
    "heads": Case(
        student=Finish(0.5, 4.0), teacher=Finish(2.0, 6.0), nll_share=0.3, temperature=2.5
    ),
    "mix": Case(mix=0.4, temperature=2.5, teacher=Finish(0.8)),
    "bf16": Case(dtype=torch.bfloat16, nll_share=0.3),
    "fp16": Case(dtype=torch.float16, temperature=2.5, nll_share=0.3),
}


@needs_triton
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@every_loss
def test_equals_dense_autograd(loss: Loss, case: Case) -> None:
    check(case, loss)


@needs_triton
@every_loss
def test_many_blocks_equal_dense_autograd(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_distill.losses.kernels.MOST_TOKENS", 32)
    check(Case(vocabulary=131, teacher_vocabulary=128, width=101, nll_share=0.3), loss)
    check(Case(vocabulary=128, teacher_vocabulary=128, width=128, nll_share=0.3), loss)


@needs_triton
@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_the_target_moves_from_the_student_to_the_teacher(mix: float) -> None:
    z, t, labels = Case().chunk()
    moving, _ = score(z.clone(), t, labels, Case(mix=mix).spec(divergences.forward_kl))
    plain, _ = score(z, t, labels, Case().spec(divergences.forward_kl))
    assert torch.equal(moving, plain if mix else torch.zeros_like(plain))


@needs_triton
def test_weights_of_each_row() -> None:
    check(Case(share=[0.0, 1.0, -2.0], nll_share=[1.0, 0.0, 0.5]), divergences.jsd)
    check(Case(share=[0.0, 1.0, -2.0], nll_share=0.1), divergences.forward_kl)


@needs_triton
@pytest.mark.parametrize("loss", [divergences.forward_kl, divergences.reverse_kl])
def test_equal_models_read_exactly_zero(loss: Loss) -> None:
    z, _, labels = Case(rows=5).chunk()
    values, _ = score(z, z.clone(), labels, Case().spec(loss))
    assert values.tolist() == [0.0] * 5
    assert z.abs().max() < 1e-7


@needs_triton
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_extreme_logits(name: str) -> None:
    draw = torch.Generator().manual_seed(1)
    loss, case = LOSSES[name], Case(rows=6, width=70, nll_share=0.3)
    _, t, labels = case.chunk()
    z = 1e4 * torch.randn(6, 77, generator=draw).to(DEVICE)
    t[:3] = 1e4 * torch.randn(3, 70, generator=draw).to(DEVICE)
    values, _, grad = case.dense(loss, z, t, labels)
    found, _ = score(z, t, labels, case.spec(loss))
    finite = values < 1e8
    assert torch.equal(found < 1e8, finite)
    torch.testing.assert_close(found[finite].double(), values[finite], rtol=1e-5, atol=1e-6)
    expected = grad.where(finite[:, None], 0.0)
    torch.testing.assert_close(z.double(), expected, rtol=1e-4, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_tokens_both_models_forbid(name: str) -> None:
    loss, case = LOSSES[name], Case(nll_share=0.3, temperature=2.5)
    z, t, _ = case.chunk()
    z[:, 5:9] = t[:, 5:9] = -torch.inf
    z[:, 70:] = -torch.inf
    labels = torch.tensor([0, 12, 60], device=DEVICE)
    values, nll, grad = case.dense(loss, z, t, labels)
    found, found_nll = score(z, t, labels, case.spec(loss))
    assert found_nll is not None
    torch.testing.assert_close(found.double(), values, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(found_nll.double(), nll, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(z.double(), grad, rtol=1e-5, atol=2e-6)


@needs_triton
@pytest.mark.parametrize("loss", [divergences.jsd, divergences.tvd, divergences.skew_forward_kl])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_token_one_model_forbids_is_finite_for_bounded_losses(loss: Loss, side: str) -> None:
    case = Case()
    z, t, labels = case.chunk()
    (z if side == "student" else t)[:, 5] = -torch.inf
    values, _, grad = case.dense(loss, z, t, labels)
    found, _ = score(z, t, labels, case.spec(loss))
    torch.testing.assert_close(found.double(), values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.double(), grad, rtol=1e-5, atol=1e-6)


FAULTS: dict[str, tuple[Loss, str, float, int]] = {
    "NaN in the student": (divergences.forward_kl, "z", torch.nan, 3),
    "NaN in the student, three passes": (divergences.jsd, "z", torch.nan, 3),
    "NaN where only the student has tokens": (divergences.jsd, "z", torch.nan, 75),
    "NaN in the teacher": (divergences.tvd, "t", torch.nan, 3),
    "inf in the student": (divergences.tvd, "z", torch.inf, 3),
    "inf in the teacher": (divergences.forward_kl, "t", torch.inf, 3),
    "forbidden by the student": (divergences.forward_kl, "z", -torch.inf, 3),
    "forbidden by the teacher": (divergences.reverse_kl, "t", -torch.inf, 3),
}


@needs_triton
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("finish", [Finish(), Finish(2.0, 30.0)], ids=["plain", "capped"])
def test_a_faulty_row_has_no_gradient(fault: tuple[Loss, str, float, int], finish: Finish) -> None:
    loss, side, value, token = fault
    if finish.softcap and value in (torch.inf, -torch.inf):
        pytest.skip("a soft cap makes it finite")
    case = Case(nll_share=0.3, student=finish, teacher=finish, size=1.0)
    z, t, labels = case.chunk()
    _, _, grad = case.dense(loss, z, t, labels)
    (z if side == "z" else t)[1, token] = value
    found, nll = score(z, t, labels, case.spec(loss))
    assert nll is not None
    sound = (found.abs() < 1e8) & (nll.abs() < 1e8)
    assert sound.tolist() == [True, False, True]
    assert torch.equal(z[1], torch.zeros_like(z[1]))
    torch.testing.assert_close(z[::2].double(), grad[::2], rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("label", [-100, 77, 2**32 + 3])
def test_a_label_outside_the_vocabulary_makes_its_row_faulty(label: int) -> None:
    case = Case(nll_share=0.3)
    z, t, labels = case.chunk()
    labels[1] = label
    _, nll = score(z, t, labels, case.spec(divergences.forward_kl))
    assert nll is not None
    assert nll.isnan().tolist() == [False, True, False]
    assert z.count_nonzero(-1).tolist() == [77, 0, 77]


@needs_triton
def test_labels_alone_need_no_teacher() -> None:
    z, _, labels = Case().chunk()
    leaf = z.double().requires_grad_()
    nll = F.cross_entropy(leaf, labels, reduction="none")
    grad = torch.autograd.grad(0.3 * nll.sum(), leaf)[0]
    weight = torch.tensor(0.3, device=DEVICE)
    values, found = score(z, None, labels, Spec(None, weight, nll_share=weight))
    assert found is not None
    assert values.tolist() == [0.0] * 3
    torch.testing.assert_close(found.double(), nll.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.double(), grad, rtol=1e-5, atol=1e-7)


@needs_triton
@pytest.mark.parametrize("nll_share", [None, 0.3])
@pytest.mark.parametrize("loss", [divergences.forward_kl, divergences.jsd, None])
def test_values_alone_leave_the_logits(loss: Loss | None, nll_share: float | None) -> None:
    case = Case(nll_share=nll_share)
    z, t, labels = case.chunk()
    before = z.clone()
    spec = replace(case.spec(loss or divergences.tvd), grad=False)
    if loss is None:
        spec = replace(spec, form=None)
    values, nll = score(z, None if loss is None else t, labels, spec)
    assert torch.equal(z, before)
    dense, dense_nll, _ = case.dense(loss or divergences.tvd, z, t, labels)
    if loss is not None:
        torch.testing.assert_close(values.double(), dense, rtol=1e-5, atol=1e-6)
    if nll is not None:
        torch.testing.assert_close(nll.double(), dense_nll, rtol=1e-5, atol=1e-6)


@needs_triton
def test_rows_may_lie_apart() -> None:
    case = Case(nll_share=0.3)
    z, t, labels = case.chunk()
    frame = torch.full((3, 100), 7.0, device=DEVICE)
    frame[:, :77] = z
    score(frame[:, :77], t, labels, case.spec(divergences.jsd))
    score(z, t, labels, case.spec(divergences.jsd))
    assert torch.equal(frame[:, :77], z)
    assert (frame[:, 77:] == 7.0).all()


@needs_triton
def test_rows_may_begin_beyond_32_bits() -> None:
    # The last begins at 2^31 + 128; the pages between are never touched.
    case = Case()
    z, t, labels = case.chunk()
    far = torch.empty_strided((3, 77), (2**30 + 64, 1), dtype=torch.bfloat16, device=DEVICE)
    near = far.copy_(z).contiguous()
    score(far, t, labels, case.spec(divergences.jsd))
    score(near, t, labels, case.spec(divergences.jsd))
    assert torch.equal(far, near)


@needs_triton
def test_no_rows() -> None:
    values, nll = score(
        *Case(rows=0).chunk(), Case(rows=0, nll_share=0.3).spec(divergences.forward_kl)
    )
    assert nll is not None
    assert values.shape == nll.shape == (0,)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU")
def test_a_launch_waits_for_nothing() -> None:
    case = Case(nll_share=0.3, mix=0.4)
    z, t, labels = case.chunk()
    spec = case.spec(divergences.jsd)
    score(z.clone(), t, labels, spec)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        score(z, t, labels, spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def user_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().sum(-1)


def test_what_has_a_form() -> None:
    assert supports(divergences.forward_kl) == Form("forward_kl", total=-1.0)
    assert supports(partial(divergences.jsd, beta=0.1)) == Form("jsd", 0.1)
    assert supports(reweighted.alpha_beta) == Form("beta_alpha", 0.2, 0.7)
    nested = partial(partial(divergences.jsd, beta=0.1), normalize_ends=True)
    assert supports(nested) == Form("jsd", 0.1, factor=1.0 / (0.1 * 0.9))
    assert supports(user_loss) is None
    assert supports(partial(divergences.jsd, torch.zeros(1, 2))) is None
    assert supports(reweighted.adaptive_kl) is None
    assert supports(reweighted.decoupled) is None


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert usable(torch.device("cpu")) == (importlib.util.find_spec("triton") is not None)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not usable(torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not usable(torch.device("cuda"))


def test_what_it_cannot_read_is_refused() -> None:
    z, t, labels = Case().chunk()
    spec = Case().spec(divergences.jsd)
    with pytest.raises(ValueError, match=r"student's are in torch\.float64: float64 has the Py"):
        score(z.double(), t, labels, spec)
    with pytest.raises(ValueError, match=r"teacher's logits must be \[n, V\].*call \.contig"):
        score(z, t.T.contiguous().T, labels, spec)
    with pytest.raises(ValueError, match=r"width=71 is not among the 70 tokens of the teacher"):
        score(z, t, labels, replace(spec, width=71))
    with pytest.raises(ValueError, match="given together or not at all"):
        score(z, None, labels, spec)
