import json
from pathlib import Path

import pytest

from llm_distill.cli.output import clear, refuse_finished, sign, start_from
from llm_distill.errors import InputError
from llm_distill.publishing import versions
from llm_distill.recipe import Recipe


def checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    if whole:
        (made / "trainer_state.json").write_text("{}")
    return made


class TestStartFrom:
    def test_a_fresh_start(self, tmp_path: Path) -> None:
        assert start_from(tmp_path / "new", resume=None, overwrite=False) is None
        assert start_from(tmp_path, resume=None, overwrite=False) is None

    def test_a_folder_with_something_in_it_is_refused_unless_told(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(InputError, match=r"is not empty; go on with --resume, .* --overwrite"):
            start_from(tmp_path, resume=None, overwrite=False)
        assert start_from(tmp_path, resume=None, overwrite=True) is None

    def test_what_comes_before_a_training_is_none(self, tmp_path: Path) -> None:
        before = ("map.yaml", "map.png", "map-a_b.2.yaml", "calibration.safetensors", "race.json")
        for name in before:
            (tmp_path / name).write_text("")
        assert start_from(tmp_path, resume=None, overwrite=False) is None
        for name in ("mapped.yaml", "map.txt", "model.safetensors", "recipe.yaml"):
            (tmp_path / name).write_text("")
            with pytest.raises(InputError, match="is not empty"):
                start_from(tmp_path, resume=None, overwrite=False)
            (tmp_path / name).unlink()

    def test_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="is a file"):
            start_from(tmp_path / "file", resume=None, overwrite=True)

    def test_the_newest_by_number_not_by_name(self, tmp_path: Path) -> None:
        checkpoint(tmp_path, 20)
        newest = checkpoint(tmp_path, 100)
        checkpoint(tmp_path, 9)
        (tmp_path / "checkpoint-tmp").mkdir()
        (tmp_path / "checkpoint-900").write_text("")
        assert start_from(tmp_path, resume="", overwrite=False) == newest

    def test_unfinished_checkpoints_are_passed_over(self, tmp_path: Path) -> None:
        whole = checkpoint(tmp_path, 10)
        checkpoint(tmp_path, 20, whole=False)
        (checkpoint(tmp_path, 30) / "checkpoint-is-incomplete.txt").write_text("")
        assert start_from(tmp_path, resume="", overwrite=False) == whole

    def test_nothing_to_resume(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=f"no checkpoint in {tmp_path / 'no'}; start anew"):
            start_from(tmp_path / "no", resume="", overwrite=False)
        checkpoint(tmp_path, 7, whole=False)
        with pytest.raises(InputError, match="; not whole: checkpoint-7; start anew"):
            start_from(tmp_path, resume="", overwrite=False)

    def test_a_named_checkpoint(self, tmp_path: Path) -> None:
        made = checkpoint(tmp_path, 3)
        assert start_from(tmp_path / "out", resume=str(made), overwrite=False) == made
        with pytest.raises(InputError, match="is no whole checkpoint; it has checkpoint-3"):
            start_from(tmp_path / "out", resume=str(tmp_path), overwrite=False)
        with pytest.raises(InputError, match="there is no folder"):
            start_from(tmp_path / "out", resume=str(tmp_path / "no"), overwrite=False)
        bare = checkpoint(tmp_path, 4, whole=False)
        with pytest.raises(InputError, match=r"it has no trainer_state\.json"):
            start_from(tmp_path / "out", resume=str(bare), overwrite=False)


def test_clear_deletes_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3)
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "config.json").write_text("{}")
    clear(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-notes", "config.json"}
    clear(tmp_path / "not there")


def test_sign_writes_a_recipe_that_can_be_run_again(tmp_path: Path) -> None:
    recipe = Recipe.of({"student": "a", "teacher": "b", "data": {"path": "c"}})
    sign(tmp_path / "out", recipe)
    again = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert again.document == recipe.document
    assert json.loads((tmp_path / "out" / "versions.json").read_text()) == versions()
    assert set(versions()) >= {
        "python",
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "peft",
        "llm-distill",
    }


class TestRefuseFinished:
    def checkpoint(self, folder: Path, step: int, epoch: float) -> Path:
        folder.mkdir()
        text = json.dumps({"global_step": step, "epoch": epoch})
        (folder / "trainer_state.json").write_text(text)
        return folder

    def test_what_is_left_is_gone_on_with(self, tmp_path: Path) -> None:
        refuse_finished(None, steps=10, epochs=3.0)
        made = self.checkpoint(tmp_path / "checkpoint-9", 9, 2.5)
        refuse_finished(made, steps=10, epochs=1.0)
        refuse_finished(made, steps=-1, epochs=3.0)

    def test_the_end_is_the_end(self, tmp_path: Path) -> None:
        made = self.checkpoint(tmp_path / "checkpoint-10", 10, 3.0)
        with pytest.raises(InputError, match=r"end of this training \(max_steps 10\).*raise"):
            refuse_finished(made, steps=10, epochs=9.0)
        with pytest.raises(InputError, match=r"\(num_train_epochs 3\)"):
            refuse_finished(made, steps=-1, epochs=3.0)
