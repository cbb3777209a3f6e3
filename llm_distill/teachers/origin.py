"""Whether a cache is of the teacher that a recipe names, told without loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_distill import loading
from llm_distill.cache import fingerprints
from llm_distill.errors import InputError

if TYPE_CHECKING:
    from llm_distill.cache.manifest import Manifest
    from llm_distill.teachers.local import Local

ANEW = "or another path and run llm-distill cache"


def refuse_other(path: str, of: Local, manifest: Manifest) -> None:
    """Refuse a cache of another teacher than a recipe says.

    Args:
        path: Of the cache, for messages.
        of: What the recipe says.
        manifest: Of the cache.

    Raises:
        InputError: Saying what differs.
    """
    asked, commit = loading.shown(of.name), of.revision
    if asked != manifest.teacher:
        raise InputError(
            f"the cache {path} is of the teacher {manifest.teacher}, and the recipe says {asked}; "
            f"write of: {manifest.teacher}, {ANEW}"
        )
    if commit not in (None, manifest.revision) and _is_commit(commit):
        raise InputError(
            f"the cache {path} is of revision {manifest.revision} of its teacher, and the recipe "
            f"says {commit}; write another path and run llm-distill cache"
        )
    if of.quantize != manifest.quantised:
        raise InputError(
            f"the cache {path} is of {asked}{_in(manifest.quantised)}, and the recipe says "
            f"{asked}{_in(of.quantize)}, which is another teacher; write the same quantize, {ANEW}"
        )
    if isinstance(of.model, str):
        _refuse_other_dtype(path, of, manifest)
        _refuse_other_files(path, of.model, of.revision, manifest)


def _refuse_other_dtype(path: str, of: Local, manifest: Manifest) -> None:
    """Refuse what was loaded in another dtype than the recipe says, where it says one."""
    if of.dtype not in (None, "auto", manifest.dtype) and manifest.dtype:
        raise InputError(
            f"the cache {path} is of its teacher in {manifest.dtype}, and the recipe says dtype: "
            f"{of.dtype}; write dtype: {manifest.dtype}, {ANEW}"
        )


def _refuse_other_files(path: str, name: str, revision: str | None, manifest: Manifest) -> None:
    """Refuse a teacher whose files are here and are not those that were asked.

    A folder without weights is no teacher that could differ, but for its config. A branch of the
    Hub that moved on is the same teacher where its files are.
    """
    folder = loading.folder_of(name, revision)
    if folder is None:
        return
    commit = loading.commit_of(folder)
    if commit is not None and commit == manifest.revision:
        return
    now = fingerprints.of_folder(folder)
    there = dict(manifest.files)
    moved = commit is not None and manifest.revision is not None
    if moved and there != now:
        raise InputError(
            f"the cache {path} is of revision {manifest.revision} of {name}, and {folder} holds "
            f"{commit}; write of: {{Local: {{model: {name}, revision: {manifest.revision}}}}}, "
            f"{ANEW}"
        )
    if not fingerprints.of_weights_alone(now):
        there = {key: value for key, value in there.items() if key in now}
    differ = fingerprints.compared(there, now) if there else []
    if differ:
        raise InputError(
            f"the cache {path} is of another teacher than the one in {folder}, which has the same "
            f"name: {', '.join(differ)}; write the teacher that was asked, {ANEW}"
        )


def _in(quantize: str | None) -> str:
    """How a teacher is quantised, in words."""
    return " with all its bits" if quantize is None else f" in {quantize}"


def _is_commit(revision: str | None) -> bool:
    """Whether a revision names one commit, rather than a branch that moves."""
    return revision is not None and len(revision) == 40
