"""A small Qwen3, trained on the text with the plain `transformers.Trainer`, once."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from hashlib import sha256
from io import StringIO
from typing import TYPE_CHECKING, Any

from scripts._quickstart.settings import BLOCK, VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from scripts._quickstart.corpus import Corpus
    from scripts._quickstart.settings import Settings

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "max_position_embeddings": BLOCK,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
TRAINING: dict[str, Any] = {
    "learning_rate": 4e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "per_device_train_batch_size": 8,
}


def find_or_train(corpus: Corpus, settings: Settings) -> bool:
    """Leave a teacher in its folder; whether it was there already.

    A teacher is reused if it was trained to its end, with these settings, on this text.
    """
    manifest = settings.teacher / "manifest.json"
    text = json.dumps(_manifest(corpus, settings), indent=2) + "\n"
    if manifest.exists() and manifest.read_text(encoding="utf-8") == text:
        return True
    manifest.unlink(missing_ok=True)  # Half a teacher, after an interruption, has none.
    train(corpus, settings)
    manifest.write_text(text, encoding="utf-8")
    return False


def train(corpus: Corpus, settings: Settings) -> None:
    """Train a tokenizer and a teacher, and save both."""
    from transformers import Trainer, TrainingArguments

    from llm_distill.data import Collator, Data, load
    from scripts._quickstart.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(corpus.train, VOCABULARY)
    text = Data(path=str(settings.train_text), max_length=BLOCK)
    blocks = load(text, tokenizer, max_positions=BLOCK)
    trainer = Trainer(
        model=build(tokenizer, settings.seed),
        args=TrainingArguments(
            output_dir=str(settings.teacher),
            max_steps=settings.teacher_steps,
            seed=settings.seed,
            use_cpu=True,
            disable_tqdm=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            **TRAINING,
        ),
        train_dataset=blocks.train,
        data_collator=Collator.of(tokenizer),
        processing_class=tokenizer,
    )
    with redirect_stdout(StringIO()):  # The bar says what the figures at the end would.
        trainer.train()
    trainer.save_model()


def build(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """The teacher before its training."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

    set_seed(seed)
    ids: Any = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config: Any = {"vocab_size": len(tokenizer), "bos_token_id": None, **ids, **ARCHITECTURE}
    return Qwen3ForCausalLM(Qwen3Config(**config))


def _manifest(corpus: Corpus, settings: Settings) -> dict[str, Any]:
    """Everything that the teacher's weights depend on, apart from the versions of the packages."""
    return {
        "architecture": ARCHITECTURE,
        "training": TRAINING,
        "vocabulary": VOCABULARY,
        "steps": settings.teacher_steps,
        "seed": settings.seed,
        "text": sha256(corpus.train.encode()).hexdigest(),
    }
