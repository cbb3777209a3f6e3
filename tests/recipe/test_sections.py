# ruff: noqa: E501  tables of cases
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_distill import CrossEntropy, Local, Logits, Taid, balance
from llm_distill.errors import InputError
from llm_distill.recipe import Recipe, document

CONTENT = {"student": "me/student", "teacher": "me/teacher", "data": {"path": "me/data"}}


def recipe(**changes: Any) -> Recipe:
    content = {k: v for k, v in {**CONTENT, **changes}.items() if v is not ...}
    return Recipe.of(content, name="mine")


class TestSections:
    def test_the_least_recipe(self) -> None:
        made = recipe()
        assert made.student == Local("me/student")
        assert made.teacher == Local("me/teacher")
        assert made.data.path == "me/data"
        assert made.objectives == (CrossEntropy(weight=0.1), Logits())
        assert made.training == {"output_dir": "out/mine", "report_to": "none", "logging_steps": 10}
        assert made.peft is None
        assert made.rows_per_chunk is None

    def test_moving_targets(self) -> None:
        """By name, and with settings beside any loss."""
        settings = {"loss": {"jsd": {"beta": 0.1}}, "target": {"Taid": {"start": "2e-1"}}}
        made = recipe(objectives=[{"Logits": {"target": "Taid"}}, {"Logits": settings}]).objectives
        assert made[0] == Logits(target=Taid())
        assert isinstance(made[1], Logits)
        assert made[1].target == Taid(start=0.2)
        assert made[1].describe() == "jsd(beta=0.1), target Taid from 0.2 to 1"

    def test_rows_per_chunk(self, tmp_path: Path) -> None:
        assert recipe(rows_per_chunk=64).rows_per_chunk == 64
        (tmp_path / "run.yaml").write_text(document.dump(CONTENT))
        made = Recipe.load(tmp_path / "run.yaml", [("rows_per_chunk", "512")])
        assert made.rows_per_chunk == 512
        assert "rows_per_chunk: 512" in made.resolved()

    @pytest.mark.parametrize(
        ("written", "expected"),
        [
            (None, None),
            ("fixed", balance.fixed),
            ("normalised", balance.normalised),
            ({"uncertainty": {}}, balance.uncertainty),
        ],
    )
    def test_balances_by_name(self, written: Any, expected: Any) -> None:
        assert recipe(balance=written).balance is expected

    def test_balances_with_settings(self, tmp_path: Path) -> None:
        """They stand in the resolved recipe, and can be overridden."""
        settings = {"gradient": {"layer": 2, "every": 1e1}}
        (tmp_path / "run.yaml").write_text(document.dump(CONTENT | {"balance": settings}))
        made = Recipe.load(tmp_path / "run.yaml", [("balance.gradient.most", "50")])
        rule: Any = made.balance
        assert rule.func is balance.gradient
        assert rule.keywords == {"layer": 2, "every": 10, "most": 50.0}
        assert "balance:\n  gradient:\n    layer: 2" in made.resolved()

    def test_training_is_checked_by_the_hints_of_transformers(self) -> None:
        made = recipe(
            training={
                "learning_rate": "1e-5",
                "max_steps": 1e3,
                "eval_strategy": "no",
                "bf16": True,
            }
        )
        assert made.training["learning_rate"] == 1e-5
        assert made.training["max_steps"] == 1000
        assert made.training["eval_strategy"] == "no"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"techer": "x"}, "no section 'techer' in a recipe; did you mean 'teacher'"),
            ({"rollout": {}}, "no section 'rollout' in a recipe; a recipe has student, teacher"),
            ({"teacher": ..., "data": ...}, "has no teacher and no data; write `teacher: …`"),
            ({"student": None}, "has no student"),
            ({"peft": {"megatron_core": "os"}}, r"peft\.megatron_core: it names code"),
            ({"data": "file.txt"}, r"data: 'file.txt' is no mapping; write data: \{path: …\}"),
            ({"data": {"pth": "x"}}, "data: Data has no 'pth'; did you mean 'path'"),
            ({"data": {"path": "x", "max_length": 1}}, r"data\.max_length: 1 is less than 2"),
            ({"data": {"path": "x", "streaming": "yes"}}, r"data\.streaming: 'yes' is not .* true or false"),
            ({"data": {"path": "x", "eval": 3}}, r"data\.eval: 3.0 is no fraction"),
            ({"objectives": "Logits"}, "objectives: 'Logits' is no list"),
            ({"objectives": []}, "objectives: the list is empty"),
            ({"objectives": [{"Logits": {"weight": 0}}]}, "every weight is 0 for the whole run"),
            ({"objectives": ["Logits", {"Logits": {"name": "Logits"}}]}, "two are named 'Logits'"),
            ({"objectives": [{"HiddenStates": {"layers": "unifrm"}}]}, r"objectives\[0\]\.HiddenStates\.layers: no 'unifrm' .* did you mean 'uniform'"),
            ({"training": {"learnin_rate": 1}}, r"training: TrainingArguments has no 'learnin_rate'; did you mean 'learning_rate'"),
            ({"training": {"max_steps": 3.5}}, r"training\.max_steps: 3.5 is not .* an integer"),
            ({"training": {"bf16": "yes"}}, r"training\.bf16: 'yes' is not"),
            ({"training": {"eval_strategy": "epcoh"}}, r"training\.eval_strategy: 'epcoh' .* did you mean 'epoch'"),
            ({"training": {"hub_token": "x"}}, r"training\.hub_token: tokens do not belong .* HF_TOKEN"),
            ({"training": {"resume_from_checkpoint": "x"}}, "run with --resume"),
            ({"training": {"output_dir": None}}, "output_dir is empty"),
            ({"training": {"parallelism_config": {"a": 1}}}, "training.parallelism_config"),
            ({"training": [1]}, "training: .* is no mapping"),
            ({"peft": {"rr": 4, "lora_alph": 3}}, "peft: LoraConfig has no 'rr'"),
            ({"rows_per_chunk": 0}, "rows_per_chunk: 0; write a number of rows from 1 on"),
            ({"rows_per_chunk": "many"}, "rows_per_chunk: 'many' is not what this takes; write an integer or null"),
            ({"rows_per_chunk": {"rows": 8}}, "rows_per_chunk: .* is not what this takes"),
            ({"balance": "normalized"}, r"balance: no 'normalized' in llm_distill\.balance; did you mean 'normalised'"),
            ({"balance": "Balance"}, "no 'Balance' in llm_distill.balance; it has fixed, gradient, normalised, uncertainty"),
            ({"balance": {"gradient": {"evry": 3}}}, r"balance\.gradient: gradient has no 'evry'; did you mean 'every'"),
            ({"balance": {"normalised": {"momentum": "much"}}}, r"balance\.normalised\.momentum: 'much' is not .* a number"),
            ({"balance": {"gradient": {"layer": 1.5}}}, r"balance\.gradient\.layer: 1.5 is not .* an integer"),
            ({"balance": ["normalised"]}, "balance: .* is no component; write a name"),
            ({"balance": "mine:rule"}, "balance: 'mine:rule' is code from outside .* --allow-code mine"),
            ({"objectives": [{"Logits": {"target": "Taidd"}}]}, r"objectives\[0\]\.Logits\.target: no 'Taidd' .* did you mean 'Taid'"),
            ({"objectives": [{"Logits": {"target": "Logits"}}]}, "'Logits' is no Taid; write one of Taid"),
            ({"objectives": [{"Logits": {"target": {"Taid": {"start": 2}}}}]}, r"objectives\[0\]\.Logits\.target: Taid: start=2.0, end=1.0; write 0 <= start"),
            ({"objectives": [{"Logits": {"target": {"Taid": {"momentum": 1}}}}]}, "Taid: momentum=1.0; write 0 <= momentum < 1"),
            ({"objectives": [{"Logits": {"target": {"Taid": {"begin": 0}}}}]}, "Taid has no 'begin'"),
            ({"objectives": [{"Logits": {"loss": {"jsd": {"beta": 3}}}}]}, r"objectives\[0\]: Logits: loss jsd\(beta=3.0\) fails .*beta"),
            ({"objectives": [{"Logits": {"loss": {"decoupled": {"labels": 3}}}}]}, "labels"),
            ({"peft": {"r": "many"}}, r"peft\.r: 'many' is not"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_meant_is_refused_with_its_place(
        self, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            recipe(**changes)

    @pytest.mark.parametrize("place", ["data", "training", "peft"])
    def test_a_token_is_refused_anywhere_and_not_repeated(self, place: str) -> None:
        token = "hf_" + "aB3" * 10
        with pytest.raises(InputError, match=rf"{place}\.\w+: this looks like an access") as raised:
            recipe(**{place: {"path": token}})
        assert token not in str(raised.value)

    def test_a_token_in_a_list_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"objectives\.0\.Logits\.name: this looks"):
            recipe(objectives=[{"Logits": {"name": "hf_" + "x" * 20}}])


class TestLoad:
    def test_a_file_with_overrides(self, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text(document.dump(CONTENT))
        made = Recipe.load(tmp_path / "run.yaml", [("training.seed", "3"), ("teacher", "other")])
        assert made.training["seed"] == 3
        assert made.training["output_dir"] == "out/run"
        assert made.teacher == Local("other")

    def test_an_unknown_override_is_found(self, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text(document.dump(CONTENT))
        with pytest.raises(InputError, match="no 'sed'; did you mean 'seed'"):
            Recipe.load(tmp_path / "run.yaml", [("training.sed", "3")])

    def test_the_resolved_recipe_gives_the_same_run(self, tmp_path: Path) -> None:
        content = {
            **CONTENT,
            "objectives": [
                {"Logits": {"weight": {"linear": {"start": "1e-1", "end": 0}}, "name": "no"}},
                {"HiddenStates": {"layers": {"explicit": {"pairs": [[1, 2], [2, 4]]}}}},
            ],
            "training": {"eval_strategy": "no", "learning_rate": "1e-5", "run_name": "1e5"},
            "peft": {"r": 4, "target_modules": ["q_proj"]},
        }
        first = Recipe.of(content, name="first")
        (tmp_path / "recipe.yaml").write_text(first.resolved())
        again = Recipe.load(tmp_path / "recipe.yaml")
        assert again.resolved() == first.resolved()
        assert again.training == first.training
        assert again.peft == first.peft
        assert again.data == first.data
        assert str(again.objectives) == str(first.objectives)


class TestMaking:
    def test_arguments(self, tmp_path: Path) -> None:
        made = recipe(training={"output_dir": str(tmp_path), "use_cpu": True, "warmup_steps": 3})
        args = made.arguments(max_steps=7)
        assert (args.warmup_steps, args.max_steps, args.report_to) == (3, 7, [])

    @pytest.mark.parametrize(
        ("training", "message"),
        [
            ({"bf16": True, "fp16": True}, "training: At most one of fp16 and bf16"),
            ({"load_best_model_at_end": True}, "training: .*load_best_model_at_end"),
            ({"report_to": "wandbb"}, "training: wandbb is not supported"),
        ],
    )
    def test_arguments_that_do_not_go_together(
        self, tmp_path: Path, training: dict[str, Any], message: str
    ) -> None:
        made = recipe(training={"output_dir": str(tmp_path), "use_cpu": True, **training})
        with pytest.raises(InputError, match=message):
            made.arguments()

    def test_deepspeed_that_is_not_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        absent = "transformers.integrations.deepspeed.is_deepspeed_available"
        monkeypatch.setattr(absent, lambda: False)
        stage = {"zero_optimization": {"stage": 3}}
        made = recipe(training={"output_dir": str(tmp_path), "use_cpu": True, "deepspeed": stage})
        with pytest.raises(InputError, match="not installed here; pip install deepspeed, or train"):
            made.arguments()

    def test_adapters(self) -> None:
        adapter = recipe(peft={"r": 4, "target_modules": "all-linear"}).adapter(causal=True)
        assert adapter is not None
        assert (adapter.r, adapter.target_modules, adapter.task_type) == (
            4,
            "all-linear",
            "CAUSAL_LM",
        )
        assert recipe().adapter(causal=True) is None


def test_importing_it_is_light() -> None:
    code = "import sys, llm_distill.recipe; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
