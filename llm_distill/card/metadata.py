"""The front matter of a card: what the Hub reads, filters by and checks."""

import math
from collections.abc import Mapping

from huggingface_hub import EvalResult, ModelCardData

from llm_distill.card.facts import CardFacts, base, is_linked, shown, slug
from llm_distill.measures import KL_OF_FEW, of_few_tokens

__all__ = ["metadata"]

TAGS = ("distillation", "knowledge-distillation", "llm-distill", "generated_from_trainer")

FIGURES: Mapping[str, str] = {
    "eval_perplexity": "Perplexity",
    "eval_kl": "KL(teacher‖student), nats per token",
    "eval_agreement": "Top-1 agreement with the teacher",
    "eval_loss": "Weighted sum of the objectives",
}

KNOWN_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
    bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3
    llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++
    osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(KNOWN_LICENSES.split())


def metadata(facts: CardFacts) -> ModelCardData:
    """What the Hub reads."""
    linked, data, results = is_linked(facts.student), facts.data, _results(facts)
    card = ModelCardData(
        language=facts.language,
        license=_license(facts.student.licence),
        library_name="peft" if facts.peft else "transformers",
        pipeline_tag=facts.task,
        base_model=facts.student.name if linked else None,
        datasets=[data.name] if data is not None and is_linked(data) else None,
        tags=list(TAGS),
        model_name=slug(base(facts.name)) if results else None,
        eval_results=results or None,
    )
    if card.license == "other":
        card.license_name = slug(facts.student.licence or "").lower()
    if linked:
        card["base_model_relation"] = "adapter" if facts.peft else "finetune"
    return card


def label_of(key: str, figures: Mapping[str, float]) -> str:
    """A figure in words."""
    return KL_OF_FEW if key == "eval_kl" and of_few_tokens(figures) else FIGURES[key]


def _license(licence: str | None) -> str | None:
    """The student's licence is that of its base; the Hub has `other` for those it does not list."""
    return licence if licence is None or licence in LICENSES else "other"


def _results(facts: CardFacts) -> list[EvalResult]:
    """The student's figures for the Hub's own table, which takes finite numbers only."""
    data = facts.evaluation_data
    name = "not recorded" if data is None else shown(data)
    part = f" ({data.part})" if data is not None and data.part else ""
    return [
        EvalResult(
            task_type=facts.task,
            dataset_type=name if data is not None and is_linked(data) else slug(name),
            dataset_name=name + part,
            metric_type=key.removeprefix("eval_"),
            metric_name=label_of(key, facts.evaluation),
            metric_value=float(facts.evaluation[key]),
        )
        for key in FIGURES
        if math.isfinite(facts.evaluation.get(key, math.nan))
    ]
