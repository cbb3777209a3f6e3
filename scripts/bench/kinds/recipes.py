"""The recipes: the quickstart's, with another teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

CE = {"CrossEntropy": {"weight": 0.1}}
TOKENS = (CE, "Logits")
HINTS = (*TOKENS, "HiddenStates")
MAPS = {"AttentionMaps": {"heads": "group", "weight": 0.1}}
SIGNALS = (*HINTS, MAPS)
"""All that a model on this machine gives."""
NEAR = ({"CrossEntropy": {"weight": 1.0}}, {"Logits": {"weight": 0.3}})
"""Of a student that learns from itself."""
QUANTISED = ("bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8")
ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
BATCH = "per_device_train_batch_size"
COLUMN = "expert"
"""Of the data, where each example has its own teacher."""


@dataclass(frozen=True)
class Kind:
    """A recipe of one kind of teacher.

    Attributes:
        name: In words.
        teacher: As a recipe has it; `URL` in it stands for a server of the teacher.
        objectives: The same.
        processes: That it is started in.
        student: Where it is another than the quickstart's recipe has.
        sections: Further ones.
    """

    name: str
    teacher: Any
    objectives: Sequence[Any] = TOKENS
    processes: int = 1
    student: str | None = None
    sections: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cached(self) -> bool:
        """Whether the teacher is asked once, before."""
        return isinstance(self.teacher, dict) and "Cached" in self.teacher

    @property
    def remote(self) -> bool:
        """Whether it is behind a server."""
        return isinstance(self.teacher, dict) and "Remote" in self.teacher

    def recipe(self, base: Mapping[str, Any], out: Path, steps: int, url: str) -> dict[str, Any]:
        """All sections.

        Args:
            base: The quickstart's recipe, its paths of this machine.
            out: Of the student.
            steps: To train.
            url: Of the server.
        """
        made = {**base, "teacher": self.teacher, "objectives": list(self.objectives)}
        if self.remote:
            made["teacher"] = {"Remote": {**self.teacher["Remote"], "url": url}}
        if self.student is not None:
            made["student"] = self.student
        short = {"output_dir": str(out), "max_steps": steps, "disable_tqdm": True}
        training = {**base["training"], **short}
        if self.processes > 1:  # the same batch
            training[BATCH] //= self.processes
        # All that is trained on, and no more: a cache is of all data.
        limit = {"limit": steps * base["training"][BATCH]}
        data = {**base["data"], **self.sections.get("data", {}), **limit}
        return {**made, **self.sections, "data": data, "training": training}


def kinds(folder: Path, caches: Path, routed: Mapping[str, str]) -> list[Kind]:
    """Every kind.

    Args:
        folder: Of the quickstart.
        caches: Where caches are written.
        routed: Data whose examples name their experts: `path` and `eval`.
    """
    teacher, second = str(folder / "teacher"), str(folder / "distilled")
    return [
        Kind("Local", teacher, SIGNALS),
        *(_local(teacher, word, quantize=word) for word in QUANTISED),
        *(_local(teacher, f"shard: {s}", processes=2, shard=s) for s in ("fsdp2", "tp")),
        _local(teacher, "blocks on disk", device_map=ON_DISK),
        *_cached(teacher, caches),
        Kind("Remote, top 20", {"Remote": {"model": "teacher", "of": teacher, "top_k": 20}}),
        *_several(teacher, second, routed),
        *_itself(second),
    ]


def _local(teacher: str, name: str, processes: int = 1, **settings: Any) -> Kind:
    """A model on this machine, that lies here in some way."""
    spec = {"Local": {"model": teacher, **settings}}
    return Kind(f"Local, {name}", spec, SIGNALS, processes)


def _cached(teacher: str, caches: Path) -> list[Kind]:
    """What may be kept of a teacher."""
    keeps: dict[str, Any] = {
        "topk": {"topk": {"k": 64}},
        "sampled": {"sampled": {"n": 50}},
        "hybrid": {"hybrid": {"m": 8, "n": 42}},
        "hidden": "hidden",
    }
    made = []
    for name, keep in keeps.items():
        spec = {"path": str(caches / name), "of": teacher, "keep": keep}
        made.append(Kind(f"Cached, {name}", {"Cached": spec}))
    states = {"path": str(caches / "states"), "of": teacher, "states": True}
    return [*made, Kind("Cached, topk and states", {"Cached": states}, HINTS)]


def _several(teacher: str, second: str, routed: Mapping[str, str]) -> list[Kind]:
    """More than one teacher."""
    both = {"members": [teacher, second]}
    each = [{"HiddenStates": {"member": k, "weight": 0.1}} for k in (0, 1)]
    experts = {"a": teacher, "b": second}
    data = {**routed, "keep": [COLUMN]}
    return [
        Kind("Ensemble, hints of each", {"Ensemble": both}, (*TOKENS, *each)),
        Kind(
            "Ensemble, confidence and turns",
            {"Ensemble": {**both, "confidence": "label", "turns": True}},
        ),
        Kind("Routed", {"Routed": {"by": COLUMN, "experts": experts}}, sections={"data": data}),
    ]


def _itself(student: str) -> list[Kind]:
    """The student, which the quickstart distilled, as its own teacher."""
    adapter = {"peft": {"r": 8, "target_modules": ["q_proj", "v_proj"]}}
    exits = ({"CrossEntropy": {"weight": 1.0}}, {"Logits": {"exit": 1}})
    return [
        Kind("BornAgain", "BornAgain", NEAR, student=student),
        Kind("Ema", {"Ema": {"decay": 0.99}}, NEAR, student=student),
        Kind("AdapterOff", "AdapterOff", NEAR, student=student, sections=adapter),
        Kind("DeepToShallow", "DeepToShallow", exits, student=student),
    ]
