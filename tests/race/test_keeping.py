"""A race beside its run: read again only by the same run."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from llm_distill import HiddenStates, Logits
from llm_distill.layers import auto_race, explicit, last, learned
from llm_distill.preparation import prepare_run
from llm_distill.race import keeping
from llm_distill.race.halving import Arm, Result
from llm_distill.students import FromTeacher
from tests import on_disk, tiny
from tests.launch import launch

RESULTS = (
    Result(Arm("none", None), 20, 0.1 + 0.2),
    Result(Arm("last", last(2, 4), 3.0), 20, 0.5),
    Result(Arm("learned", replace(learned(2, 4), evidence=(("score", 0.1),)), 1.0, 1 / 3), 5, 0.7),
)


class TestFile:
    @pytest.mark.parametrize("winner", range(3))
    def test_what_is_written_is_read(self, tmp_path: Path, winner: int) -> None:
        place = tmp_path / "new" / "race.json"
        keeping.write(place, "key", RESULTS[winner].arm, RESULTS)
        assert keeping.read(place, "key") == (RESULTS[winner].arm, RESULTS)
        assert [path.name for path in place.parent.iterdir()] == ["race.json"]

    def test_a_training_that_failed(self, tmp_path: Path) -> None:
        place = tmp_path / "race.json"
        keeping.write(place, "key", RESULTS[0].arm, [*RESULTS, replace(RESULTS[1], kl=math.nan)])
        assert "NaN" not in place.read_text()
        found = keeping.read(place, "key")
        assert found is not None
        assert math.isnan(found[1][-1].kl)

    def test_of_another_run_or_none(self, tmp_path: Path) -> None:
        place = tmp_path / "race.json"
        assert keeping.read(place, "key") is None
        keeping.write(place, "key", RESULTS[0].arm, RESULTS)
        assert keeping.read(place, "other") is None
        assert keeping.read(place, None) is None

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[: len(text) // 2],
            lambda _: "",
            lambda _: "[]",
            lambda _: '{"key": "key"}',
            lambda text: text.replace('"steps": 20', '"steps": "many"'),
            lambda text: text.replace('"student_depth": 2', '"student_depth": 1'),
            lambda text: text.replace('"mapping"', '"map"'),
        ],
    )
    def test_a_damaged_file_is_none(self, tmp_path: Path, damage: Any) -> None:
        place = tmp_path / "race.json"
        keeping.write(place, "key", RESULTS[1].arm, RESULTS)
        place.write_text(damage(place.read_text()))
        assert keeping.read(place, "key") is None

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        place = tmp_path / "race.json"
        place.write_bytes(b"\xff\xfe\x00")
        assert keeping.read(place, "key") is None


def key(
    folder: Path,
    *objectives: Any,
    student: Any = None,
    adapter: dict[str, Any] | None = None,
    loaded: bool = False,
    **given: Any,
) -> str | None:
    """Of a run with named models."""
    own = ("train_dataset", "data_collator", "optimizer_cls_and_kwargs")
    kwargs = {"train_dataset": tiny.rows(16)} | {k: v for k, v in given.items() if k in own}
    args = tiny.arguments(folder, **{k: v for k, v in given.items() if k not in own})
    teacher: Any = folder / "teacher"
    if not teacher.exists():
        on_disk.save_model(teacher, "teacher")
    model = student or FromTeacher(depth=2)
    teacher = tiny.llama("teacher", vocabulary=300) if loaded else str(teacher)
    chosen = objectives or (Logits(), HiddenStates(layers=auto_race))
    run = prepare_run(model, teacher, chosen, args, kwargs)
    module: Any = tiny.llama("student")
    if adapter is not None:
        module = get_peft_model(module, LoraConfig(target_modules=["q_proj", "v_proj"], **adapter))
    return keeping.key_of(run, module, args, (3,))


class TestKey:
    def test_the_same_run(self, tmp_path: Path) -> None:
        assert key(tmp_path) == key(tmp_path)
        assert key(tmp_path) == key(tmp_path, logging_steps=7, save_steps=3, run_name="other")

    @pytest.mark.parametrize(
        "other",
        [
            {"seed": 1},
            {"learning_rate": 1e-5},
            {"lr_scheduler_type": "linear"},
            {"per_device_train_batch_size": 4},
            {"gradient_accumulation_steps": 2},
            {"max_grad_norm": 1.0},
            {"optim": "adamw_torch"},
            {"bf16": True},
            {"train_dataset": tiny.rows(17)},
            {"train_dataset": tiny.rows(16, empty=(3,))},
            {"student": FromTeacher(depth=3)},
            {"adapter": {"r": 2}},
        ],
    )
    def test_another_recipe(self, tmp_path: Path, other: dict[str, Any]) -> None:
        assert key(tmp_path, **other) not in (None, key(tmp_path))

    def test_other_objectives(self, tmp_path: Path) -> None:
        raced = HiddenStates(layers=partial(auto_race, also=[partial(explicit, pairs=[(1, 1)])]))
        others = [
            key(tmp_path, Logits(), HiddenStates(layers=auto_race, weight=2.0)),
            key(tmp_path, Logits(temperature=2.0), HiddenStates(layers=auto_race)),
            key(tmp_path, Logits(), raced),
        ]
        assert None not in others
        assert len({*others, key(tmp_path)}) == 4

    def test_other_adapters(self, tmp_path: Path) -> None:
        settings = [{"r": 2}, {"r": 4}, {"r": 2, "lora_alpha": 3}]
        assert len({key(tmp_path, adapter=one) for one in settings}) == 3

    def test_other_weights_of_the_same_name(self, tmp_path: Path) -> None:
        before = key(tmp_path)
        on_disk.save_model(tmp_path / "teacher", "student")
        assert key(tmp_path) != before

    def test_what_has_no_name_is_not_kept(self, tmp_path: Path) -> None:
        def local(rows: Any) -> Any:
            return rows

        assert key(tmp_path, loaded=True) is None
        assert key(tmp_path, student=tiny.llama("student", vocabulary=300)) is None
        weight = HiddenStates(layers=auto_race, weight=lambda progress: 1.0 - progress)
        assert key(tmp_path, Logits(), weight) is None

    def test_another_process_finds_the_same(self, tmp_path: Path) -> None:
        """Where functions lie in memory, and the order of sets, change from start to start."""
        adapter = {"r": 2}
        here = key(tmp_path, adapter=adapter)
        assert here is not None
        code = json.dumps([str(tmp_path), adapter])
        assert launch("tests.race.test_keeping", code).strip().splitlines()[-1] == here


if __name__ == "__main__":
    import sys

    _folder, _adapter = json.loads(sys.argv[1])
    sys.stdout.write(f"{key(Path(_folder), adapter=_adapter)}\n")
