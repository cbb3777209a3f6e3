import logging
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from llm_distill.cli.plan import plan
from llm_distill.cli.reading import open_screen, read_data, trainer_inputs
from llm_distill.data import Collator
from llm_distill.recipe import Recipe


def test_data_are_read_and_told(
    content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe.of(content)
    args = recipe.arguments()
    planned = plan(recipe, args)
    prepared = read_data(recipe, args, planned, open_screen(args))
    said = capsys.readouterr().out
    assert said.startswith("Data: 16 examples: 0 truncated")
    given = trainer_inputs(planned, prepared)
    assert (len(given["train_dataset"]), len(given["eval_dataset"])) == (12, 4)
    assert given["processing_class"] is planned.tokenizer
    assert given["data_collator"] == Collator.of(planned.tokenizer)


def test_other_processes_are_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("llm_distill")
    monkeypatch.setattr(log, "level", log.level)
    second: Any = SimpleNamespace(process_index=1)
    try:
        open_screen(second).say("heard by nobody")
        assert datasets.are_progress_bars_disabled()
        assert not log.isEnabledFor(logging.WARNING)
    finally:
        datasets.enable_progress_bars()
        log.setLevel(logging.NOTSET)
    assert capsys.readouterr().out == ""
