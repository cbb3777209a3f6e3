"""What the Hub refuses about the metadata of a model card, as far as that is known without it.

The rules follow hub-docs/modelcard.md and messages that users got from the Hub: licences in
huggingface_hub issue 4218 (May 2026), datasets in autotrain-advanced issue 648, languages in
wav2vec2-sprint issue 11, the shape of the results in MDEL issue 34.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping

import yaml

KNOWN_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0
odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3
llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(KNOWN_LICENSES.split())
TASKS = frozenset(
    {
        "text-generation",
        "fill-mask",
        "text-classification",
        "feature-extraction",
        "text-ranking",
        "other",
    }
)
RELATIONS = frozenset({"adapter", "merge", "quantized", "finetune"})
REPO_ID = re.compile(
    r"(?!.*(?:--|\.\.))(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}(?<![.-])"
)
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")

Check = Callable[[str, object], Iterator[str]]
RESULT = {
    "task": {"type": str, "name?": str},
    "dataset": {"type": str, "name": str, "config?": str, "split?": str, "revision?": str},
    "metrics": [{"type": str, "value": object, "name?": str}],
}


def strings(accepts: Callable[[str], object], message: str, *, many: bool = True) -> Check:
    """A check of a string, or of each string of a list."""

    def check(at: str, value: object) -> Iterator[str]:
        items = {at: value}
        if many and isinstance(value, list):
            items = {f"{at}[{i}]": item for i, item in enumerate(value)}
        for name, item in items.items():
            if not isinstance(item, str):
                yield f'"{name}" must be a string'
            elif not accepts(item):
                yield f'"{name}" {message.format(item)}'

    return check


def shape(at: str, expected: object, value: object) -> Iterator[str]:
    """Where a value departs from a type, a list, or a mapping (`name?` may be absent)."""
    if isinstance(expected, type):
        if not isinstance(value, expected):
            yield f'"{at}" must be a string'
    elif isinstance(expected, list):
        if not isinstance(value, list):
            yield f'"{at}" must be an array'
            return
        for i, item in enumerate(value):
            yield from shape(f"{at}[{i}]", expected[0], item)
    elif isinstance(expected, dict):
        yield from mapping_shape(at, expected, value)


def mapping_shape(at: str, expected: dict[str, object], value: object) -> Iterator[str]:
    """Where a value departs from a mapping."""
    if not isinstance(value, dict):
        yield f'"{at}" must be of type object'
        return
    for name, inner in expected.items():
        key = name.rstrip("?")
        if key in value:
            yield from shape(f"{at}.{key}", inner, value[key])
        elif key == name:
            yield f'"{at}.{key}" is required'


def model_index(at: str, value: object) -> Iterator[str]:
    """The evaluation results: their shape, then what they say."""
    wrong = list(shape(at, [{"name": str, "results": [RESULT]}], value))
    yield from wrong
    if wrong or not isinstance(value, list):
        return
    for i, result in enumerate(r for model in value for r in model["results"]):
        yield from CHECKS["datasets"](
            f"{at}[0].results[{i}].dataset.type", result["dataset"]["type"]
        )
        for metric in result["metrics"]:
            if isinstance(metric["value"], float) and not math.isfinite(metric["value"]):
                yield f'"{at}[0].results[{i}]" has a metric that is not finite'


RELATED = strings(RELATIONS.__contains__, f"must be one of {sorted(RELATIONS)}", many=False)
NOT_EMPTY = strings(bool, "is not allowed to be empty")
CHECKS: Mapping[str, Check] = {
    "license": strings(LICENSES.__contains__, "must be one of [apache-2.0, mit, ..., other]"),
    "base_model": strings(REPO_ID.fullmatch, 'with value "{}" is not valid. Use a model id'),
    "base_model_relation": RELATED,
    "datasets": strings(REPO_ID.fullmatch, 'with value "{}" is not valid. Use a dataset id'),
    "language": strings(LANGUAGE.fullmatch, "must be an ISO 639 code of 2 or 3 lowercase letters"),
    "tags": NOT_EMPTY,
    "library_name": NOT_EMPTY,
    # The Hub only warns about a task that it does not know; here that is always a mistake.
    "pipeline_tag": strings(TASKS.__contains__, "is not in the official list", many=False),
    "model-index": model_index,
}


def card_errors(content: str) -> list[str]:
    """What the Hub would refuse about the metadata of a card."""
    block = re.match(r"\s*---[\r\n]+([\S\s]*?)[\r\n]+---[\r\n]", content)
    if block is None:
        return []  # a card without metadata is accepted, with a warning
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML in README.md: {error}"]
    if not isinstance(data, dict):
        return ["Invalid YAML in README.md: the metadata must be a mapping"]
    return [error for key in data if key in CHECKS for error in CHECKS[key](key, data[key])]
