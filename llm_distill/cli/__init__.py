"""The command line: `llm-distill run recipe.yaml`; `check`, `map` and `cache` before it.

Any value of a recipe can be set: ``--training.learning_rate 1e-5``, ``--data.max_length=512``,
``--objectives.1.Logits.temperature 2.0``, ``--teacher path/to/model``. Values are YAML.

Exit codes: 0 done, 1 failed (with a traceback), 2 bad input (with a message that says what to
write instead). Under several processes all exit alike, and the first one speaks.
"""

from llm_distill.cli.main import main

__all__ = ["main"]
