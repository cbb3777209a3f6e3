"""Finding configs, models and tokenizers, with refusals that name the way out."""

from __future__ import annotations

import contextlib
import copy
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as hf_logging

from llm_distill import zero
from llm_distill.errors import InputError
from llm_distill.kinds import has_masked, is_masked, sees_only_the_past

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from llm_distill.signals import Request

PLAIN_BLOCKS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of blocks that do not depend on which other blocks there are."""


SAMPLE = "Don't panic: 12,345 naïve cafés — 東京, Ελλάδα!\n\tdef f(x): return x ** 2  # ok"
"""Cut by two tokenizers: one vocabulary may still come with other merges or normalisers."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Dtypes of weights, by the names that torch has for them."""


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of a model id or path, the first thing that is read.

    Raises:
        InputError: If it is neither a folder nor to be found, or if the model is not a language
            model of one stack with its head.
    """
    if _looks_local(name) and not Path(name).is_dir():
        raise InputError(f"model {name!r} is not a folder here{_beside(name)}")
    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise InputError(
            f"model {name!r} cannot be read, as a local folder or a Hub id: {first_line(error)}"
            + _beside(name)
        ) from error
    if config.is_encoder_decoder:
        raise InputError(
            f"model {name!r} is an encoder-decoder ({config.model_type}); causal or masked models "
            "are supported"
        )
    _refuse_other_tasks(config, name)
    # transformers 5.23 keeps no commit; the file that it read lies in a folder named after it.
    folder = None if getattr(config, "_commit_hash", None) else folder_of(name, revision)
    if folder is not None:
        config._commit_hash = commit_of(folder)
    return cast("PreTrainedConfig", config)


def load_model(
    name: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str,
    backbone: bool = False,
    engine: Mapping[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Weights of a causal or masked language model, or of its backbone alone.

    Args:
        name: Id or path.
        config: From `load_config`, perhaps cut by `cut_above`.
        dtype: A torch dtype, its name, or `auto` for the checkpoint's.
        backbone: Leave the language-model head out.
        engine: DeepSpeed's configuration, of an engine that keeps the model in pieces.
        options: For `from_pretrained`; those that are None are left out.

    Raises:
        InputError: If the weights are not there.
    """
    auto: Any = (
        AutoModel
        if backbone
        else AutoModelForMaskedLM
        if is_masked(config)
        else AutoModelForCausalLM
    )
    given = {key: value for key, value in options.items() if value is not None}
    lies = zero.aside() if engine is None else zero.instead(engine)
    with lies, quiet() if backbone else contextlib.nullcontext():
        try:
            model = auto.from_pretrained(name, config=config, dtype=dtype, **given)
        except OSError as error:
            raise InputError(
                f"the weights of {name!r} cannot be read: {first_line(error)}"
            ) from error
    return cast("PreTrainedModel", model)


def cut_above(config: PreTrainedConfig, request: Request) -> PreTrainedConfig:
    """The config without the blocks that no requested signal needs; their weights are never read.

    One block more than the highest hidden state stays: the state of a model's last block goes
    through the final norm, and the requested one must not. Models whose blocks depend on one
    another (shared keys, recurrent states, embeddings for each block) stay whole.
    """
    top = max(max(request.hidden, default=0) + 1, max(request.heads, default=1))
    whole = request.logits or config.get_text_config(decoder=True) is not config
    if whole or top >= config.num_hidden_layers or _entangled(config):
        return config
    cut = copy.deepcopy(config)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(cut, name, None) is not None:
            setattr(cut, name, getattr(cut, name)[:top])
    cut.num_hidden_layers = top
    return cut


def dtype_name(dtype: torch.dtype | str, owner: str, *, allowed: tuple[str, ...] = DTYPES) -> str:
    """The name of a dtype, which torch's own may stand for.

    Raises:
        InputError: If weights cannot have it, with those they can.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in allowed:
        raise InputError(f"{owner}: dtype is {name!r}; write one of {', '.join(allowed)}")
    return name


def folder_of(name: str, revision: str | None = None) -> Path | None:
    """Where the files of a model are on this machine; None where they are not. Asks no network."""
    if _looks_local(name):
        return Path(name) if Path(name).is_dir() else None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a folder that is gone, and no id
        return None
    return Path(found).parent if isinstance(found, str) else None


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache holds; None of any other.

    >>> commit_of(Path("models--me--it/snapshots/c0ffee")), commit_of(Path("me/it"))
    ('c0ffee', None)
    """
    return folder.name if folder.parent.name == "snapshots" else None


def find_tokenizer(
    name: str | None, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any | None:  # noqa: ANN401  transformers has no common base that types
    """The tokenizer that lies beside a model, or None where there is none."""
    if not name or (_looks_local(name) and not _has_tokenizer(Path(name))):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError):
        return None


def shown(name: str) -> str:
    """A Hub id as it is, of a path its last part: what may stand in files that others read.

    >>> shown("Qwen/Qwen3-0.6B"), shown("/home/me/teacher/")
    ('Qwen/Qwen3-0.6B', 'teacher')
    """
    return Path(name).name if _looks_local(name) else name


def _looks_local(name: str) -> bool:
    """Whether a name is a path rather than a Hub id."""
    return Path(name).exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def _has_tokenizer(folder: Path) -> bool:
    """Whether tokenizer files lie in a folder."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")
    return any((folder / name).exists() for name in names)


def _beside(name: str) -> str:
    """What folders there are where a missing one was looked for."""
    folder = Path(name).parent
    if folder == Path() and not name.startswith("."):
        return ""
    near = sorted(p.name for p in folder.glob("[!.]*") if p.is_dir())
    close = get_close_matches(Path(name).name, near, n=5, cutoff=0.5) or near[:5]
    return f"; in {folder} there are {', '.join(map(repr, close))}" if close else ""


def first_line(error: Exception) -> str:
    """The first line of a message; what is behind it where that is only a heading."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _refuse_other_tasks(config: PreTrainedConfig, name: str) -> None:
    """Refuse checkpoints whose language-model head would be a random one, or none."""
    saved = config.architectures or ()
    if not saved or getattr(config, "auto_map", None):
        return
    if not any(_is_language_model(architecture) for architecture in saved):
        raise InputError(
            f"model {name!r} was saved as a {saved[0]}, which has no language-model head; take the "
            "checkpoint of a causal or a masked language model (…ForCausalLM, …ForMaskedLM), such "
            "as the one it was made from"
        )
    if not is_masked(config) and has_masked(config) and not sees_only_the_past(config):
        raise InputError(
            f"model {name!r} was saved as a {saved[0]} without is_decoder, so it sees the tokens "
            "that it should predict; write is_decoder: true into its config.json, or save it as a "
            "masked language model"
        )


def _is_language_model(architecture: str) -> bool:
    """Whether a class of transformers predicts tokens."""
    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return True
    if architecture in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return True
    return "ForCausalLM" in architecture or (
        architecture.endswith("ForPreTraining") and not architecture.startswith("Electra")
    )


def _entangled(config: PreTrainedConfig) -> bool:
    """Whether a model cannot be cut between two blocks by its config alone."""
    kinds = getattr(config, "layer_types", None) or ()
    return (
        not PLAIN_BLOCKS.issuperset(kinds)
        or bool(getattr(config, "num_kv_shared_layers", 0))
        or bool(getattr(config, "hidden_size_per_layer_input", 0))
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No table of unexpected keys where we leave weights out on purpose."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
