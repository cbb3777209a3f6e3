"""One training of a race: a copy of everything, and nothing left of it."""

import copy
import gc
import logging
import math
import random
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from llm_distill import DistillTrainer, HiddenStates, Logits, Routed
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.layers import auto_race, uniform
from llm_distill.preparation import Run, prepare_run
from llm_distill.race import heats as module
from llm_distill.race.halving import Arm
from llm_distill.race.heats import Heats, arguments, refuse, same_random_numbers
from llm_distill.signals import Request
from llm_distill.teachers import Local, columns_of
from tests import tiny

NONE = Arm("none", None)
HINT = Arm("uniform", uniform(2, 4), 3.0)
EVERYTHING = Request(logits=True, hidden=frozenset(range(5)))


class Watched:
    """Makes trainers, and remembers their students as long as they live."""

    def __init__(self) -> None:
        self.students: list[weakref.ref[Any]] = []
        self.alive: list[int] = []
        self.arguments: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.alive.append(sum(ref() is not None for ref in self.students))
        self.students.append(weakref.ref(args[0]))
        self.arguments.append(args[3])
        return DistillTrainer(*args, **kwargs)


def prepared(folder: Path, student: Any, **given: Any) -> tuple[Run, Any, Any]:
    """A run whose hint races, its opened teacher, and its arguments."""
    objectives = Logits(), HiddenStates(layers=auto_race)
    names = ("data_collator", "optimizers", "optimizer_cls_and_kwargs", "train_dataset")
    kwargs = {"train_dataset": tiny.rows(24)} | {k: v for k, v in given.items() if k in names}
    args = tiny.arguments(folder, **{k: v for k, v in given.items() if k not in names})
    teacher = Local(tiny.llama("teacher"))
    run = prepare_run(student, teacher, objectives, args, kwargs)
    return run, teacher.open(EVERYTHING, args.device), args


def heats(folder: Path, make: Any = DistillTrainer, **given: Any) -> Heats:
    student = tiny.llama("student")
    run, source, args = prepared(folder, student, **given)
    return Heats(run, student, source, args, make)


def everything(args: Any) -> dict[str, Any]:
    """All values of arguments, deep."""
    return copy.deepcopy({k: v for k, v in vars(args).items() if k != "distributed_state"})


class TestMeasure:
    def test_the_run_does_not_notice(self, tmp_path: Path) -> None:
        student = tiny.llama("student")
        run, source, args = prepared(tmp_path / "out", student, disable_tqdm=False)
        weights, config = copy.deepcopy(student.state_dict()), student.config.to_dict()
        before, objectives = everything(args), run.objectives
        student.train()
        race = Heats(run, student, source, args, DistillTrainer)
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002  what Trainer seeds
        state = torch.get_rng_state()
        expected = random.random(), float(np.random.rand())  # noqa: NPY002
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        for arm in (HINT, NONE):
            assert math.isfinite(race.measure(arm, 2))
        assert torch.equal(torch.get_rng_state(), state)
        assert (random.random(), float(np.random.rand())) == expected  # noqa: NPY002
        assert everything(args) == before
        assert run.objectives is objectives
        assert all(torch.equal(student.state_dict()[k], v) for k, v in weights.items())
        assert student.config.to_dict() == config
        assert student.training
        assert all(p.grad is None for p in student.parameters())
        assert not (tmp_path / "out").exists()

    def test_an_arm_is_a_training_of_its_own(self, tmp_path: Path) -> None:
        """The same as a run that was written by hand, on the same examples."""
        race = heats(tmp_path)
        kl = race.measure(HINT, 4)
        assert kl == race.measure(HINT, 4)
        assert kl != race.measure(NONE, 4)
        rows = tiny.rows(24)
        by_hand = DistillTrainer(
            tiny.llama("student"),
            tiny.llama("teacher"),
            [Logits(), HiddenStates(layers=uniform, weight=3.0)],
            tiny.arguments(tmp_path, max_steps=4),
            train_dataset=rows.select(range(22)),
            eval_dataset=rows.select(range(22, 24)),
        )
        by_hand.train()
        assert kl == pytest.approx(by_hand.evaluate()["eval_kl"], rel=1e-6)

    def test_one_copy_of_the_student_at_a_time(self, tmp_path: Path) -> None:
        make = Watched()
        race = heats(tmp_path, make)
        gc.collect()
        for _ in range(3):
            race.measure(HINT, 1)
        assert make.alive == [0, 0, 0]
        assert [ref() for ref in make.students] == [None] * 3

    def test_a_training_that_fails(self, tmp_path: Path) -> None:
        race = heats(tmp_path, learning_rate=math.inf)
        assert math.isnan(race.measure(HINT, 2))

    def test_interruptions_leave_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Control-C in the middle of a training."""
        made = tmp_path / "temporary"
        made.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(made))
        make, calls = Watched(), 0

        def collate(rows: list[Any]) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:  # the first looks at the data
                raise KeyboardInterrupt
            return Collator(pad_token_id=0)(rows)

        race = heats(tmp_path / "out", make, data_collator=collate)
        state, level = torch.get_rng_state(), logging.root.manager.disable
        with pytest.raises(KeyboardInterrupt):
            race.measure(HINT, 9)
        assert torch.equal(torch.get_rng_state(), state)
        assert logging.root.manager.disable == level
        assert list(made.iterdir()) == []
        assert not (tmp_path / "out").exists()
        gc.collect()
        assert make.students[0]() is None

    def test_it_says_nothing(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        race = heats(tmp_path, logging_steps=1, disable_tqdm=False)
        capfd.readouterr()
        caplog.clear()
        race.measure(HINT, 2)
        assert capfd.readouterr() == ("", "")
        assert caplog.text == ""

    def test_a_teacher_that_was_opened_serves_all_arms(self, tmp_path: Path) -> None:
        student = tiny.llama("student")
        run, source, args = prepared(tmp_path, student)
        opened = module.Opened(run.teacher, source)
        assert opened.open(Request(logits=True), args.device) is source
        assert (opened.config, opened.spec) == (run.teacher.config, run.teacher.spec)
        assert opened.find_tokenizer() is None
        assert opened.form() is None
        assert isinstance(opened.model, LlamaForCausalLM)
        experts = {"a": tiny.llama("teacher"), "b": tiny.llama("teacher")}
        routed = module.Opened(Routed(experts, by="kind"), source)
        assert columns_of(routed) == ("kind",)  # else a race would lose them


class TestArguments:
    def test_nothing_is_shared_or_left_behind(self, tmp_path: Path) -> None:
        args = tiny.arguments(
            tmp_path,
            report_to=["tensorboard"],
            save_strategy="steps",
            eval_strategy="steps",
            load_best_model_at_end=True,
            push_to_hub=True,
            eval_on_start=True,
            lr_scheduler_kwargs={"power": 2.0},
            disable_tqdm=False,
        )
        before = everything(args)
        short: Any = arguments(args, 5, 100, "folder")
        shared = [
            name
            for name, value in vars(short).items()
            if isinstance(value, module.OWN) and value is getattr(args, name)
        ]
        assert shared == []
        short.accelerator_config.split_batches = True
        assert everything(args) == before
        assert (short.output_dir, short.max_steps, short.disable_tqdm) == ("folder", 5, True)
        kinds = short.save_strategy, short.eval_strategy, short.logging_strategy
        assert [kind.value for kind in kinds] == ["no"] * 3
        flags = short.load_best_model_at_end, short.push_to_hub, short.eval_on_start
        assert not any(flags)
        assert short.report_to == []

    @pytest.mark.parametrize(
        ("written", "steps"), [(0, 0), (0.1, 4), (100, 4), (500, 20), (1000, 40), (3000, 40)]
    )
    def test_warm_up_is_the_same_share(self, tmp_path: Path, written: float, steps: int) -> None:
        short = arguments(tiny.arguments(tmp_path, warmup_steps=written), 40, 1000, "folder")
        assert short.get_warmup_steps(40) == steps

    def test_so_are_the_steps_of_schedulers(self, tmp_path: Path) -> None:
        given = {"num_decay_steps": 200, "min_lr_ratio": 0.1}
        args = tiny.arguments(
            tmp_path, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=given
        )
        short = arguments(args, 40, 1000, "folder")
        assert short.lr_scheduler_kwargs == {"num_decay_steps": 8, "min_lr_ratio": 0.1}
        assert args.lr_scheduler_kwargs == given


class TestRefuse:
    @pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
    def test_sharded_by_the_launcher(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        run, _, args = prepared(tmp_path, tiny.llama("student"))
        refuse(run, args)
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
        message = "which (FSDP|DeepSpeed) would shard; race in one process first: llm-distill map"
        with pytest.raises(InputError, match=message):
            refuse(run, args)

    def test_sharded_by_the_arguments(self, tmp_path: Path) -> None:
        run, _, args = prepared(tmp_path, tiny.llama("student"))
        args.fsdp_plugin_args = {"fsdp_version": 2}
        with pytest.raises(InputError, match="which FSDP would shard"):
            refuse(run, args)

    def test_optimizers_of_the_students_own_weights(self, tmp_path: Path) -> None:
        student = tiny.llama("student")
        run, _, args = prepared(tmp_path, student)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        run = replace(run, kwargs=run.kwargs | {"optimizers": (optimizer, None)})
        with pytest.raises(InputError, match="give optimizer_cls_and_kwargs="):
            refuse(run, args)
        refuse(replace(run, kwargs=run.kwargs | {"optimizers": (None, None)}), args)

    def test_a_kind_of_optimizer_is_passed_on(self, tmp_path: Path) -> None:
        race = heats(tmp_path, optimizer_cls_and_kwargs=(torch.optim.Adam, {"lr": 0.0}))
        still = race.measure(HINT, 3)
        assert still == race.measure(NONE, 3)
        assert still != heats(tmp_path).measure(NONE, 3)


def test_random_numbers_also_after_an_error() -> None:
    state = torch.get_rng_state()

    def draw() -> None:
        with same_random_numbers():
            torch.rand(3)
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        draw()
    assert torch.equal(torch.get_rng_state(), state)
