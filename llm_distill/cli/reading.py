"""Data and students as a recipe says them, for the commands that open models."""

import logging
from dataclasses import replace
from typing import Any

import datasets
from transformers import TrainingArguments

from llm_distill import data
from llm_distill.cli.console import Screen
from llm_distill.cli.plan import Plan
from llm_distill.data import Prepared
from llm_distill.recipe import Recipe
from llm_distill.teachers import columns_of


def open_screen(args: TrainingArguments) -> Screen:
    """A screen for the first process; the others fall silent."""
    first = args.process_index == 0
    if not first:
        datasets.disable_progress_bars()
        logging.getLogger("llm_distill").setLevel(logging.ERROR)
    return Screen(speaks=first)


def read_data(recipe: Recipe, args: TrainingArguments, planned: Plan, screen: Screen) -> Prepared:
    """The data, tokenised, and what became of them said.

    Raises:
        InputError: If they are missing, unreadable, or of no use.
    """
    with args.main_process_first(desc="data"):
        keep = tuple(dict.fromkeys([*recipe.data.keep, *columns_of(recipe.teacher)]))
        given = replace(recipe.data, keep=keep)
        prepared = data.load(given, planned.tokenizer, max_positions=planned.positions)
    screen.say(f"Data: {prepared.report}")
    if prepared.eval_report is not None:
        screen.say(f"Evaluation: {prepared.eval_report}")
    return prepared


def trainer_inputs(planned: Plan, prepared: Prepared) -> dict[str, Any]:
    """What a trainer takes besides models, objectives and arguments."""
    return {
        "train_dataset": prepared.train,
        "eval_dataset": prepared.eval,
        "processing_class": planned.tokenizer,
        # Given, so that the data is not tokenised a second time.
        "data_collator": data.Collator.of(planned.tokenizer),
    }
