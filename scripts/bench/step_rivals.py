"""Other libraries' losses in a step on the same models and the same batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scripts.bench.arms import Arm, UnavailableError
from scripts.bench.rivals import FALLBACK, LIGER_BEST, beta_of, liger_loss, load

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from scripts.bench.inputs import Loss
    from scripts.bench.measure import Run
    from scripts.bench.models import Models

DISTILLKIT = {0.0: "kl"}


def gkd(models: Models, loss: Loss) -> Run:
    """TRL's experimental GKDTrainer: all logits of both models, the teacher with its cache on."""
    function = load("trl", "trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    beta = beta_of(loss)

    def forward() -> Any:  # noqa: ANN401  untyped
        teacher, student = models.teacher_logits(cache=True), models.student_logits()
        return function(
            student_logits=student[:, :-1].float(),
            teacher_logits=teacher[:, :-1].float(),
            labels=models.shifted,
            beta=beta,
        )

    return _trained(forward)


def trl_chunked(models: Models, loss: Loss) -> Run:
    """TRL's stable DistillationTrainer: both bodies, its chunked divergence on the completion."""
    function = load("trl", "trl.trainer.distillation_trainer")._chunked_divergence_loss
    beta = beta_of(loss)
    kept = models.supervised.any(0)  # the trainer cuts the prompts off before

    def forward() -> Any:  # noqa: ANN401  untyped
        teacher, student = models.teacher_hidden(), models.student_hidden()
        return function(
            student[:, :-1][:, kept],
            teacher[:, :-1][:, kept],
            models.student.lm_head.weight,
            models.teacher.lm_head.weight,
            models.supervised[:, kept].long(),
            beta,
        )[0]

    return _trained(forward)


def liger(models: Models, loss: Loss) -> Run:
    """Both bodies, and Liger's chunked JSD on the supervised rows."""
    function = liger_loss(loss, chunk=LIGER_BEST, compiled=False)

    def forward() -> Any:  # noqa: ANN401  untyped
        x = models.rows(models.teacher_hidden(), models.student_hidden())
        return function(x.student, x.student_weight, x.teacher, x.teacher_weight, x.labels)

    return _trained(forward)


def distillkit(models: Models, loss: Loss) -> Run:
    """What DistillKit's DistillationTrainer does between a batch and a loss, teacher in memory."""
    name = None if loss.beta is None else DISTILLKIT.get(loss.beta)
    losses = load("distillkit", "distillkit.lossfuncs").ALL_LOSS_CLASSES
    if name is None:
        raise UnavailableError("only compared in the forward KL")
    function = next(kind for kind in losses if kind.name() == name)(temperature=1.0)
    vocabulary = models.student.config.vocab_size
    source = load("distillkit", "distillkit.signals").OnlineSignalSource(models.teacher, vocabulary)
    model: Any = models.student

    def forward() -> Any:  # noqa: ANN401  untyped
        student = model(input_ids=models.ids, labels=models.targets, return_dict=True)
        signal = source.get_signal({"input_ids": models.ids}, return_hidden_states=False)
        return function(student, signal, mask=(models.targets >= 0).unsqueeze(-1))

    return _trained(forward)


def step_arms(models: Models, loss: Loss) -> list[Arm]:
    """All rivals of the step."""
    fallback = "" if models.ids.is_cuda else f", {FALLBACK}"

    def arm(name: str, make: Callable[[Models, Loss], Run], note: str) -> Arm:
        return Arm(name, "rival", lambda: make(models, loss), note, "divergence")

    return [
        arm("TRL GKD", gkd, "loss of GKDTrainer, all rows"),
        arm("TRL Distillation", trl_chunked, f"chunked loss of the stable trainer{fallback}"),
        arm(f"Liger {LIGER_BEST}", liger, "its chunked JSD"),
        arm("DistillKit", distillkit, "its mask is not shifted: other rows, and CE as well"),
    ]


def _trained(forward: Callable[[], Any]) -> Run:
    """Forward and backward."""

    def run() -> Tensor:
        value: Tensor = forward()
        value.backward()
        return value

    return run
