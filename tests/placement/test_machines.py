"""Several machines: what they may share, and two of them that train as one process does.

Which placement unequal ones get, and what is refused: test_choice.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_distill.placement import Launch
from tests import tiny
from tests.launch import ROOT, launch

BOUND = 6e-7


@pytest.mark.parametrize(
    ("world", "local", "divisor", "common"),
    [
        (16, 8, None, 8),
        (8, 8, 8, 8),
        (4, 1, 1, 1),
        (12, 8, None, 4),
        (10, 4, 2, 2),
        (16, 8, 4, 4),
        (7, 4, 1, 1),
    ],
)
def test_what_divides_the_processes_of_each(
    world: int, local: int, divisor: int | None, common: int
) -> None:
    found = Launch(world=world, local=local, divisor=divisor)
    assert found.common == common
    assert found.even == (common == local)


def machines(command: list[str], folder: Path) -> list[str]:
    """Two launches of two processes each, as on two machines; what they printed.

    Raises:
        AssertionError: With the output of both, if one fails or does not end.
    """
    config = folder / "launcher.yaml"
    text = (ROOT / "recipes/accelerate/hsdp.yaml").read_text()
    for key, value in {"use_cpu": "true", "num_processes": "4"}.items():
        text, count = re.subn(rf"^{key}: \S+", f"{key}: {value}", text, flags=re.M)
        assert count == 1
    config.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    asked = ["--config_file", str(config), "--num_machines", "2", "--main_process_port", port]
    run = [sys.executable, "-m", "accelerate.commands.launch", *asked, "--machine_rank"]
    outputs = [folder / f"machine{rank}.txt" for rank in range(2)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = []
    try:
        for rank, output in enumerate(outputs):
            with output.open("w") as told:
                started.append(
                    subprocess.Popen(
                        [*run, str(rank), *command],
                        cwd=ROOT,
                        env=environment,
                        stdout=told,
                        stderr=subprocess.STDOUT,
                    )
                )
        ended = [process.wait(timeout=180) for process in started]
    finally:
        for process in started:
            process.terminate()  # the launcher ends those that it started
            process.wait(timeout=30)
    found = [output.read_text() for output in outputs]
    assert ended == [0, 0], "".join(text[-4000:] for text in found)
    return found


@pytest.mark.distributed
def test_two_machines_train_as_one_process_does(tmp_path: Path) -> None:
    """By the shipped launcher: a copy on each, two pieces to a copy, and one student."""
    tiny.llama("teacher").save_pretrained(tmp_path / "llama", max_shard_size="60KB")
    worker = "tests.placement_worker"
    launch(worker, "one", str(tmp_path), "llama:replica")
    machines(["-m", worker, "ddp", str(tmp_path), "llama:hsdp"], tmp_path)
    expected = torch.load(tmp_path / "one1.pt", weights_only=True)["llama:replica"]["weights"]
    found: dict[str, Any] = torch.load(tmp_path / "ddp4.pt", weights_only=True)["llama:hsdp"]
    assert found["world"] == 4
    assert "on each of 2 processes x 2 copies (as asked)" in found["told"][0]
    assert found["resident"] == [found["whole"] // 2] * 4
    weights = found["weights"]
    assert weights.keys() == expected.keys()
    assert max(float((weights[k] - expected[k]).abs().max()) for k in weights) <= BOUND
