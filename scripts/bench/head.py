"""`head`: the loss alone, from hidden states and heads to their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scripts.bench import dense, floors, ours, rivals
from scripts.bench.arms import Answer, Arm, Benchmark, UnavailableError
from scripts.bench.inputs import CE_WEIGHT, Inputs, Loss

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from scripts.bench.measure import Run
    from scripts.bench.settings import HeadSettings

WHOLE, WHOLE_FRESH = "4 GEMMs, whole", "4 GEMMs, whole, allocating"
CHUNKED, CHUNKED_FRESH = "4 GEMMs, chunked", "4 GEMMs, chunked, allocating"


class Head(Benchmark):
    """Inputs and arms.

    Args:
        settings: What was asked for.
    """

    ratios: Mapping[str, tuple[str, ...]] = {
        "x whole": (WHOLE,),
        "x whole, alloc.": (WHOLE_FRESH,),
        "x chunked": (CHUNKED,),
    }

    def __init__(self, settings: HeadSettings) -> None:
        self.settings: HeadSettings = settings
        self.loss = Loss.parse(settings.loss)
        self.inputs = Inputs.draw(settings)
        self.title = (
            f"head: {settings.loss}, N={settings.rows:,}, V={settings.vocab:,}, "
            f"widths {settings.student_width} and {settings.teacher_width}, {settings.dtype}, "
            f"chunk {settings.chunk}"
        )

    def arms(self) -> list[Arm]:
        """Floors, ours, the dense way, rivals."""
        arms = [*self._floors(), *self._ours(), *self._dense()]
        return [*arms, *rivals.head_arms(self.inputs, self.loss)]

    def forget(self) -> None:
        """Drop all gradients."""
        self.inputs.student.grad = self.inputs.student_weight.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Of hidden states and head."""
        found = {"hidden": self.inputs.student.grad, "head": self.inputs.student_weight.grad}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def answer(self, name: str) -> Answer:
        """Of the divergence, or of it with cross-entropy."""
        mixed = name == "divergence + CE"
        return dense.answer(self.inputs, self.loss, mixed=mixed, reference=self.settings.reference)

    def facts(self) -> dict[str, float]:
        """Sizes of one fp32 [N, V] and of the gradients, and the work of the four GEMMs."""
        s, size = self.settings, self.inputs.student.element_size()
        gradients = (s.vocab + s.rows) * s.student_width * size
        work = 2 * s.rows * s.vocab * (3 * s.student_width + s.teacher_width)
        return {
            "logits_mib": s.rows * s.vocab * 4 / 2**20,
            "gradients_mib": gradients / 2**20,
            "gflop": work / 1e9,
        }

    def _floors(self) -> list[Arm]:
        """Bare GEMMs; no peaks, as their buffers are not what is judged."""
        rows, chunk = self.settings.rows, self.settings.chunk
        settings: dict[str, Any] = {"kind": "floor", "memory": False}
        return [
            Arm(name, make=floors.gemms(self.inputs, size, reused=reused), **settings)
            for name, size, reused in (
                (WHOLE, rows, True),
                (WHOLE_FRESH, rows, False),
                (CHUNKED, chunk, True),
                (CHUNKED_FRESH, chunk, False),
            )
        ]

    def _ours(self) -> list[Arm]:
        """The head pass."""
        function, chunk = self.loss.function, self.settings.chunk

        def run(inputs: Inputs, loss: Callable[..., Tensor], ce: float = 0.0) -> Callable[[], Run]:
            return lambda: _trained(lambda: ours.fused(inputs, loss, chunk=chunk, ce=ce))

        def users() -> Run:
            if self.loss != Loss("forward_kl", {}):
                raise UnavailableError("only beside --loss forward_kl, of which it is a copy")
            return run(self.inputs, dense.naive_forward_kl)()

        naive = "F.kl_div in two lines, nothing known of it"
        return [
            Arm("ours", "ours", run(self.inputs, function), answer="divergence"),
            Arm(
                "ours + CE on labels",
                "ours",
                run(self.inputs, function, CE_WEIGHT),
                answer="divergence + CE",
            ),
            Arm("ours, a user's own", "ours", users, note=naive, answer="divergence"),
            Arm(
                "ours, frozen head",
                "ours",
                run(self.inputs.frozen, function),
                note="3 GEMMs, no gradient of the head",
                answer="divergence",
                returned=self.inputs.student.numel() * self.inputs.student.element_size() / 2**20,
            ),
        ]

    def _dense(self) -> list[Arm]:
        """Autograd through all logits."""
        return [
            Arm(
                "dense autograd",
                "dense",
                lambda: _trained(lambda: dense.dense(self.inputs, self.loss)),
                answer="divergence",
            ),
            Arm(
                "dense + checkpoint",
                "dense",
                lambda: _trained(lambda: dense.dense_checkpointed(self.inputs, self.loss)),
                answer="divergence",
            ),
        ]


def _trained(forward: Callable[[], Tensor]) -> Run:
    """Forward and backward."""

    def run() -> Tensor:
        loss = forward()
        loss.backward()
        return loss

    return run
