"""`llm-distill run`: from a recipe to a student in a folder."""

from dataclasses import replace
from pathlib import Path

from transformers import TrainingArguments

from llm_distill import data
from llm_distill.card import DataFacts, origin_of
from llm_distill.cli.console import Screen
from llm_distill.cli.output import clear, refuse_finished, sign, start_from
from llm_distill.cli.plan import Plan, plan
from llm_distill.cli.reading import open_screen, read_data, trainer_inputs
from llm_distill.data import Prepared
from llm_distill.errors import InputError, each_by_itself
from llm_distill.recipe import Recipe
from llm_distill.trainer import DistillTrainer


def run(recipe: Recipe, *, resume: str | None = None, overwrite: bool = False) -> dict[str, float]:
    """Train as a recipe says.

    Args:
        recipe: What to do.
        resume: None for a fresh start, empty for the newest checkpoint in the output folder, else
            the checkpoint to go on from.
        overwrite: Start anew in an output folder that is not empty; its checkpoints are deleted.

    Returns:
        The metrics of the last evaluation; empty where the recipe has no evaluation.

    Raises:
        InputError: For anything that cannot work, before weights load.
        FloatingPointError: For rows whose loss is no number or infinite; no student is written.
    """
    folder = Path(recipe.training["output_dir"]).expanduser()
    checkpoint = start_from(folder, resume=resume, overwrite=overwrite)
    args = recipe.arguments()
    refuse_finished(checkpoint, steps=args.max_steps, epochs=args.num_train_epochs)
    screen = open_screen(args)
    planned = plan(recipe, args)
    prepared = read_data(recipe, args, planned, screen)
    trainer = _trainer(recipe, args, planned, prepared)
    screen.models(planned.student, planned.teacher)
    for line in trainer.run.told:
        screen.say(line)
    screen.objectives(trainer.run.objectives, trainer.run.terms)
    screen.balance(trainer.distiller.balance)
    if args.process_index == 0:
        if checkpoint is None:
            clear(folder)
        sign(folder, recipe)
    trainer.accelerator.wait_for_everyone()
    try:
        with each_by_itself():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except FloatingPointError:
        trainer.end()  # all ranks are here: none waits for another
        raise
    return _finish(trainer, prepared, screen)


def _trainer(
    recipe: Recipe, args: TrainingArguments, planned: Plan, prepared: Prepared
) -> DistillTrainer:
    """Load the weights."""
    try:
        trainer = DistillTrainer(
            recipe.student,
            recipe.teacher,
            recipe.objectives,
            args,
            peft_config=recipe.adapter(causal=planned.causal),
            rows_per_chunk=recipe.rows_per_chunk,
            balance=recipe.balance,
            **trainer_inputs(planned, prepared),
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    trainer.announces = False  # the tables are ours
    trainer.data, trainer.evaluation_data = _described(recipe.data)
    return trainer


def _described(source: data.Data) -> tuple[DataFacts, DataFacts | None]:
    """Training and evaluation data, as the model card tells them."""
    name = source.path or ""
    train = DataFacts(name=name, origin=origin_of(name), part=f"split {source.split}")
    held = source.eval
    if held is None:
        return train, None
    if isinstance(held, float):
        return train, replace(train, part=f"{held:.1%} of split {source.split}, held out")
    if "/" in held or Path(held).suffix:
        return train, DataFacts(name=held, origin=origin_of(held))
    return train, replace(train, part=f"split {held}")


def _finish(trainer: DistillTrainer, prepared: Prepared, screen: Screen) -> dict[str, float]:
    """Evaluate, save, push."""
    if prepared.counter is not None:
        screen.say(f"Data that was read: {prepared.counter.report()}")
    with each_by_itself():
        metrics = trainer.evaluate() if prepared.eval is not None else {}
    trainer.save_model(_internal_call=True)  # without a push: that comes once, with the card
    trainer.save_state()
    if metrics:
        trainer.save_metrics("eval", metrics, combined=False)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    if metrics:
        screen.figures(metrics)
    screen.say(f"The student is in {trainer.args.output_dir}")
    trainer.end()
    return metrics
