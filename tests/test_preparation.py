"""A run is checked before its weights load; every refusal with its message."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    PreTrainedModel,
    TrainingArguments,
)

from llm_distill import (
    AttentionMaps,
    DistillTrainer,
    FromConfig,
    HiddenStates,
    Local,
    Logits,
    Taid,
    skew_forward_kl,
)
from llm_distill import heads as head_rules
from llm_distill import layers as layer_maps
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.preparation import Run, prepare_run
from tests import on_disk, tiny

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Any]:
    """A student and a teacher in folders, as arguments of `DistillTrainer`."""
    return {
        "model": str(on_disk.save_model(tmp_path / "student", "student")),
        "teacher": str(on_disk.save_model(tmp_path / "teacher", "teacher")),
        "train_dataset": tiny.rows(4),
    }


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading or making any model fails the test, but for one that holds nothing."""
    make = PreTrainedModel._from_config

    def fail(*given: Any, **options: Any) -> Any:
        if torch.get_default_device().type == "meta":
            return make.__func__(*given, **options)  # type: ignore[attr-defined]  # a class method
        raise AssertionError("weights were loaded before the input was checked")

    for name in ("from_pretrained", "_from_config"):
        monkeypatch.setattr(PreTrainedModel, name, classmethod(fail))


def prepared(
    model: Any, teacher: Any, *objectives: Any, args: TrainingArguments, **kwargs: Any
) -> Run:
    return prepare_run(model, teacher, objectives or (Logits(),), args, kwargs)


def at(*pairs: list[int]) -> Any:
    return partial(layer_maps.explicit, pairs=[*pairs])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model_init": ({"model_init": lambda: None}, "takes no model_init: the loss is"),
    "compute_loss_func": ({"compute_loss_func": lambda: None}, "takes no compute_loss_func"),
    "no objectives": ({"objectives": []}, "the list is empty"),
    "all weights zero": ({"objectives": [lambda: Logits(weight=0.0)]}, "every weight is 0"),
    "negative weight": ({"objectives": [lambda: Logits(weight=-1.0)]}, "Logits: weight is -1.0"),
    "nan weight": ({"objectives": [lambda: Logits(weight=math.nan)]}, "Logits: weight is nan"),
    "temperature": ({"objectives": [lambda: Logits(temperature=0)]}, "temperature is 0; it must"),
    "student layer": (
        {"objectives": [lambda: HiddenStates(layers=at([3, 4]))]},
        r"student layer 3 is out of range 0\.\.2",
    ),
    "teacher layer": (
        {"objectives": [lambda: HiddenStates(layers=at([2, -9]))]},
        r"teacher layer -9 is out of range 0\.\.4",
    ),
    "two query plans": (
        {"objectives": [AttentionMaps, lambda: AttentionMaps(queries=3)]},
        "AttentionMaps and AttentionMaps.2 ask for different query rows",
    ),
    "identity for least squares": (
        {
            "objectives": [
                lambda: HiddenStates(init="least_squares", projector=lambda s, t: torch.nn.Tanh())
            ]
        },
        "Tanh has no closed-form optimum",
    ),
    "empty dataset": ({"train_dataset": tiny.rows(4).select([])}, "train_dataset is empty"),
    "empty evaluation": (
        {"eval_dataset": {"a": tiny.rows(4).select([])}},
        r"eval_dataset\[a\] is empty",
    ),
    "all labels masked": (
        {"train_dataset": tiny.rows(2, empty=(0, 1))},
        "0 supervised tokens in the 2 examples",
    ),
    "all labels masked, in a list": (
        {"train_dataset": list(tiny.rows(2, empty=(0, 1)))},
        "0 supervised tokens in the first 2 examples of train_dataset: every label is -100; leave",
    ),
    "all labels masked, for a collator of the user's own": (
        {
            "train_dataset": tiny.rows(2, empty=(0, 1)),
            "data_collator": Collator(pad_token_id=0),
        },
        "0 supervised tokens in the first 2 examples",
    ),
    "no format": (
        {"train_dataset": datasets.Dataset.from_dict({"texts": ["a"]})},
        r"has the columns 'texts'; accepted are",
    ),
    "several splits": (
        {"train_dataset": datasets.DatasetDict({"train": tiny.rows(2), "test": tiny.rows(2)})},
        r"train_dataset is a dict of \['test', 'train'\]; give one",
    ),
    "no labels": (
        {"data_collator": lambda rows: {"input_ids": torch.ones(1, 2, dtype=torch.long)}},
        r"collator gave \['input_ids'\] but no `labels`",
    ),
    "nothing to calibrate on": (
        {
            "objectives": [lambda: AttentionMaps(heads=head_rules.match)],
            "train_dataset": None,
        },
        "there is no train_dataset to calibrate on",
    ),
    "unknown architecture": ({"model": FromConfig("lama")}, "did you mean 'llama'"),
    "masked student": ({"model": tiny.bert()}, "student is a masked .* the teacher a causal one"),
    "a share of a skewed loss": (
        {"objectives": [lambda: Logits(loss=partial(skew_forward_kl, alpha=1.5))]},
        r"skew_forward_kl\(alpha=1.5\) fails .* alpha",
    ),
    "a moving target": ({"objectives": [lambda: Logits(target=Taid(start=2.0))]}, "Taid: start=2"),
    "rows per chunk": ({"rows_per_chunk": 0}, "rows_per_chunk: 0; write a number of rows from 1"),
    "an adapter on the head": (
        {"peft_config": LoraConfig(target_modules=["q_proj", "lm_head"])},
        "the adapter would sit on lm_head, the student's .*; take lm_head out of target_modules",
    ),
    "an adapter on the head, which only an evaluation reads": (
        {
            "objectives": [HiddenStates],
            "peft_config": LoraConfig(target_modules=["lm_head"]),
            "eval_dataset": tiny.rows(2),
        },
        "the adapter would sit on lm_head",
    ),
    "different tokenizers": (
        {"processing_class": on_disk.tokenizer("zebras graze where lions doze")},
        "the tokenizers differ: token ",
    ),
}

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: the teacher"),
    "push of checkpoints": (
        {"push_to_hub": True, "hub_strategy": "checkpoint"},
        "hub_strategy 'checkpoint' would upload optimizer states",
    ),
    "push of all checkpoints": (
        {"push_to_hub": True, "hub_strategy": "all_checkpoints"},
        "hub_strategy 'all_checkpoints' would upload",
    ),
}


@pytest.mark.usefixtures("_no_weights")
class TestRefusedBeforeWeightsLoad:
    @pytest.mark.parametrize("case", REFUSED)
    def test_input(self, case: str, saved: dict[str, Any], tmp_path: Path) -> None:
        changes, message = REFUSED[case]
        given = saved | changes
        made = given.pop("objectives", [Logits])
        with pytest.raises(ValueError, match=message):
            DistillTrainer(
                objectives=[make() for make in made], args=tiny.arguments(tmp_path), **given
            )

    @pytest.mark.parametrize("case", ARGUMENTS)
    def test_arguments(self, case: str, saved: dict[str, Any], tmp_path: Path) -> None:
        changes, message = ARGUMENTS[case]
        with pytest.raises(InputError, match=message):
            DistillTrainer(args=tiny.arguments(tmp_path, **changes), **saved)

    def test_several_gpus_without_a_launcher(self, saved: dict[str, Any], tmp_path: Path) -> None:
        args = tiny.arguments(tmp_path)
        args._n_gpu = 2
        with pytest.raises(InputError, match=r"2 GPUs .* launch --num_processes 2 your_"):
            DistillTrainer(args=args, **saved)

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_kwargs` is deprecated")
    @pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
    def test_maps_under_reentrant_checkpointing(
        self, name: str, saved: dict[str, Any], tmp_path: Path
    ) -> None:
        options = {name: True, f"{name}_kwargs": {"use_reentrant": True}}
        args = tiny.arguments(tmp_path, **options)
        with pytest.raises(InputError, match="no gradient under reentrant gradient checkpointing"):
            DistillTrainer(objectives=[AttentionMaps()], args=args, **saved)
        prepared(saved["model"], saved["teacher"], Logits(), args=args)

    def test_a_teacher_that_is_not_there(self, saved: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"is not a folder here; in .* 'teacher'"):
            DistillTrainer(**saved | {"teacher": saved["teacher"] + "s"})

    def test_a_teacher_that_cannot_give_a_signal(
        self, saved: dict[str, Any], tmp_path: Path
    ) -> None:
        """The teacher, the signal and the blocks are named, from its config alone."""
        folder = str(tmp_path / "bloom")
        BloomConfig(vocab_size=on_disk.VOCABULARY, n_layer=2).save_pretrained(folder)
        args = tiny.arguments(tmp_path)
        message = (
            rf"{folder} \(bloom\) has no attention that can be read, and AttentionMaps asks for "
            r"blocks \[1, 2\]; use Logits and HiddenStates"
        )
        with pytest.raises(InputError, match=message):
            DistillTrainer(objectives=[AttentionMaps()], args=args, **saved | {"teacher": folder})

    def test_no_teacher(self, saved: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="NoneType is no model; give a Hub id"):
            DistillTrainer(**saved | {"teacher": None})

    def test_text_without_any_tokenizer(self, tmp_path: Path) -> None:
        text = datasets.Dataset.from_dict({"text": on_disk.SENTENCES})
        with pytest.raises(InputError, match=r"columns \['text'\] and no tokenizer is known"):
            DistillTrainer(
                tiny.llama("student"),
                tiny.llama("teacher"),
                args=tiny.arguments(tmp_path),
                train_dataset=text,
            )


@pytest.mark.parametrize("wrap", [lambda m: m, Local, lambda m: get_peft_model(m, LoraConfig())])
def test_one_object_cannot_teach_itself(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    model = tiny.llama("student")
    with pytest.raises(InputError, match="model and teacher are one object; give the teacher a co"):
        prepared(wrap(model), model, args=tiny.arguments(tmp_path))


def test_a_causal_student_of_a_masked_teacher_is_refused(
    student: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="student is a causal language model and the teacher a ma"):
        prepared(student, tiny.bert(), args=tiny.arguments(tmp_path))


def test_unmasked_rows_of_a_masked_model_are_refused(tmp_path: Path) -> None:
    """Each token would tell itself."""
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    args = tiny.arguments(tmp_path)
    with pytest.raises(InputError, match="give data_collator=DataCollatorForLanguageModeling"):
        prepare_run(tiny.bert(), tiny.bert(), [Logits()], args, {"train_dataset": rows})
    masked = [{"input_ids": [5, 4, 7], "labels": [-100, 6, -100]}] * 4
    prepare_run(tiny.bert(), tiny.bert(), [Logits()], args, {"train_dataset": masked})


def test_an_adapter_on_a_head_that_nobody_reads(saved: dict[str, Any], tmp_path: Path) -> None:
    adapter = LoraConfig(target_modules=["lm_head"])
    kwargs = {"train_dataset": tiny.rows(4)}
    given = (saved["model"], saved["teacher"], [HiddenStates()], tiny.arguments(tmp_path), kwargs)
    assert prepare_run(*given, adapter=adapter).kwargs.keys() >= {"train_dataset"}


def test_an_optimizer_that_does_not_know_the_projectors_is_refused(
    student: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    made = torch.optim.SGD(student.parameters()), None
    args = tiny.arguments(tmp_path)
    prepared(student, teacher, Logits(), args=args, optimizers=made)
    with pytest.raises(InputError, match="optimizers: HiddenStates would not be trained"):
        prepared(student, teacher, Logits(), HiddenStates(), args=args, optimizers=made)
    prepared(student, teacher, HiddenStates(), args=args, optimizers=(None, None))
