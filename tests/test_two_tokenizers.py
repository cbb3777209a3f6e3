"""A teacher with a tokenizer of its own: what needs no aligned tokens, end to end.

Expected values are plain loops over plain transformers models, one unpadded text at a time.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_distill import (
    Contrastive,
    CrossEntropy,
    DistillTrainer,
    HiddenStates,
    Local,
    Logits,
    pkt,
    rkd_angle,
    rkd_distance,
    surveying,
)
from llm_distill import cka as cka_loss
from llm_distill.cli import main
from llm_distill.errors import InputError
from llm_distill.layers import Similarities, auto, cka, last, transport
from llm_distill.recipe import document
from tests import on_disk, reference_features, tiny
from tests.exactness_worker import whole
from tests.launch import launch
from tests.reference import Array
from tests.two_tokenizers_worker import data, models, objectives, texts

POOLED: dict[str, Any] = {"items": "pooled", "rows": "valid"}
BOUND = 3e-7


def trainer(folder: Path, *given: Any, **changes: Any) -> DistillTrainer:
    """On the texts of the worker, evaluated on all in one batch."""
    settings = models() | {"train_dataset": data(), "eval_dataset": data()}
    args = tiny.arguments(folder, per_device_eval_batch_size=24, **changes.pop("args", {}))
    return DistillTrainer(**settings | changes, objectives=list(given), args=args)


@torch.no_grad()
def state(model: PreTrainedModel, ids: list[int], layer: int, skip: int) -> Tensor:
    """Mean hidden state of one text: `[D]`."""
    output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    states: Tensor = output.hidden_states[layer][0, skip:].double()
    return states.mean(0)


def means(pairs: list[tuple[int, int]], skip: int = 0) -> list[tuple[Array, Array]]:
    """What every text is on average, for both models, for pairs of layers: `[N, Ds], [N, Dt]`."""
    used, ours, theirs = models(), on_disk.tokenizer(), on_disk.foreign()
    ids = [
        ([*ours(text).input_ids, ours.eos_token_id], [*theirs(text).input_ids, theirs.eos_token_id])
        for text in texts(24)
        if text
    ]
    found = []
    for s, t in pairs:
        sides = [
            (state(used["model"], own, s, skip), state(used["teacher"].model, other, t, skip))
            for own, other in ids
            if len(own) > skip and len(other) > skip
        ]
        student, teacher = (torch.stack(side).numpy() for side in zip(*sides, strict=True))
        found.append((student, teacher))
    return found


def stacked(model: Any, ids: list[list[int]]) -> list[Tensor]:
    """Means of texts behind the first four tokens, layer by layer: L x `[n, D]`."""
    found = [model(torch.tensor([x]), output_hidden_states=True).hidden_states for x in ids]
    return [torch.stack([h[0, 4:].mean(0) for h in layer]) for layer in zip(*found, strict=True)]


def normal(x: Array) -> Array:
    """Zero mean and unit variance over the features."""
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5))


def mapped(x: Array, linear: nn.Module) -> Array:
    """Through a linear layer."""
    weight, bias = (p.detach().double().numpy() for p in linear.parameters())
    return np.asarray(x @ weight.T + bias)


@pytest.mark.parametrize(("ours", "theirs"), [("right", "left"), ("left", "right")])
class TestValues:
    """Which side either tokenizer pads makes no difference."""

    @pytest.fixture
    def sides(self, ours: str, theirs: str) -> dict[str, Any]:
        own, given = on_disk.tokenizer(), models()
        own.padding_side = ours
        teacher = Local(given["teacher"].model, tokenizer=on_disk.foreign(theirs))
        return {"processing_class": own, "teacher": teacher}

    @pytest.mark.parametrize("loss", [pkt, rkd_distance, rkd_angle, cka_loss])
    @pytest.mark.parametrize("skip", [0, 2])
    def test_relations(self, loss: Any, skip: int, sides: dict[str, Any], tmp_path: Path) -> None:
        hint = HiddenStates(loss=loss, layers=last, skip=skip, **POOLED)
        metrics = trainer(tmp_path, CrossEntropy(), hint, **sides).evaluate()
        ((student, teacher),) = means([(2, 4)], skip)
        expected = getattr(reference_features, loss.__name__)(student, teacher).mean()
        assert metrics["eval_loss/HiddenStates"] == pytest.approx(expected, rel=1e-4)
        assert "eval_kl" not in metrics

    def test_mse_through_projectors(self, sides: dict[str, Any], tmp_path: Path) -> None:
        fit = HiddenStates(layers=last, init="least_squares", name="fitted", **POOLED)
        done = trainer(tmp_path, *objectives(), fit, **sides)
        metrics = done.evaluate()
        terms: Any = done.run.terms
        values = []
        modules = terms["HiddenStates"].projectors
        for (s, t), module in zip(means([(1, 2), (2, 4)], skip=1), modules, strict=True):
            values.append(((normal(mapped(s, module)) - normal(t)) ** 2).mean(-1))
        assert metrics["eval_loss/HiddenStates"] == pytest.approx(np.mean(values), rel=1e-4)
        ((s, t),) = means([(2, 4)])
        fitted = ((normal(mapped(s, terms["fitted"].projectors[0])) - normal(t)) ** 2).mean()
        assert metrics["eval_loss/fitted"] == pytest.approx(fitted, rel=1e-4)
        note = next(n for n in terms["fitted"].notes if "projector" in n)
        assert f"least squares on {len(s)} rows" in note

    def test_contrast(self, sides: dict[str, Any], tmp_path: Path) -> None:
        done = trainer(tmp_path, Contrastive(rows="valid", temperature=0.2), **sides)
        metrics = done.evaluate()
        term: Any = done.run.terms["Contrastive"]
        ((s, t),) = means([(2, 4)])
        ours, theirs = mapped(normal(s), term.ours[0]), mapped(normal(t), term.theirs[0])
        found = [text for text in texts(24) if text]
        blocked = np.array([[a == b for b in found] for a in found])
        expected = reference_features.info_nce(ours, theirs, 0.2, blocked=blocked).mean()
        assert metrics["eval_loss/Contrastive"] == pytest.approx(expected, rel=1e-4)


def test_one_tokenizer_taken_for_two_gives_the_same_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, to the last weight: the text comes back as the tokens it was."""
    settings = {
        "teacher": Local(
            tiny.llama("teacher", vocabulary=on_disk.VOCABULARY), tokenizer=on_disk.tokenizer()
        ),
        # Without texts of nothing: an end alone is a token, and no text.
        "train_dataset": [row for row in data() if len(row["input_ids"]) > 1],
    }
    hints = [
        HiddenStates(loss=pkt, **POOLED),
        HiddenStates(init="least_squares", most=5, **POOLED),
        Contrastive(rows="valid"),
    ]

    def train(name: str) -> DistillTrainer:
        settings["model"] = tiny.llama("student", vocabulary=on_disk.VOCABULARY)
        made = trainer(tmp_path / name, CrossEntropy(), *hints, **settings)
        made.train()
        return made

    same = train("same")
    monkeypatch.setattr("llm_distill.vocabulary.find_difference", lambda *_: "they differ")
    apart = train("apart")
    assert same.run.collator.theirs is None
    assert apart.run.collator.theirs is not None
    first, second = whole(same), whole(apart)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class TestEvaluation:
    def test_only_what_the_student_says_of_itself_is_measured(self, tmp_path: Path) -> None:
        done = trainer(tmp_path, CrossEntropy(), HiddenStates(loss=pkt, **POOLED))
        metrics = done.evaluate()
        assert {k for k in metrics if not k.endswith(("second", "time", "epoch"))} == {
            "eval_loss",
            "eval_loss/CrossEntropy",
            "eval_loss/HiddenStates",
            "eval_perplexity",
            "eval_entropy",
        }
        nll = metrics["eval_loss/CrossEntropy"]
        assert metrics["eval_perplexity"] == pytest.approx(np.exp(nll), rel=1e-5)

    def test_nobody_asks_the_teacher_where_only_labels_teach(self, tmp_path: Path) -> None:
        done = trainer(tmp_path, CrossEntropy(), train_dataset=data()[1:])
        assert done.run.collator.theirs is None
        done._source = None  # type: ignore[assignment]  # whoever asks it fails
        done.train()
        assert done.evaluate()["eval_perplexity"] > 1

    def test_the_best_checkpoint_has_the_lowest_loss(self, tmp_path: Path) -> None:
        args = {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        done = trainer(tmp_path, CrossEntropy(), HiddenStates(loss=pkt, **POOLED), args=args)
        done.train()
        losses = [log["eval_loss"] for log in done.state.log_history if "eval_loss" in log]
        assert len(losses) == 3
        assert done.state.best_metric == min(losses)

    def test_a_figure_that_there_is_not_is_refused_before_weights_load(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match="metric_for_best_model is 'eval_kl'"):
            trainer(tmp_path, CrossEntropy(), args={"metric_for_best_model": "eval_kl"})


class TestMaps:
    """Half of 512 short texts have words behind the first tokens: enough for 8 sets."""

    @pytest.mark.parametrize("strategy", [cka, transport])
    def test_layers_are_compared_by_whole_texts(self, strategy: Any, tmp_path: Path) -> None:
        hint = HiddenStates(loss=pkt, layers=strategy, **POOLED)
        done = trainer(tmp_path, hint, train_dataset=data(512), eval_dataset=None)
        notes = "\n".join(done.run.terms["HiddenStates"].notes)
        assert strategy.__name__ in notes
        assert "calibration" not in notes

    def test_the_similarities_are_those_of_pooled_texts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """8 sets of 16 texts of at least 4 words, each read alone by plain models."""
        monkeypatch.setattr(surveying, "POOLED", 128)
        monkeypatch.setattr(surveying, "FEWEST", 12)
        said = [f"{k} {text}" for k, text in enumerate(texts(400)) if text.count(" ") > 3][:128]
        ids = [on_disk.tokenizer()(text).input_ids for text in said]
        rows = [{"input_ids": tokens, "labels": tokens} for tokens in ids]
        hint = HiddenStates(loss=pkt, layers=transport, **POOLED)
        done = trainer(tmp_path, hint, train_dataset=rows, eval_dataset=None)
        run = replace(done.run, objectives=(hint,))
        source = run.teacher.open(run.opening_request, done.args.device)
        found = surveying.survey(run, done.student, source, done.args).cross
        expected = Similarities()
        teacher, student = run.teacher.model, done.student  # type: ignore[attr-defined]  # Local's
        with torch.no_grad():
            for start in range(0, 128, 16):
                part = slice(start, start + 16)
                theirs = [on_disk.foreign()(text).input_ids for text in said[part]]
                expected.add(stacked(teacher, theirs), stacked(student, ids[part]))
        assert found is not None
        assert torch.allclose(found.values, expected.result()["cross"].values, atol=1e-4)

    def test_the_teachers_own_layers_by_its_own_tokens(self, tmp_path: Path) -> None:
        done = trainer(
            tmp_path,
            HiddenStates(loss=pkt, layers=auto, **POOLED),
            train_dataset=data(512),
            eval_dataset=None,
        )
        assert "coverage" in done.run.terms["HiddenStates"].notes[0]
        assert done.run.told == done.run.tokenizers.told
        assert len(done.run.told) == 1


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each engine and splitting ended with."""
    folder = tmp_path_factory.mktemp("two_tokenizers")
    for engine, ranks in (("one", 1), ("ddp", 2)):
        launch("tests.two_tokenizers_worker", engine, str(folder), ranks=ranks)
    return {e: torch.load(folder / f"{e}.pt", weights_only=True) for e in ("one", "ddp")}


@pytest.mark.distributed
class TestSplittings:
    @pytest.mark.parametrize(
        ("engine", "splitting"), [("one", "1x8"), ("ddp", "4x1"), ("ddp", "1x4")]
    )
    def test_one_global_batch_gives_one_result(
        self, results: dict[str, Any], engine: str, splitting: str
    ) -> None:
        """Weights, logs, and an evaluation of 9 texts, whose first has no words."""
        expected, found = results["one"]["8x1"], results[engine][splitting]
        assert found["world"] == (2 if engine == "ddp" else 1)
        worst = max(
            float((found["state"][k] - v).abs().max()) for k, v in expected["state"].items()
        )
        assert worst <= BOUND, worst
        for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert found["eval"] == pytest.approx(expected["eval"], rel=1e-5)

    def test_the_weights_moved(self, results: dict[str, Any]) -> None:
        start = models()["model"].state_dict()
        end = results["one"]["8x1"]["state"]
        moved = [float((end[f"student.{k}"] - v).abs().max()) for k, v in start.items()]
        assert min(moved) > 1e-5


class TestRecipe:
    @pytest.fixture
    def recipe(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """Two models in folders, each with a tokenizer of its own."""
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
        monkeypatch.setenv("COLUMNS", "200")
        on_disk.fill(tmp_path)
        teacher = tiny.llama("teacher", vocabulary=on_disk.FOREIGN)
        teacher.save_pretrained(tmp_path / "teacher")
        on_disk.foreign().save_pretrained(tmp_path / "teacher")
        lines = [json.dumps({"text": f"{k} {text}"}) for k, text in enumerate(texts(24))]
        (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
        hint = {"HiddenStates": {"loss": "pkt", **POOLED}}
        return on_disk.document(tmp_path) | {"objectives": ["CrossEntropy", hint]}

    def run(self, folder: Path, command: str, content: dict[str, Any]) -> int:
        file = folder / "recipe.yaml"
        file.write_text(document.dump(content), encoding="utf-8")
        return main([command, str(file)])

    def test_text_to_a_student(
        self, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(tmp_path, "check", recipe) == 0
        assert "the tokenizers differ: token 0 is '<pad>'" in capsys.readouterr().out
        assert self.run(tmp_path, "run", recipe) == 0
        said = capsys.readouterr().out
        assert "so there is no KL and no agreement" in said
        assert "perplexity" in said
        out = tmp_path / "out"
        figures = json.loads((out / "eval_results.json").read_text())
        assert figures["eval_loss/HiddenStates"] > 0
        assert "eval_kl" not in figures
        assert "not the teacher's; nothing compared" in (out / "README.md").read_text()
        student = AutoModelForCausalLM.from_pretrained(out)
        start = tiny.llama("student", vocabulary=on_disk.VOCABULARY).state_dict()
        assert any(not torch.equal(v, start[k]) for k, v in student.state_dict().items())

    def test_what_needs_one_vocabulary_is_refused(
        self, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recipe["objectives"].append("Logits")
        assert self.run(tmp_path, "check", recipe) == 2
        assert "Logits compares the models token by token" in capsys.readouterr().err


def test_a_longer_teacher_text_than_its_positions_is_cut(tmp_path: Path) -> None:
    """The student's limit is the data's; the teacher reads what it has positions for."""
    given = models()
    given["teacher"].model.config.max_position_embeddings = 8
    done = trainer(tmp_path, HiddenStates(loss=pkt, **POOLED), **given)
    batch = done.run.collator(data())
    assert batch["theirs"]["input_ids"].shape[1] == 8
    assert batch["input_ids"].shape[1] > 8
    assert done.evaluate()["eval_loss"] > 0


def test_without_a_term_for_it_logits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Logits compares the models token by token"):
        trainer(tmp_path, CrossEntropy(), Logits())
