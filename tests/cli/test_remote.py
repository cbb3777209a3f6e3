"""The command line with a teacher behind a server: what it says, and how it exits."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_distill.recipe import document
from llm_distill.teachers import client as client_module
from llm_distill.teachers import probing
from tests import on_disk
from tests.cli.conftest import Cli
from tests.teacher_server import TeacherServer

ROOT = Path(__file__).parents[2]
SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(probing, "HASTE", 0.4)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def network(models: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(models / "teacher")
    return loaded


@pytest.fixture
def server(network: PreTrainedModel) -> Iterator[TeacherServer]:
    with TeacherServer(network, on_disk.tokenizer(), longest=64) as running:
        yield running


@pytest.fixture
def teacher(server: TeacherServer, models: Path) -> dict[str, Any]:
    """The section of a recipe, its fields to be changed in place."""
    of = str(models / "teacher")
    return {"Remote": {"url": server.url, "model": "teacher", "top_k": 8, "of": of, "patience": 1}}


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_a_run(cli: Cli, server: TeacherServer, teacher: Any, tmp_path: Path, owner: str) -> None:
    server.owner = owner
    ended = cli("run", teacher=teacher)
    assert ended.code == 0, ended.err
    assert "KL on the tokens that the teacher told alone, nats per token" in ended.out
    assert "63" in ended.out  # positions: what the server takes
    assert (tmp_path / "out" / "model.safetensors").exists()
    left = [p for p in (tmp_path / "out").iterdir() if p.suffix in (".md", ".json", ".yaml")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert len(left) > 3
    assert "127.0.0.1" not in card


@pytest.mark.usefixtures("_no_weights")
def test_checking_asks_the_server_and_loads_nothing(
    cli: Cli, server: TeacherServer, teacher: Any
) -> None:
    ended = cli("check", teacher=teacher)
    assert ended.code == 0, ended.err
    assert [request.path for request in server.received] == [
        "/v1/models",
        "/v1/completions",
        "/tokenize",
    ]


CASES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"model": "teachr"}, {}, "serves teacher, and not 'teachr'; write model: teacher"),
    ({"top_k": 25}, {}, "the server tells at most 20 tokens of a row, and top_k is 25; start it"),
    ({"url": "http://127.0.0.1:9"}, {}, "127.0.0.1:9/v1/models: ConnectError"),
    ({"url": f"http://me:{SECRET}@127.0.0.1"}, {}, "Remote: the url holds more than a host"),
    ({"key_from": SECRET}, {}, "Remote: key_from is no name of a variable"),
    ({"key_from": "NOT_THERE"}, {}, "the environment has no NOT_THERE"),
    ({"api_key": SECRET}, {}, "teacher.Remote: Remote has no 'api_key'"),
    ({"dialect": "openai"}, {}, "teacher.Remote.dialect"),
    (
        {},
        {"objectives": ["Logits", {"HiddenStates": {"layers": {"last": {"n": 1}}}}]},
        "is Remote, which tells the likeliest tokens of each row and nothing else, and hidden stat",
    ),
    ({}, {"objectives": ["AttentionMaps"]}, "and hidden state 0 is asked for"),
]


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(("changes", "sections", "message"), CASES)
def test_bad_input_is_found_before_weights_load(
    cli: Cli,
    teacher: Any,
    command: str,
    changes: dict[str, Any],
    sections: dict[str, Any],
    message: str,
) -> None:
    teacher["Remote"] |= changes
    ended = cli(command, teacher=teacher, **sections)
    assert ended.code == 2
    assert message in ended.err
    assert SECRET not in ended.err + ended.out
    assert "Traceback" not in ended.err


@pytest.mark.usefixtures("_no_weights")
def test_a_student_of_teacher_blocks_needs_the_weights_here(cli: Cli, teacher: Any) -> None:
    ended = cli("run", teacher=teacher, student={"FromTeacher": {"depth": 2}})
    assert ended.code == 2
    assert "the teacher is a Remote, whose weights are not here to be copied" in ended.err


def test_a_server_that_dies_is_said_without_a_traceback(
    cli: Cli, server: TeacherServer, teacher: Any, tmp_path: Path
) -> None:
    """Checkpoints stay; no student is written."""
    server.fail("/v1/completions", "drop", times=10_000, after=1 + 3 * 4)
    steps = ("--training.max_steps", "6", "--training.eval_strategy", "no", "--data.eval", "null")
    saved = ("--training.save_strategy", "steps", "--training.save_steps", "1")
    ended = cli("run", *steps, *saved, teacher=teacher)
    assert ended.code == 1
    assert f"llm-distill: {server.url}/v1/completions: RemoteProtocolError" in ended.err
    assert "Traceback" not in ended.err
    out = tmp_path / "out"
    assert not (out / "model.safetensors").exists()
    assert (out / "checkpoint-3").is_dir()
    server.faults.clear()
    ended = cli("run", *steps, *saved, "--resume", teacher=teacher)
    assert ended.code == 0, ended.err
    assert (out / "model.safetensors").exists()


@pytest.mark.distributed
def test_a_server_that_fails_one_of_two_processes_ends_both(
    content: dict[str, Any],
    network: PreTrainedModel,
    server: TeacherServer,
    teacher: Any,
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(document.dump({**content, "teacher": teacher}))
    with TeacherServer(network, on_disk.tokenizer(), longest=64) as other:
        other.fail("/v1/completions", "status", times=10_000, value=500, after=1)
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        worker = ["--standalone", "-m", "tests.remote_worker", "run", str(recipe)]
        command = [*run, *worker, server.url, other.url]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
        )
    assert done.returncode == 1
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("llm-distill")]
    assert told.startswith(f"llm-distill process 1: {other.url}/v1/completions: status 500")
    assert not (tmp_path / "out" / "model.safetensors").exists()
