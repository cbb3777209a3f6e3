"""Writing and reading students as plain transformers checkpoints, terms beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llm_distill.errors import InputError
from llm_distill.layers import Row
from llm_distill.objectives import Term

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from llm_distill.distiller import Distiller

STUDENT = "student."
TERMS = "terms."
BALANCE = "balance."
TERMS_FILE = "terms.safetensors"
TEACHER_FILE = "teacher.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"


def save_student(distiller: Distiller, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """Write the plain student: weights, config, generation config; for PEFT the adapter.

    Args:
        distiller: Holds the student.
        folder: Made if absent.
        state: The whole distiller's state dict where it had to be gathered; None reads the module.
    """
    own = (
        None
        if state is None
        else {k.removeprefix(STUDENT): v for k, v in state.items() if k.startswith(STUDENT)}
    )
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(distiller.student, PeftModel):
        _save_adapter(distiller.student, folder, own)
    else:
        cast("PreTrainedModel", distiller.student).save_pretrained(folder, state_dict=own)


def save_terms(distiller: Distiller, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """Write what terms and balance learned (projectors, matched heads, means), for resuming."""
    own = _learned(distiller)
    if state is not None:
        own = {k.removeprefix(TERMS): v for k, v in state.items() if k.startswith((TERMS, BALANCE))}
    if own or _moving(distiller):
        tensors = {k: v.contiguous().cpu() for k, v in own.items()}
        save_file(tensors, folder / TERMS_FILE, metadata={"maps": _maps(distiller)})


def save_teacher(distiller: Distiller, folder: Path) -> None:
    """Write what a teacher within has learned (a moving mean), for resuming."""
    own = {} if distiller.within is None else distiller.within.learned()
    if own:
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in own.items()}
        save_file(tensors, folder / TEACHER_FILE)


def load_teacher(distiller: Distiller, folder: Path) -> None:
    """Read what a teacher within has learned.

    Raises:
        FileNotFoundError: If the checkpoint does not have it.
        ValueError: If it is of another student.
    """
    own = {} if distiller.within is None else distiller.within.learned()
    if not own:
        return
    path = folder / TEACHER_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the teacher of this run would start anew as the student is now; "
            "resume from another checkpoint, or start over"
        )
    found = load_file(path)
    if found.keys() != own.keys():
        raise ValueError(
            f"{path} does not fit the teacher: {sorted(found.keys() ^ own.keys())} are of one only"
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(found[name])


def load_student(distiller: Distiller, folder: Path) -> None:
    """Read the student's weights back from a checkpoint, every one of them.

    Raises:
        ValueError: If weights are missing or left over.
    """
    student = distiller.student
    if isinstance(student, PeftModel):
        _load_adapter(student, folder)
        return
    model = cast("PreTrainedModel", student)
    # Parts of a student may be wider than its first weight, which is the dtype it says it has.
    widest = reduce(torch.promote_types, {p.dtype for p in model.parameters()})
    fresh, report = cast(
        "tuple[PreTrainedModel, dict[str, Any]]",
        type(model).from_pretrained(folder, dtype=widest, output_loading_info=True),
    )
    wrong = {
        key: sorted(report[key])
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report[key]
    }
    if wrong:
        raise ValueError(
            f"checkpoint {folder} does not fit the student {type(model).__name__}: {wrong}"
        )
    model.load_state_dict(fresh.state_dict())
    model.tie_weights()


def load_terms(distiller: Distiller, folder: Path) -> None:
    """Read what terms and balance learned.

    Raises:
        FileNotFoundError: If they have something to load and the checkpoint does not have it.
        ValueError: If the checkpoint is of another balance, or of other layer maps that stay.
    """
    own = _learned(distiller)
    path = folder / TERMS_FILE
    if not path.exists():
        if not own and not _moving(distiller):
            return
        raise FileNotFoundError(
            f"{path} is missing: projectors and maps of this run would start anew; resume from "
            "another checkpoint, or start over"
        )
    load_maps(distiller, folder)
    found = load_file(path)
    ours, theirs = ({k for k in keys if k.startswith(BALANCE)} for keys in (own, found))
    if ours != theirs:
        raise ValueError(
            f"{path} is of another balance between terms: it has {sorted(theirs) or 'none'}, this "
            f"run {sorted(ours) or 'none'}; write the balance it was trained with, or start over"
        )
    distiller.terms.load_state_dict({k: v for k, v in found.items() if k not in theirs})
    distiller.balance.load_state_dict({k.removeprefix(BALANCE): found[k] for k in theirs})


def save_maps(distiller: Distiller, folder: Path) -> None:
    """Write the layer maps alone, beside terms that each rank writes its own part of."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({}, folder / TERMS_FILE, metadata={"maps": _maps(distiller)})


def load_maps(distiller: Distiller, folder: Path) -> None:
    """Go on with the layer maps of a checkpoint where they move; refuse others.

    Projectors of other maps would fit by their shapes.

    Raises:
        InputError: With both maps.
    """
    path = folder / TERMS_FILE
    if not path.exists():
        return
    with safe_open(str(path), framework="pt") as file:
        maps = (file.metadata() or {}).get("maps", _maps(distiller))
    for number, rows in json.loads(maps).items():
        term = distiller.terms[int(number)] if int(number) < len(distiller.terms) else None
        if not isinstance(term, Term) or not term.moves or term.mapping is None:
            continue
        made = tuple(Row(s, tuple((t, share) for t, share in teacher)) for s, teacher in rows)
        ours = [row.student for row in term.mapping.rows]
        if made != term.mapping.rows and [row.student for row in made] == ours:
            origin = f"{term.mapping.origin}, as the checkpoint has it"
            term.move(replace(term.mapping, rows=made, origin=origin, evidence=()))
    if maps != _maps(distiller):
        raise InputError(
            f"{folder} was trained with other layer maps, {_shown(maps)}; this run has "
            f"{_shown(_maps(distiller))}; write the maps it was trained with (layers: {{explicit: "
            "{pairs: …}}), or start over"
        )


def _moving(distiller: Distiller) -> bool:
    """Whether a map may have moved, which a checkpoint then has to know."""
    return any(term.moves for term in cast("Iterable[Term]", distiller.terms))


def _maps(distiller: Distiller) -> str:
    """The layer maps that projectors and matched heads belong to, by the number of the term."""
    terms = enumerate(cast("Iterable[Term]", distiller.terms))
    maps = {str(k): term.mapping for k, term in terms if term.mapping is not None}
    return json.dumps({k: [[row.student, row.teacher] for row in m.rows] for k, m in maps.items()})


def _shown(maps: str) -> str:
    """Layer maps as a person would write them: `1->2 2->4`, more than one by their numbers."""
    found = json.loads(maps)
    said = {
        k: " ".join(f"{s}->{'+'.join(str(layer) for layer, _ in t)}" for s, t in rows)
        for k, rows in found.items()
    }
    return ", ".join(said.values() if len(said) == 1 else (f"{k}: {m}" for k, m in said.items()))


def _learned(distiller: Distiller) -> dict[str, Tensor]:
    """What a checkpoint has beside the student: terms by their number, the balance by its name."""
    balance = {f"{BALANCE}{k}": v for k, v in distiller.balance.state_dict().items()}
    return distiller.terms.state_dict() | balance


def _save_adapter(student: PeftModel, folder: Path, state: dict[str, Tensor] | None) -> None:
    """The active adapter, in the folder itself whatever it is called."""
    name = student.active_adapters[0]
    student.save_pretrained(str(folder), selected_adapters=[name], state_dict=state)
    if name != "default":  # PEFT has a folder of its own for it, where nobody would look
        for file in (folder / name).iterdir():
            file.replace(folder / file.name)
        (folder / name).rmdir()


def _load_adapter(student: PeftModel, folder: Path) -> None:
    """The active adapter's weights, every one of them."""
    name = student.active_adapters[0]
    path = folder / ADAPTER_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: this is no checkpoint of an adapter")
    result: Any = set_peft_model_state_dict(student, load_file(path), adapter_name=name)
    own = (key for key in result.missing_keys if f".{name}." in f"{key}.")
    left = [key for key in own if ".lora_" in key or "modules_to_save" in key]
    if left or result.unexpected_keys:
        raise ValueError(
            f"checkpoint {folder} does not fit the adapter: missing {left}, unexpected "
            f"{result.unexpected_keys}"
        )
