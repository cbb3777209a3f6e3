"""How similar layers are, against plain loops over what transformers says; kept beside the run."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from llm_distill import HiddenStates, Logits, surveying
from llm_distill import layers as layer_maps
from llm_distill.layers import LayerEvidence
from llm_distill.preparation import Run, prepare_run
from llm_distill.rows import Batch
from llm_distill.signals import Request, Signals
from llm_distill.students import FromConfig
from llm_distill.surveying import FEWEST, FILE, LENGTH, SETS, SINKS, TOKENS, stamp, survey
from tests import mapping_worker, on_disk, tiny
from tests.launch import launch

CROSSED = (HiddenStates(layers=layer_maps.transport), HiddenStates())


def prepared(
    folder: Path, *objectives: Any, model: Any = None, teacher: Any = None, data: Any = None
) -> Run:
    args = tiny.arguments(folder)
    given = {"train_dataset": tiny.rows(32) if data is None else data}
    models = model or tiny.llama("student"), teacher or tiny.llama("teacher")
    return prepare_run(*models, objectives or (HiddenStates(),), args, given)


def surveyed(folder: Path, run: Run, student: Any = None) -> LayerEvidence:
    args = tiny.arguments(folder)
    source = run.teacher.open(run.opening_request, args.device)
    student = tiny.llama("student") if student is None else student
    return survey(run, student, source, args)


@torch.no_grad()
def kept_states(models: list[Any], examples: Any) -> list[list[Tensor]]:
    """All states of a set, one example after the other, without sinks and tokens out of line."""
    rows: list[list[list[Tensor]]] = [[] for _ in models]
    for example in examples:
        ids = torch.tensor([example["input_ids"][:LENGTH]])
        for model, found in zip(models, rows, strict=True):
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
            found.append([state[0, SINKS:].double() for state in hidden])
    layers = [[torch.cat(parts) for parts in zip(*found, strict=True)] for found in rows]
    good = torch.ones(len(layers[0][0]), dtype=torch.bool)
    for layer in (layer for found in layers for layer in found):
        norms = layer.norm(dim=1)
        good &= norms <= 6 * norms.median()
    return [[layer[good] for layer in found] for found in layers]


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """Without bias, of two linear kernels (Song et al. 2012, equation 5)."""
    n = len(x)
    k, m = ((z @ z.T).fill_diagonal_(0) for z in (x - x.mean(0), y - y.mean(0)))
    one = torch.ones(n, dtype=x.dtype)
    trace = (k * m).sum()
    both = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (trace + both - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def naive(rows: list[Any], columns: list[Any]) -> Tensor:
    """CKA of layers with layers: HSIC averaged over sets, then divided."""

    def mean(one: int, other: int, left: list[Any], right: list[Any]) -> Tensor:
        pairs = zip(left, right, strict=True)
        return torch.stack([hsic(a[one], b[other]) for a, b in pairs]).mean()

    return torch.stack(
        [
            torch.stack(
                [
                    mean(s, t, rows, columns)
                    / (mean(s, s, rows, rows) * mean(t, t, columns, columns)).sqrt()
                    for t in range(len(columns[0]))
                ]
            )
            for s in range(len(rows[0]))
        ]
    )


class TestSurvey:
    def test_it_is_what_transformers_says(self, tmp_path: Path) -> None:
        evidence = surveyed(tmp_path, prepared(tmp_path, *CROSSED))
        data = tiny.rows(32)
        sets = [data.select(range(k, k + 4)) for k in range(0, 32, 32 // SETS)]
        models = [tiny.llama("student"), tiny.llama("teacher")]
        found = [kept_states(models, examples) for examples in sets]
        ours, theirs = ([both[k] for both in found] for k in (0, 1))
        assert evidence.similarity is not None
        assert evidence.cross is not None
        assert torch.allclose(evidence.similarity.values.double(), naive(theirs, theirs), atol=1e-4)
        assert torch.allclose(evidence.cross.values.double(), naive(ours, theirs), atol=1e-4)
        assert evidence.similarity.errors.shape == (5, 5)
        assert (evidence.cross.errors > 0).all()

    def test_the_student_is_left_alone_where_nobody_asks_for_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        student = tiny.llama("student")
        monkeypatch.setattr(student, "forward", None)
        monkeypatch.setattr(student, "to", None)
        evidence = surveyed(tmp_path, prepared(tmp_path, HiddenStates()), student)
        assert evidence.similarity is not None
        assert evidence.cross is None

    def test_what_nobody_asks_for_is_not_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(surveying, "_measure", None)
        for objective in (Logits(), HiddenStates(layers=layer_maps.uniform)):
            assert surveyed(tmp_path, prepared(tmp_path, objective)) == LayerEvidence()

    def test_streams_are_read_alike(self, tmp_path: Path) -> None:
        rows = tiny.rows(32)
        whole = surveyed(tmp_path, prepared(tmp_path, data=rows))
        stream = surveyed(tmp_path, prepared(tmp_path, data=rows.to_iterable_dataset()))
        assert whole.similarity is not None
        assert stream.similarity is not None
        assert torch.equal(whole.similarity.values, stream.similarity.values)

    def test_dropout_has_no_say_and_the_student_stays_as_it_was(self, tmp_path: Path) -> None:
        values = []
        for dropout in (0.0, 0.5):
            student = tiny.llama("student").train()
            for block in student.model.layers:
                block.self_attn.attention_dropout = dropout
            evidence = surveyed(tmp_path, prepared(tmp_path, *CROSSED), student)
            assert student.training
            assert evidence.cross is not None
            values.append(evidence.cross.values)
        assert torch.equal(*values)

    def test_it_stays_so_when_the_teacher_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, student = prepared(tmp_path), tiny.llama("student").train()
        monkeypatch.setattr(surveying, "_measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            surveyed(tmp_path, run, student)
        assert student.training

    @pytest.mark.parametrize("rows", [0, 2])
    def test_too_few_data_say_nothing(self, rows: int, tmp_path: Path) -> None:
        run = prepared(tmp_path, data=tiny.rows(2))
        if not rows:
            run.kwargs["train_dataset"] = None
        assert surveyed(tmp_path, run) == LayerEvidence()
        assert not (tmp_path / FILE).exists()

    def test_random_numbers_of_others_stay_as_they_are(self, tmp_path: Path) -> None:
        run, student = prepared(tmp_path, *CROSSED), tiny.llama("student")
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        surveyed(tmp_path, run, student)
        assert torch.equal(torch.rand(3), expected)


class Planted:
    """A teacher whose states are drawn, with the same massive activation on some tokens."""

    def __init__(self, spoil: Callable[[Tensor, Batch], None] | None = None) -> None:
        self._spoil = spoil
        self._draws = {k: torch.Generator().manual_seed(k) for k in range(5)}

    def ask(self, request: Request) -> None:
        self.request = request

    def __call__(self, batch: Batch) -> Signals:
        ids = batch.inputs["input_ids"]
        states = {}
        for layer, draw in self._draws.items():
            states[layer] = torch.randn(*ids.shape, 16, generator=draw)
            if self._spoil is not None:
                self._spoil(states[layer], batch)
        return Signals("planted", None, states)

    def close(self) -> None:
        """Nothing is held."""


def spoil_first(states: Tensor, batch: Batch) -> None:
    mask = batch.inputs["attention_mask"]
    first = mask.argmax(1)
    for place in range(SINKS):
        states[torch.arange(len(states)), first + place] = 4.0  # not long enough to be out of line


def spoil_some(states: Tensor, batch: Batch) -> None:
    states[batch.inputs["input_ids"] % 11 == 0] = 1e4


def spoil_padding(states: Tensor, batch: Batch) -> None:
    states[batch.inputs["attention_mask"] == 0] = torch.nan


class TestTokens:
    """Layers of the planted teacher have nothing in common but what is spoiled."""

    def values(self, folder: Path, spoil: Any = None) -> Tensor:
        found = survey(
            prepared(folder, data=tiny.rows(64)),
            tiny.llama("student"),
            cast("Any", Planted(spoil)),
            tiny.arguments(folder),
        )
        assert found.similarity is not None
        return found.similarity.values

    @pytest.mark.parametrize("spoil", [None, spoil_first, spoil_some, spoil_padding])
    def test_sinks_outliers_and_padding_are_dropped(self, spoil: Any, tmp_path: Path) -> None:
        values = self.values(tmp_path, spoil)
        assert torch.allclose(values.diagonal(), torch.ones(5), atol=1e-5)
        assert (values - torch.eye(5)).abs().max() < 0.1

    def test_they_would_make_all_layers_alike(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(surveying, "keep", lambda states: torch.ones(len(states[0])))
        values = self.values(tmp_path, spoil_some)
        assert values.min() > 0.9

    def test_more_tokens_than_are_needed_are_taken_from_everywhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []

        def note(_: Any, teacher: list[Tensor], student: Any) -> None:
            seen.append([len(layer) for layer in teacher])
            assert student is None

        monkeypatch.setattr(layer_maps.Similarities, "add", note)
        monkeypatch.setattr(surveying, "TOKENS", 20)
        with pytest.raises(AssertionError):
            self.values(tmp_path)
        assert seen == [[20] * 5] * SETS
        places = surveying._spread(torch.arange(1000))
        assert places.tolist() == [50 * k for k in range(20)]

    def test_sets_with_too_few_are_left_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(surveying, "TOKENS", FEWEST - 1)
        with pytest.raises(AssertionError):
            self.values(tmp_path)
        assert TOKENS > FEWEST


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Any]:
    """A student and a teacher in folders."""
    return {
        "model": str(on_disk.save_model(tmp_path / "student", "student")),
        "teacher": str(on_disk.save_model(tmp_path / "teacher", "teacher")),
    }


class TestKept:
    @staticmethod
    def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
        calls: list[int] = []
        measure = surveying._measure

        def counting(*given: Any) -> Any:
            calls.append(1)
            return measure(*given)

        monkeypatch.setattr(surveying, "_measure", counting)
        return calls

    def test_it_is_measured_once_and_read_again(
        self, saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = self.counted(monkeypatch)
        out = tmp_path / "out"
        for objectives in ((HiddenStates(),), CROSSED):
            first, again = (surveyed(out, prepared(out, *objectives, **saved)) for _ in range(2))
            for name in ("similarity", "cross") if objectives is CROSSED else ("similarity",):
                one, other = getattr(first, name), getattr(again, name)
                assert torch.equal(one.values, other.values)
                assert torch.equal(one.errors, other.errors)
        assert len(calls) == 2
        assert [file.name for file in out.iterdir()] == [FILE]

    @pytest.mark.parametrize("change", ["teacher", "student", "data", "file"])
    def test_it_is_measured_again_when_anything_changes(
        self,
        change: str,
        saved: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        calls = self.counted(monkeypatch)
        surveyed(tmp_path, prepared(tmp_path, *CROSSED, **saved))
        data = tiny.rows(33).select(range(1, 33)) if change == "data" else None
        if change == "file":
            (tmp_path / FILE).write_bytes(b"nothing")
        if change in ("teacher", "student"):
            weights = tmp_path / change / "model.safetensors"
            time = weights.stat().st_mtime_ns + 10**9
            os.utime(weights, ns=(time, time))
        surveyed(tmp_path, prepared(tmp_path, *CROSSED, data=data, **saved))
        assert len(calls) == 2
        surveyed(tmp_path, prepared(tmp_path, *CROSSED, data=data, **saved))
        assert len(calls) == 2

    def test_what_nobody_compares_may_change(
        self, saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = self.counted(monkeypatch)
        for model in (saved["model"], tiny.llama("student", vocabulary=on_disk.VOCABULARY)):
            surveyed(tmp_path, prepared(tmp_path, model=model, teacher=saved["teacher"]))
        assert len(calls) == 1

    def test_loaded_models_are_not_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = self.counted(monkeypatch)
        for _ in range(2):
            surveyed(tmp_path, prepared(tmp_path))
        assert len(calls) == 2
        assert not (tmp_path / FILE).exists()

    def test_stamps_tell_weights_apart(self, saved: dict[str, Any]) -> None:
        first = stamp(saved["teacher"])
        assert first is not None
        assert "model.safetensors" in first
        assert first != stamp(saved["model"])
        assert stamp("some/id-of-the-hub") == "some/id-of-the-hub []"
        assert stamp(tiny.llama("student")) is None
        fresh = [stamp(FromConfig("llama", {"hidden_size": 32}, seed=seed)) for seed in (0, 0, 1)]
        assert fresh[0] == fresh[1] != fresh[2]


@pytest.mark.distributed
def test_two_ranks_agree_with_each_other_and_with_one(
    tmp_path: Path, saved: dict[str, Any]
) -> None:
    assert saved
    alone = mapping_worker.train(tmp_path / "alone")
    launch("tests.mapping_worker", str(tmp_path / "together"), ranks=2)
    first, second = (torch.load(tmp_path / "together" / f"{k}.pt") for k in (0, 1))
    for found in (first, second):
        assert found["pairs"] == alone["pairs"]
        assert found["files"] == [FILE]
        for name, tensor in alone["similarity"].items():
            assert torch.allclose(found["similarity"][name], tensor, atol=1e-5), name
        for name, tensor in alone["gate"].items():
            assert torch.allclose(found["gate"][name], tensor, rtol=1e-3, atol=1e-5), name
        (looked,), (there,) = found["looks"], alone["looks"]
        assert looked[0] == there[0]
        assert torch.allclose(looked[1], there[1], atol=1e-4)
        assert not torch.allclose(looked[1], alone["similarity"]["cross.values"], atol=1e-4)
    assert torch.equal(first["looks"][0][1], second["looks"][0][1])
    for part in ("gate", "similarity"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
