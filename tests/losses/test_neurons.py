"""Neuron selectivity: the exact Gram form, the splits over rows, sub-sampling."""

from functools import partial
from typing import get_args

import pytest
import torch

from llm_distill.losses.neurons import Kernel, nst
from tests import reference_features
from tests.losses.feature_catalogue import slope, states

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


@every_kernel
def test_the_mean_over_rows_is_the_discrepancy_of_all_pairs(kernel: Kernel) -> None:
    student, teacher = (side.detach() for side in states(rows=7, width=4, other=9))
    full = reference_features.discrepancy(student.numpy(), teacher.numpy(), kernel)
    assert full > 1e-2
    assert nst(student, teacher, kernel=kernel).mean().item() == pytest.approx(full, rel=1e-12)


@every_kernel
def test_a_louder_teacher_changes_nothing(kernel: Kernel) -> None:
    # TextBrewer leaves the scaling of neurons out: 0.065 becomes 2205 at ten times the scale.
    student, teacher = states()
    torch.testing.assert_close(
        nst(student, 10 * teacher, kernel=kernel), nst(student, teacher, kernel=kernel)
    )


@every_kernel
def test_rows_of_zeros_leave_the_mean_as_it_is(kernel: Kernel) -> None:
    student, teacher = (side.detach() for side in states())
    padded = [torch.cat([side, torch.zeros(7, 5)]) for side in (student, teacher)]
    torch.testing.assert_close(
        nst(padded[0], padded[1], kernel=kernel).mean(), nst(student, teacher, kernel=kernel).mean()
    )


@every_kernel
def test_neurons_that_never_fire_have_no_gradient(kernel: Kernel) -> None:
    student, teacher = (side.detach() for side in states())
    student[:, 2] = 0.0
    gradient = slope(partial(nst, kernel=kernel), student, teacher)
    assert gradient.isfinite().all()
    assert gradient[:, 2].abs().max() == 0
    assert gradient[:, 1].abs().max() > 0


@every_kernel
def test_one_neuron_in_many_copies_is_one_point(kernel: Kernel) -> None:
    student = torch.tensor([[1.0], [2.0], [-1.0]])
    assert nst(student, student.repeat(1, 4), kernel=kernel).abs().max() < 1e-6
    assert slope(partial(nst, kernel=kernel), student, student.repeat(1, 4)).abs().max() < 1e-6


def test_the_gaussian_kernel_takes_evenly_spaced_neurons_of_wide_models() -> None:
    student, teacher = (side.detach() for side in states(width=7, other=3))
    some = nst(student, teacher, kernel="gaussian", neurons=3)
    torch.testing.assert_close(some, nst(student[:, [0, 2, 4]], teacher, kernel="gaussian"))
    gradient = slope(partial(nst, kernel="gaussian", neurons=3), student, teacher)
    assert gradient.abs().amax(0).gt(0).tolist() == [True, False, True, False, True, False, False]


@pytest.mark.parametrize("kernel", ["polynomial", "linear"])
def test_the_other_kernels_take_all(kernel: Kernel) -> None:
    student, teacher = states()
    assert torch.equal(
        nst(student, teacher, kernel=kernel, neurons=2), nst(student, teacher, kernel=kernel)
    )


def test_sampling_is_the_same_on_every_call() -> None:
    student, teacher = states(width=40)
    sampled = partial(nst, kernel="gaussian", neurons=8)
    assert torch.equal(sampled(student, teacher), sampled(student, teacher))


def test_nothing_is_read_on_the_host_when_sampling() -> None:
    states = torch.empty(4, 50, device="meta")
    assert nst(states, states[:, :9], kernel="gaussian", neurons=8).shape == (4,)


def test_unknown_kernels_and_no_neurons_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nst: kernel='rbf'; write one of polynomial, linear, ga"):
        nst(*states(), kernel="rbf")  # type: ignore[arg-type]  # refused
    with pytest.raises(ValueError, match=r"nst: neurons=0; take 1 or more"):
        nst(*states(), kernel="gaussian", neurons=0)
