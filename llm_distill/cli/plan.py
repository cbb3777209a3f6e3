"""What a recipe comes to on two real models, from their configs and tokenizers alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from llm_distill import binding, hints
from llm_distill.arguments import check_arguments, check_batches, check_under_deepspeed
from llm_distill.balance import Balance
from llm_distill.balance.base import settle
from llm_distill.data.files import is_local, missing
from llm_distill.errors import InputError
from llm_distill.kinds import is_masked
from llm_distill.objectives import Objective, Term
from llm_distill.race.candidates import settings_of
from llm_distill.recipe import Recipe
from llm_distill.signals import ModelSpec
from llm_distill.students import refuse_adapted_head, student_spec, teacher_for
from llm_distill.teachers import Local, Teacher, has_device_map, leaves
from llm_distill.teachers.members import Composite
from llm_distill.vocabulary import Tokenizers, check_alignment, settle_tokenizers


@dataclass(frozen=True)
class Plan:
    """A recipe, bound to its two models as far as that is possible without weights.

    Attributes:
        student: Depth, width and heads.
        teacher: The same.
        objectives: As the recipe has them, with what follows from the two configs.
        terms: The objectives, bound.
        balance: Between them.
        tokenizers: Of both models; the student's is known.
        causal: Whether they predict the next token, rather than masked ones.
    """

    student: ModelSpec
    teacher: ModelSpec
    objectives: tuple[Objective, ...]
    terms: Mapping[str, Term]
    balance: Balance
    tokenizers: Tokenizers
    causal: bool

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401  transformers has no common base that types
        """Of the data and of the student."""
        return self.tokenizers.ours

    @property
    def positions(self) -> int | None:
        """Tokens that a sequence may have; None where neither model has a limit."""
        return self.tokenizers.positions(self.student, self.teacher)


def plan(recipe: Recipe, args: TrainingArguments, *, here: bool = True) -> Plan:
    """Bind a recipe to its models.

    Args:
        recipe: What to do.
        args: As it has them.
        here: Whether this launch is to do it; else what depends on its devices is not asked.

    Raises:
        InputError: If the objectives, models, tokenizers and arguments do not go together.
    """
    check_arguments(args, {}, spread=has_device_map(recipe.teacher))
    _check_evaluation(recipe, args)
    _check_files(recipe)
    # What kind of model it is for makes no difference here, and is not known yet.
    master = teacher_for(recipe.student, recipe.teacher, recipe.adapter(causal=True))
    student = student_spec(recipe.student, master.config)
    teacher = master.spec
    objectives = hints.ready(recipe.objectives, student, master)
    terms = binding.bind(objectives, student, teacher, seed=args.seed)
    hints.check(recipe.teacher, objectives, terms, student)
    binding.check_itself(master, objectives, terms)
    settings_of(objectives)  # those of a race are refused
    check_batches(terms, args)
    balance = settle(recipe.balance, terms, student.depth)
    check_under_deepspeed(args, master, balance)
    causal = not is_masked(master.config)
    if recipe.data.eval is not None or binding.reads_logits(terms):
        adapter = recipe.adapter(causal=causal)
        refuse_adapted_head(recipe.student, master.config, adapter)
    tokenizers = settle_tokenizers(recipe.student, master, student, None)
    check_alignment(tokenizers, objectives, terms, causal=causal)
    if tokenizers.ours is None:
        raise InputError(
            f"neither {student.name} nor {teacher.name} has a tokenizer beside it; write teacher: "
            f"{{Local: {{model: {teacher.name}, tokenizer: …}}}}"
        )
    compared = recipe.data.eval is not None and tokenizers.theirs is None
    request = binding.opening_request(objectives, terms, (student, teacher), compared=compared)
    if here or not asks_for_a_launch(recipe.teacher):
        master.check(request, args.device)
    elif isinstance(master, Composite):
        master.check_together(request)
    return Plan(student, teacher, objectives, terms, balance, tokenizers, causal)


def asks_for_a_launch(teacher: Teacher) -> bool:
    """Whether where a teacher lies has to be decided, which is no question for a laptop."""
    locals_ = [leaf for leaf in leaves(teacher) if isinstance(leaf, Local)]
    pieces = any(leaf.shard not in ("auto", "replica") for leaf in locals_)
    quantised = any(leaf.quantize is not None for leaf in locals_)  # which not every device can
    return pieces or quantised or isinstance(teacher, Local)


def _check_evaluation(recipe: Recipe, args: TrainingArguments) -> None:
    """Refuse what Trainer would refuse after the weights are loaded."""
    if args.eval_strategy != "no" and recipe.data.eval is None:
        raise InputError(
            f"training.eval_strategy is {recipe.training['eval_strategy']}, but there is nothing "
            "to evaluate on; write data: {eval: 0.05}, or a split or a path"
        )
    if recipe.data.streaming and args.max_steps <= 0:
        raise InputError(
            "data.streaming: a stream has no known length; write training: {max_steps: 1000}"
        )
    if args.push_to_hub:
        from huggingface_hub import get_token

        if get_token() is None:
            raise InputError("training.push_to_hub: no token; run hf auth login, or set HF_TOKEN")


def _check_files(recipe: Recipe) -> None:
    """Refuse a local file that is not there, before anything is read."""
    for path in (recipe.data.path, recipe.data.chat_template):
        if path is not None and is_local(path) and not Path(path).expanduser().exists():
            raise missing(path)
