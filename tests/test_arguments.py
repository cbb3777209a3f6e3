"""Training arguments: what is refused, and which defaults are changed."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from llm_distill import BornAgain, Contrastive, DistillTrainer, Ema, HiddenStates, Logits, pkt
from llm_distill.arguments import (
    check_arguments,
    check_batches,
    check_checkpointing,
    check_engine,
    check_under_deepspeed,
    check_untrained,
    idle_gates,
    sharded_by,
)
from llm_distill.balance import Balance, gradient
from llm_distill.binding import bind
from llm_distill.errors import InputError
from llm_distill.evaluation import settle_best_metric
from llm_distill.layers import last
from llm_distill.signals import ModelSpec
from tests import tiny
from tests.objectives.planted import STUDENT, TEACHER

SPECS = STUDENT, TEACHER
SAVED = "stage3_gather_16bit_weights_on_model_save"


class TestDefaults:
    def check(self, tmp_path: Path, evaluation: Any = None, **changes: Any) -> TrainingArguments:
        args = tiny.arguments(tmp_path, **changes)
        check_arguments(args, {"eval_dataset": evaluation})
        settle_best_metric(args, evaluation, compared=True)
        return args

    def test_nothing_is_hidden_or_cut(self, tmp_path: Path) -> None:
        args = self.check(tmp_path)
        assert args.logging_nan_inf_filter is False
        loader: Any = args.accelerator_config
        assert loader.dispatch_batches is False
        assert args.metric_for_best_model is None

    @pytest.mark.parametrize(
        "changes",
        [
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            {"save_strategy": "best", "eval_strategy": "steps"},
        ],
    )
    def test_the_best_model_is_nearest_to_the_teacher(
        self, changes: dict[str, Any], tmp_path: Path
    ) -> None:
        args = self.check(tmp_path, tiny.rows(2), **changes)
        assert args.metric_for_best_model == "eval_kl"
        assert args.greater_is_better is False
        args = self.check(tmp_path, {"a": tiny.rows(2), "b": tiny.rows(2)}, **changes)
        assert args.metric_for_best_model == "eval_a_kl"

    @pytest.mark.parametrize(
        ("metric", "greater"),
        [
            ("eval_kl", False),
            ("kl", False),
            ("eval_teacher_perplexity", False),
            ("eval_loss", False),
            ("eval_loss/HiddenStates", False),
            ("eval_text_loss/Logits", False),
            ("eval_agreement", True),
        ],
    )
    def test_a_metric_that_was_named_stays(
        self, metric: str, greater: bool, tmp_path: Path
    ) -> None:
        args = self.check(tmp_path, metric_for_best_model=metric)
        assert args.metric_for_best_model == metric
        assert args.greater_is_better is greater


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", "1", "write fsdp_version: 2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "without weights on all ranks but the first"),
    ],
)
def test_sharding_that_cannot_work_is_refused(
    name: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = tiny.arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_arguments(args, {})
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        check_arguments(args, {})


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "false", None),
    ],
)
def test_what_keeps_a_student_in_pieces(
    variable: str,
    value: str,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = tiny.arguments(tmp_path)
    monkeypatch.setenv(variable, value)
    assert sharded_by(args) == expected


def test_noise_on_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neftune_noise_alpha"):
        check_arguments(tiny.arguments(tmp_path, neftune_noise_alpha=5.0), {})


def test_batches_cut_up_by_one_process_are_refused(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, accelerator_config={"dispatch_batches": True})
    with pytest.raises(InputError, match="dispatch_batches: rows are not cut up"):
        check_arguments(args, {})


def test_reentrant_checkpointing_has_no_maps(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path)
    check_checkpointing(args)
    args.activation_checkpointing_kwargs = {"use_reentrant": True}
    with pytest.raises(InputError, match="no gradient under reentrant"):
        check_checkpointing(args)


def test_gates_of_compiled_students_are_told_to_be_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo takes the hidden states between two graphs: no hook sees the whole gradient there."""
    specs = [ModelSpec.of(tiny.llama(role).config, role) for role in ("student", "teacher")]
    objectives = [Logits(), HiddenStates(), HiddenStates(gate=False, name="open")]
    terms = bind(objectives, specs[0], specs[1], seed=0)
    assert idle_gates(terms, tiny.arguments(tmp_path)) == ()
    compiled = tiny.arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    (told,) = idle_gates(terms, compiled)
    assert told.startswith("HiddenStates: under torch_compile the gate sees no gradients")
    with monkeypatch.context() as patch:
        patch.setattr("llm_distill.zero.is_zero3", lambda: True)
        (told,) = idle_gates(terms, tiny.arguments(tmp_path))
    assert told.startswith("HiddenStates: under DeepSpeed ZeRO-3 the gate sees no gradients")
    del terms["HiddenStates"]
    assert idle_gates(terms, compiled) == ()


class TestDeepSpeed:
    def settled(
        self, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> dict[str, Any]:
        """A configuration after the check of arguments that cut gradients at 0.5."""
        args: Any = tiny.arguments(tmp_path, max_grad_norm=0.5)
        args.deepspeed_plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))
        contradicts = config.get("gradient_clipping", "auto") not in ("auto", 0.5)
        lines = ["ds gradient_clipping=1.0 vs hf max_grad_norm=0.5"] if contradicts else []
        monkeypatch.setattr("llm_distill.zero.mismatches", lambda *_: lines)
        check_arguments(args, {})
        return config

    def test_clipping_is_that_of_the_arguments(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Left out, it would be something else."""
        assert self.settled({}, tmp_path, monkeypatch)["gradient_clipping"] == 0.5
        kept = self.settled({"gradient_clipping": "auto"}, tmp_path, monkeypatch)
        assert kept["gradient_clipping"] == "auto"

    def test_contradictions_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        message = r"differ: ds gradient_clipping=1.0 vs hf max_grad_norm=0.5; write auto for each"
        with pytest.raises(InputError, match=message):
            self.settled({"gradient_clipping": 1.0}, tmp_path, monkeypatch)

    @pytest.mark.parametrize("asked", [{}, {SAVED: False}, {SAVED: "auto"}])
    def test_zero3_saves_a_model(
        self, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = {"zero_optimization": {"stage": 3, **asked}}
        assert self.settled(config, tmp_path, monkeypatch)["zero_optimization"][SAVED] is True
        others = self.settled({"zero_optimization": {"stage": 2}}, tmp_path, monkeypatch)
        assert others["zero_optimization"] == {"stage": 2}

    def test_a_slow_mean_in_halves_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        half = tiny.arguments(tmp_path, bf16=True)
        check_under_deepspeed(half, Ema(), Balance())
        monkeypatch.setattr("llm_distill.zero.is_running", lambda: True)
        check_under_deepspeed(half, BornAgain(), Balance())
        check_under_deepspeed(tiny.arguments(tmp_path), Ema(), Balance())
        with pytest.raises(InputError, match=r"Ema: .* would not move; write bf16: false"):
            check_under_deepspeed(half, Ema(), Balance())

    def test_gradients_at_states_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        balance = gradient(bind([Logits()], *SPECS, seed=0), STUDENT.depth)
        check_under_deepspeed(tiny.arguments(tmp_path), BornAgain(), balance)
        monkeypatch.setattr("llm_distill.zero.is_zero3", lambda: True)
        with pytest.raises(InputError, match="write balance: normalised or uncertainty"):
            check_under_deepspeed(tiny.arguments(tmp_path), BornAgain(), balance)

    def test_an_engine_that_is_there_does_not_train_again(self) -> None:
        trainer: Any = SimpleNamespace(deepspeed=None)
        check_untrained(trainer)
        trainer.deepspeed = object()
        with pytest.raises(InputError, match="trains once, and before it evaluates"):
            check_untrained(trainer)


class TestBatches:
    def terms(self, **settings: Any) -> dict[str, Any]:
        objective: Any = settings.pop("objective", HiddenStates)
        return {"hint": objective(**settings, layers=last).build(*SPECS)}

    def test_a_relation_that_never_has_enough_sequences_is_refused(self, tmp_path: Path) -> None:
        terms = self.terms(loss=pkt, items="pooled")
        check_batches(terms, tiny.arguments(tmp_path, per_device_train_batch_size=3))
        args = tiny.arguments(tmp_path, per_device_train_batch_size=2)
        with pytest.raises(InputError, match=r"hint compares 3 sequences or more .* is 2: it"):
            check_batches(terms, args)

    @pytest.mark.parametrize(
        "settings",
        [
            {"loss": pkt},
            {"items": "pooled"},
            {"objective": Contrastive, "items": "token"},
            {"objective": Contrastive, "queue": 8},
        ],
    )
    def test_one_sequence_is_enough_for_others(
        self, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        args = tiny.arguments(tmp_path, per_device_train_batch_size=1)
        check_batches(self.terms(**settings), args)

    def test_contrast_needs_two_of_all_ranks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        args = tiny.arguments(tmp_path, per_device_train_batch_size=1)
        with pytest.raises(InputError, match="hint compares 2 sequences"):
            check_batches(self.terms(objective=Contrastive), args)
        monkeypatch.setattr(TrainingArguments, "world_size", 2)
        check_batches(self.terms(objective=Contrastive), args)


@pytest.mark.parametrize(
    ("asked", "running", "fine"),
    [
        ({}, (False, False), True),
        ({"ACCELERATE_USE_FSDP": "true"}, (True, False), True),
        ({"ACCELERATE_USE_FSDP": "true"}, (False, False), False),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, (False, True), True),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, (False, False), False),
    ],
)
def test_the_engine_that_was_asked_for_is_the_one_that_runs(
    asked: dict[str, str],
    running: tuple[bool, bool],
    fine: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = tiny.arguments(tmp_path)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    found = dict(zip(("FSDP", "DeepSpeed"), running, strict=True))
    with nullcontext() if fine else pytest.raises(InputError, match="Accelerate does not run it"):
        check_engine(args, found)


def test_fsdp_on_a_cpu_is_no_quiet_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = tiny.arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    models = tiny.llama("student"), tiny.llama("teacher")
    with pytest.raises(InputError, match="FSDP was asked for and Accelerate does not run it"):
        DistillTrainer(*models, [Logits()], args, train_dataset=tiny.rows())


def test_several_gpus_under_one_teacher(tmp_path: Path) -> None:
    """With a device map they are its own; Trainer would copy the student to each of them."""
    args = tiny.arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(InputError, match="let the teacher lie on all of them: device_map: auto"):
        check_arguments(args, {})
    check_arguments(args, {}, spread=True)
    assert args.n_gpu == 1
