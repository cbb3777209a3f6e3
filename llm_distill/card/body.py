"""The text of a card: what the student is, how good, how it was made, what nobody measured."""

import json
import math
import re
from collections.abc import Iterable, Sequence

from llm_distill.card.citations import CITATIONS
from llm_distill.card.facts import (
    CardFacts,
    DataFacts,
    ModelFacts,
    base,
    is_linked,
    is_repo_id,
    shown,
)
from llm_distill.card.metadata import FIGURES, label_of

__all__ = ["body"]

NOTHING = "–"  # noqa: RUF001 (the sign for an empty cell)

PROMPTS = {
    "text-generation": 'print(pipe("Once upon a time", max_new_tokens=40)[0]["generated_text"])',
    "fill-mask": 'print(pipe(f"The capital of France is {tokenizer.mask_token}."))',
}


def body(facts: CardFacts) -> str:
    """Everything below the front matter."""
    sections = {
        "How to use": _usage(facts),
        "Figures": _figures(facts),
        "Objectives": _objectives(facts),
        "Training": _training(facts),
        "Framework versions": _table(("Library", "Version"), facts.versions.items()),
        "Limits": "\n".join(f"- {limit}" for limit in _limits(facts)),
        "Citations": _citations(facts.objectives),
    }
    parts = [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join([_summary(facts), *parts]) + "\n"


def _summary(facts: CardFacts) -> str:
    """Title and two sentences."""
    student, teacher = facts.student, facts.teacher
    start = {
        "hub": f"from {_link(student)}",
        "local": f"from the local weights {_link(student)}",
        "random": f"from random weights ({_link(student)})",
        "cut": f"from its teacher's {student.name}",
    }[student.origin]
    how = f"as an adapter, {start}," if facts.peft else start
    steps = "" if facts.steps is None else f" for {facts.steps:,} steps"
    data = "" if facts.data is None else f" on {_link(facts.data)}"
    return (
        f"# {base(facts.name)}\n\nA language model{_size(student)}, distilled with `llm_distill` "
        f"from the teacher {_link(teacher)}{_size(teacher)}. "
        f"It was trained {how}{steps}{data}, to predict as its teacher does."
    )


def _usage(facts: CardFacts) -> str:
    """Code that loads the student and uses it."""
    own = json.dumps(facts.name if is_repo_id(facts.name) else base(facts.name))
    auto = "AutoModelForMaskedLM" if facts.task == "fill-mask" else "AutoModelForCausalLM"
    first = json.dumps(shown(facts.student)) if facts.peft else own
    adapter = [f"model = PeftModel.from_pretrained(model, {own})"] if facts.peft else []
    lines = [
        *(["from peft import PeftModel"] if facts.peft else []),
        f"from transformers import {auto}, AutoTokenizer, pipeline",
        "",
        f"model = {auto}.from_pretrained({first})",
        *adapter,
        f"tokenizer = AutoTokenizer.from_pretrained({own})",
        f'pipe = pipeline("{facts.task}", model=model, tokenizer=tokenizer)',
        PROMPTS[facts.task],
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _figures(facts: CardFacts) -> str:
    """Teacher and student side by side, and where that was measured."""
    figures = facts.evaluation
    rows = [("Parameters", _count(facts.teacher.parameters), _count(facts.student.parameters))]
    for key in FIGURES:
        if key in figures:
            label = label_of(key, figures)
            teacher = figures.get(key.replace("eval_", "eval_teacher_"))
            rows.append((label, _figure(key, teacher), _figure(key, figures[key])))
    table = _table(("", "Teacher", "Student"), rows)
    return f"{table}\n\nMeasured on {_where(facts)}." if figures else table


def _objectives(facts: CardFacts) -> str:
    """What was trained on, and which layer learned from which."""
    table = _table(("Objective", "Weight", "What"), facts.objectives)
    layers = "" if facts.layer_map is None else facts.layer_map.strip("\n")
    return f"{table}\n\n```text\n{layers}\n```" if layers else table


def _training(facts: CardFacts) -> str:
    """The settings that are known."""
    rate = None if facts.learning_rate is None else f"{facts.learning_rate:g}"
    rows = {
        "Teacher": _link(facts.teacher),
        "Quantised": "; ".join(facts.quantised),
        "Data": None if facts.data is None else _link(facts.data),
        "Steps": _integer(facts.steps),
        "Tokens": _integer(facts.tokens),
        "Sequences per step": _integer(facts.batch),
        "Learning rate": rate,
        "Seed": None if facts.seed is None else str(facts.seed),
        "Tokenizer": facts.tokenizer,
    }
    return _table(("Setting", "Value"), [(key, value) for key, value in rows.items() if value])


def _limits(facts: CardFacts) -> Iterable[str]:
    """What the card does not show."""
    seed = "" if facts.seed is None else f" ({facts.seed})"
    yield f"One run with one seed{seed}: how far another seed would land from it is not known."
    if facts.evaluation:
        yield (
            f"The figures hold for {_where(facts)}, with the right text given up to each token "
            "(teacher-forced). They say little about other text, and nothing about long answers."
        )
    else:
        yield "The student was not evaluated: nothing here says how good it is."
    yield (
        "Not measured: benchmarks, generated text, calibration, bias, safety, speed and memory; "
        "whether evaluation texts were in the training data; how a student trained in the same "
        "way without the teacher would do."
    )
    teacher = facts.teacher.licence
    terms = "its licence was not recorded" if teacher is None else f"its licence is {teacher}"
    yield f"The student learned its teacher's mistakes too. The teacher's terms may apply: {terms}."
    if facts.student.licence is None:
        yield "No licence is stated for the student."


def _citations(objectives: Sequence[tuple[str, str, str]]) -> str:
    """The papers of the losses that the objectives name."""
    words = {word for row in objectives for word in re.findall(r"\w+", row[2])}
    return "\n".join(f"- `{loss}`: {CITATIONS[loss]}" for loss in CITATIONS if loss in words)


def _where(facts: CardFacts) -> str:
    """The evaluation set, in words."""
    data = facts.evaluation_data
    return "text that was not recorded" if data is None else _link(data)


def _link(what: ModelFacts | DataFacts) -> str:
    """A name, linked if the Hub has it, and which revision or part of it."""
    if isinstance(what, DataFacts):
        folder, more = "datasets/", f" ({what.part})" if what.part else ""
    else:
        folder, more = "", f" at `{what.revision}`" if what.revision else ""
    if not is_linked(what):
        return f"`{shown(what)}`{more}"
    return f"[{what.name}](https://huggingface.co/{folder}{what.name}){more}"


def _size(model: ModelFacts) -> str:
    """Of how many parameters, where that is known."""
    return "" if model.parameters is None else f" of {_count(model.parameters)} parameters"


def _count(number: int | None) -> str:
    """A number of parameters, to three digits.

    >>> _count(596_049_920), _count(8_190_735_360), _count(81_920), _count(512), _count(None)
    ('596M', '8.19B', '81.9k', '512', '–')
    """
    if number is None:
        return NOTHING
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _figure(key: str, value: float | None) -> str:
    """A figure in its unit; a dash where there is none."""
    if value is None:
        return NOTHING
    if key == "eval_agreement" and math.isfinite(value):
        return f"{value:.1%}"
    return f"{value:.4g}"


def _integer(number: int | None) -> str | None:
    """With separators."""
    return None if number is None else f"{number:,}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""A Markdown table, or nothing where there is no row.

    >>> print(_table(("Key", "Value"), [("a|b", "1")]))
    | Key | Value |
    |---|---|
    | a\|b | 1 |
    """
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [header, *cells]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]]) if cells else ""
