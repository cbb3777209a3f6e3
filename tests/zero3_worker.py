"""Trains under DeepSpeed ZeRO beside teachers of several kinds; started alone or by torchrun.

Usage: python -m tests.zero3_worker ENGINE FOLDER CELL...   (ENGINE: one, zero1, zero2, zero3)

A cell is MODEL:SHARD[:SIZE][:WORD...] as in `placement_worker`, its student a smaller model of the
same kind; `lora` is a Llama with adapters. Words: `step`, micro-batches of one sequence; `data`, a
map from data, fitted projectors and evaluations of 9 rows, before the first step too; `hidden`,
lower layers alone; `apart`, sequences against those of all ranks; `alone`, blocks learn alone at
first, from states that are given; `recomputed`, activations are; `bf16`; `clip`, gradients are cut;
`after`, both models are loaded by the user, after the arguments; `bare`, a configuration with
nothing but a stage; `ema`, `born`, `off`, `deep`, the student is its own teacher; `uncertainty`,
weights that are trained.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import placement_worker, tiny
from tests.launch import finish, from_all

SETTINGS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_force_ds_cpu_optimizer": False,
}
"""Of an engine, as users write them; what saving needs is left out."""

CHANGES: dict[str, dict[str, Any]] = {
    "clip": {"max_grad_norm": 0.05},
    "data": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 3},
    "recomputed": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
}
"""Of the training arguments, by words of a cell."""

ITSELF = ("ema", "born", "off", "deep")


def configuration(engine: str, *, bare: bool) -> dict[str, Any]:
    """DeepSpeed's, in which no weight is too small to be cut up."""
    stage: dict[str, Any] = {"stage": int(engine[-1])}
    if engine == "zero3":
        stage["stage3_param_persistence_threshold"] = 0
    return {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": stage} | (
        {} if bare else SETTINGS
    )


def gathered(trainer: Any) -> dict[str, torch.Tensor]:
    """Every weight of student and projectors, whole."""
    found = dict(trainer.distiller.named_parameters(remove_duplicate=False))
    parts = [weight for weight in found.values() if "ds_id" in vars(weight)]
    if not parts:
        return {name: weight.detach().clone() for name, weight in found.items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        return {name: weight.detach().clone() for name, weight in found.items()}


def itself(words: list[str]) -> tuple[Any, list[Any]]:
    """A teacher that is the student, and what it can teach."""
    from llm_distill import (
        AdapterOff,
        BornAgain,
        CrossEntropy,
        DeepToShallow,
        Ema,
        HiddenStates,
        Logits,
    )
    from llm_distill.layers import explicit, uniform

    if "deep" in words:
        hint = HiddenStates(layers=partial(explicit, pairs=[[1, 2]]), gate=False)
        return DeepToShallow(), [CrossEntropy(), Logits(exit=1), hint]
    kinds: dict[str, Any] = {"ema": Ema(decay=0.9), "born": BornAgain(), "off": AdapterOff()}
    teacher = next(kind for word, kind in kinds.items() if word in words)
    return teacher, [CrossEntropy(), Logits(), HiddenStates(layers=uniform, gate=False)]


def contrasted() -> list[Any]:
    """Logits, and sequences that are told from those of other ranks."""
    from llm_distill import Contrastive, Logits
    from llm_distill.layers import uniform

    return [Logits(), Contrastive(embedding=16, layers=uniform)]


def blocks() -> list[Any]:
    """Blocks that start from states of the teacher for two of three steps."""
    from llm_distill import CrossEntropy, HiddenStates, Logits
    from llm_distill.layers import uniform

    hint = HiddenStates(blockwise=0.5, layers=uniform, init="random", gate=False)
    return [CrossEntropy(weight=0.5), Logits(), hint]


def models(folder: Path, kind: str, shard: str, words: list[str]) -> tuple[Any, Any, list[Any]]:
    """Student, teacher and objectives of a cell."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    name = "llama" if kind == "lora" else kind
    student = placement_worker.student(name)
    if kind == "tied":
        student = tiny.llama("student", tied=True)
    sets = {"data": placement_worker.decided, "hidden": placement_worker.lower}
    sets |= {"apart": contrasted, "alone": blocks}
    sets |= {"pair": placement_worker.together, "routed": placement_worker.apart}
    chosen = (made for word, made in sets.items() if word in (kind, *words))
    objectives = next(chosen, placement_worker.objectives)()
    teacher: Any = None
    if any(word in words for word in ITSELF):
        teacher, objectives = itself(words)
    elif "after" not in words:
        size = next((int(word) for word in words if word.isdigit()), None)
        settings = {"shard": shard, "shard_size": size, "once_per_step": "step" in words}
        teacher = placement_worker.teacher_of(folder, name, settings)
    else:
        student = AutoModelForCausalLM.from_pretrained(folder / "student")
        teacher = AutoModelForCausalLM.from_pretrained(folder / name)
    if kind == "lora":
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        student = get_peft_model(student, config)
    return student, teacher, objectives


def train(engine: str, folder: Path, cell: str) -> dict[str, Any]:
    """Three steps over 8 rows a step; weights, and what ran."""
    from llm_distill import DistillTrainer
    from llm_distill.balance import uncertainty

    kind, shard, *words = cell.split(":")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch = 1 if "step" in words else 8 // ranks
    changes = {
        name: value
        for word, given in CHANGES.items()
        if word in words
        for name, value in given.items()
    }
    if engine != "one":
        changes["deepspeed"] = configuration(engine, bare="bare" in words)
    args = tiny.arguments(
        folder / "out",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=8 // ranks // batch,
        **changes,
    )
    student, teacher, objectives = models(folder, kind, shard, words)
    trainer = DistillTrainer(
        student,
        teacher,
        objectives,
        args,
        train_dataset=placement_worker.examples(kind),
        eval_dataset=tiny.rows(9) if "data" in words else None,  # no number of ranks divides it
        balance=uncertainty if "uncertainty" in words else None,
    )
    trainer.train()
    facts = {"told": list(trainer.run.told), "weights": gathered(trainer), **_lies(trainer)}
    told = ("loss", "kl", "eval_kl", "eval_agreement", "eval_loss")
    logs = [{k: log[k] for k in log if k.startswith(told)} for log in trainer.state.log_history]
    return facts | {"logs": [log for log in logs if log]}


def _lies(trainer: Any) -> dict[str, Any]:
    """What runs, and how much of the models lies on each rank after three steps."""
    from llm_distill.pieces import shape_of
    from llm_distill.placement import resident_bytes

    def sizes(model: Any) -> tuple[int, int]:
        every = {id(p): shape_of(p).numel() * p.element_size() for p in model.parameters()}
        return resident_bytes(model), sum(every.values())

    engine, source = trainer.model_wrapped, trainer._source
    sources = source.sources if "sources" in vars(source) else [source]
    student = from_all(sizes(trainer.distiller))
    facts: dict[str, Any] = {"engine": type(engine).__name__, "student": student}
    if facts["engine"] == "DeepSpeedEngine":
        facts["clipping"] = float(engine.gradient_clipping())
    held = [one.model for one in sources if one.model is not None]
    return facts | {"teachers": [from_all(sizes(model)) for model in held]}


def main(engine: str, folder: Path, cells: list[str]) -> None:
    """All cells in one launch."""
    torch.set_num_threads(1)
    facts = {cell: train(engine, folder, cell) for cell in cells}
    if not dist.is_initialized() or dist.get_rank() == 0:
        ranks = os.environ.get("WORLD_SIZE", "1")
        torch.save(facts, folder / f"{engine}-{ranks}.pt")
    finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
