"""Trains beside a quantised teacher, and compares what it says; started alone or by torchrun.

Usage: python -m tests.quantised_worker ENGINE FOLDER WORD...   (in FOLDER: teacher; ENGINE: one,
ddp, fsdp2)
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.exactness_worker import EMPTY, whole
from tests.fsdp2_on_cpu import fsdp2_on_cpu
from tests.launch import finish


def objectives() -> list[Any]:
    """Logits, hidden states with a projector, and attention maps."""
    from llm_distill import AttentionMaps, HiddenStates, Logits
    from llm_distill.layers import uniform

    hint = HiddenStates(weight=0.5, layers=uniform, init="random", gate=False)
    return [Logits(), hint, AttentionMaps(queries=4, rows="valid", layers=uniform)]


def plain(folder: Path, word: str, attention: str) -> Any:
    """The same quantised model by transformers alone."""
    from llm_distill import quantising

    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=quantising.settings(word, torch.float32),
        device_map={"": "cpu"},
        attn_implementation=attention,
    )


@torch.no_grad()
def differences(trainer: Any, model: Any, eager: Any) -> dict[str, float]:
    """The largest difference of each signal from what the model says when it is called.

    Args:
        trainer: With the teacher at work.
        model: The same, loaded by transformers alone.
        eager: Once more, with attention that it tells.
    """
    source, run = trainer._source, trainer.run
    source.ask(run.teacher_request)
    batch = trainer._batch(next(iter(trainer.get_train_dataloader())))
    signals = source(batch)
    out = model(**batch.inputs, output_hidden_states=True)
    attentions = eager(**batch.inputs, output_attentions=True).attentions
    found: dict[str, Tensor] = {}
    if len(batch.supervised):
        logits = out.logits.flatten(0, 1)[batch.supervised.index]
        found["logits"] = signals.whole.logits(slice(None)) - logits
    real = batch.inputs["attention_mask"].bool()
    for layer, state in signals.states.items():
        found[f"hidden {layer}"] = (state - out.hidden_states[layer])[real]
    for layer, heads in signals.attention.items():
        maps = attentions[layer - 1].transpose(1, 2)  # [B, T, H, T]
        place = batch.queries.position[:, :, None, None].expand(-1, -1, *maps.shape[2:])
        expected = maps.gather(1, place).flatten(0, 1)[batch.queries.flat]
        found[f"maps {layer}"] = heads.maps(batch.queries) - expected
    return {name: float(difference.abs().max()) for name, difference in found.items()}


def train(engine: str, folder: Path, word: str) -> dict[str, Any]:
    """Three steps of 8 rows; weights, the KL that was told, and how signals differ."""
    from llm_distill import DistillTrainer, Local

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    out = folder / f"{word}-{engine}"
    args = tiny.arguments(out, per_device_train_batch_size=8 // ranks)
    trainer = DistillTrainer(
        tiny.llama("student"),
        Local(str(folder / "teacher"), quantize=word),  # type: ignore[arg-type]  # a word
        objectives(),
        args,
        train_dataset=tiny.rows(empty=EMPTY),
    )
    models = (plain(folder / "teacher", word, attention) for attention in ("sdpa", "eager"))
    differ = differences(trainer, *models)
    trainer.train()
    trainer.save_model(str(out / "student"))
    inside = [name for name, _ in trainer.distiller.named_modules() if "student" not in name]
    source: Any = trainer._source
    return {
        "weights": whole(trainer),
        "differ": differ,
        "told": list(trainer.run.told),
        "wrapped": type(trainer.model_wrapped).__name__,
        "inside": inside,
        "trained": sum(p.numel() for p in trainer.student.parameters()),
        "teacher": type(source.model).__name__,
        "world": args.world_size,
    }


def main(engine: str, folder: Path, words: list[str]) -> None:
    """All words in one launch; what each rank found."""
    torch.set_num_threads(1)
    if engine == "fsdp2":
        fsdp2_on_cpu()
    from transformers import TrainingArguments

    rank = TrainingArguments(str(folder / "none"), use_cpu=True).process_index  # starts the group
    found = {word: train(engine, folder, word) for word in words}
    torch.save(found, folder / f"{engine}-{rank}.pt")
    finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
