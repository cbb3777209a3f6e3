"""Trains a tiny student and pushes it; run against the local Hub.

Usage: python -m tests.push_worker FOLDER STRATEGY KIND   (KIND: plain, lora)
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig

from tests import tiny
from tests.exactness_worker import objectives


def main(folder: Path, strategy: str, kind: str) -> None:
    """Push, then load back by the Hub id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_distill import DistillTrainer, Local

    known = tiny.tokenizer()
    known.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    args = tiny.arguments(
        folder / "student",
        push_to_hub=True,
        hub_model_id="me/student",
        hub_strategy=strategy,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer = DistillTrainer(
        tiny.llama("student"),
        Local(tiny.llama("teacher"), tokenizer=known),
        objectives(),
        args,
        train_dataset=tiny.rows(),
        eval_dataset=tiny.rows(8),
        processing_class=known,
        peft_config=LoraConfig(target_modules=["q_proj"]) if kind == "lora" else None,
    )
    trainer.train()
    trainer.push_to_hub()
    if kind == "lora":
        return
    back = AutoModelForCausalLM.from_pretrained("me/student")
    for name, value in trainer.student.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    tokens = AutoTokenizer.from_pretrained("me/student")
    assert tokens.get_vocab() == known.get_vocab()
    assert tokens.chat_template == known.chat_template


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
