"""The front matter, field by field."""

import math
from dataclasses import replace

import pytest

from llm_distill.card.body import body
from llm_distill.card.facts import CardFacts, DataFacts, ModelFacts
from llm_distill.card.metadata import metadata

FACTS = CardFacts(
    name="me/student",
    student=ModelFacts(name="Qwen/Qwen3-0.6B", origin="hub", licence="apache-2.0"),
    teacher=ModelFacts(name="Qwen/Qwen3-8B", origin="hub"),
    objectives=(),
)


def test_a_student_from_the_hub() -> None:
    assert metadata(FACTS).to_dict() == {
        "base_model": "Qwen/Qwen3-0.6B",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "knowledge-distillation", "llm-distill", "generated_from_trainer"],
    }


@pytest.mark.parametrize("origin", ["random", "local"])
def test_other_students_have_no_base(origin: str) -> None:
    student = ModelFacts(name="small", origin="random" if origin == "random" else "local")
    shown = metadata(replace(FACTS, student=student)).to_dict()
    assert not {"base_model", "base_model_relation", "license"} & shown.keys()


def test_an_adapter_says_so() -> None:
    shown = metadata(replace(FACTS, peft=True)).to_dict()
    assert (shown["library_name"], shown["base_model_relation"]) == ("peft", "adapter")


def test_a_licence_that_the_hub_does_not_list_goes_by_its_name() -> None:
    student = replace(FACTS.student, licence="Qwen Research")
    shown = metadata(replace(FACTS, student=student)).to_dict()
    assert (shown["license"], shown["license_name"]) == ("other", "qwen-research")


def test_datasets_are_those_of_the_hub() -> None:
    there, here = (DataFacts(name="imdb", origin=origin) for origin in ("hub", "local"))
    assert metadata(replace(FACTS, data=there)).datasets == ["imdb"]
    assert metadata(replace(FACTS, data=here)).datasets is None


def test_the_kl_of_a_sparse_teacher_is_called_what_it_is() -> None:
    facts = replace(FACTS, evaluation={"eval_kl": 0.25})
    (model,) = metadata(facts).to_dict()["model-index"]
    (metric,) = model["results"][0]["metrics"]
    assert metric["name"] == "KL on the tokens that the teacher told alone, nats per token"
    assert metric["name"] in body(facts)


def test_results_name_the_evaluation_set_and_leave_out_what_is_not_finite() -> None:
    facts = replace(
        FACTS,
        data=DataFacts(name="imdb", origin="hub"),
        evaluation_data=DataFacts(name="/data/held out.jsonl", origin="local", part="5%"),
        evaluation={
            "eval_kl": 0.25,
            "eval_agreement": math.nan,
            "eval_perplexity": math.inf,
            "eval_runtime": 3.0,
        },
    )
    (model,) = metadata(facts).to_dict()["model-index"]
    assert model["name"] == "student"
    assert model["results"] == [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": "held out.jsonl (5%)", "type": "held-out.jsonl"},
            "metrics": [
                {"type": "kl", "value": 0.25, "name": "KL(teacher‖student), nats per token"}
            ],
        }
    ]
