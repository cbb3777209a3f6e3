"""What a run is made of once it was accepted, and how it is calibrated."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pytest
import torch
import torch.distributed as dist
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from llm_distill import (
    AttentionMaps,
    CrossEntropy,
    DistillTrainer,
    HiddenStates,
    Logits,
    calibration,
)
from llm_distill import heads as head_rules
from llm_distill.calibration import CALIBRATION_EXAMPLES, calibrate
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.layers import uniform
from llm_distill.preparation import Run, prepare_run
from llm_distill.signals import Request
from tests import on_disk, tiny

if TYPE_CHECKING:
    from llm_distill.rows import RowKind


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Any]:
    """A student and a teacher in folders, as arguments of `DistillTrainer`."""
    return {
        "model": str(on_disk.save_model(tmp_path / "student", "student")),
        "teacher": str(on_disk.save_model(tmp_path / "teacher", "teacher")),
        "train_dataset": tiny.rows(4),
    }


def prepared(
    model: Any, teacher: Any, *objectives: Any, args: TrainingArguments, **kwargs: Any
) -> Run:
    return prepare_run(model, teacher, objectives or (Logits(),), args, kwargs)


class Stream(torch.utils.data.IterableDataset[Any]):
    """Rows that can be read once."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows, self.read = iter(rows), 0

    def __iter__(self) -> Iterator[Any]:
        for row in self._rows:
            self.read += 1
            yield row


class Places(torch.utils.data.Dataset[Any]):
    """Rows by their places; one too many is no IndexError."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = dict(enumerate(rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Any:
        return self._rows[place]


class TestPrepared:
    def test_text_becomes_tokens_of_the_student(
        self, saved: dict[str, Any], tmp_path: Path
    ) -> None:
        saved["train_dataset"] = datasets.Dataset.from_dict({"text": on_disk.SENTENCES})
        run = prepared(**saved, eval_dataset=tiny.rows(2), args=tiny.arguments(tmp_path))
        tokenizer = run.kwargs["processing_class"]
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        end = [tokenizer.eos_token_id]
        ids = [tokenizer(text)["input_ids"] + end for text in on_disk.SENTENCES]
        assert run.kwargs["train_dataset"]["input_ids"][:] == ids
        assert list(run.prepared) == ["train_dataset", "eval_dataset"]
        assert run.kwargs["data_collator"] == Collator.of(tokenizer)

    def test_the_teacher_gives_logits_where_there_is_an_evaluation(
        self, saved: dict[str, Any], tmp_path: Path
    ) -> None:
        args = tiny.arguments(tmp_path)
        run = prepared(saved["model"], saved["teacher"], CrossEntropy(), args=args)
        assert run.teacher_request == Request()
        run = prepared(
            saved["model"], saved["teacher"], CrossEntropy(), args=args, eval_dataset=tiny.rows(2)
        )
        assert run.teacher_request == Request(logits=True)

    def test_valid_rows_are_collated_where_a_term_wants_them(
        self, saved: dict[str, Any], tmp_path: Path
    ) -> None:
        args, data = tiny.arguments(tmp_path), {"train_dataset": saved["train_dataset"]}
        kinds: tuple[RowKind, ...] = ("supervised", "valid")
        for rows in kinds:
            objective = HiddenStates(rows=rows)
            run = prepared(saved["model"], saved["teacher"], objective, args=args, **data)
            assert isinstance(run.collator, RowCollator)
            assert run.collator.valid is (rows == "valid")
            assert run.shift

    def test_a_collator_of_the_users_own_sees_its_rows(self, tmp_path: Path) -> None:
        tokenizer = on_disk.tokenizer()
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
        ids = [tokenizer(text)["input_ids"] for text in on_disk.SENTENCES * 2]
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=0)
        model, teacher = tiny.bert(depth=1), tiny.bert(depth=2)
        for either in (model, teacher):
            either.resize_token_embeddings(len(tokenizer))
        trainer = DistillTrainer(
            model,
            teacher,
            args=tiny.arguments(tmp_path),
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids}),
            data_collator=collator,
            processing_class=tokenizer,
        )
        assert not trainer.run.shift
        trainer.train()
        assert trainer.state.global_step == 3

    def test_the_check_of_the_collator_draws_nothing(
        self, saved: dict[str, Any], tmp_path: Path
    ) -> None:
        def noisy(rows: list[Any]) -> Any:
            torch.rand(3)
            return Collator(pad_token_id=0)(rows)

        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        prepared(**saved, data_collator=noisy, args=tiny.arguments(tmp_path))
        assert torch.equal(torch.rand(3), expected)

    def test_columns_that_trainer_takes_away_are_not_shown_to_the_collator(
        self, saved: dict[str, Any], tmp_path: Path
    ) -> None:
        seen: list[list[str]] = []

        def look(rows: list[Any]) -> Any:
            seen.append(sorted(rows[0]))
            return Collator(pad_token_id=0)(rows)

        rows = tiny.rows(4).add_column("note", ["x"] * 4)
        saved["train_dataset"] = rows
        prepared(**saved, data_collator=look, args=tiny.arguments(tmp_path))
        args = tiny.arguments(tmp_path, remove_unused_columns=False)
        prepared(**saved, data_collator=look, args=args)
        assert seen == [["input_ids", "labels"], ["input_ids", "labels", "note"]]

    def test_unknown_tokenizers_are_warned_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            run = prepared(
                tiny.llama("student"),
                tiny.llama("teacher"),
                args=tiny.arguments(tmp_path),
                train_dataset=tiny.rows(2),
            )
        assert "Nothing says" in caplog.text
        assert run.kwargs["data_collator"] == Collator(pad_token_id=0)


class TestCalibrated:
    OBJECTIVES = (
        HiddenStates(init="least_squares", layers=uniform, gate=False),
        AttentionMaps(heads=head_rules.match, queries=4, layers=uniform),
    )

    def run(self, tmp_path: Path, *objectives: Any, rows: Any = None) -> tuple[Run, Run]:
        """A run before and after calibration."""
        args = tiny.arguments(tmp_path)
        model, teacher = tiny.llama("student"), tiny.llama("teacher")
        given = {"train_dataset": tiny.rows(40) if rows is None else rows}
        before = prepared(model, teacher, *objectives, args=args, **given)
        model.train()
        source = before.teacher.open(before.opening_request, args.device)
        after = calibrate(before, model, source, args, DistillTrainer)
        assert model.training
        return before, after

    def test_most_runs_need_none(self, tmp_path: Path) -> None:
        random = HiddenStates(layers=uniform, init="random")
        before, after = self.run(tmp_path, Logits(), random)
        assert after is before

    def test_projectors_are_fitted_one_example_at_a_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Until there are enough rows per feature; asked for by name, to one batch of all."""
        monkeypatch.setattr(calibration, "PLENTY", 4)
        sizes: list[int] = []

        def noted(rows: list[Any]) -> Any:
            sizes.append(len(rows))
            return Collator(pad_token_id=0)(rows)

        args = tiny.arguments(tmp_path)
        given = {"train_dataset": tiny.rows(40), "data_collator": noted}
        notes = []
        inits: list[Any] = [None, "least_squares"]
        for init in inits:
            hint = HiddenStates(layers=uniform, init=init)
            run = prepared(tiny.llama("student"), tiny.llama("teacher"), hint, args=args, **given)
            source = run.teacher.open(run.opening_request, args.device)
            sizes.clear()
            after = calibrate(run, tiny.llama("student"), source, args, DistillTrainer)
            term = after.terms["HiddenStates"]
            notes.append((list(sizes), term.notes[-1]))
        (batches, fitted), (whole, asked) = notes
        assert (set(batches), whole) == ({1}, [32])
        rows = [sum(label != -100 for label in row["labels"][1:]) for row in tiny.rows(40)]
        assert sum(rows[: len(batches) - 1]) < 4 * 32 <= sum(rows[: len(batches)])
        assert fitted.startswith("projector 2 -> 4: least squares on ")
        assert asked.startswith("projector 2 -> 4: least squares on ")

    @pytest.mark.parametrize("data", ["one-shot stream", "empty stream", "places alone", "packed"])
    def test_default_projectors_take_any_data(self, tmp_path: Path, data: str) -> None:
        """Streams are not used up, places are not run past, packed batches are not too long."""
        rows = list(tiny.rows(24))
        stream = Stream(rows if data == "one-shot stream" else [])
        dataset: Any = {"places alone": Places(rows), "packed": rows}.get(data, stream)
        more: Any = {"data_collator": DataCollatorWithFlattening()} if data == "packed" else {}
        trainer = DistillTrainer(
            tiny.llama("student"),
            tiny.llama("teacher"),
            [Logits(), HiddenStates(layers=uniform)],
            tiny.arguments(tmp_path, per_device_train_batch_size=2),
            train_dataset=dataset,
            **more,
        )
        note = trainer.run.terms["HiddenStates"].notes[-1]
        if dataset is stream:
            assert stream.read == 0
            assert note.startswith("projectors: random, there are no examples")
        else:
            assert "least squares on" in note

    def test_what_was_asked_for_needs_examples(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="train_dataset has no example to calibrate on"):
            self.run(tmp_path, *self.OBJECTIVES, rows=Stream([]))

    def test_it_is_the_same_again_and_said(self, tmp_path: Path) -> None:
        before, first = self.run(tmp_path, *self.OBJECTIVES)
        _, again = self.run(tmp_path, *self.OBJECTIVES)
        for name in ("HiddenStates", "AttentionMaps"):
            a, b = first.terms[name].state_dict(), again.terms[name].state_dict()
            assert a.keys() == b.keys() != set()
            assert all(torch.equal(a[key], b[key]) for key in a)
            assert first.terms[name].notes == again.terms[name].notes
            assert "decided at calibration" in before.terms[name].notes[-1]
        assert "of the variance" in first.terms["HiddenStates"].notes[-1]
        assert first.terms["AttentionMaps"].notes[-1].startswith("heads of 2 -> heads of 4: [")

    def test_dropout_has_no_say(self, tmp_path: Path) -> None:
        args = tiny.arguments(tmp_path)
        notes = []
        for dropout in (0.0, 0.5):
            model, teacher = tiny.llama("student").train(), tiny.llama("teacher")
            for block in model.model.layers:
                block.self_attn.attention_dropout = dropout
            run = prepared(model, teacher, *self.OBJECTIVES, args=args, train_dataset=tiny.rows(8))
            source = run.teacher.open(run.opening_request, args.device)
            notes.append(
                calibrate(run, model, source, args, DistillTrainer).terms["HiddenStates"].notes
            )
        assert notes[0] == notes[1]

    def test_the_first_examples_decide(self, tmp_path: Path) -> None:
        many = tiny.rows(40)
        _, whole = self.run(tmp_path, *self.OBJECTIVES, rows=many)
        few = many.select(range(CALIBRATION_EXAMPLES))
        _, first = self.run(tmp_path, *self.OBJECTIVES, rows=few)
        a, b = (run.terms["HiddenStates"].state_dict() for run in (whole, first))
        assert all(torch.equal(a[key], b[key]) for key in a)

    def test_ranks_read_as_much_as_the_one_with_least(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A teacher in pieces is asked by all ranks together."""
        batches: Any = [object() for _ in range(5)]
        device = torch.device("cpu")
        assert calibration._on_all_ranks(batches, device) is batches
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: tensor.fill_(3))
        assert calibration._on_all_ranks(batches, device) == batches[:3]

    def test_rank_0_decides_for_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every tensor of every term, projectors and matched heads, becomes what rank 0 sends."""
        _, alone = self.run(tmp_path, *self.OBJECTIVES)
        sent: list[tuple[int, ...]] = []

        def broadcast(tensor: torch.Tensor, src: int) -> None:
            assert src == 0
            sent.append(tuple(tensor.shape))
            tensor.fill_(3)

        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: None)
        monkeypatch.setattr(dist, "broadcast", broadcast)
        _, run = self.run(tmp_path, *self.OBJECTIVES)
        states = [term.state_dict() for term in run.terms.values()]
        assert sent == [tuple(v.shape) for state in states for v in state.values()]
        assert len(sent) == 5  # two projectors with their biases, and the heads
        assert all((v == 3).all() for state in states for v in state.values())
        assert not any((v == 3).all() for v in alone.terms["HiddenStates"].state_dict().values())

    def test_it_helps(self, tmp_path: Path) -> None:
        losses = []
        for init in ("random", "least_squares"):
            trainer = DistillTrainer(
                tiny.llama("student"),
                tiny.llama("teacher"),
                [HiddenStates(init=init, layers=uniform)],
                tiny.arguments(tmp_path, max_steps=1),
                train_dataset=tiny.rows(8),
            )
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
        assert losses[1] < 0.7 * losses[0]
