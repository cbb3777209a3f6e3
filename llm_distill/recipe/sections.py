"""`Recipe`: the sections of a recipe, each as what it stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_distill.data.spec import Data
from llm_distill.errors import InputError
from llm_distill.recipe import document as documents
from llm_distill.recipe.components import Components
from llm_distill.recipe.models import student_of, teacher_of, teachers
from llm_distill.recipe.values import Place, convert, did_you_mean

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import TrainingArguments

    # Nobody reads the hints of Recipe when it runs; importing it stays fast.
    from llm_distill.balance import BalanceRule  # noqa: TC004
    from llm_distill.objectives import Objective  # noqa: TC004
    from llm_distill.students import FromConfig, FromTeacher  # noqa: TC004
    from llm_distill.teachers import Local, Teacher  # noqa: TC004

SECTIONS = (
    "student",
    "teacher",
    "data",
    "objectives",
    "balance",
    "training",
    "peft",
    "rows_per_chunk",
)
NEEDED = ("student", "teacher", "data")
DEFAULT_OBJECTIVES = ({"CrossEntropy": {"weight": 0.1}}, "Logits")
DEFAULT_TRAINING = {"report_to": "none", "logging_steps": 10}
ELSEWHERE = {
    "hub_token": "tokens do not belong into a recipe; set HF_TOKEN, or run: hf auth login",
    "resume_from_checkpoint": "run with --resume, or --resume PATH",
}
"""Fields of TrainingArguments that a recipe does not take, and what to do instead."""

RUNS_CODE = ("auto_mapping", "megatron_config", "megatron_core")
"""Fields of LoraConfig that name modules to import."""

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run as its file says it, every name and type checked; nothing is loaded yet.

    Attributes:
        student: A spec.
        teacher: A spec.
        data: What to train on.
        objectives: What to match.
        training: Fields of `transformers.TrainingArguments`.
        peft: Fields of `peft.LoraConfig`; None for a student that is trained whole.
        rows_per_chunk: Rows whose logits exist at a time; None: as memory allows.
        balance: Between the weights of the objectives (`llm_distill.balance`); None: as written.
        document: The YAML it was made from, overrides applied and defaults filled in.
    """

    student: Local | FromConfig | FromTeacher
    teacher: Teacher
    data: Data
    objectives: tuple[Objective, ...]
    training: Mapping[str, Any]
    peft: Mapping[str, Any] | None = None
    rows_per_chunk: int | None = None
    balance: BalanceRule | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Sequence[tuple[str, str]] = (),
        allow_code: Sequence[str] = (),
    ) -> Recipe:
        """Read a file.

        Args:
            path: Of the YAML.
            overrides: (`training.learning_rate`, `1e-5`): what stands in the file is replaced.
            allow_code: Modules and packages outside of llm_distill that the recipe may name.

        Raises:
            InputError: For anything in it that cannot be meant, with its place.
        """
        content = documents.read(path)
        for key, text in overrides:
            content = documents.override(content, key, text)
        return cls.of(content, name=Path(path).stem, allow_code=allow_code)

    @classmethod
    def of(
        cls, content: Mapping[str, Any], *, name: str = "recipe", allow_code: Sequence[str] = ()
    ) -> Recipe:
        """Make a recipe of a document that is in memory.

        Args:
            content: The sections.
            name: The student goes to `out/<name>`, unless the recipe says where.
            allow_code: Modules and packages outside of llm_distill that the recipe may name.

        Raises:
            InputError: For anything in it that cannot be meant, with its place.
        """
        _check_sections(content)
        filled = _filled(content, name)
        make = Components(tuple(allow_code), teachers())
        return cls(
            student=student_of(filled["student"], make),
            teacher=teacher_of(filled["teacher"], make),
            data=make.spec(Data, _section(filled, "data"), Place("data"), Place("data")),
            objectives=_objectives(filled["objectives"], make),
            training=_training(_section(filled, "training"), make),
            peft=_peft(_section(filled, "peft"), make) if "peft" in filled else None,
            rows_per_chunk=_rows(filled.get("rows_per_chunk"), make),
            balance=_balance(filled.get("balance"), make),
            document=filled,
        )

    def resolved(self) -> str:
        """The recipe as YAML, overrides applied and defaults filled in; it gives the same run."""
        return documents.dump(self.document)

    def arguments(self, **changes: Any) -> TrainingArguments:
        """The training section as what Trainer takes.

        Args:
            changes: Fields that shall be different.

        Raises:
            InputError: For values that do not go together, or that this machine cannot do.
        """
        from transformers import TrainingArguments
        from transformers.integrations.deepspeed import is_deepspeed_available
        from transformers.integrations.integration_utils import get_reporting_integration_callbacks

        if self.training.get("deepspeed") and not is_deepspeed_available():
            raise InputError(
                "training.deepspeed: DeepSpeed is not installed here; pip install deepspeed, or "
                "train under FSDP2 (recipes/accelerate/fsdp2.yaml)"
            )
        try:
            args = TrainingArguments(**{**self.training, **changes})
            get_reporting_integration_callbacks(args.report_to)
        except ValueError as error:
            raise InputError(f"training: {error}") from error
        return args

    def adapter(self, *, causal: bool) -> LoraConfig | None:
        """The peft section as what `get_peft_model` takes."""
        from peft import LoraConfig

        if self.peft is None:
            return None
        try:
            return LoraConfig(**{"task_type": "CAUSAL_LM" if causal else None, **self.peft})
        except ValueError as error:
            raise InputError(f"peft: {error}") from error


def _check_sections(content: Mapping[str, Any]) -> None:
    """Refuse unknown sections, missing ones, and tokens anywhere."""
    for name in content:
        if name not in SECTIONS:
            near = did_you_mean(name, SECTIONS) or f"; a recipe has {', '.join(SECTIONS)}"
            raise InputError(f"no section {name!r} in a recipe{near}")
    missing = [name for name in NEEDED if content.get(name) is None]
    if missing:
        raise InputError(f"the recipe has no {' and no '.join(missing)}; write `{missing[0]}: …`")
    _refuse_tokens(content, "")


def _refuse_tokens(value: Any, path: str) -> None:  # noqa: ANN401  any YAML
    """Refuse what looks like a token, without repeating it."""
    if isinstance(value, str) and _TOKEN.search(value):
        raise InputError(f"{path}: this looks like an access token; {ELSEWHERE['hub_token']}")
    entries = dict(enumerate(value)) if isinstance(value, list) else value
    for key, entry in entries.items() if isinstance(entries, Mapping) else ():
        _refuse_tokens(entry, f"{path}.{key}" if path else str(key))


def _filled(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The document with defaults, in the order of the sections."""
    given = {section: content[section] for section in SECTIONS if content.get(section) is not None}
    training = _section(given, "training") if "training" in given else {}
    if "objectives" not in given:
        given["objectives"] = list(DEFAULT_OBJECTIVES)
    given["training"] = {"output_dir": f"out/{name}", **DEFAULT_TRAINING, **training}
    return {section: given[section] for section in SECTIONS if section in given}


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section that is a mapping."""
    value = content[name]
    if not isinstance(value, Mapping):
        example = {"data": "path", "peft": "r"}.get(name, "learning_rate")
        raise InputError(f"{name}: {value!r} is no mapping; write {name}: {{{example}: …}}")
    return value


def _objectives(value: Any, make: Components) -> tuple[Objective, ...]:  # noqa: ANN401  any YAML
    """What to match; whether the list makes sense as a whole is known here as well."""
    from llm_distill.objectives import Objective, check_objectives, named

    place = Place("objectives")
    if not isinstance(value, list):
        raise InputError(f"{place}: {value!r} is no list; write `- Logits` on a line below")
    made = tuple(make(entry, Objective, place.entry(i)) for i, entry in enumerate(value))
    try:
        check_objectives(made)
        named(made)
    except ValueError as error:
        raise InputError(str(error)) from error
    return made


def _rows(value: Any, make: Components) -> int | None:  # noqa: ANN401  any YAML
    """Rows per chunk."""
    from llm_distill.binding import checked_rows

    return checked_rows(convert(value, int | None, Place("rows_per_chunk"), make))


def _balance(value: Any, make: Components) -> BalanceRule | None:  # noqa: ANN401  any YAML
    """How the weights of the objectives move."""
    return None if value is None else make(value, Callable, Place("balance", "balance"))


def _training(section: Mapping[str, Any], make: Components) -> Mapping[str, Any]:
    """Fields of TrainingArguments."""
    from transformers import TrainingArguments

    for name, instead in ELSEWHERE.items():
        if name in section:
            raise InputError(f"training.{name}: {instead}")
    values = make.fields(TrainingArguments, section, Place("training"))
    if not str(values["output_dir"] or "").strip():
        raise InputError("training.output_dir is empty; write where the student shall go")
    return values


def _peft(section: Mapping[str, Any], make: Components) -> Mapping[str, Any]:
    """Fields of LoraConfig."""
    from peft import LoraConfig

    for name in RUNS_CODE:
        if name in section:
            raise InputError(f"peft.{name}: it names code to import; recipes do not take it")
    return make.fields(LoraConfig, section, Place("peft"))
