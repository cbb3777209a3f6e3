"""Teachers that are made of the student: copies, a moving mean, and no adapters."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from llm_distill import (
    AdapterOff,
    AttentionMaps,
    BornAgain,
    CrossEntropy,
    DeepToShallow,
    DistillTrainer,
    Ema,
    Ensemble,
    FromConfig,
    FromTeacher,
    HiddenStates,
    Local,
    Logits,
    Routed,
)
from llm_distill.errors import InputError
from llm_distill.layers import auto, auto_race, explicit, last
from llm_distill.projectors import linear
from llm_distill.signals import Request
from llm_distill.teachers.within import Shared
from tests import on_disk, tiny
from tests.teachers.test_local import batch

CPU = torch.device("cpu")
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
LOGITS = Request(logits=True)


def trainer(folder: Path, teacher: Any, objectives: list[Any], **given: Any) -> DistillTrainer:
    peft = given.pop("peft_config", None)
    student = given.pop("student", None) or tiny.llama("student")
    args = tiny.arguments(folder, **given)
    data = {"train_dataset": tiny.rows()}
    return DistillTrainer(student, teacher, objectives, args, peft_config=peft, **data)


class Recorder(TrainerCallback):
    """The student after every step."""

    def __init__(self, made: DistillTrainer) -> None:
        self.made = made
        self.seen = [self.now()]

    def now(self) -> dict[str, torch.Tensor]:
        return {k: v.detach().double().clone() for k, v in self.made.student.named_parameters()}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(self.now())


class TestEma:
    @pytest.mark.parametrize("accumulation", [1, 2])
    @pytest.mark.parametrize("adapter", [None, LORA])
    def test_it_has_the_closed_form(
        self, tmp_path: Path, accumulation: int, adapter: LoraConfig | None
    ) -> None:
        """`b^n x_0 + (1 - b) sum_k b^(n - k) x_k`, over optimizer steps, not micro-batches."""
        decay, steps = 0.7, 4
        made = trainer(
            tmp_path,
            Ema(decay=decay),
            [CrossEntropy(), Logits()],
            max_steps=steps,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            peft_config=adapter,
        )
        recorder = Recorder(made)
        made.add_callback(recorder)
        made.train()
        assert len(recorder.seen) == steps + 1
        within = made.distiller.within
        assert within is not None
        mean = dict(within.model.named_parameters())  # type: ignore[union-attr]
        for name, start in recorder.seen[0].items():
            expected = decay**steps * start
            for k, seen in enumerate(recorder.seen[1:], 1):
                expected = expected + (1 - decay) * decay ** (steps - k) * seen[name]
            torch.testing.assert_close(mean[name].double(), expected, rtol=1e-6, atol=1e-7)

    def test_it_learns_from_the_mean_of_before_the_step(self, tmp_path: Path) -> None:
        """Decay 0: the teacher is the student of the last step, so there is never a KL."""
        made = trainer(tmp_path, Ema(decay=0.0), [CrossEntropy(), Logits()])
        made.train()
        logs = [log["kl"] for log in made.state.log_history if "kl" in log]
        assert logs == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), 2.0])
    def test_a_decay_out_of_range(self, decay: float) -> None:
        with pytest.raises(InputError, match=r"Ema: decay is .*; write a number from 0 up to 1"):
            Ema(decay=decay)

    def test_halves_cannot_hold_a_slow_mean(self, tmp_path: Path) -> None:
        with pytest.raises(
            InputError, match=r"trained in torch.bfloat16, which cannot hold a mean"
        ):
            trainer(tmp_path, Ema(), [Logits()], student=tiny.llama("student").bfloat16())

    def test_a_checkpoint_without_the_mean_is_refused(self, tmp_path: Path) -> None:
        given = {"save_strategy": "steps", "save_steps": 2}
        trainer(tmp_path, BornAgain(), [CrossEntropy(), Logits()], **given).train()
        made = trainer(tmp_path, Ema(), [CrossEntropy(), Logits()], **given)
        with pytest.raises(FileNotFoundError, match="the teacher of this run would start anew"):
            made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class TestBornAgain:
    def test_it_is_a_frozen_copy(self, tmp_path: Path) -> None:
        start = tiny.llama("student").state_dict()
        made = trainer(tmp_path, BornAgain(), [CrossEntropy(), Logits()])
        made.train()
        within: Any = made.distiller.within
        for name, weight in within.model.state_dict().items():
            assert torch.equal(weight, start[name])
        assert not torch.equal(made.student.state_dict()["lm_head.weight"], start["lm_head.weight"])
        assert not within.training
        assert not within.model.training
        assert not any(p.requires_grad for p in within.parameters())

    def test_all_signals_and_maps_that_data_decide(self, tmp_path: Path) -> None:
        objectives = [
            CrossEntropy(),
            Logits(),
            HiddenStates(layers=auto, rows="valid"),
            AttentionMaps(queries=3),
        ]
        made = trainer(tmp_path, BornAgain(), objectives)
        made.train()
        first = next(log for log in made.state.log_history if "loss/HiddenStates" in log)
        assert first["loss/HiddenStates"] == pytest.approx(0.0, abs=1e-6)
        assert first["loss/AttentionMaps"] == pytest.approx(0.0, abs=1e-6)
        assert made.evaluate(tiny.rows(5))["eval_kl"] > 0

    def test_a_name_is_loaded_once_and_copied(self, tmp_path: Path) -> None:
        path = str(on_disk.save_model(tmp_path, "student"))
        made = trainer(tmp_path / "out", BornAgain(), [CrossEntropy(), Logits()], student=path)
        assert made.run.teacher.spec.name == f"BornAgain({path})"
        within: Any = made.distiller.within
        own, theirs = made.student.state_dict(), within.model.state_dict()
        assert all(torch.equal(own[name], theirs[name]) for name in own)
        assert own["lm_head.weight"].data_ptr() != theirs["lm_head.weight"].data_ptr()

    def test_opened_by_itself_it_is_the_student_of_its_name(self, tmp_path: Path) -> None:
        """As `llm-distill map` does."""
        spec = Local(str(on_disk.save_model(tmp_path, "student")))
        expected = spec.open(LOGITS, CPU)(batch()).whole.logits(slice(None))
        for teacher in (BornAgain(), Ema(), AdapterOff()):
            found = teacher.of(spec).open(LOGITS, CPU)(batch()).whole.logits(slice(None))
            torch.testing.assert_close(found, expected)


class TestAdapterOff:
    def test_it_is_the_base_model(self, tmp_path: Path) -> None:
        """With a trained adapter in place, and without a weight of its own."""
        made = trainer(tmp_path, AdapterOff(), [CrossEntropy(), Logits()], peft_config=LORA)
        made.train()
        within: Any = made.distiller.within
        assert list(within.parameters()) == []
        found = within(batch()).whole.logits(slice(None))
        base = Local(tiny.llama("student")).open(LOGITS, CPU)(batch()).whole.logits(slice(None))
        assert torch.equal(found, base)

    def test_the_student_is_as_it_was_afterwards(self) -> None:
        student: Any = get_peft_model(tiny.llama("student"), LORA)
        source = AdapterOff().of(Local(student)).open(LOGITS, CPU)
        student.train()
        student.get_base_model().model.layers[0].eval()
        modes = [module.training for module in student.modules()]
        for name, parameter in student.named_parameters():
            if "layers.1" in name:
                parameter.requires_grad_(requires_grad=False)
        trained = [p.requires_grad for p in student.parameters()]
        assert any(trained)
        source(batch())
        assert [module.training for module in student.modules()] == modes
        assert [p.requires_grad for p in student.parameters()] == trained
        assert student.get_model_status().enabled is True

    def test_a_head_that_is_trained_whole_is_left_out_too(self) -> None:
        config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        student: Any = get_peft_model(tiny.llama("student"), config)
        with torch.no_grad():
            student.get_base_model().lm_head.modules_to_save["default"].weight.mul_(3)
        found = AdapterOff().of(Local(student)).open(LOGITS, CPU)(batch())
        base = Local(tiny.llama("student")).open(LOGITS, CPU)(batch())
        expected = base.whole.logits(slice(None))
        assert torch.equal(found.whole.logits(slice(None)), expected)

    def test_a_student_without_adapters(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"the student has no adapters.*peft: \{r: 16\}"):
            trainer(tmp_path, AdapterOff(), [Logits()])

    def test_an_adapted_student_that_is_given(self, tmp_path: Path) -> None:
        student: Any = get_peft_model(tiny.llama("student"), LORA)
        made = trainer(tmp_path, AdapterOff(), [CrossEntropy(), Logits()], student=student)
        made.train()
        assert isinstance(made.student, PeftModel)
        logs = [log["kl"] for log in made.state.log_history if "kl" in log]
        assert logs[0] == 0.0
        assert logs[-1] > 0.0

    def test_hidden_states_and_data_that_decide(self, tmp_path: Path) -> None:
        objectives = [CrossEntropy(), HiddenStates(layers=auto), Logits()]
        made = trainer(tmp_path, AdapterOff(), objectives, peft_config=LORA)
        made.train()
        assert all(p.isfinite().all() for p in made.student.parameters())

    def test_attention_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"attention of blocks \[1, 2\] is asked for, which"):
            trainer(tmp_path, AdapterOff(), [AttentionMaps()], peft_config=LORA)

    def test_dropout_rests_in_the_teacher_alone(self, tmp_path: Path) -> None:
        student = tiny.gpt2()
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        given = {"student": student, "peft_config": config}
        made = trainer(tmp_path, AdapterOff(), [CrossEntropy(), Logits()], **given)
        made.train()
        within: Any = made.distiller.within
        assert isinstance(within, Shared)
        assert torch.equal(*(within(batch()).whole.logits(slice(None)) for _ in range(2)))


class TestBadInput:
    @pytest.mark.parametrize("teacher", [BornAgain(), Ema(), AdapterOff()])
    def test_a_student_that_is_made_for_a_teacher(self, tmp_path: Path, teacher: Any) -> None:
        for student in (FromTeacher(depth=2), FromConfig("llama")):
            with pytest.raises(
                InputError, match=r"is made of the student, and From.* makes a stud"
            ):
                trainer(tmp_path, teacher, [Logits()], student=student)

    @pytest.mark.parametrize("own", [BornAgain(), Ema(), AdapterOff(), DeepToShallow()])
    def test_a_member_of_several(self, tmp_path: Path, own: Any) -> None:
        other, name = Local(tiny.llama("teacher")), type(own).__name__
        for teacher in (Ensemble([other, own]), Routed({"a": other, "b": own}, by="kind")):
            with pytest.raises(InputError, match=f"{name} is the student itself, and stands alone"):
                trainer(tmp_path, teacher, [Logits()], peft_config=LORA)

    def test_hints_that_are_refused_before_weights_load(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="member 0 of the teacher Ema"):
            trainer(tmp_path, Ema(), [HiddenStates(member=0, layers=last)])


class TestDeepToShallow:
    def objectives(self) -> list[Any]:
        deeper = partial(explicit, pairs=[[1, 2]])
        return [CrossEntropy(), Logits(exit=1), HiddenStates(layers=deeper, weight=0.5)]

    def test_the_deeper_layer_teaches_and_does_not_learn(self, tmp_path: Path) -> None:
        """Without cross-entropy nothing but what the exit needs has a gradient."""
        made = trainer(tmp_path, DeepToShallow(), [Logits(exit=1)], max_steps=1)
        start = {k: v.clone() for k, v in made.student.state_dict().items()}
        made.train()
        moved = {k for k, v in made.student.state_dict().items() if not torch.equal(v, start[k])}
        assert any("layers.0" in name for name in moved)
        assert not any("layers.1" in name for name in moved)
        assert {"lm_head.weight", "model.norm.weight"} <= moved

    def test_the_exit_learns_what_the_end_says(self, tmp_path: Path) -> None:
        given = {"max_steps": 60, "learning_rate": 0.5, "num_train_epochs": 20}
        made = trainer(tmp_path, DeepToShallow(), self.objectives(), **given)
        made.train()
        logs = [log["loss/Logits"] for log in made.state.log_history if "loss/Logits" in log]
        assert sum(logs[-4:]) < 0.7 * sum(logs[:4])
        assert list(made.distiller.within.parameters()) == []  # type: ignore[union-attr]

    def test_nothing_compares_the_student_with_itself(self, tmp_path: Path) -> None:
        made = DistillTrainer(
            tiny.llama("student"),
            DeepToShallow(),
            self.objectives(),
            tiny.arguments(tmp_path),
            train_dataset=tiny.rows(),
            eval_dataset=tiny.rows(5),
        )
        made.train()
        assert not any("kl" in log or "agreement" in log for log in made.state.log_history)
        metrics = made.evaluate()
        assert "eval_perplexity" in metrics
        assert "eval_kl" not in metrics

    def test_with_calibration_and_adapters(self, tmp_path: Path) -> None:
        deeper = partial(explicit, pairs=[[1, 2]])
        hint = HiddenStates(layers=deeper, projector=linear, init="least_squares", rows="valid")
        made = trainer(
            tmp_path, DeepToShallow(), [CrossEntropy(), hint, Logits(exit=1)], peft_config=LORA
        )
        assert any("least squares on" in note for note in made.run.terms["HiddenStates"].notes)
        made.train()
        assert all(p.isfinite().all() for p in made.distiller.parameters())

    @pytest.mark.parametrize(
        ("objective", "message"),
        [
            (Logits(), "Logits: the last layer would learn from itself; with DeepToShallow write"),
            (
                HiddenStates(layers=last),  # there is nothing below the last of two blocks
                r"layer 2 of the student would learn from its own layer 2.*pairs: \[\[1, 2\]\]",
            ),
            (HiddenStates(), r"layer 1 of the student would learn .*pairs: \[\[1, 2\]\]"),
        ],
    )
    def test_a_layer_that_would_learn_from_itself(
        self, tmp_path: Path, objective: Any, message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            trainer(tmp_path, DeepToShallow(), [CrossEntropy(), objective])

    def test_a_student_of_one_block(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="the student has one block, and none below it to te"):
            trainer(tmp_path, DeepToShallow(), [CrossEntropy()], student=tiny.gpt2(depth=1))

    def test_a_metric_that_there_is_not(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="nothing compares the tokens of two models: there is"):
            DistillTrainer(
                tiny.llama("student"),
                DeepToShallow(),
                self.objectives(),
                tiny.arguments(tmp_path, metric_for_best_model="eval_kl"),
                train_dataset=tiny.rows(),
                eval_dataset=tiny.rows(5),
            )


def test_a_race_of_maps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="auto_race trains copies of the student, and BornAgain"):
        trainer(tmp_path, BornAgain(), [Logits(), HiddenStates(layers=auto_race)])


def test_the_best_student_is_not_the_one_nearest_to_itself(tmp_path: Path) -> None:
    given = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    args = tiny.arguments(tmp_path, **given)
    data = {"train_dataset": tiny.rows(), "eval_dataset": tiny.rows(5)}
    DistillTrainer(tiny.llama("student"), BornAgain(), [CrossEntropy(), Logits()], args, **data)
    assert args.metric_for_best_model == "eval_loss"
