"""`DistillTrainer` is a Trainer: its keyword arguments work, and its numbers are the naive ones."""

import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback

from llm_distill import (
    AttentionMaps,
    CrossEntropy,
    DistillTrainer,
    HiddenStates,
    Local,
    Logits,
    Taid,
    adaptive_kl,
    decoupled,
    jsd,
    tvd,
)
from llm_distill.errors import InputError
from llm_distill.heads import group
from llm_distill.recipe import Recipe
from llm_distill.rows import supervised_rows
from llm_distill.schedules import linear
from tests import reference, tiny
from tests.exactness_worker import objectives


def build(folder: Path, wanted: Any = None, **changes: Any) -> DistillTrainer:
    """A trainer on tiny Llamas; keyword arguments of Trainer, others of TrainingArguments."""
    names = (
        "eval_dataset",
        "callbacks",
        "compute_metrics",
        "optimizers",
        "peft_config",
        "data_collator",
        "rows_per_chunk",
    )
    given = {name: changes.pop(name) for name in names if name in changes}
    return DistillTrainer(
        changes.pop("student", None) or tiny.llama("student"),
        changes.pop("teacher", None) or tiny.llama("teacher"),
        objectives() if wanted is None else wanted,
        tiny.arguments(folder, **changes),
        train_dataset=tiny.rows(),
        **given,
    )


def losses(trainer: DistillTrainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights(trainer: DistillTrainer) -> dict[str, torch.Tensor]:
    return dict(trainer.distiller.state_dict())


def naive_rows(model: Any, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of all supervised positions, one sequence at a time, float64."""
    logits, labels = [], []
    double = model.double().eval()
    for row in rows:
        with torch.no_grad():
            out = double(torch.tensor([row["input_ids"]])).logits[0, :-1]
        target = torch.tensor(row["labels"][1:])
        logits.append(out[target != -100])
        labels.append(target[target != -100])
    return torch.cat(logits), torch.cat(labels)


def test_three_lines(tmp_path: Path) -> None:
    """Everything that may be left out."""
    trainer = DistillTrainer(
        tiny.llama("student"),
        tiny.llama("teacher"),
        train_dataset=tiny.rows(),
        args=tiny.arguments(tmp_path),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {"loss/CrossEntropy", "loss/Logits"} <= logged.keys()
    assert logged["loss"] == pytest.approx(
        0.1 * logged["loss/CrossEntropy"] + logged["loss/Logits"], rel=1e-5
    )


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # the default of TrainingArguments
def test_three_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's claim, to the letter: even the output folder has a default."""
    monkeypatch.chdir(tmp_path)
    trainer = DistillTrainer(
        tiny.llama("student"), tiny.llama("teacher"), train_dataset=tiny.rows(8)
    )
    trainer.train()
    assert trainer.state.global_step == 3  # one batch in each of three epochs
    assert [type(o).__name__ for o in trainer.run.objectives] == ["CrossEntropy", "Logits"]


def test_query_rows_are_drawn_anew_in_each_epoch_and_after_resuming_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From (seed, example, epoch): the same for the same epoch, other ones for the next."""
    maps = AttentionMaps(queries=3, rows="valid")

    def drawn(**changes: Any) -> list[Any]:
        trainer = build(tmp_path, [maps], save_strategy="steps", save_steps=4, **changes)
        forward, seen = trainer.distiller.forward, []

        def noting(batch: Any, *args: Any) -> Any:
            seen.append(batch.queries.position.tolist())
            return forward(batch, *args)

        monkeypatch.setattr(trainer.distiller, "forward", noting)
        checkpoint = tmp_path / "checkpoint-4"
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint.exists() else None)
        return seen

    straight = drawn(max_steps=9)  # 4 steps of 8 rows are an epoch
    first, second, third = straight[:4], straight[4:8], straight[8:]
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert third[0] not in (first[0], second[0])
    assert drawn(max_steps=9) == [*second, *third]


@pytest.mark.parametrize("hints", [(), (HiddenStates(),)])
def test_what_a_stream_gave_is_counted(tmp_path: Path, capsys: Any, hints: Any) -> None:
    """Examples that were looked at before training, to check or to calibrate, are not."""
    stream = tiny.rows(16).to_iterable_dataset()
    trainer = DistillTrainer(
        tiny.llama("student"),
        tiny.llama("teacher"),
        [Logits(), *hints],
        args=tiny.arguments(tmp_path, max_steps=2),
        train_dataset=stream,
    )
    trainer.train()
    assert "train_dataset, read: 16 examples of a stream: 0 truncated" in capsys.readouterr().err


def test_layer_maps_are_shown_before_training(tmp_path: Path, capsys: Any) -> None:
    trainer = build(tmp_path)
    trainer.train()
    shown = capsys.readouterr().err
    assert "AttentionMaps: weight 1 · map_kl, heads mean, 5 valid rows" in shown
    assert "2 | 4 of 4" in shown
    assert "train_dataset: 32 examples: 0 truncated" in shown
    quiet = build(tmp_path)
    quiet.announces = False
    quiet.train()
    assert "of 4" not in capsys.readouterr().err


def test_evaluation_is_the_naive_one(tmp_path: Path) -> None:
    """Token means over the whole set, from dense logits in float64."""
    rows = tiny.rows(13)
    trainer = build(tmp_path, eval_dataset=rows, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    z_s, labels = naive_rows(tiny.llama("student"), rows)
    z_t, _ = naive_rows(tiny.llama("teacher"), rows)
    log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert metrics["eval_kl"] == pytest.approx(float(kl), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(
        float(F.cross_entropy(z_s, labels).exp()), rel=1e-5
    )
    assert metrics["eval_teacher_perplexity"] == pytest.approx(
        float(F.cross_entropy(z_t, labels).exp()), rel=1e-5
    )
    agreement = (z_s.argmax(-1) == z_t.argmax(-1)).double().mean()
    assert metrics["eval_agreement"] == pytest.approx(float(agreement))
    tempered = (
        4
        * (
            (log_p / 2).log_softmax(-1).exp()
            * ((log_p / 2).log_softmax(-1) - (log_q / 2).log_softmax(-1))
        )
        .sum(-1)
        .mean()
    )
    assert metrics["eval_loss/Logits"] == pytest.approx(float(tempered), rel=1e-4)


def test_evaluation_is_deterministic(tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_dataset=tiny.rows(9))
    first, second = trainer.evaluate(), trainer.evaluate()
    for key in ("eval_loss", "eval_kl", "eval_loss/AttentionMaps"):
        assert first[key] == second[key]


def test_evaluation_is_without_dropout_and_the_same_in_every_epoch(tmp_path: Path) -> None:
    """Training goes on in between, without moving the weights."""
    student = tiny.llama("student")
    for block in student.model.layers:
        block.self_attn.attention_dropout = 0.5
    given = {"learning_rate": 0.0, "max_steps": 5, "eval_strategy": "steps", "eval_steps": 1}
    trainer = build(tmp_path, student=student, eval_dataset=tiny.rows(9), **given)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(logs) == 5
    for key in ("eval_loss", "eval_kl", "eval_loss/AttentionMaps"):
        assert len({log[key] for log in logs}) == 1


def test_evaluation_does_not_depend_on_its_batch_size(tmp_path: Path) -> None:
    results = [
        build(tmp_path, eval_dataset=tiny.rows(9), per_device_eval_batch_size=b).evaluate()
        for b in (1, 4, 9)
    ]
    for key in ("eval_loss", "eval_kl", "eval_loss/AttentionMaps", "eval_loss/HiddenStates"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-5)
        assert results[0][key] == pytest.approx(results[2][key], rel=1e-5)


def test_eval_loss_uses_the_weights_at_the_end(tmp_path: Path) -> None:
    """A decaying weight must not make `eval_loss` fall by itself."""
    fading = HiddenStates(weight=partial(linear, start=1.0, end=0.0))
    trainer = build(tmp_path, [Logits(), fading], eval_dataset=tiny.rows(8))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss/Logits"], rel=1e-6)
    assert metrics["eval_loss/HiddenStates"] > 0.1


def test_schedules_follow_the_progress(tmp_path: Path) -> None:
    fading = HiddenStates(weight=partial(linear, start=1.0, end=0.0))
    trainer = build(tmp_path, [Logits(), fading], max_steps=4, learning_rate=0.0)
    trainer.train()
    for step, log in enumerate(entry for entry in trainer.state.log_history if "loss" in entry):
        expected = log["loss/Logits"] + (1 - step / 4) * log["loss/HiddenStates"]
        assert log["loss"] == pytest.approx(expected, rel=1e-5)


MEASURED = {"kl", "agreement", "entropy"}


def logs(trainer: DistillTrainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (1, 8), (2, 4)])
def test_logged_measures_are_the_naive_ones(tmp_path: Path, batch: int, accumulation: int) -> None:
    """Token means over the whole step that is logged, from dense logits in float64."""
    split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = build(tmp_path, [Logits(loss=jsd)], learning_rate=0.0, logging_steps=2, **split)
    trainer.train()
    (logged,) = logs(trainer)
    rows = list(tiny.rows())[8:16]  # of the second step
    z_s, _ = naive_rows(tiny.llama("student"), rows)
    z_t, _ = naive_rows(tiny.llama("teacher"), rows)
    log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
    expected = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "agreement": (z_s.argmax(-1) == z_t.argmax(-1)).double().mean(),
        "entropy": -(log_q.exp() * log_q).sum(-1).mean(),
    }
    for name, value in expected.items():
        assert logged[name] == pytest.approx(float(value), rel=1e-5)


def test_measures_are_taken_on_logged_steps_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    trainer = build(tmp_path, max_steps=7, logging_steps=3)
    forward = trainer.distiller.forward

    def noting(batch: Any, teacher: Any, step: Any) -> Any:
        taken.append(step.measure)
        return forward(batch, teacher, step)

    monkeypatch.setattr(trainer.distiller, "forward", noting)
    trainer.train()
    assert taken == [False, False, True, False, False, True, False]
    assert [log.keys() >= MEASURED for log in logs(trainer)] == [True, True]


@pytest.mark.parametrize("wanted", [[CrossEntropy()], [HiddenStates()]])
def test_nothing_is_measured_where_no_term_reads_the_teachers_logits(
    tmp_path: Path, wanted: Any
) -> None:
    trainer = build(tmp_path, wanted)
    trainer.train()
    assert not any(MEASURED & log.keys() for log in logs(trainer))


@pytest.mark.parametrize("loss", [jsd, tvd, partial(adaptive_kl, mu=0.3), decoupled])
def test_a_moving_target_works_with_any_loss(tmp_path: Path, loss: Any) -> None:
    """Every step's share follows from the losses that were logged, as plain floats say."""
    target = Taid(start=0.2, pace=0.3, momentum=0.5)
    moving = Logits(loss=loss, target=target, weight=0.5)
    trainer = build(tmp_path, [moving], max_steps=4, learning_rate=0.0)
    trainer.train()
    values = [log["loss/Logits"] for log in logs(trainer)]
    expected = reference.taid(values, 0.2, 1.0, 0.3, 0.5)
    shares = [log["target/Logits"] for log in logs(trainer)]
    assert shares == pytest.approx(expected, rel=1e-5)
    assert shares[1] > 0.2 + 0.8 * 2 / 4  # ahead of the line
    assert values[0] < 0.5 * values[-1]  # of other rows, but to a target much nearer


def test_an_evaluation_of_a_moving_target_is_against_the_teacher(tmp_path: Path) -> None:
    moving = build(tmp_path, [Logits(loss=jsd, target=Taid(start=0.0))], eval_dataset=tiny.rows(8))
    plain = build(tmp_path, [Logits(loss=jsd)], eval_dataset=tiny.rows(8))
    assert moving.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_moving_and_still_terms_share_the_pass(tmp_path: Path) -> None:
    """Each with its own target, and sums as if it were alone."""
    target = Taid(start=0.3)
    wanted = [CrossEntropy(), Logits(), Logits(target=target, name="a"), Logits(target=target)]
    together = build(tmp_path, wanted, learning_rate=0.0)
    together.train()
    (first, *_) = logs(together)
    assert first["loss/a"] == first["loss/Logits.3"]
    for name, alone in (("Logits", Logits()), ("a", Logits(target=target))):
        single = build(tmp_path, [alone], learning_rate=0.0)
        single.train()
        value = logs(single)[0]["loss/Logits"]
        assert first[f"loss/{name}"] == pytest.approx(value, rel=1e-5)


def test_labels_reach_a_loss_that_asks_for_them(tmp_path: Path) -> None:
    """Named in a recipe, at a temperature, against the paper in plain floats."""
    named = {"Logits": {"loss": {"decoupled": {"beta": 4.0}}, "temperature": 2.0}}
    content = {"student": "a", "teacher": "b", "data": {"path": "c"}, "objectives": [named]}
    trainer = build(tmp_path, list(Recipe.of(content).objectives), learning_rate=0.0)
    trainer.train()
    rows = list(tiny.rows())[:8]
    z_s, labels = naive_rows(tiny.llama("student"), rows)
    z_t, _ = naive_rows(tiny.llama("teacher"), rows)
    half = (z_s.numpy() / 2, z_t.numpy() / 2)
    expected = 4 * reference.decoupled(*half, labels.tolist(), 1.0, 4.0).mean()
    assert logs(trainer)[0]["loss/Logits"] == pytest.approx(expected, rel=1e-4)


def test_rows_per_chunk(tmp_path: Path) -> None:
    """Settable; the weights do not hang on it."""
    whole, chunked = build(tmp_path), build(tmp_path, rows_per_chunk=3)
    whole.train()
    chunked.train()
    assert chunked.distiller.rows_per_chunk == 3
    assert whole.distiller.rows_per_chunk == 256
    a, b = weights(whole), weights(chunked)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) <= 3e-7


@pytest.mark.parametrize("rows", [0, -5])
def test_impossible_rows_per_chunk(tmp_path: Path, rows: int) -> None:
    with pytest.raises(InputError, match=f"rows_per_chunk: {rows}; write a number of rows from 1"):
        build(tmp_path, rows_per_chunk=rows)


def test_two_of_one_class_have_two_names(tmp_path: Path) -> None:
    trainer = build(tmp_path, [HiddenStates(), HiddenStates(normalize="none"), Logits(name="soft")])
    trainer.train()
    logged = trainer.state.log_history[0].keys()
    assert {"loss/HiddenStates", "loss/HiddenStates.2", "loss/soft"} <= logged


def test_compute_metrics_gets_full_logits(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def look(prediction: Any) -> dict[str, float]:
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"mine": 1.5}

    rows = tiny.rows(6)
    trainer = build(tmp_path, eval_dataset=rows, compute_metrics=look, per_device_eval_batch_size=6)
    metrics = trainer.evaluate()
    longest = max(map(len, rows["input_ids"]))
    assert metrics["eval_mine"] == 1.5
    assert seen["logits"].shape == (6, longest, tiny.VOCABULARY)
    assert seen["labels"].shape == (6, longest)
    alone = tiny.llama("student")(torch.tensor([rows[0]["input_ids"]])).logits[0]
    assert torch.allclose(torch.tensor(seen["logits"][0, : len(alone)]), alone, atol=1e-4)


def test_no_full_logits_without_compute_metrics(tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_dataset=tiny.rows(6))
    forward = trainer.student.forward

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the student's own head ran")

    trainer.student.forward = forbidden
    trainer.train()
    trainer.evaluate()
    trainer.student.forward = forward


def test_callbacks_and_optimizers_are_used(tmp_path: Path) -> None:
    class Counting(TrainerCallback):
        steps = 0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps += 1

    counting = Counting()
    student = tiny.llama("student")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    trainer = build(
        tmp_path, [Logits()], student=student, callbacks=[counting], optimizers=(optimizer, None)
    )
    before = {k: v.clone() for k, v in student.state_dict().items()}
    trainer.train()
    assert counting.steps == 3
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_activation_checkpointing_changes_nothing(name: str, tmp_path: Path) -> None:
    """By its name of today, and by the one that recipes know."""
    plain = build(tmp_path)
    plain.train()
    saving = build(tmp_path, **{name: True})
    assert not plain.distiller.is_activation_checkpointing
    saving.train()
    assert saving.distiller.is_activation_checkpointing
    a, b = weights(plain), weights(saving)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) <= 1e-7


def test_reentrant_checkpointing_is_refused_with_maps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no gradient under reentrant"):
        build(
            tmp_path,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": True},
        )


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # dynamo's own, on a graph break
def test_compiled_equals_eager(tmp_path: Path) -> None:
    """`aot_eager` needs no compiler."""
    eager = build(tmp_path)
    eager.train()
    compiled = build(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_equals_eager_for_a_moving_target(tmp_path: Path) -> None:
    wanted = [CrossEntropy(weight=0.1), Logits(loss=jsd, target=Taid(start=0.2, pace=0.3))]
    eager = build(tmp_path, wanted)
    eager.train()
    compiled = build(tmp_path, wanted, torch_compile=True, torch_compile_backend="aot_eager")
    compiled.train()
    for a, b in zip(logs(eager), logs(compiled), strict=True):
        for key in ("loss", "kl", "target/Logits"):
            assert a[key] == pytest.approx(b[key], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:`torch.jit")
def test_inductor_equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    eager = build(tmp_path, [Logits()], max_steps=1)
    eager.train()
    compiled = build(tmp_path, [Logits()], max_steps=1, torch_compile=True)
    compiled.train()
    assert compiled.args.torch_compile_backend == "inductor"
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)


def test_bf16_is_close(tmp_path: Path) -> None:
    exact, short = build(tmp_path), build(tmp_path, bf16=True)
    exact.train()
    short.train()
    assert losses(short) == pytest.approx(losses(exact), rel=2e-2)
    assert next(short.student.parameters()).dtype == torch.float32


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_train_and_the_rest_stays(tmp_path: Path, wrapped: bool) -> None:
    """As `peft_config`, and as a PEFT student."""
    from peft import get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if wrapped:
        trainer = build(tmp_path, student=get_peft_model(tiny.llama("student"), config))
    else:
        trainer = build(tmp_path, peft_config=config)
    before = {k: v.clone() for k, v in trainer.student.state_dict().items()}
    trainer.train()
    assert isinstance(trainer.student, PeftModel)
    for name, value in trainer.student.state_dict().items():
        assert torch.equal(before[name], value) == ("lora_" not in name), name


def test_teacher_stays_as_it_is(tmp_path: Path) -> None:
    teacher = tiny.llama("teacher")
    teacher.train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    build(tmp_path, teacher=teacher).train()
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not teacher.training


def test_silent_teachers_do_not_run(tmp_path: Path) -> None:
    """Cross-entropy alone: the teacher is there for the evaluation."""
    teacher = tiny.llama("teacher")
    seen: list[int] = []
    teacher.register_forward_hook(lambda *_: seen.append(1))
    teacher.model.register_forward_hook(lambda *_: seen.append(1))
    trainer = build(tmp_path, [CrossEntropy()], teacher=teacher, eval_dataset=tiny.rows(4))
    seen.clear()
    trainer.train()
    assert not seen
    assert trainer.evaluate()["eval_kl"] > 0
    assert seen


def test_equal_models_have_nothing_to_learn(tmp_path: Path) -> None:
    """Zero loss, zero gradient, finite."""
    wanted = [Logits(), HiddenStates(), AttentionMaps(heads=group)]
    trainer = build(tmp_path, wanted, student=tiny.llama("teacher"), teacher=tiny.llama("teacher"))
    before = {k: v.clone() for k, v in trainer.student.state_dict().items()}
    trainer.train()
    assert max(losses(trainer)) < 1e-6
    moved = [float((before[k] - v).abs().max()) for k, v in trainer.student.state_dict().items()]
    assert max(moved) < 1e-6


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3"])
def test_other_families_train(tmp_path: Path, family: str) -> None:
    student, teacher = tiny.MODELS[family](), tiny.MODELS[family]()
    trainer = build(tmp_path, student=student, teacher=teacher, learning_rate=1e-3)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


def test_masked_models_have_rows_without_the_shift(tmp_path: Path) -> None:
    """BERT predicts at the masked position itself; the rows are selected by us, on the backbone."""
    student, teacher = tiny.bert(), tiny.bert(depth=4)
    batch = tiny.batch()
    rows = supervised_rows(
        batch["input_ids"], batch["attention_mask"], batch["labels"], shift=False
    )
    assert len(rows) == int((batch["labels"] != -100).sum())
    trainer = build(
        tmp_path, [CrossEntropy(), Logits(), HiddenStates()], student=student, teacher=teacher
    )
    trainer.train()
    naive = _masked_cross_entropy(tiny.bert(), trainer)
    assert trainer.state.log_history[0]["loss/CrossEntropy"] == pytest.approx(naive, rel=1e-4)


def _masked_cross_entropy(model: Any, trainer: DistillTrainer) -> float:
    """Over the first 8 rows, unshifted."""
    total, count = 0.0, 0
    for row in list(trainer.train_dataset)[:8]:  # type: ignore[arg-type]  # torch's has no __iter__
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            out = model(torch.tensor([row["input_ids"]])).logits
        total += float(F.cross_entropy(out[0], labels[0], reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def test_padded_vocabularies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """128 and 136 rows of one tokenizer: divergences on the common tokens, renormalised."""
    known = tiny.tokenizer()
    student, teacher = tiny.llama("student"), tiny.llama("teacher", vocabulary=136)
    with caplog.at_level(logging.WARNING):
        trainer = DistillTrainer(
            student,
            Local(teacher, tokenizer=known),
            [CrossEntropy(), Logits()],
            tiny.arguments(tmp_path),
            train_dataset=tiny.rows(),
            eval_dataset=tiny.rows(8),
            processing_class=known,
        )
    metrics = trainer.evaluate()
    z_s, _ = naive_rows(tiny.llama("student"), tiny.rows(8))
    z_t, _ = naive_rows(tiny.llama("teacher", vocabulary=136), tiny.rows(8))
    log_q, log_p = z_s.log_softmax(-1), z_t[:, :128].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert metrics["eval_loss/Logits"] == pytest.approx(float(kl), rel=1e-4)


def test_users_own_collator(tmp_path: Path) -> None:
    """Anything that makes `input_ids` and `labels`."""

    def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
        del examples
        return tiny.batch(sequences=4)

    trainer = build(tmp_path, data_collator=collate)
    trainer.train()
    assert len(losses(trainer)) == 3


def test_unused_layers_do_not_stop_ddp(tmp_path: Path) -> None:
    """Without logits the upper layers and the head have no gradient."""
    trainer = build(tmp_path, [HiddenStates(layers=_first_layer)])
    assert finds_unused(trainer)
    trainer.train()
    assert not finds_unused(build(tmp_path))
    assert finds_unused(build(tmp_path, ddp_find_unused_parameters=True))


def test_trainers_may_share_their_arguments(tmp_path: Path) -> None:
    """What DDP is told follows from each one's own objectives."""
    args = tiny.arguments(tmp_path)
    found = [
        DistillTrainer(
            tiny.llama("student"), tiny.llama("teacher"), wanted, args, train_dataset=tiny.rows()
        )
        for wanted in ([Logits()], [Logits(), HiddenStates(blockwise=0.5)], [Logits()])
    ]
    assert [finds_unused(trainer) for trainer in found] == [False, True, False]


def finds_unused(trainer: DistillTrainer) -> bool:
    handler: Any = trainer.accelerator.ddp_handler
    return bool(handler.find_unused_parameters)


def _first_layer(student_depth: int, teacher_depth: int) -> Any:
    from llm_distill.layers import explicit

    return explicit(student_depth, teacher_depth, pairs=[[1, 2]])


def generated(trainer: DistillTrainer) -> list[int]:
    """A sequence of another shape than any batch of the training."""
    student: Any = trainer.student
    prompt = torch.tensor([[5, 6, 7]])
    return list(student.generate(prompt, max_new_tokens=3, do_sample=False)[0].tolist())


def test_the_student_generates_between_and_after_evaluations(tmp_path: Path) -> None:
    """The attention taps know nothing of the last evaluation's batch."""

    class Writing(TrainerCallback):
        written = 0

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            self.written += len(generated(trainer)) > 3

    writing = Writing()
    trainer = build(
        tmp_path,
        eval_dataset=tiny.rows(9),
        callbacks=[writing],
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    assert writing.written == 3
    trainer.predict(tiny.rows(9))
    generated(trainer)


def test_the_student_generates_after_a_step_that_was_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(tmp_path)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.accelerator, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    generated(trainer)


class Stream(torch.utils.data.IterableDataset[Any]):
    """The first 20 rows, without a length."""

    def __iter__(self) -> Iterator[Any]:
        yield from list(tiny.rows())[:20]


@pytest.mark.parametrize("wanted", [None, [Logits()]])
def test_a_stream_that_ends_inside_a_step(tmp_path: Path, wanted: Any) -> None:
    """Five batches make steps of two, two and one, as they do of a dataset with a length."""
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6}
    known = build(tmp_path, wanted, **split)
    known.train_dataset = list(Stream())
    known.train()
    endless = build(tmp_path, wanted, **split)
    endless.train_dataset = Stream()
    # Queries are drawn for each epoch, which a stream has none of: the weights agree in the first.
    endless.train()
    count = 6 if wanted else 3
    assert losses(endless)[:count] == pytest.approx(losses(known)[:count], rel=1e-6)
    if wanted:
        a, b = weights(known), weights(endless)
        assert max(float((a[k] - b[k]).abs().max()) for k in a) <= 3e-7


def test_a_second_training_logs_its_own_steps(tmp_path: Path) -> None:
    trainer = build(tmp_path, [Logits()], max_steps=3, logging_steps=2, learning_rate=0.0)
    trainer.train()
    first = trainer.state.log_history[0]
    trainer.train()
    assert trainer.state.log_history[0]["loss/Logits"] == first["loss/Logits"]


def test_special_tokens_of_the_tokenizer_reach_generation(tmp_path: Path) -> None:
    """As Trainer does for a model of its own: the student stops where its tokenizer says."""
    known = tiny.tokenizer()
    known.eos_token = "w9"
    student = tiny.llama("student")
    trainer = DistillTrainer(
        student,
        tiny.llama("teacher"),
        args=tiny.arguments(tmp_path, max_steps=1),
        train_dataset=tiny.rows(8),
        processing_class=known,
    )
    trainer.train()
    assert student.generation_config is not None
    assert student.generation_config.eos_token_id == [9, 2]
