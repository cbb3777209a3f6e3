"""The text of the card, section by section."""

from dataclasses import replace

import pytest

from llm_distill.card.body import body
from llm_distill.card.citations import CITATIONS
from llm_distill.card.facts import CardFacts, DataFacts, ModelFacts, ObjectiveFacts

FACTS = CardFacts(
    name="me/student",
    student=ModelFacts(name="LlamaForCausalLM", origin="random", parameters=81_920),
    teacher=ModelFacts(name="/models/big", origin="local", parameters=8_190_735_360),
    objectives=(
        ObjectiveFacts("CrossEntropy", "0.1", ""),
        ObjectiveFacts("Logits", "linear(start=1, end=0)", "jsd(beta=0.9) | T = 2"),
    ),
    data=DataFacts(name="imdb", origin="hub", part="split train"),
    evaluation_data=DataFacts(name="/data/eval.jsonl", origin="local"),
    layer_map="student layer | teacher layer\n            1 | 3 of 6\n",
    steps=2000,
    tokens=16_384_000,
    seed=42,
    learning_rate=1e-5,
    batch=32,
    evaluation={
        "eval_perplexity": 9.8123,
        "eval_teacher_perplexity": 7.1,
        "eval_kl": 0.12345,
        "eval_agreement": 0.8125,
    },
    versions={"transformers": "5.23.0"},
)


def section(facts: CardFacts, title: str) -> str:
    """The text under a heading."""
    return body(facts).split(f"## {title}\n\n")[1].split("\n\n## ")[0].strip()


def test_the_summary_is_two_sentences() -> None:
    title, text = body(FACTS).split("\n\n## ")[0].split("\n\n")
    assert title == "# student"
    assert text == (
        "A language model of 81.9k parameters, distilled with `llm_distill` from the teacher "
        "`big` of 8.19B parameters. It was trained from random weights (`LlamaForCausalLM`) for "
        "2,000 steps on [imdb](https://huggingface.co/datasets/imdb) (split train), to predict as "
        "its teacher does."
    )


def test_figures() -> None:
    assert section(FACTS, "Figures").splitlines() == [
        "|  | Teacher | Student |",
        "|---|---|---|",
        "| Parameters | 8.19B | 81.9k |",
        "| Perplexity | 7.1 | 9.812 |",
        "| KL(teacher‖student), nats per token | – | 0.1235 |",  # noqa: RUF001
        "| Top-1 agreement with the teacher | – | 81.2% |",  # noqa: RUF001
        "",
        "Measured on `eval.jsonl`.",
    ]


def test_objectives_and_layers() -> None:
    assert section(FACTS, "Objectives").splitlines() == [
        "| Objective | Weight | What |",
        "|---|---|---|",
        "| CrossEntropy | 0.1 |  |",
        "| Logits | linear(start=1, end=0) | jsd(beta=0.9) \\| T = 2 |",
        "",
        "```text",
        "student layer | teacher layer",
        "            1 | 3 of 6",
        "```",
    ]


def test_training_shows_what_is_known() -> None:
    table = section(FACTS, "Training")
    assert "| Steps | 2,000 |\n| Tokens | 16,384,000 |\n| Sequences per step | 32 |" in table
    assert "| Learning rate | 1e-05 |\n| Seed | 42 |" in table
    assert "Tokenizer" not in table
    assert "| Seed | 0 |" in section(replace(FACTS, seed=0), "Training")


def test_how_teachers_were_quantised() -> None:
    assert "Quantised" not in section(FACTS, "Training")
    told = replace(FACTS, quantised=("a: torchao_int8", "/home/me/b: bitsandbytes_4bit"))
    table = section(told, "Training")
    assert "| Quantised | a: torchao_int8; /home/me/b: bitsandbytes_4bit |" in table


def test_the_revision_of_the_teacher_is_told() -> None:
    teacher = ModelFacts(name="Qwen/Qwen3-8B", origin="hub", revision="abc123")
    link = "[Qwen/Qwen3-8B](https://huggingface.co/Qwen/Qwen3-8B) at `abc123`"
    assert f"| Teacher | {link} |" in section(replace(FACTS, teacher=teacher), "Training")


def test_limits_without_an_evaluation() -> None:
    silent = replace(FACTS, evaluation={}, versions={}, layer_map=None, objectives=())
    assert "The student was not evaluated" in section(silent, "Limits")
    assert "Measured on" not in body(silent)
    assert "## Framework versions" not in body(silent)
    assert "## Citations" not in body(silent)


def test_limits_with_an_evaluation() -> None:
    limits = section(FACTS, "Limits")
    assert "one seed (42)" in limits
    assert "The figures hold for `eval.jsonl`" in limits
    assert "its licence was not recorded" in limits


def test_an_adapter_is_loaded_onto_its_base() -> None:
    base = ModelFacts(name="Qwen/Qwen3-0.6B", origin="hub")
    code = section(replace(FACTS, peft=True, student=base), "How to use")
    assert 'model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")' in code
    assert 'model = PeftModel.from_pretrained(model, "me/student")' in code


def test_a_masked_model_fills_masks() -> None:
    code = section(replace(FACTS, task="fill-mask"), "How to use")
    assert "AutoModelForMaskedLM" in code
    assert "tokenizer.mask_token" in code


def test_a_student_cut_from_its_teacher_says_which_blocks() -> None:
    student = replace(FACTS.student, name="blocks 1, 4", origin="cut")
    assert "from its teacher's blocks 1, 4 for 2,000 steps" in body(replace(FACTS, student=student))


@pytest.mark.parametrize("loss", sorted(CITATIONS))
def test_the_losses_that_were_used_are_cited(loss: str) -> None:
    facts = replace(FACTS, objectives=(ObjectiveFacts("X", "1", f"{loss}(beta=1), temperature 2"),))
    assert section(facts, "Citations") == f"- `{loss}`: {CITATIONS[loss]}"
