"""Other libraries on the same inputs. All are optional: what is missing is said, not an error."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from scripts.bench.arms import Arm, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from scripts.bench.inputs import Inputs, Loss
    from scripts.bench.measure import Run

LIGER_DEFAULT = 1024
LIGER_BEST = 128
FALLBACK = "CPU fallback of a Triton kernel"
NO_BETA = "has the forward KL, the reverse KL and the generalised JSD only"


def load(package: str, module: str) -> Any:  # noqa: ANN401  these ship no types, or are not here
    """A module of a rival.

    Raises:
        UnavailableError: If the package is not installed.
    """
    if find_spec(package) is None:
        raise UnavailableError("not installed")
    return import_module(module)


def beta_of(loss: Loss) -> float:
    """Where the rivals' generalised JSD is this loss.

    Raises:
        UnavailableError: If it is nowhere.
    """
    if loss.beta is None:
        raise UnavailableError(NO_BETA)
    return loss.beta


def trl_chunked(inputs: Inputs, loss: Loss) -> Run:
    """The loss of TRL's stable DistillationTrainer."""
    function = load("trl", "trl.trainer.distillation_trainer")._chunked_divergence_loss
    beta, mask = beta_of(loss), torch.ones_like(inputs.labels)[None]
    weights = inputs.student_weight, inputs.teacher_weight

    def run() -> Any:  # noqa: ANN401  untyped
        value = function(inputs.student[None], inputs.teacher[None], *weights, mask, beta)[0]
        value.backward()
        return value

    return run


def liger_loss(loss: Loss, *, chunk: int, compiled: bool) -> Any:  # noqa: ANN401  untyped
    """Liger's chunked JSD, with no part for the labels."""
    kind = load("liger_kernel", "liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    return kind(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta_of(loss),
        compiled=compiled,
        chunk_size=chunk,
    )


def liger(inputs: Inputs, loss: Loss, *, chunk: int, compiled: bool = False) -> Run:
    """Liger's chunked JSD on hidden states."""
    function = liger_loss(loss, chunk=chunk, compiled=compiled)

    def run() -> Any:  # noqa: ANN401  untyped
        value = function(
            inputs.student,
            inputs.student_weight,
            inputs.teacher,
            inputs.teacher_weight,
            inputs.labels,
        )
        value.backward()
        return value

    return run


def head_arms(inputs: Inputs, loss: Loss) -> list[Arm]:
    """All rivals of the head."""

    def liger_arm(chunk: int, *, compiled: bool = False) -> Callable[[], Run]:
        return lambda: liger(inputs, loss, chunk=chunk, compiled=compiled)

    note = "" if inputs.student.is_cuda else FALLBACK
    settings: dict[str, Any] = {"kind": "rival", "answer": "divergence"}
    return [
        Arm("TRL chunked", make=lambda: trl_chunked(inputs, loss), note=note, **settings),
        Arm(f"Liger {LIGER_DEFAULT}", make=liger_arm(LIGER_DEFAULT), note="default", **settings),
        Arm(f"Liger {LIGER_BEST}", make=liger_arm(LIGER_BEST), **settings),
        Arm(
            f"Liger {LIGER_BEST} compiled",
            make=liger_arm(LIGER_BEST, compiled=True),
            twice=True,
            **settings,
        ),
    ]
