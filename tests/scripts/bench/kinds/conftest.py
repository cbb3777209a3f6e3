"""What a quickstart leaves, tiny."""

from pathlib import Path

import pytest

from tests import on_disk, tiny


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    on_disk.save_model(folder / "teacher", "teacher")
    tiny.llama("student", vocabulary=on_disk.VOCABULARY).save_pretrained(folder / "distilled")
    on_disk.tokenizer().save_pretrained(folder / "distilled")
    for name in ("train", "eval"):
        text = "\n".join(on_disk.SENTENCES * 16)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder
