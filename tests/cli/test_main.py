# ruff: noqa: E501  tables of cases
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llm_distill import __version__, loading
from llm_distill.cli.main import main, split_overrides
from llm_distill.errors import InputError, OwnError, ServerError
from llm_distill.recipe import document
from tests import on_disk
from tests.cli.conftest import Cli

ALL_MASKED = '{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}\n'


class TestArguments:
    def test_overrides_are_taken_out_wherever_they_stand(self) -> None:
        argv = [
            "--teacher",
            "t",
            "run",
            "--training.lr=1e-5",
            "x.yaml",
            "--resume",
            "--data.eval",
            "no",
        ]
        rest, overrides = split_overrides(argv)
        assert rest == ["run", "x.yaml", "--resume"]
        assert overrides == [("teacher", "t"), ("training.lr", "1e-5"), ("data.eval", "no")]

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--trainin.lr", "1"], "no section 'trainin' in a recipe; did you mean 'training'"),
            (["--training.lr"], "--training.lr has no value; write --training.lr=value"),
            (["--training.bf16", "--resume"], "--training.bf16 has no value"),
        ],
    )
    def test_overrides_that_cannot_be_meant(self, argv: list[str], message: str) -> None:
        with pytest.raises(InputError, match=message):
            split_overrides(argv)

    @pytest.mark.parametrize(
        ("argv", "code", "said"),
        [
            (["--help"], 0, "exit codes: 0 done, 1 failed, 2 bad input"),
            (["run", "--help"], 0, "--overwrite"),
            (["map", "--help"], 0, "--no-data"),
            (["cache", "--help"], 0, "replace a cache that is there and differs"),
            (["cache", "x.yaml", "--resume"], 2, "unrecognized arguments: --resume"),
            (["map", "x.yaml", "--resume"], 2, "unrecognized arguments: --resume"),
            (["map", "x.yaml", "-o"], 2, "expected one argument"),
            (["check", "x.yaml", "-o", "y"], 2, "unrecognized arguments: -o y"),
            (["map", "nowhere.yaml", "-o", "y.z"], 2, "recipe nowhere.yaml does not exist"),
            (["--version"], 0, __version__),
            ([], 2, "required"),
            (["trian", "x.yaml"], 2, "invalid choice: 'trian'"),
            (["run"], 2, "required: recipe"),
            (["run", "x.yaml", "--overwite"], 2, "unrecognized arguments: --overwite"),
            (["run", "x.yaml", "--resume", "--overwrite"], 2, "not allowed with"),
            (["check", "x.yaml", "--resume"], 2, "unrecognized arguments: --resume"),
            (["run", "nowhere.yaml"], 2, "llm-distill: recipe nowhere.yaml does not exist"),
        ],
    )
    def test_exit_codes(
        self, argv: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(argv) == code
        written = capsys.readouterr()
        assert said in written.out + written.err

    def test_help_needs_no_torch_and_no_second(self) -> None:
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "llm_distill", "--help"],
            check=True,
            capture_output=True,
        )
        assert time.perf_counter() - started < 1.0
        code = (
            "import sys, llm_distill.cli as c; c.main(['map', '-h']); "
            "print({'torch', 'matplotlib', 'transformers'} & set(sys.modules))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "set()"

    def test_libraries_for_other_devices_are_not_heard(
        self, content: dict[str, Any], tmp_path: Path
    ) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(document.dump(content), encoding="utf-8")
        command = [sys.executable, "-m", "llm_distill", "check", str(recipe)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""

    def test_bad_input_is_said_without_a_traceback(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "llm_distill", "run", str(tmp_path / "no.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("llm-distill: recipe ")
        assert "Traceback" not in done.stderr

    def test_what_fails_exits_with_1_and_its_traceback(self) -> None:
        program = (
            "import runpy, sys\n"
            "import llm_distill.cli\n"
            "def fail(*_): raise ValueError('the disk is on fire')\n"
            "sys.modules['llm_distill.cli.main']._do = fail\n"
            "sys.argv = ['llm-distill', 'check', 'x.yaml']\n"
            "runpy.run_module('llm_distill', run_name='__main__')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert done.stderr.strip().endswith("ValueError: the disk is on fire")

    def test_only_the_first_of_several_processes_speaks(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("RANK", "1")
        assert main(["run", "nowhere.yaml"]) == 2
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (OwnError("example 7 is not there"), "llm-distill process 1: example 7 is not there\n"),
            (ServerError("it went away"), "llm-distill process 1: it went away\n"),
            (InputError("nobody can do this"), ""),
        ],
    )
    def test_what_another_process_meets_alone_is_told_by_it(
        self,
        error: Exception,
        words: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(sys.modules["llm_distill.cli.main"], "_do", fail)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["run", "x.yaml"]) in (1, 2)
        assert capsys.readouterr().err == words


class TestBadInput:
    """Refused with exit code 2 and a message, and before any weights load."""

    @pytest.fixture(autouse=True)
    def _no_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("weights were loaded")

        monkeypatch.setattr(loading, "load_model", refuse)

    @pytest.mark.parametrize("command", ["run", "check"])
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--training.learnin_rate", "1"], "no 'learnin_rate'; did you mean 'learning_rate'"),
            (["--student", "/no/where"], "model '/no/where' is not a folder here"),
            (["--teacher", "./no"], "model './no' is not a folder here"),
            (["--data.path", "no.jsonl"], "no file or folder 'no.jsonl'"),
            (["--data.chat_template", "./no.jinja"], "no file or folder './no.jinja'"),
            (["--objectives.0", "Logit"], "objectives[0]: no 'Logit' in llm_distill; did you mean"),
            (["--objectives.0", "m:f"], "run with --allow-code m"),
            (["--objectives.1.Logits.temperature", "0"], "temperature is 0.0; it must be"),
            (["--objectives.1.Logits.loss", "alpha_beta: {alpha: .inf}"], "alpha: inf is not finite"),
            (["--objectives.1.Logits.loss", "skew_reverse_kl: {alpha: 2}"], "skew_reverse_kl(alpha=2.0) fails"),
            (["--objectives.1.Logits.target", "Taid: {end: 1.5}"], "Taid: start=0.4, end=1.5; write"),
            (["--rows_per_chunk", "0"], "rows_per_chunk: 0; write a number of rows from 1 on (256)"),
            (["--peft.target_modules", "[q_proj, lm_head]"], "take lm_head out of target_modules"),
            (["--objectives.1.Logits.weight", "-1"], "weight is -1.0 at progress 0.0"),
            (["--objectives.1.Logits.weight", ".inf"], "weight: inf is not finite"),
            (["--objectives", "[Logits: {weight: 0}]"], "every weight is 0 for the whole run"),
            (
                ["--objectives.0", "HiddenStates: {layers: {explicit: {pairs: [[1, 9]]}}}"],
                "layers: teacher layer 9 is out of range 0..4",
            ),
            (
                ["--objectives.0", "HiddenStates: {layers: {explicit: {pairs: [[3, 1]]}}}"],
                "layers: student layer 3 is out of range 0..2",
            ),
            (["--objectives.0", "HiddenStates: {projector: identity}"], "needs equal widths"),
            (
                ["--student", "FromConfig: {architecture: llama, config: {num_layer: 2}}"],
                "FromConfig: llama has no 'num_layer' in its config",
            ),
            (["--training.eval_strategy", "epoch", "--data.eval", "null"], "nothing to evaluate on"),
            (["--data.streaming", "true", "--data.eval", "null", "--training.max_steps", "0"], "stream"),
            (["--training.label_smoothing_factor", "0.1"], "label_smoothing_factor"),
        ],
    )  # fmt: skip
    def test_before_the_data(
        self, cli: Cli, command: str, arguments: list[str], message: str, tmp_path: Path
    ) -> None:
        ended = cli(command, *arguments)
        assert message in ended.err
        assert ended.code == 2
        assert "Traceback" not in ended.err
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())

    @pytest.mark.parametrize(
        ("text", "arguments", "message"),
        [
            ("", [], "is empty"),
            (ALL_MASKED, [], "0 supervised tokens in the 1 examples"),
            ('{"txt": "a"}\n', [], "txt"),
            ('{"text": "a b c"}\n{"text"', [], "line 2"),
            ('{"text": "the cat"}\n', ["--data.eval", "null", "--data.max_length", "65"], "more than the 64 positions"),
            ('{"text": "the cat"}\n', [], "leaves nothing to train on"),
            (ALL_MASKED, ["--data.streaming", "true", "--data.eval", "null"], "0 supervised tokens in the first 1 examples of the stream"),
        ],
    )  # fmt: skip
    def test_the_data(
        self, cli: Cli, tmp_path: Path, text: str, arguments: list[str], message: str
    ) -> None:
        (tmp_path / "own.jsonl").write_text(text)
        ended = cli("run", "--data.path", str(tmp_path / "own.jsonl"), *arguments)
        assert message in ended.err
        assert ended.code == 2

    @pytest.mark.parametrize("command", ["run", "check"])
    def test_different_tokenizers(self, cli: Cli, tmp_path: Path, command: str) -> None:
        model = on_disk.save_model(tmp_path / "student", "student", "quite another corpus here")
        ended = cli(command, "--student", str(model))
        assert "the tokenizers differ: token " in ended.err
        assert f"for the student {model}" in ended.err
        assert ended.code == 2

    def test_a_push_without_a_token(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        ended = cli("check", "--training.push_to_hub", "true")
        assert "training.push_to_hub: no token; run hf auth login, or set HF_TOKEN" in ended.err
        assert ended.code == 2

    def test_no_tokenizer_anywhere(self, cli: Cli, models: Path, tmp_path: Path) -> None:
        for role in ("student", "teacher"):
            (tmp_path / role).mkdir()
            config = (models / role / "config.json").read_text()
            (tmp_path / role / "config.json").write_text(config)
        ended = cli(
            "check", "--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")
        )
        assert "has a tokenizer beside it; write teacher: {Local: {model:" in ended.err
        assert ended.code == 2


def test_foreign_code_in_the_current_folder(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_losses_here.py").write_text(
        "def huber(student, teacher, *, delta=1.0):\n    return (student - teacher).abs().mean(-1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    loss = ("--objectives.1", "Logits: {loss: {own_losses_here:huber: {delta: 0.5}}}")
    assert cli("check", *loss).code == 2
    ended = cli("check", *loss, "--allow-code", "own_losses_here")
    assert ended.code == 0, ended.err
    assert "huber(delta=0.5)" in ended.out
