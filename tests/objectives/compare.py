"""What the terms are compared with: whole models of transformers, read in the plainest way."""

import copy
from functools import partial
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_distill import layers as layer_maps
from llm_distill.binding import make_batch
from llm_distill.capture import Reader
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.objectives import Evidence, Objective, QueryPlan, Term
from llm_distill.rows import Batch, RowKind, Step
from llm_distill.signals import ModelSpec, Request, Signals
from tests import tiny

STEP = Step(0.0, torch.ones(1))
EXPLICIT = partial(layer_maps.explicit, pairs=[[0, 1], [1, 2], [2, 2], [2, 4]])


def batch(plan: QueryPlan | None = None, *, empty: tuple[int, ...] = (), count: int = 4) -> Batch:
    """Some sequences of different lengths, padded on the left."""
    collate = RowCollator(Collator(pad_token_id=0, padding_side="left"), shift=True, valid=True)
    data = tiny.rows(count, empty=empty)
    return make_batch(collate([data[k] for k in range(count)]), plan, seed=0, epoch=0)


def specs(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[ModelSpec, ModelSpec]:
    return ModelSpec.of(student.config, "student"), ModelSpec.of(teacher.config, "teacher")


def read(model: PreTrainedModel, request: Request, given: Batch) -> Signals:
    """What a model says, and nothing left behind."""
    reader = Reader(model, request, "model")
    signals = reader.read(given)
    reader.release()
    return signals


def value(term: Term, student: PreTrainedModel, teacher: PreTrainedModel, given: Batch) -> Tensor:
    """The sum a term gives for a batch."""
    ours = read(student, term.student, given)
    with torch.no_grad():
        theirs = read(teacher, term.teacher, given)
    return cast("Tensor", term(ours, theirs, given, STEP))


def evidence(
    objective: Objective, student: PreTrainedModel, teacher: PreTrainedModel, given: Batch
) -> Evidence:
    """What calibration shows an objective."""
    ours, theirs = objective.survey(*specs(student, teacher))
    with torch.no_grad():
        return Evidence(given, read(student, ours, given), read(teacher, theirs, given))


@torch.no_grad()
def states(model: PreTrainedModel, given: Batch, rows: RowKind) -> list[Tensor]:
    """Every hidden state of the chosen rows, from transformers."""
    hidden = model(**given.inputs, output_hidden_states=True).hidden_states
    return [state.flatten(0, 1)[given.rows(rows).index] for state in hidden]


def eager_maps(model: PreTrainedModel, given: Batch) -> list[Tensor]:
    """Every map `[n, H, T]` of the query rows, from transformers' eager attention."""
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    queries = given.queries
    assert queries is not None
    with torch.no_grad():
        attentions = copied(**given.inputs, output_attentions=True).attentions
    found = []
    for maps in attentions:
        chosen = [
            maps[sequence, :, int(queries.position[sequence, place])]
            for sequence, count in enumerate(queries.per_sequence)
            for place in range(count)
        ]
        found.append(torch.stack(chosen))
    return found
