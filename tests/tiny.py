"""Tiny models from configs, and token data with very uneven numbers of supervised tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
)

Model = TypeVar("Model", bound=PreTrainedModel)

VOCABULARY = 128
POSITIONS = 64

DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.layers.3": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
"""A `device_map` of the Llama teacher: block by block, and the head."""


def llama(role: str, *, tied: bool = False, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """A student (2 blocks, width 32) or a teacher (4 blocks, width 64), sharper than at init."""
    width, depth, heads = (32, 2, 4) if role == "student" else (64, 4, 8)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return sharpened(LlamaForCausalLM, config, seed=len(role))


def qwen3(*, depth: int = 3, width: int = 32) -> Qwen3ForCausalLM:
    """Queries and keys with a norm of their own, grouped."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=POSITIONS,
    )
    return sharpened(Qwen3ForCausalLM, config)


def gpt2(*, depth: int = 3, width: int = 32) -> GPT2LMHeadModel:
    """Absolute positions, tied head; dropout off."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=width,
        n_layer=depth,
        n_head=4,
        n_positions=POSITIONS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return sharpened(GPT2LMHeadModel, config)


def gemma3(*, depth: int = 4, width: int = 32, softcap: float | None = None) -> Gemma3ForCausalLM:
    """Sliding windows of 8 tokens in all but one block; optionally a soft cap on the logits."""
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention"] * (depth - 1) + ["full_attention"],
        max_position_embeddings=POSITIONS,
        final_logit_softcapping=softcap,
        pad_token_id=0,
    )
    return sharpened(Gemma3ForCausalLM, config)


def gemma2(*, depth: int = 2, width: int = 32) -> Gemma2ForCausalLM:
    """Soft caps on scores and logits, and so eager attention, and a sliding window."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=POSITIONS,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        pad_token_id=0,
    )
    config._attn_implementation = "eager"
    return sharpened(Gemma2ForCausalLM, config)


def bert(*, depth: int = 3, width: int = 32) -> BertForMaskedLM:
    """An encoder with a masked-language-model head; dropout off."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return sharpened(BertForMaskedLM, config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama("teacher"),
    "qwen3": qwen3,
    "gpt2": gpt2,
    "gemma2": gemma2,
    "gemma3": gemma3,
}


def sharpened(kind: Callable[[Any], Model], config: Any, seed: int = 0) -> Model:
    """A model whose weights are larger than at init, so that differences show."""
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
            elif kind is BertForMaskedLM:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval()
    return model


def rows(count: int = 32, *, empty: tuple[int, ...] = (), longest: int = 24) -> datasets.Dataset:
    """Rows of 6 to `longest` tokens, some supervised; none in the `empty` rows."""
    generator = torch.Generator().manual_seed(7)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    examples = []
    for row in range(count):
        length = draw(6, longest + 1)
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        prompt = length if row in empty else draw(1, length - 1)
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return datasets.Dataset.from_list(examples)


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    """Three steps of SGD on the CPU, in order, nothing saved or reported."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(**given | changes)


def tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Words `<pad>`, `<s>`, `</s>`, `w3`, `w4`, …: as many as the models have tokens."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{k}": k for k in range(3, size)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def batch(
    *, side: str = "right", sequences: int = 3, length: int = 12, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Sequences of different lengths, padded on one side, every token supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (sequences, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, sequences):
        pads = slice(-2 * row, None) if side == "right" else slice(0, 2 * row)
        mask[row, pads] = 0
    ids = torch.where(mask == 1, ids, torch.zeros_like(ids))
    labels = torch.where(mask == 1, ids, torch.full_like(ids, -100))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
