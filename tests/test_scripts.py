"""`scripts/setup.sh` on the machines it may meet, with a stand-in Python that logs its pip calls.

The real install runs at the start of every `scripts/test.sh`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("pyproject.toml", "scripts/setup.sh", "scripts/constraints.txt", "scripts/zero3.txt")
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "grep", "mkdir", "rm")

# Answers what setup.sh asks of a Python; a copy of it becomes the python of the .venv it makes.
PYTHON = """#!{bash}
state="{state}"
case "$*" in
  --version) echo "Python $(cat "$state/version")" ;;
  "-c import sys; sys.exit(sys.version_info < (3, 11))") [ "$(cat "$state/version")" != 3.10 ] ;;
  "-c import ensurepip, venv") [ ! -e "$state/no-ensurepip" ] ;;
  "-c import sys; print"*) cat "$state/version" ;;
  "-m venv .venv") echo "$*" >>"$state/log"; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  "-m pip --version" | "-m ensurepip") [ ! -e "$state/no-pip" ] ;;
  "-m pip install "*)
    echo "$*" >>"$state/log"
    if [ -e "$state/killed" ]; then kill -9 $PPID; exit 1; fi
    case "$(cat "$state/refuses" 2>/dev/null)" in
      "") ;;
      *) case "$*" in *"$(cat "$state/refuses")"*) exit 1 ;; esac ;;
    esac ;;
  "-c from deepspeed"*) echo "compiles" >>"$state/log"; [ ! -e "$state/no-compiler" ] ;;
  *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


@dataclass(frozen=True)
class Machine:
    """A clone of the scripts, and a PATH with a few tools and one stand-in Python."""

    clone: Path
    state: Path
    tools: Path

    def setup(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `scripts/setup.sh`."""
        bash = self.tools / "bash"
        return subprocess.run(
            [bash, self.clone / "scripts" / "setup.sh", *arguments],
            env={"PATH": str(self.tools)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def tell(self, what: str, text: str = "") -> None:
        """Change what the stand-in answers."""
        (self.state / what).write_text(text)

    def log(self) -> list[str]:
        """What was run so far."""
        path = self.state / "log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    it = Machine(tmp_path / "a clone", tmp_path / "state", tmp_path / "bin")
    for folder in (it.clone / "scripts", it.state, it.tools):
        folder.mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / name, it.clone / name)
    for tool in TOOLS:
        where = shutil.which(tool)
        assert where, f"this test needs {tool}"
        (it.tools / tool).symlink_to(where)
    it.tell("version", "3.11")
    python = it.tools / "python3"
    python.write_text(PYTHON.format(bash=it.tools / "bash", state=it.state))
    python.chmod(0o755)
    return it


def torch_pin() -> str:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def test_fresh_machine_gets_torch_first_then_the_package(machine: Machine) -> None:
    run = machine.setup()
    assert run.returncode == 0, run.stderr
    made, torch, package = machine.log()
    assert made == "-m venv .venv"
    assert torch.endswith(f"-c scripts/constraints.txt {torch_pin()}")
    assert package.endswith("-c scripts/constraints.txt -e .[dev]")


def test_second_call_does_nothing(machine: Machine) -> None:
    machine.setup()
    before = machine.log()
    run = machine.setup()
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert machine.log() == before


def test_run_leaves_the_developer_tools_out(machine: Machine) -> None:
    machine.setup("run")
    assert machine.log()[-1].endswith("-e .")


def test_dev_install_serves_run_and_not_the_other_way(machine: Machine) -> None:
    machine.setup("run")
    machine.setup("dev")
    assert machine.log()[-1].endswith("-e .[dev]")
    before = machine.log()
    machine.setup("run")
    assert machine.log() == before


@pytest.mark.parametrize("name", ["pyproject.toml", "scripts/constraints.txt"])
def test_changed_requirements_install_again(machine: Machine, name: str) -> None:
    machine.setup()
    before = machine.log()
    with (machine.clone / name).open("a") as file:
        file.write("# changed\n")
    machine.setup()
    after = machine.log()
    assert len(after) == len(before) + 2
    assert after.count("-m venv .venv") == 1


def test_moved_folder_installs_again(machine: Machine) -> None:
    machine.setup()
    moved = Machine(machine.clone.with_name("moved"), machine.state, machine.tools)
    machine.clone.rename(moved.clone)
    before = machine.log()
    moved.setup()
    assert len(moved.log()) == len(before) + 2


def test_killed_install_starts_again_from_nothing(machine: Machine) -> None:
    machine.tell("killed")
    assert machine.setup().returncode != 0
    (machine.state / "killed").unlink()
    leftover = machine.clone / ".venv" / "half-a-package"
    leftover.touch()
    run = machine.setup()
    assert run.returncode == 0, run.stderr
    assert "An earlier install was interrupted" in run.stderr
    assert not leftover.exists()
    assert machine.log().count("-m venv .venv") == 2


def test_failed_install_says_so_and_is_continued(machine: Machine) -> None:
    machine.tell("refuses", ".[dev]")
    run = machine.setup()
    assert run.returncode == 1
    assert "the installation failed" in run.stderr
    machine.tell("refuses")
    assert machine.setup().returncode == 0
    assert machine.log().count("-m venv .venv") == 1


def test_python_without_the_pinned_torch_gets_the_ranges(machine: Machine) -> None:
    machine.tell("refuses", torch_pin())
    run = machine.setup()
    assert run.returncode == 0, run.stderr
    assert f"{torch_pin()} cannot be installed here" in run.stderr
    assert machine.log()[-1].endswith("install --disable-pip-version-check -e .[dev]")


def test_missing_ensurepip_names_the_debian_package(machine: Machine) -> None:
    machine.tell("no-ensurepip")
    run = machine.setup()
    assert run.returncode == 1
    assert "sudo apt install python3.11-venv" in run.stderr
    assert not (machine.clone / ".venv").exists()


def test_old_python_is_refused_with_its_version(machine: Machine) -> None:
    machine.tell("version", "3.10")
    run = machine.setup()
    assert run.returncode == 1
    assert "needs Python 3.11 or newer; python3 here is Python 3.10" in run.stderr
    assert "PYTHON=" in run.stderr


def test_no_python_at_all_is_refused(machine: Machine) -> None:
    (machine.tools / "python3").unlink()
    run = machine.setup()
    assert run.returncode == 1
    assert "python3 here is missing" in run.stderr


def test_newer_python_beside_an_old_python3_is_found(machine: Machine) -> None:
    python = machine.tools / "python3"
    shutil.copy(python, machine.tools / "python3.12")
    python.write_text(f"#!{machine.tools / 'bash'}\nexit 1\n")
    assert machine.setup().returncode == 0


def test_broken_environment_is_made_anew(machine: Machine) -> None:
    (machine.clone / ".venv" / "bin").mkdir(parents=True)
    (machine.clone / ".venv" / "bin" / "python").symlink_to("/nonexistent/python3.9")
    assert machine.setup().returncode == 0
    assert machine.log()[0] == "-m venv .venv"


def test_environment_of_an_old_python_is_left_alone(machine: Machine) -> None:
    machine.setup()
    machine.tell("version", "3.10")
    (machine.clone / "pyproject.toml").write_text("# changed\n")
    run = machine.setup()
    assert run.returncode == 1
    assert ".venv has Python 3.10, and llm_distill needs 3.11 or newer. Remove .venv" in run.stderr


def test_unknown_kind_of_install_is_refused(machine: Machine) -> None:
    run = machine.setup("plots")
    assert run.returncode == 1
    assert "no kind of install 'plots'; there are 'dev'" in run.stderr


class TestDeepSpeed:
    def test_it_gets_a_folder_of_its_own(self, machine: Machine) -> None:
        run = machine.setup("zero3")
        assert run.returncode == 0, run.stderr
        *_, package, _, pins, compiled = machine.log()
        assert package.endswith("-e .[dev]")
        assert pins.endswith("--target .zero3/site -r scripts/zero3.txt")
        assert "--no-deps" in pins
        assert compiled == "compiles"
        before = machine.log()
        assert machine.setup("zero3").returncode == 0
        assert machine.log() == before

    def test_one_that_was_not_done_starts_from_nothing(self, machine: Machine) -> None:
        """A compilation that was killed leaves a lock that all later ones would wait for."""
        machine.tell("no-compiler")
        run = machine.setup("zero3")
        assert run.returncode == 1
        assert "does not compile; it needs a C++ compiler" in run.stderr
        lock = machine.clone / ".zero3" / "extensions" / "lock"
        lock.parent.mkdir()
        lock.touch()
        (machine.state / "no-compiler").unlink()
        assert machine.setup("zero3").returncode == 0
        assert not lock.exists()


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = {re.split("[<>=;]", line)[0].lower() for group in groups for line in group}
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
    assert asked <= pinned
