"""`llm-distill check`: what would be trained, without weights."""

from llm_distill import mapping
from llm_distill.arguments import idle_gates
from llm_distill.cli.console import Screen
from llm_distill.cli.plan import asks_for_a_launch, plan
from llm_distill.recipe import Recipe

ON_ANY_MACHINE = {"use_cpu": True, "bf16": False, "fp16": False, "tf32": None}
"""A recipe for GPUs can be checked on a laptop."""


def check(recipe: Recipe) -> None:
    """Print models, objectives and layer maps of a recipe.

    Raises:
        InputError: For what `run` would refuse before it reads the data.
    """
    args = recipe.arguments(**ON_ANY_MACHINE)
    planned = plan(recipe, args, here=False)
    screen = Screen(speaks=True)
    screen.models(planned.student, planned.teacher)
    for line in (*planned.tokenizers.told, *idle_gates(planned.terms, args)):
        screen.say(line)
    screen.objectives(planned.objectives, planned.terms)
    screen.balance(planned.balance)
    if mapping.undecided(planned.objectives):
        screen.say("Layer maps that data decide: `llm-distill map` shows them before a training.")
    if asks_for_a_launch(recipe.teacher):
        screen.say(
            "Where the teacher lies, and whether there is room for it, is decided at launch."
        )
    screen.say("The recipe is good. No weights were loaded, no data was read.")
