"""The output folder: refused, cleared, resumed from, and signed."""

import json
import re
import shutil
from pathlib import Path

from llm_distill.errors import InputError
from llm_distill.publishing import versions
from llm_distill.recipe import Recipe

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = "checkpoint-is-incomplete.txt"
_STATE = "trainer_state.json"
_BEFORE_TRAINING = re.compile(
    r"map(-.*)?\.(yaml|png)|calibration\.(safetensors|part)|(race|added_kl)\.(json|part)"
)
"""What `llm-distill map` and calibration write: no training was there."""


def start_from(folder: Path, *, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to go on from; None for a fresh start.

    Args:
        folder: Where the student goes.
        resume: None for a fresh start, empty for the newest checkpoint, else a path.
        overwrite: Whether the folder may hold something already.

    Raises:
        InputError: If there is nothing to resume, or a fresh start would write over something.
    """
    if resume:
        return _checkpoint(Path(resume))
    if resume is not None:
        return _newest(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"training.output_dir: {folder} is a file; write another folder")
    if not overwrite and folder.is_dir() and _holds_a_training(folder):
        raise InputError(
            f"training.output_dir: {folder} is not empty; go on with --resume, start anew with "
            "--overwrite, or write another folder"
        )
    return None


def refuse_finished(checkpoint: Path | None, *, steps: int, epochs: float) -> None:
    """Refuse to go on where there is nothing left: Trainer would take one more step.

    Args:
        checkpoint: To go on from; None for a fresh start.
        steps: Of the whole training; 0 or less: as many as the epochs have.
        epochs: Of the whole training.

    Raises:
        InputError: With what to write to go on.
    """
    if checkpoint is None:
        return
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    done, whole, name = (
        (state["global_step"], steps, "max_steps")
        if steps > 0
        else (state["epoch"] or 0, epochs, "num_train_epochs")
    )
    if done >= whole:
        raise InputError(
            f"--resume: {checkpoint} is the end of this training ({name} {whole:g}); there is "
            f"nothing left to do: raise training.{name} to go on"
        )


def clear(folder: Path) -> None:
    """Delete the checkpoints of an earlier run, so that nothing resumes from them."""
    for entry in _checkpoints(folder).values():
        shutil.rmtree(entry)


def sign(folder: Path, recipe: Recipe) -> None:
    """Write the recipe and the versions beside the student."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe.resolved(), encoding="utf-8")
    text = json.dumps(versions(), indent=2) + "\n"
    (folder / "versions.json").write_text(text, encoding="utf-8")


def _holds_a_training(folder: Path) -> bool:
    """Whether there is more than what comes before a training."""
    return any(not _BEFORE_TRAINING.fullmatch(entry.name) for entry in folder.iterdir())


def _newest(folder: Path) -> Path:
    """The newest checkpoint that was written to its end."""
    there = _checkpoints(folder)
    whole = {step: path for step, path in there.items() if _is_whole(path)}
    if not whole:
        found = f"; not whole: {', '.join(p.name for p in there.values())}" if there else ""
        raise InputError(
            f"--resume: no checkpoint in {folder}{found}; start anew without --resume, or name "
            "one: --resume path/to/checkpoint-100"
        )
    return whole[max(whole)]


def _checkpoint(path: Path) -> Path:
    """A checkpoint that the user named."""
    if not path.is_dir():
        raise InputError(f"--resume: there is no folder {path}")
    if not _is_whole(path):
        inside = sorted(p.name for p in _checkpoints(path).values())
        near = f"; it has {', '.join(inside)}" if inside else f"; it has no {_STATE}"
        raise InputError(f"--resume: {path} is no whole checkpoint{near}")
    return path


def _checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by their steps."""
    entries = folder.iterdir() if folder.is_dir() else iter(())
    named = ((_CHECKPOINT.fullmatch(entry.name), entry) for entry in entries if entry.is_dir())
    return {int(match[1]): entry for match, entry in sorted(named, key=str) if match}


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return (checkpoint / _STATE).is_file() and not (checkpoint / _UNFINISHED).exists()
