"""Students with random weights of a named architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from llm_distill import loading, provenance, zero
from llm_distill.errors import InputError
from llm_distill.kinds import has_causal, has_masked, is_masked, sees_only_the_past

SHARED = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""What a student with random weights takes from its teacher unless told otherwise."""


@dataclass(frozen=True)
class FromConfig:
    """A student with random weights.

    Attributes:
        architecture: A `model_type` of transformers (`llama`, `qwen3`, `gpt2`, …), or an id or path
            whose config is taken.
        config: What to change in that config; the vocabulary and special tokens are the teacher's
            by default.
        seed: Of the random weights; the same seed gives the same weights, whatever ran before.
        dtype: Of the weights.

    Raises:
        InputError: For an unknown dtype.
    """

    architecture: str
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse an unknown dtype."""
        object.__setattr__(self, "dtype", loading.dtype_name(self.dtype, "FromConfig"))

    def resolve(self, teacher: PreTrainedConfig) -> PreTrainedConfig:
        """The whole config.

        Raises:
            InputError: For an unknown architecture, one of another kind than the teacher's, or a
                key or value that its config does not have.
        """
        text = teacher.get_text_config(decoder=True)
        base = self._base()
        self._refuse_unknown(base)
        shared = {key: getattr(text, key, None) for key in SHARED if hasattr(base, key)}
        wanted = {**shared, **_followers(base, self.config), **self.config}
        try:
            made = (
                AutoConfig.for_model(self.architecture, **wanted)
                if self.architecture in CONFIG_MAPPING
                else _changed(base, wanted)
            )
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise InputError(f"{self._label}: {loading.first_line(error)}") from error
        self._refuse_kind(made, masked=is_masked(teacher))
        return made

    def load(self, teacher: PreTrainedConfig) -> PreTrainedModel:
        """The model, its weights drawn from `seed`."""
        auto: Any = AutoModelForMaskedLM if is_masked(teacher) else AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]), zero.aside():
            torch.manual_seed(self.seed)
            return cast(
                "PreTrainedModel",
                auto.from_config(self.resolve(teacher), dtype=getattr(torch, self.dtype)),
            )

    @property
    def _label(self) -> str:
        """For messages."""
        return f"FromConfig({self.architecture})"

    def _base(self) -> PreTrainedConfig:
        """The config that is changed."""
        if self.architecture in CONFIG_MAPPING:
            base = AutoConfig.for_model(self.architecture)
        else:
            base = self._named()
        if base.get_text_config(decoder=True) is not base:
            text = base.get_text_config(decoder=True).model_type
            raise InputError(
                f"FromConfig: {self.architecture!r} is more than a language model; write the "
                f"architecture of its text part, {text!r}"
            )
        return base

    def _named(self) -> PreTrainedConfig:
        """The config of an id or path."""
        try:
            return loading.load_config(self.architecture)
        except InputError as error:
            near = _closest(self.architecture, list(CONFIG_MAPPING.keys()))
            raise InputError(
                f"FromConfig: {self.architecture!r} is no architecture of transformers; as an "
                f"id or path: {error}{near}"
            ) from error

    def _refuse_unknown(self, base: PreTrainedConfig) -> None:
        """Refuse keys that the config does not have."""
        known = [*base.to_dict(), *base.attribute_map]
        for key in self.config:
            if not hasattr(base, key) or callable(getattr(base, key)):
                near = _closest(key, [name for name in known if not name.startswith("_")])
                raise InputError(
                    f"FromConfig: {base.model_type} has no {key!r} in its config{near}"
                )

    def _refuse_kind(self, made: PreTrainedConfig, *, masked: bool) -> None:
        """Refuse an architecture that does not predict tokens the teacher's way."""
        kind = made.model_type
        if masked and not has_masked(made):
            raise InputError(
                f"{self._label}: {kind} has no masked language model, and the teacher is one; take "
                "the teacher's architecture"
            )
        if masked or sees_only_the_past(made):
            return
        if has_causal(made):
            raise InputError(
                f"{self._label}: {kind} sees the tokens that it should predict; write is_decoder: "
                "true into its config, since the teacher is a causal language model"
            )
        raise InputError(
            f"{self._label}: {kind} has no causal language model, and the teacher is one; take the "
            "teacher's architecture"
        )


def _followers(base: PreTrainedConfig, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Key and value heads for another number of heads: the same share of them, where that fits."""
    heads, shared = wanted.get("num_attention_heads"), getattr(base, "num_key_value_heads", None)
    if heads is None or shared is None or "num_key_value_heads" in wanted:
        return {}
    group = max(base.num_attention_heads // shared, 1)
    return {"num_key_value_heads": heads if heads % group else heads // group}


def _changed(base: PreTrainedConfig, wanted: Mapping[str, Any]) -> PreTrainedConfig:
    """A config with other values; what follows from a changed size is worked out anew."""
    values = {**base.to_dict(), "architectures": None}
    derived = base.hidden_size // base.num_attention_heads
    resized = "hidden_size" in wanted or "num_attention_heads" in wanted
    if resized and values.get("head_dim") == derived:
        del values["head_dim"]
    values.pop(provenance.KEY, None)  # no weights are copied, so no block comes from anywhere
    if "num_hidden_layers" in wanted:
        for name in ("layer_types", "mlp_layer_types"):
            values.pop(name, None)
    changed = type(base).from_dict({**values, **wanted})
    changed.name_or_path = ""  # its weights are not from there
    return changed


def _closest(word: str, words: list[str]) -> str:
    """`; did you mean …?` or nothing."""
    from difflib import get_close_matches

    near = get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
