"""`attention`: a step of two bodies without heads, and what maps and relations add to it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_distill import losses
from llm_distill.binding import bind, query_plan
from llm_distill.capture import Reader
from llm_distill.heads import mean
from llm_distill.layers import last
from llm_distill.objectives import AttentionMaps, QueryPlan, Relations
from llm_distill.rows import Step
from llm_distill.signals import ModelSpec, Request
from llm_distill.teachers.local_source import LocalSource
from scripts.bench.arms import Answer, Arm, Benchmark
from scripts.bench.models import Models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from llm_distill.objectives import Term
    from llm_distill.rows import Batch
    from llm_distill.signals import Signals
    from scripts.bench.measure import Run
    from scripts.bench.settings import AttentionSettings

BASE = "no maps"
MAP_LOSSES = {"map_kl": losses.map_kl, "map_mse": losses.map_mse}
WEIGHT = 1.0
"""Of the maps beside the loss of the last hidden states."""


@dataclass(frozen=True)
class Wanted:
    """What one arm is trained for besides.

    Attributes:
        layers: Of the student, from the last down; 0: none.
        queries: Sampled rows; None: all.
        relations: Of queries, keys and values, in place of attention maps.
    """

    layers: int = 0
    queries: int | None = None
    relations: bool = False


class AttentionBenchmark(Benchmark):
    """Models and arms of one sequence length.

    Args:
        settings: What was asked for.

    Raises:
        ValueError: For a loss that does not compare maps.
    """

    ratios: Mapping[str, tuple[str, ...]] = {f"x {BASE}": (BASE,)}
    lean = BASE

    def __init__(self, settings: AttentionSettings) -> None:
        if settings.loss not in MAP_LOSSES:
            raise ValueError(
                f"there is no loss of maps {settings.loss!r}; there are {', '.join(MAP_LOSSES)}"
            )
        self.settings: AttentionSettings = settings
        self.models = Models.build(settings)
        s = settings
        self.wanted = {
            f"1 layer, {s.queries} rows": Wanted(1, s.queries),
            f"2 layers, {s.queries} rows": Wanted(2, s.queries),
            "1 layer, all rows": Wanted(1),
            f"relations, 1 layer, {s.queries} rows": Wanted(1, s.queries, relations=True),
        }
        self.title = (
            f"attention: {s.loss}, T={s.length:,}, student {s.student_layers} x {s.student_width}, "
            f"teacher {s.teacher_layers} x {s.teacher_width}, no language-model head, B={s.batch}, "
            f"{s.dtype}"
        )

    def arms(self) -> list[Arm]:
        """The step alone, ours, one piece through autograd, and eager attention."""
        return [
            Arm(BASE, "part", lambda: self._ours(Wanted()), "both bodies, sdpa", BASE),
            *(
                Arm(name, "ours", partial(self._ours, wanted), answer=name)
                for name, wanted in self.wanted.items()
            ),
            Arm(
                "1 layer, all rows, one piece",
                "dense",
                partial(self._one_piece, Wanted(1)),
                "all maps of the layer through autograd",
                "1 layer, all rows",
            ),
            Arm("eager, no maps", "dense", lambda: self._eager(maps=False), answer=BASE),
            Arm(
                "eager with output_attentions, 1 layer",
                "dense",
                lambda: self._eager(maps=True),
                "all rows of one layer used, as most scripts do",
                "1 layer, all rows",
            ),
        ]

    def forget(self) -> None:
        """Drop all gradients."""
        self.models.student.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        """Of all of the student, flat."""
        found = [p.grad.flatten() for p in self.models.student.parameters() if p.grad is not None]
        return {"body": torch.cat(found)} if found else {}

    def answer(self, name: str) -> Answer:
        """Through autograd in one piece, of whole maps."""
        self.forget()
        loss = self._one_piece(self.wanted.get(name, Wanted()))()
        assert loss is not None
        found = {key: value.clone() for key, value in self.gradients().items()}
        return Answer(float(loss.detach()), found)

    def facts(self) -> dict[str, float]:
        """Sizes of the student's gradients and of a whole map."""
        s = self.settings
        body = self.models.student.model.parameters()
        heads = int(self.models.student.config.num_attention_heads)
        return {
            "gradients_mib": sum(p.numel() * p.element_size() for p in body) / 2**20,
            "map_mib": s.batch * heads * s.length**2 * 4 / 2**20,
        }

    def _ours(self, wanted: Wanted) -> Run:
        """As DistillTrainer does it."""
        term = self._term(wanted)
        return self._run(
            wanted, lambda ours, theirs, batch: term(ours, theirs, batch, Step(0.0, torch.ones(1)))
        )

    def _one_piece(self, wanted: Wanted) -> Run:
        """Whole maps, and autograd."""

        def value(ours: Signals, theirs: Signals, batch: Batch) -> Tensor:
            queries = batch.queries
            assert queries is not None
            weight = queries.weight.flatten()[queries.flat]
            total = torch.zeros((), device=weight.device)
            for k in range(wanted.layers):
                own = ours.heads(self.settings.student_layers - k)
                other = theirs.heads(self.settings.teacher_layers - k)
                for kind in ("query", "key", "value") if wanted.relations else (None,):
                    pair: tuple[Tensor, Tensor]
                    if kind is None:
                        pair = mean(own.maps(queries), other.maps(queries))
                    else:
                        split = self._relation_heads()
                        sides = (h.relation(kind, split, queries) for h in (own, other))
                        first, second = (side.maps(queries) for side in sides)
                        pair = first, second
                    total = total + (MAP_LOSSES[self.settings.loss](*pair) * weight).sum()
            return total / wanted.layers

        return self._run(wanted, value)

    def _run(
        self, wanted: Wanted, value: Callable[[Signals, Signals, Batch], Tensor]
    ) -> Callable[[], Tensor]:
        """Teacher, student, loss of the last hidden states and of maps, backward."""
        models, s = self.models, self.settings
        term = self._term(wanted) if wanted.layers else None
        plan = None if term is None else query_plan({"maps": term})
        batch = self._batch(plan)
        top = Request(hidden=frozenset({s.student_layers}))
        reader = Reader(models.student, top if term is None else top | term.student, "student")
        theirs = Request(hidden=frozenset({s.teacher_layers})) if term is None else term.teacher
        source = LocalSource(models.teacher, theirs, "teacher", models.ids.device)

        def run() -> Tensor:
            said = source(batch)
            signals = reader.read(batch)
            loss = signals.states[s.student_layers].square().mean()
            if term is not None:
                loss = loss + WEIGHT * value(signals, said, batch) / term.count(batch)
            loss.backward()
            reader.release()
            return loss

        return run

    def _eager(self, *, maps: bool) -> Callable[[], Tensor]:
        """What `output_attentions=True` asks for: eager attention in every layer of both models."""
        models, loss_of = self.models, MAP_LOSSES[self.settings.loss]
        plan = QueryPlan(None, "supervised")
        queries = self._batch(plan).queries
        assert queries is not None

        def run() -> Tensor:
            with eager(models):
                options = {"input_ids": models.ids, "output_attentions": maps}
                with torch.no_grad():
                    theirs = _call(models.teacher.model, use_cache=False, **options)
                ours = _call(models.student.model, **options)
                loss: Tensor = ours.last_hidden_state.square().mean()
                if maps:
                    sides = (
                        out.attentions[-1].transpose(1, 2).flatten(0, 1) for out in (ours, theirs)
                    )
                    rows = self._batch(None).supervised.index
                    first, second = (side.index_select(0, rows) for side in sides)
                    loss = loss + WEIGHT * loss_of(*mean(first, second)).mean()
                loss.backward()
            return loss

        return run

    def _term(self, wanted: Wanted) -> Term:
        """What is asked of the two models."""
        layers = partial(last, n=max(1, wanted.layers))
        loss = MAP_LOSSES[self.settings.loss]
        kind = Relations if wanted.relations else AttentionMaps
        objective = kind(loss=loss, layers=layers, queries=wanted.queries)
        specs = [
            ModelSpec.of(model.config, name)
            for model, name in ((self.models.student, "student"), (self.models.teacher, "teacher"))
        ]
        return bind([objective], *specs, seed=0)[kind.__name__]

    def _relation_heads(self) -> int:
        """Of the arm with relations."""
        term: Any = self._term(Wanted(1, relations=True))
        return int(term.heads)

    def _batch(self, plan: QueryPlan | None) -> Batch:
        """With the sampled queries of a plan."""
        return self.models.batch(plan)


@contextmanager
def eager(models: Models) -> Iterator[None]:
    """Eager attention in both models, for as long as it lasts."""
    configs = [model.config for model in (models.student, models.teacher)]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _call(model: Any, **inputs: Any) -> Any:  # noqa: ANN401  transformers' outputs
    """A forward pass."""
    return model(**inputs)
