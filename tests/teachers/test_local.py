"""`Local`: found, loaded, frozen, and asked only for what is asked."""

import gc
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LlamaModel, PreTrainedModel

from llm_distill import (
    AttentionMaps,
    DistillTrainer,
    HiddenStates,
    Local,
    Logits,
    Relations,
    loading,
)
from llm_distill.binding import make_batch
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.layers import uniform
from llm_distill.objectives import QueryPlan
from llm_distill.placement import Launch
from llm_distill.rows import Batch
from llm_distill.signals import Dense, Request
from llm_distill.teachers import local
from tests import on_disk, tiny

if TYPE_CHECKING:
    from llm_distill.teachers.local_source import LocalSource

CPU = torch.device("cpu")
ALL = Request(
    logits=True, hidden=frozenset({0, 2, 4}), heads=frozenset({1}), relations=frozenset({4})
)


def batch() -> Batch:
    collate = RowCollator(Collator(pad_token_id=0), shift=True, valid=True)
    examples = [tiny.rows()[k] for k in range(3)]
    return make_batch(collate(examples), QueryPlan(4, "valid"), seed=0, epoch=0)


class TestSpec:
    def test_a_name(self, tmp_path: Path) -> None:
        path = on_disk.save_model(tmp_path, "teacher")
        spec = Local(str(path)).spec
        assert (spec.depth, spec.width, spec.heads, spec.name) == (4, 64, 8, str(path))
        assert (spec.vocabulary, spec.positions) == (on_disk.VOCABULARY, tiny.POSITIONS)

    def test_a_loaded_model(self, teacher: PreTrainedModel) -> None:
        assert Local(teacher).spec.name == "LlamaForCausalLM"
        assert Local(teacher).config is teacher.config

    def test_a_path_object_is_a_path(self, tmp_path: Path) -> None:
        given: Any = on_disk.save_model(tmp_path, "teacher")
        assert Local(given).model == str(given)

    @pytest.mark.parametrize("given", [None, 3, torch.nn.Linear(2, 2)])
    def test_what_is_no_model_is_refused(self, given: Any) -> None:
        with pytest.raises(InputError, match="is no model; give a Hub id, a path, or a loaded"):
            Local(given)

    def test_dtypes(self) -> None:
        given: Any = torch.bfloat16
        assert Local("an/id", dtype=given).dtype == "bfloat16"
        with pytest.raises(InputError, match="Local: dtype is 'half'; write one of auto, float32"):
            Local("an/id", dtype="half")


class TestTokenizer:
    def test_it_lies_beside_the_model(self, tmp_path: Path) -> None:
        path = on_disk.save_model(tmp_path, "teacher")
        found = Local(str(path)).find_tokenizer()
        assert found is not None
        assert found.get_vocab() == on_disk.tokenizer().get_vocab()

    def test_one_that_is_given_wins(self, tmp_path: Path) -> None:
        path = on_disk.save_model(tmp_path / "model", "teacher")
        given = on_disk.tokenizer()
        assert Local(str(path), tokenizer=given).find_tokenizer() is given
        on_disk.tokenizer("zebras graze").save_pretrained(tmp_path / "tokenizer")
        named = Local(str(path), tokenizer=str(tmp_path / "tokenizer")).find_tokenizer()
        assert named is not None
        assert named.get_vocab() != given.get_vocab()

    def test_one_that_is_named_and_not_there_is_refused(self, teacher: PreTrainedModel) -> None:
        with pytest.raises(
            InputError, match=r"tokenizer '\./nowhere' of LlamaForCausalLM cannot be"
        ):
            Local(teacher, tokenizer="./nowhere").find_tokenizer()

    def test_revision_and_trust_are_the_models_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = str(on_disk.save_model(tmp_path / "model", "teacher"))
        other = str(tmp_path / "other")
        on_disk.tokenizer().save_pretrained(other)
        seen: dict[str, tuple[Any, Any]] = {}

        def record(name: str, **options: Any) -> Any:
            seen[name] = options["revision"], options["trust_remote_code"]
            return on_disk.tokenizer()

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", record)
        for tokenizer in (None, other):
            spec = Local(path, tokenizer=tokenizer, revision="v1", trust_remote_code=True)
            spec.find_tokenizer()
        assert seen == {path: ("v1", True), other: (None, False)}


class TestLoad:
    def test_a_teacher_keeps_its_dtype_unless_told(self, tmp_path: Path) -> None:
        tiny.llama("teacher").bfloat16().save_pretrained(tmp_path)
        assert Local(str(tmp_path)).load().dtype is torch.bfloat16
        assert Local(str(tmp_path), dtype="float32").load().dtype is torch.float32

    def test_without_logits_there_is_no_head(self, tmp_path: Path) -> None:
        tiny.llama("teacher").save_pretrained(tmp_path)
        model = Local(str(tmp_path)).load(Request(hidden=frozenset({4})))
        assert isinstance(model, LlamaModel)

    def test_options_are_handed_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tiny.llama("teacher").save_pretrained(tmp_path)
        seen: dict[str, Any] = {}

        def record(name: str, **options: Any) -> PreTrainedModel:
            seen.update(options, name=name)
            return tiny.llama("teacher")

        monkeypatch.setattr(AutoModel, "from_pretrained", record)
        Local(str(tmp_path), revision="v2", device_map="auto", attn_implementation="eager").load(
            Request(hidden=frozenset({4}))
        )
        expected = {
            "revision": "v2",
            "trust_remote_code": False,
            "device_map": "auto",
            "attn_implementation": "eager",
        }
        assert {key: seen[key] for key in expected} == expected

    def test_the_attention_that_was_asked_for(self, tmp_path: Path) -> None:
        tiny.llama("teacher").save_pretrained(tmp_path)
        model = Local(str(tmp_path), attn_implementation="eager").load()
        assert model.config._attn_implementation == "eager"


class TestOpen:
    def test_it_is_frozen_and_in_evaluation_mode(self, teacher: PreTrainedModel) -> None:
        teacher.train()
        source = Local(teacher).open(ALL, CPU)
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
        signals = source(batch())
        assert not signals.states[2].requires_grad
        assert not signals.whole.logits(slice(None)).requires_grad

    def test_its_signals_are_the_models_own(self, teacher: PreTrainedModel) -> None:
        given = batch()
        signals = Local(teacher).open(ALL, CPU)(given)
        with torch.no_grad():
            expected = teacher(**given.inputs, output_hidden_states=True)
        rows = given.supervised
        logits = expected.logits.flatten(0, 1)[rows.index]
        assert torch.allclose(signals.whole.logits(slice(None)), logits, atol=1e-5)
        for layer in ALL.hidden:
            state = expected.hidden_states[layer].flatten(0, 1)[rows.index]
            assert torch.equal(signals.hidden(layer, rows), state)
        assert set(signals.attention) == ALL.heads

    def test_named_and_loaded_agree(self, tmp_path: Path, teacher: PreTrainedModel) -> None:
        teacher.save_pretrained(tmp_path)
        given = batch()
        named = Local(str(tmp_path)).open(ALL, CPU)(given).whole.logits(slice(None))
        assert torch.equal(named, Local(teacher).open(ALL, CPU)(given).whole.logits(slice(None)))

    def test_gpus_of_a_device_map_with_several_processes_are_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(
            InputError, match=r"with 2 processes would put .* on the same 0, 1; wri"
        ):
            Local("an/id", device_map={"model": 0, "lm_head": 1}).check(ALL, CPU)

    def test_a_device_map_beside_zero3_is_refused(
        self, teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("llm_distill.zero.is_zero3", lambda: True)
        Local(teacher).check(ALL, CPU)
        with pytest.raises(InputError, match="device_map='auto' beside a student under DeepSpeed"):
            Local(teacher, device_map="auto").open(ALL, CPU)

    def test_what_would_go_over_memory_and_disk_beside_zero3_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = on_disk.save_model(tmp_path, "teacher")
        monkeypatch.setattr("llm_distill.zero.is_zero3", lambda: True)
        monkeypatch.setattr(local, "launched", lambda device: Launch(free=1))
        with pytest.raises(InputError, match="write shard: replica, or start several processes"):
            Local(str(path)).check(ALL, CPU)

    def test_a_layer_that_is_not_there_is_refused(self, teacher: PreTrainedModel) -> None:
        with pytest.raises(ValueError, match=r"teacher LlamaForCausalLM: hidden state 5 is out of"):
            Local(teacher).open(Request(hidden=frozenset({5})), CPU)

    def test_closing_lets_the_weights_go(self, tmp_path: Path) -> None:
        tiny.llama("teacher").save_pretrained(tmp_path)
        source: LocalSource = Local(str(tmp_path)).open(ALL, CPU)
        assert source.model is not None
        weights = weakref.ref(source.model)
        source.close()
        source.close()
        gc.collect()
        assert weights() is None
        with pytest.raises(RuntimeError, match="this teacher was closed"):
            source(batch())


class TestDeviceMap:
    def test_weights_on_disk_say_the_same(self, tmp_path: Path, teacher: PreTrainedModel) -> None:
        """Block by block and the head; every signal, more than once."""
        teacher.save_pretrained(tmp_path)
        source = Local(str(tmp_path), device_map=tiny.DISK).open(ALL, CPU)
        assert source.model is not None
        assert sum(p.is_meta for p in source.model.parameters()) == 2 * 9 + 1
        given, whole = batch(), Local(teacher).open(ALL, CPU)
        assert given.queries is not None
        for _ in range(2):
            found, expected = source(given), whole(given)
            assert isinstance(found.distribution, Dense)
            logits = expected.whole.logits(slice(None))
            torch.testing.assert_close(found.whole.logits(slice(None)), logits)
            for layer in ALL.hidden:
                assert torch.equal(found.states[layer], expected.states[layer])
            assert found.attention.keys() == ALL.heads | ALL.relations
            for layer, heads in found.attention.items():
                for name in ("query", "key", "value", "whole_query"):
                    ours, theirs = (getattr(h, name) for h in (heads, expected.attention[layer]))
                    assert (ours is None) == (theirs is None)
                    assert ours is None or torch.equal(ours, theirs)
                maps = (h.attention[layer].maps(given.queries) for h in (found, expected))
                assert torch.equal(*maps)

    def test_nothing_is_written(
        self, tmp_path: Path, teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is on disk stays in the checkpoint's files, which several processes may read."""
        teacher.save_pretrained(tmp_path / "teacher")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "here"))
        before = sorted(tmp_path.rglob("*"))
        source = Local(str(tmp_path / "teacher"), device_map=tiny.DISK).open(ALL, CPU)
        source(batch())
        assert sorted(tmp_path.rglob("*")) == before

    def test_one_place_is_where_it_runs(
        self, tmp_path: Path, teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Batches go there, and what is said comes back to where the student trains."""
        teacher.save_pretrained(tmp_path)
        went: list[Any] = []
        to = Batch.to
        monkeypatch.setattr(Batch, "to", lambda *given: went.append(given[1]) or to(*given))
        request, student = Request(hidden=frozenset({2})), torch.device("meta")
        source = Local(str(tmp_path), device_map={"": "cpu"}).open(request, student)
        assert source.model is not None
        assert source.model.device == CPU
        given = batch()
        went.clear()
        assert source(given).states[2].device == student
        assert went == [CPU]

    def test_a_student_learns_the_same_from_it(
        self, tmp_path: Path, teacher: PreTrainedModel
    ) -> None:
        teacher.save_pretrained(tmp_path / "teacher")
        weights = []
        for where in (None, tiny.DISK):
            trainer = DistillTrainer(
                tiny.llama("student"),
                Local(str(tmp_path / "teacher"), device_map=where),
                [
                    Logits(),
                    HiddenStates(layers=uniform, init="random"),
                    AttentionMaps(queries=5, rows="valid", layers=uniform),
                    Relations(queries=5, rows="valid", layers=uniform),
                ],
                tiny.arguments(tmp_path / "out"),
                train_dataset=tiny.rows(),
            )
            trainer.train()
            weights.append(trainer.distiller.state_dict())
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=0, atol=6e-7)

    def test_what_fits_nowhere_goes_to_all_there_is(
        self, tmp_path: Path, teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        teacher.save_pretrained(tmp_path)
        asked: list[Any] = []
        load = loading.load_model

        def watched(*given: Any, **options: Any) -> PreTrainedModel:
            asked.extend((options["device_map"], options["max_memory"]))
            return load(*given, **options)

        monkeypatch.setattr(local, "launched", lambda device: Launch(free=1_000_000))
        monkeypatch.setattr(local, "caps", lambda device, room: {device.type: room})
        monkeypatch.setattr(loading, "load_model", watched)
        source = Local(str(tmp_path)).open(ALL, CPU)
        assert asked == ["auto", {"cpu": 500_000}]  # the rest is the student's
        assert source.told[0].endswith("more than half of 1.0 MB free on cpu)")
        assert "offload" in source.told[0]
        places: Any = getattr(source.model, "hf_device_map", {})
        assert {"cpu", "disk"} == set(places.values())
        found, expected = source(batch()), Local(teacher).open(ALL, CPU)(batch())
        for layer in ALL.hidden:
            assert torch.equal(found.states[layer], expected.states[layer])


class TestOncePerStep:
    def test_what_was_read_ahead_is_not_read_again(self, teacher: PreTrainedModel) -> None:
        source: LocalSource = Local(teacher, once_per_step=True).open(ALL, CPU)
        alone = Local(teacher).open(ALL, CPU)
        runs = []
        teacher.model.register_forward_pre_hook(lambda *_: runs.append(1))
        first, second = batch(), batch()
        source.prepare([first, second, second])
        assert len(runs) == 1
        found = [source(given) for given in (first, second, second)]
        assert len(runs) == 1
        expected = alone(first)
        for signals in found:
            torch.testing.assert_close(
                signals.whole.logits(slice(None)), expected.whole.logits(slice(None))
            )
        source(second)  # a third time: nobody announced it
        assert len(runs) == 3

    def test_another_request_is_answered_anew(self, teacher: PreTrainedModel) -> None:
        source: LocalSource = Local(teacher, once_per_step=True).open(ALL, CPU)
        given = batch()
        source.prepare([given])
        source.ask(Request(hidden=frozenset({2})))
        assert source(given).distribution is None

    def test_by_default_nothing_is_read_ahead(self, teacher: PreTrainedModel) -> None:
        source: LocalSource = Local(teacher).open(ALL, CPU)
        runs = []
        teacher.model.register_forward_pre_hook(lambda *_: runs.append(1))
        source.prepare([batch()])
        assert not runs


class TestQuantised:
    """What it says on several processes: tests/test_quantised_exactness.py."""

    def test_it_is_loaded_in_fewer_bits_and_says_so(self, tmp_path: Path) -> None:
        tiny.llama("teacher").save_pretrained(tmp_path)
        source = Local(str(tmp_path), quantize="torchao_int8").open(ALL, CPU)
        where, saved = source.told
        assert where.startswith(f"teacher {tmp_path}: 0.2 MB, replica (it takes 0% of ")
        assert saved == f"teacher {tmp_path}: torchao_int8, 0.2 MB instead of 0.7 MB"
        assert source.model is not None
        kinds = {type(p.data).__name__ for p in source.model.parameters()}
        assert kinds == {"Tensor", "Int8Tensor"}
        source.close()

    def test_the_config_stays_that_of_the_checkpoint(self, tmp_path: Path) -> None:
        tiny.llama("teacher").save_pretrained(tmp_path)
        spec = Local(str(tmp_path), quantize="bitsandbytes_4bit")
        spec.open(ALL, CPU)
        assert not hasattr(spec.config, "quantization_config")

    def test_without_logits_the_upper_blocks_are_not_loaded(self, tmp_path: Path) -> None:
        tiny.llama("teacher").save_pretrained(tmp_path)
        spec = Local(str(tmp_path), quantize="bitsandbytes_8bit")
        source = spec.open(Request(hidden=frozenset({1})), CPU)
        assert isinstance(source.model, LlamaModel)
        assert len(source.model.layers) == 2
        weight = source.model.get_submodule("layers.1.mlp.up_proj").weight
        assert type(weight).__name__ == "Int8Params"
        assert source(batch()).states[1].isfinite().all()

    def test_everything_else_has_the_dtype_that_was_asked_for(self, tmp_path: Path) -> None:
        tiny.llama("teacher").save_pretrained(tmp_path)
        spec = Local(str(tmp_path), quantize="bitsandbytes_4bit", dtype="bfloat16")
        model = spec.open(ALL, CPU).model
        assert model is not None
        assert model.lm_head.weight.dtype is torch.bfloat16
        assert model.model.layers[0].mlp.up_proj.compute_dtype is torch.bfloat16

    def test_it_is_refused_before_weights_load(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiny.llama("teacher").save_pretrained(tmp_path)
        monkeypatch.setattr(loading, "load_model", None)
        spec = Local(str(tmp_path), quantize="torchao_float8")
        with pytest.raises(InputError, match=r"needs an NVIDIA GPU of compute capability 8\.9"):
            DistillTrainer(
                tiny.llama("student"),
                spec,
                args=tiny.arguments(tmp_path / "out"),
                train_dataset=tiny.rows(),
            )

    def test_whole_it_may_lie_in_pieces_or_anywhere(self) -> None:
        spec = Local("an/id", quantize="bitsandbytes_8bit", device_map={"": 0})
        assert spec.unquantised == Local("an/id", device_map="auto")
        spec = Local("an/id", quantize="torchao_int8", shard="replica")
        assert spec.unquantised == Local("an/id")
