"""The head pass against the dense computation of the same thing by plain autograd."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_distill.losses.divergences import forward_kl, jsd
from llm_distill.losses.fused import CHUNK_ELEMENTS, RowFunction, Work, head_pass, rows_per_chunk
from llm_distill.signals import Head

N, D, V, CHUNK = 23, 5, 11, 4

Inputs = tuple[Tensor, Tensor, Tensor | None]
Compute = Callable[[Tensor, Tensor, Tensor | None, Tensor, Work], tuple[Tensor, Tensor]]


def cross_entropy(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    return F.cross_entropy(student, labels, reduction="none")


def divergence(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    assert teacher is not None
    return forward_kl(student, teacher[:, : student.shape[1]])


def mixed(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    assert teacher is not None
    return jsd(student, teacher[:, : student.shape[1]], beta=0.3)


def unsure(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    """Any row function of a user's own: how far the entropy is from the teacher's, cubed."""
    assert teacher is not None
    entropies = [-(z.softmax(-1) * z.log_softmax(-1)).sum(-1) for z in (student, teacher)]
    return (entropies[0] - entropies[1]).pow(3)


FUNCTIONS: tuple[RowFunction, ...] = (cross_entropy, divergence, mixed, unsure)
SHARES = (0.1, 2.0, 0.0, 0.7)


def inputs(
    *, rows: int = N, bias: bool = True, dtype: torch.dtype = torch.float64, width: int = D
) -> Inputs:
    generator = torch.Generator().manual_seed(3)

    def tensor(*shape: int) -> Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.to(dtype).requires_grad_()

    return tensor(rows, width), tensor(V, width), tensor(V) if bias else None


def work(rows: int = N, *, chunk: int = CHUNK, head: Head | None = None) -> Work:
    generator = torch.Generator().manual_seed(4)
    teacher = torch.randn(rows, V + 2, generator=generator, dtype=torch.float64)
    return Work(
        functions=FUNCTIONS,
        labels=torch.randint(V, (rows,), generator=generator),
        teacher=lambda part: teacher[part],
        finish=(head or Head(torch.empty(0))).finish,
        chunk=chunk,
    )


def dense(
    features: Tensor, weight: Tensor, bias: Tensor | None, shares: Tensor, work: Work
) -> tuple[Tensor, Tensor]:
    """All rows at once, differentiated by autograd."""
    logits = work.finish(F.linear(features, weight, bias))
    teacher = None if work.teacher is None else work.teacher(slice(None))
    sums = torch.stack([f(logits, teacher, work.labels).sum() for f in work.functions])
    return (shares.to(sums.dtype) * sums).sum(), sums.detach()


def results(
    compute: Compute,
    given: Inputs,
    shares: Sequence[float] | Tensor,
    todo: Work,
    *,
    upstream: float = 1.0,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss, sums and the gradients of the three inputs."""
    leaves = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in given]
    features, weight, bias = leaves
    assert features is not None
    assert weight is not None
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    loss, sums = compute(features, weight, bias, torch.as_tensor(shares, dtype=wide), todo)
    (loss * upstream).backward()
    return loss.detach(), sums, [None if t is None else t.grad for t in leaves]


def assert_same(given: Inputs, todo: Work, shares: Sequence[float] = SHARES) -> None:
    """To 1e-12: value, sums and every gradient."""
    found, expected = results(head_pass, given, shares, todo), results(dense, given, shares, todo)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("chunk", [1, CHUNK, N - 1, N, N + 9])
def test_any_chunk_equals_the_dense_computation(chunk: int) -> None:
    assert_same(inputs(), work(chunk=chunk))


def test_a_head_without_bias() -> None:
    assert_same(inputs(bias=False), work())


@pytest.mark.parametrize("k", range(len(FUNCTIONS)), ids=lambda k: FUNCTIONS[k].__name__)
def test_each_function_alone(k: int) -> None:
    assert_same(inputs(), replace(work(), functions=FUNCTIONS[k : k + 1]), shares=[1.7])


@pytest.mark.parametrize("scale", [1.0, 0.0625])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_scaled_and_capped_heads(scale: float, softcap: float | None) -> None:
    assert_same(inputs(), work(head=Head(torch.empty(0), scale=scale, softcap=softcap)))


def test_terms_that_need_no_teacher() -> None:
    assert_same(inputs(), replace(work(), functions=[cross_entropy], teacher=None), shares=[1.0])


@pytest.mark.parametrize("shares", [(0.0, 0.0, 0.0, 0.0), (1e-9, 0, 3e-9, 0), (1e6, 1, 0, 1e-6)])
def test_shares_of_any_size(shares: tuple[float, ...]) -> None:
    assert_same(inputs(), work(), shares)


def test_sums_are_plain_and_detached() -> None:
    features, weight, bias = inputs()
    shares = torch.tensor(SHARES, dtype=torch.float64)
    loss, sums = head_pass(features, weight, bias, shares, work())
    assert loss.requires_grad
    assert not sums.requires_grad
    torch.testing.assert_close(loss.detach(), (shares * sums).sum())


def test_an_upstream_factor_scales_the_gradients() -> None:
    found = results(head_pass, inputs(), SHARES, work(), upstream=3.0)
    expected = results(dense, inputs(), SHARES, work(), upstream=3.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    once = results(head_pass, inputs(), SHARES, work())[2][0]
    assert once is not None
    torch.testing.assert_close(found[2][0], 3 * once)


def test_gradients_reach_what_is_below_the_features() -> None:
    gradients = []
    for compute in (head_pass, dense):
        features, weight, bias = inputs()
        below = torch.eye(D, dtype=torch.float64).requires_grad_()
        shares = torch.tensor(SHARES, dtype=torch.float64)
        loss, _ = compute(torch.tanh(features @ below), weight, bias, shares, work())
        (loss + below.sum()).backward()
        gradients.append(below.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_tied_weight_gets_both_gradients() -> None:
    gradients = []
    for compute in (head_pass, dense):
        weight = inputs()[1].detach().requires_grad_()
        features = F.embedding(torch.arange(N) % V, weight)
        compute(features, weight, None, torch.tensor(SHARES).double(), work())[0].backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_frozen_inputs_get_no_gradient(frozen: tuple[int, ...]) -> None:
    given = inputs()
    for k in frozen:
        tensor = given[k]
        assert tensor is not None
        tensor.requires_grad_(False)
    assert_same(given, work())
    gradients = results(head_pass, given, SHARES, work())[2]
    assert [k for k, gradient in enumerate(gradients) if gradient is None] == list(frozen)


def test_no_rows_give_zeros_with_a_graph() -> None:
    loss, sums, gradients = results(head_pass, inputs(rows=0), SHARES, work(rows=0))
    assert loss.item() == 0.0
    assert sums.tolist() == [0.0] * 4
    assert [None if g is None else g.tolist() for g in gradients] == [
        [],
        [[0.0] * D] * V,
        [0.0] * V,
    ]


class Seen:
    """A row function that remembers what it was given."""

    def __init__(self) -> None:
        self.differentiable: list[bool] = []
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        self.differentiable.append(student.requires_grad)
        self.dtypes.add(student.dtype)
        return cross_entropy(student, teacher, labels)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_makes_no_gradients(mode: Callable[[], Any]) -> None:
    seen, (features, weight, bias) = Seen(), inputs()
    todo = replace(work(), functions=[seen])
    shares = torch.ones(1, dtype=torch.float64)
    with mode(), Largest() as largest:
        loss, sums = head_pass(features, weight, bias, shares, todo)
    assert seen.differentiable == [False] * math.ceil(N / CHUNK)
    assert not loss.requires_grad
    assert largest.shapes.isdisjoint({(V, D), (N, D)})
    torch.testing.assert_close(sums, dense(features, weight, bias, shares, todo)[1])


def test_nothing_to_train_makes_no_gradients() -> None:
    seen, (features, weight, _) = Seen(), inputs()
    todo = replace(work(), functions=[seen])
    loss, _ = head_pass(features.detach(), weight.detach(), None, torch.ones(1), todo)
    assert not any(seen.differentiable)
    assert not loss.requires_grad


def test_a_function_without_a_slope() -> None:
    constant: RowFunction = lambda s, t, labels: labels.to(s.dtype)  # noqa: E731
    todo = replace(work(), functions=[constant])
    loss, sums, gradients = results(head_pass, inputs(), [2.0], todo)
    assert loss.item() == 2 * sums.item() == 2 * todo.labels.sum().item()
    assert all(g is not None and not g.any() for g in gradients)
    assert_same(inputs(), replace(todo, functions=[constant, divergence]), [2.0, 3.0])


class Largest(TorchDispatchMode):
    """Remembers the shapes of all tensors that operations allocate, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        self.shapes |= {
            tuple(t.shape) for t in tensors(made) if t.untyped_storage().data_ptr() not in known
        }
        return made


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def test_logits_exist_for_one_chunk_at_a_time() -> None:
    rows, width, chunk = 512, 2, 16
    given, todo = inputs(rows=rows, width=width), work(rows, chunk=chunk)
    generator = torch.Generator().manual_seed(5)
    todo = replace(
        todo,
        teacher=lambda part: torch.randn(
            len(range(rows)[part]), V + 2, generator=generator, dtype=torch.float64
        ),
    )
    with Largest() as largest:
        results(head_pass, given, SHARES, todo)
    numbers = max(math.prod(shape) for shape in largest.shapes)
    assert numbers == rows * width  # the features and their gradient
    assert (chunk, V) in largest.shapes
    assert max(shape[0] for shape in largest.shapes if shape[1:] in ((V,), (V + 2,))) == chunk


def test_the_backward_runs_once() -> None:
    features, weight, bias = inputs()
    loss, _ = head_pass(features, weight, bias, torch.tensor(SHARES).double(), work())
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match=r"the head pass has one backward.*run the forward again"
    ):
        loss.backward()


def test_second_derivatives_are_no_silent_zeros() -> None:
    features, weight, bias = inputs()
    loss, _ = head_pass(features, weight, bias, torch.tensor(SHARES).double(), work())
    slope = torch.autograd.grad(loss, features, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.sum().backward()


def test_fp32_agrees_to_rounding() -> None:
    found = results(head_pass, inputs(dtype=torch.float32), SHARES, work())
    expected = results(dense, inputs(), SHARES, work())
    assert found[0].dtype == found[1].dtype == torch.float32
    for one, other in zip(found[2], expected[2], strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_models(dtype: torch.dtype, most: float) -> None:
    """Against float64 from the same rounded inputs: only the two matrix products are in `dtype`."""
    given, seen = inputs(dtype=dtype), Seen()
    exact: Inputs = (
        given[0].detach().double().requires_grad_(),
        given[1].detach().double().requires_grad_(),
        None if given[2] is None else given[2].detach().double().requires_grad_(),
    )
    todo = replace(work(), functions=[seen, *FUNCTIONS[1:]])
    found, expected = results(head_pass, given, SHARES, todo), results(dense, exact, SHARES, work())
    assert seen.dtypes == {torch.float32}
    assert found[0].dtype == found[1].dtype == torch.float32
    assert relative_error(found[0], expected[0]) < most
    for one, other in zip(found[2], expected[2], strict=True):
        assert one is not None
        assert one.dtype == dtype
        assert relative_error(one, other) < most


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_under_autocast_the_loss_and_the_gradients_stay_fp32(
    dtype: torch.dtype, most: float
) -> None:
    given, seen = inputs(dtype=torch.float32), Seen()
    todo = replace(work(), functions=[seen, *FUNCTIONS[1:]])
    products = []

    def finish(projected: Tensor) -> Tensor:
        products.append(projected.dtype)
        return work().finish(projected)

    with torch.autocast("cpu", dtype):
        found = results(head_pass, given, SHARES, replace(todo, finish=finish))
    assert set(products) == {dtype}
    assert seen.dtypes == {torch.float32}
    assert found[0].dtype == found[1].dtype == torch.float32
    expected = results(dense, inputs(), SHARES, work())
    assert relative_error(found[0], expected[0]) < most
    for one, other in zip(found[2], expected[2], strict=True):
        assert one is not None
        assert one.dtype == torch.float32
        assert relative_error(one, other) < most


def test_autocast_leaves_float64_alone() -> None:
    expected = results(dense, inputs(), SHARES, work())
    with torch.autocast("cpu", torch.bfloat16):
        found = results(head_pass, inputs(), SHARES, work())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_tiny_shares_do_not_underflow_in_fp16() -> None:
    """1e-9 is 0 in fp16: slopes are made for shares of order one, and scaled in fp32."""
    shares = [1e-9 * share for share in SHARES]
    with torch.autocast("cpu", torch.float16):
        found = results(head_pass, inputs(dtype=torch.float32), shares, work())
    expected = results(dense, inputs(), shares, work())
    for one, other in zip(found[2], expected[2], strict=True):
        assert relative_error(one, other) < 3e-3


def test_a_tiny_share_and_a_loss_scale_cancel_in_fp16() -> None:
    """As a gradient scaler does: gradients in fp16 are those of the scaled loss."""
    shares = [1e-9 * share for share in SHARES]
    given = inputs(dtype=torch.float16)
    found = results(head_pass, given, shares, work(), upstream=1e9)
    expected = results(head_pass, given, SHARES, work())
    for one, other in zip(found[2], expected[2], strict=True):
        assert relative_error(one, other) < 1e-3


def test_the_factor_is_not_rounded_to_the_gradients_dtype() -> None:
    """1.003 is 1 in bf16: every gradient would be 0.3 % too small."""
    given, todo = inputs(dtype=torch.bfloat16), replace(work(), functions=[cross_entropy])
    plain = results(head_pass, given, [1.0], todo)[2][0]
    scaled = results(head_pass, given, [1.003], todo)[2][0]
    assert plain is not None
    torch.testing.assert_close(scaled, (plain.float() * 1.003).bfloat16(), rtol=0, atol=0)


def test_many_chunks_are_summed_in_fp32() -> None:
    """A sum kept in bf16 would stop growing once it is 256 times what is added."""
    rows = 1500
    given = inputs(rows=rows, dtype=torch.bfloat16)
    todo = replace(work(rows, chunk=1), functions=[cross_entropy])
    found = results(head_pass, given, [1.0], todo)
    once = results(head_pass, given, [1.0], replace(todo, chunk=rows))
    for one, other in zip(found[2], once[2], strict=True):
        assert relative_error(one, other) < 1e-2


def test_row_functions_run_outside_autocast() -> None:
    inside = []

    def function(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        inside.append(torch.is_autocast_enabled("cpu"))
        return cross_entropy(student, teacher, labels)

    with torch.autocast("cpu", torch.bfloat16):
        todo = replace(work(), functions=[function])
        results(head_pass, inputs(dtype=torch.float32), [1.0], todo)
    assert inside == [False] * math.ceil(N / CHUNK)


def test_rows_per_chunk() -> None:
    assert rows_per_chunk(1 << 17) * (1 << 17) == CHUNK_ELEMENTS
    assert rows_per_chunk(1 << 30) == 16
