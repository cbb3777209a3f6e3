"""A cache of another teacher than the recipe's is refused, though no teacher is loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llm_distill import Cached, Local
from llm_distill.cache.manifest import FILE, Manifest
from llm_distill.caching import write_cache
from llm_distill.errors import InputError
from llm_distill.teachers import origin
from tests import caches, tiny
from tests.hub_server import LocalHub, hub, run_with_hub

__all__ = ["hub"]  # a fixture


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher on disk, and a cache of it."""
    folder = tmp_path_factory.mktemp("made")
    tiny.llama("teacher").save_pretrained(folder / "teacher")
    tiny.tokenizer().save_pretrained(folder / "teacher")
    capture = caches.capture(folder)
    local = Local(str(folder / "teacher"))
    write_cache(replace(capture, run=replace(capture.run, teacher=local)))
    return folder


@pytest.fixture
def teacher(made: Path, tmp_path: Path) -> Path:
    """The teacher, moved somewhere else."""
    to = tmp_path / "elsewhere" / "teacher"
    return Path(shutil.copytree(made / "teacher", to, copy_function=shutil.copyfile))


def of(made: Path, teacher: Path | Local | str) -> str:
    """The name of the teacher of the cache, where that is the one that is asked for."""
    given = str(teacher) if isinstance(teacher, Path) else teacher
    return Cached(str(made / "cache"), of=given).spec.name


def test_what_was_asked(made: Path, teacher: Path) -> None:
    assert set(Manifest.read(made / "cache" / FILE).files) == {"config.json", "model.safetensors"}
    assert of(made, made / "teacher") == of(made, teacher) == "teacher"


def test_one_that_is_not_there_any_more(made: Path, teacher: Path) -> None:
    (teacher / "model.safetensors").unlink()
    assert of(made, teacher)
    shutil.rmtree(teacher)
    assert of(made, teacher)


def test_other_weights_of_the_same_name(made: Path, teacher: Path) -> None:
    other = tiny.sharpened(type(tiny.llama("teacher")), tiny.llama("teacher").config, seed=1)
    other.save_pretrained(teacher)
    message = (
        r"is of another teacher than the one in .*elsewhere/teacher, which has the same name: "
        r"model\.safetensors \(other content\); write the teacher that was asked, or another path"
    )
    with pytest.raises(InputError, match=message):
        of(made, teacher)


def test_another_config_of_the_same_name(made: Path, teacher: Path) -> None:
    told = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(told | {"rms_norm_eps": 0.1}))
    (teacher / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"same name: config\.json \(other content\)"):
        of(made, teacher)


def test_a_cache_that_knows_no_files(made: Path, teacher: Path, tmp_path: Path) -> None:
    """Written before they were looked at, or of a model that was given."""
    shutil.copytree(made / "cache", tmp_path / "cache")
    replace(Manifest.read(made / "cache" / FILE), files={}).write(tmp_path / "cache" / FILE)
    tiny.qwen3().save_pretrained(teacher)
    assert of(tmp_path, teacher)


def test_another_dtype(made: Path, teacher: Path) -> None:
    for dtype in (None, "auto", "float32"):
        assert of(made, Local(str(teacher), dtype=dtype))
    message = "in float32, and the recipe says dtype: bfloat16; write dtype: float32, or another"
    with pytest.raises(InputError, match=message):
        of(made, Local(str(teacher), dtype="bfloat16"))


class TestHub:
    """A branch that moved on in the Hub's cache, as the client leaves it on the disk."""

    NAME, THERE, NOW = "me/teacher", "a" * 40, "b" * 40

    @pytest.fixture
    def manifest(self, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
        snapshot = tmp_path / "models--me--teacher" / "snapshots" / self.NOW
        shutil.copytree(made / "teacher", snapshot)
        monkeypatch.setattr(
            "llm_distill.loading.try_to_load_from_cache",
            lambda name, file, revision: str(snapshot / file) if name == self.NAME else None,
        )
        found = Manifest.read(made / "cache" / FILE)
        return replace(found, teacher=self.NAME, revision=self.THERE)

    def test_with_the_same_files(self, manifest: Manifest) -> None:
        origin.refuse_other("cache", Local(self.NAME), manifest)

    def test_with_others(self, manifest: Manifest) -> None:
        message = (
            f"is of revision {self.THERE} of me/teacher, and .* holds {self.NOW}; write of: "
            f"{{Local: {{model: me/teacher, revision: {self.THERE}}}}}, or another path"
        )
        changed = replace(manifest, files=dict(manifest.files) | {"model.safetensors": "other"})
        with pytest.raises(InputError, match=message):
            origin.refuse_other("cache", Local(self.NAME), changed)
        same = replace(changed, revision=self.NOW)
        origin.refuse_other("cache", Local(self.NAME), same)

    def test_not_on_this_machine(self, manifest: Manifest) -> None:
        origin.refuse_other("cache", Local("me/other"), replace(manifest, teacher="me/other"))


WRITE = """
from dataclasses import replace
from pathlib import Path
from llm_distill import Cached, Local
from llm_distill.cache.manifest import FILE, Manifest
from llm_distill.caching import write_cache
from tests import caches, tiny

tiny.llama("teacher").push_to_hub("me/teacher")
made = caches.capture(Path("."))
write_cache(replace(made, run=replace(made.run, teacher=Local("me/teacher"))))
print(Cached("cache", of="me/teacher").spec.name)
"""


def test_the_manifest_has_the_commit_of_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    done = run_with_hub(WRITE, hub, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "me/teacher"
    manifest = Manifest.read(tmp_path / "cache" / FILE)
    commit = hub.store.repo("model", "me/teacher").at("main")[0]
    assert manifest.revision == commit
    assert len(commit) == 40
    assert set(manifest.files) == {"config.json", "model.safetensors"}
