"""The whole card: accepted by the Hub, silent about this machine, and its code runs."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llm_distill import card
from llm_distill.card import CardFacts, DataFacts, ModelFacts, ObjectiveFacts, render, write
from llm_distill.card.metadata import LICENSES
from tests import hub_card
from tests.hub_card import card_errors
from tests.hub_server import LocalHub, hub, run_with_hub

__all__ = ["hub"]  # a fixture

SECRET = "hf_" + "abcdefgh" * 4
FACTS = CardFacts(
    name="me/student",
    student=ModelFacts(name="Qwen/Qwen3-0.6B", origin="hub", parameters=596_049_920),
    teacher=ModelFacts(name="Qwen/Qwen3-8B", origin="hub", revision="abc123"),
    objectives=(ObjectiveFacts("Logits", "1", "forward_kl"),),
)
EVALUATION = {"eval_loss": 1.5, "eval_perplexity": 9.5, "eval_kl": 0.25, "eval_agreement": 0.75}

STUDENTS = (
    FACTS.student,
    ModelFacts(name="LlamaForCausalLM", origin="random"),
    ModelFacts(name="/home/ann/models/small one", origin="local", licence="Acme Research (v2)"),
    ModelFacts(name="/home/ann/called-a-hub-id", origin="hub", licence="apache-2.0"),
)
DATASETS = (
    None,
    DataFacts(name="imdb", origin="hub", part="split train"),
    DataFacts(name="~/ann/my corpus (v2).jsonl", origin="local"),
)


@pytest.mark.parametrize(("student", "data"), list(product(STUDENTS, DATASETS)))
@pytest.mark.parametrize("evaluation", [{}, EVALUATION, {"eval_kl": float("nan")}])
@pytest.mark.parametrize("peft", [False, True])
def test_every_card_is_accepted(
    student: ModelFacts, data: DataFacts | None, evaluation: dict[str, float], peft: bool
) -> None:
    facts = replace(FACTS, student=student, data=data, evaluation_data=data, peft=peft)
    text = render(replace(facts, evaluation=evaluation, language="no"))

    assert card_errors(text) == []
    read = ModelCard(text).data.to_dict()
    assert read["tags"][:2] == ["distillation", "knowledge-distillation"]
    assert read["language"] == "no"  # YAML reads a bare `no` as false
    assert ("model-index" in read) == (evaluation == EVALUATION)
    assert "ann/" not in text


def test_the_package_knows_the_licences_of_the_hub() -> None:
    assert hub_card.LICENSES == LICENSES


@pytest.mark.parametrize("path", ["/srv/ann/x", "~/ann/x", "C:\\ann\\x", "\\\\host\\ann\\x", "/x"])
def test_no_path_and_no_token_is_told(path: str) -> None:
    leak = f"see {path} or file://{path} ({SECRET})"
    spaced = "/home/ann lee/my models/x"
    facts = CardFacts(
        name=f"{path}-student",
        student=ModelFacts(name=path, origin="local", licence=leak, revision=leak),
        teacher=ModelFacts(name=spaced, origin="local", revision=leak, licence=leak),
        objectives=(ObjectiveFacts(leak, leak, f"{leak} from {spaced}"),),
        data=DataFacts(name=path, origin="hub", part=leak),
        evaluation_data=DataFacts(name=f"me/{SECRET}", origin="hub", part=leak),
        evaluation=EVALUATION,
        layer_map=leak,
        versions={leak: leak},
        tokenizer=leak,
        peft=True,
    )
    text = render(facts)

    assert "ann" not in text
    assert SECRET not in text
    assert path not in text.replace("https://", "")
    assert "hf_[redacted]" in text
    assert card_errors(text) == []


def test_links_and_relative_names_survive() -> None:
    detail = "forward_kl, KL/T, 1/2, ./x/y, org/name, https://arxiv.org/abs/1503.02531, <b>x</b>"
    text = render(replace(FACTS, objectives=(ObjectiveFacts("Logits", "0.5", detail),)))
    assert detail in text
    assert "https://huggingface.co/Qwen/Qwen3-8B" in text


def test_write_replaces_the_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("old")
    path = write(FACTS, tmp_path)
    assert path == tmp_path / "README.md"
    assert path.read_text(encoding="utf-8") == render(FACTS)


def test_the_public_names() -> None:
    assert set(card.__all__) >= {"CardFacts", "ModelFacts", "DataFacts", "render", "write"}


RUN_THE_CARDS = """
import re
from pathlib import Path
from dataclasses import replace
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from llm_distill.card import CardFacts, ModelFacts, ObjectiveFacts, write

words = {"Once": 0, "upon": 1, "a": 2, "time": 3, "</s>": 4}
backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=2, vocab_size=8))
facts = CardFacts(name="me/student", student=ModelFacts(name="LlamaForCausalLM", origin="random"),
                  teacher=ModelFacts(name="me/teacher", origin="hub"),
                  objectives=(ObjectiveFacts("Logits", "1", "forward_kl"),))
base = ModelFacts(name="me/student", origin="hub")
adapter = replace(facts, name="me/adapter", peft=True, student=base)

for card, made in ((facts, lambda: model), (adapter, lambda: get_peft_model(model, LoraConfig()))):
    made().push_to_hub(card.name)
    tokenizer.push_to_hub(card.name)
    ModelCard.load(write(card, Path("."))).push_to_hub(card.name)
    shown = ModelCard.load(card.name).text
    (code,) = re.findall("```python\\n(.*?)```", shown, re.DOTALL)
    exec(code, {})
"""


def test_the_code_of_a_pushed_card_runs(hub: LocalHub, tmp_path: Path) -> None:
    done = run_with_hub(RUN_THE_CARDS, hub, tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Once upon a time") == 2
    assert "base_model_relation: adapter" in hub.text("me/adapter", "README.md")
    assert hub.asked("POST", "validate-yaml")
