"""What a teacher said once, in place of the teacher: `llm-distill cache` writes it down."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_distill import loading
from llm_distill.cache import estimators
from llm_distill.cache.estimator import Estimator
from llm_distill.cache.store import TEACHER, Store
from llm_distill.errors import InputError
from llm_distill.signals import ModelSpec, Request
from llm_distill.teachers import origin
from llm_distill.teachers.cached_source import CachedSource, refuse_signals
from llm_distill.teachers.local import Local

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from llm_distill.cache.manifest import Manifest


@dataclass(frozen=True)
class Cached:
    """A teacher that was asked once, and what it said, on disk: no teacher is loaded.

    Attributes:
        path: The folder of the cache.
        of: The teacher that `llm-distill cache` asks: a Hub id, a path, or `Local`. A training does
            not load it; where it is given, the cache has to be of that teacher: its name, revision,
            `quantize` and `dtype`, and its files where they are still on this machine.
        keep: What is kept (`llm_distill.cache.estimators`): `topk`, `sampled`, `hybrid`, `hidden`;
            `topk` by default. Where a training gives it, the cache has to hold that.
        states: Whether the hidden states are kept as well that the recipe's objectives ask for
            (`HiddenStates`, `Contrastive`), in 8 bit: of the supervised tokens, or of all where one
            asks for `valid` rows. They are a hundred times larger than `topk`, and more.
        states_width: Directions of each layer that are kept, those of the largest variance; None:
            all. A student learns a state of the teacher's whole width, in which everything outside
            these directions stands at its median: distances between states, which relational losses
            compare, are those within the kept directions.
        verify: Whether a training first compares every file with its SHA-256. The checksums of the
            pages are verified in any case, as they are read.
    """

    path: str
    of: str | Local | None = None
    keep: Callable[[], Estimator] | None = None
    states: bool = False
    states_width: int | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        """A name is a `Local`."""
        if not str(self.path).strip():
            raise InputError(
                f"Cached: path is {self.path!r}; write the folder of the cache, such as cache/name"
            )
        object.__setattr__(self, "path", str(Path(self.path).expanduser()))
        if self.of is not None and not isinstance(self.of, Local):
            object.__setattr__(self, "of", Local(self.of))
        width = self.states_width
        if width is not None and not (self.states and type(width) is int and width >= 1):
            raise InputError(
                f"Cached: states_width is {width!r}, and states {self.states}; write states: true, "
                "and a number of directions from 1 on, such as 256"
            )

    @property
    def estimator(self) -> Estimator:
        """What `llm-distill cache` keeps."""
        return (estimators.topk if self.keep is None else self.keep)()

    @cached_property
    def store(self) -> Store:
        """The finished cache.

        Raises:
            InputError: If there is none, or if it is of another teacher or estimator.
        """
        store = Store.open(Path(self.path))
        self._refuse_other(store.manifest)
        return store

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of the teacher, which lies beside the cache."""
        store = self.store
        config = loading.load_config(str(store.folder / TEACHER))
        config._commit_hash = store.manifest.revision
        return config

    @property
    def spec(self) -> ModelSpec:
        """Depth, width and heads of the teacher."""
        known = dict(self.store.manifest.spec)
        blocks = known.pop("blocks")
        return ModelSpec(**known, blocks=None if blocks is None else tuple(blocks))

    def find_tokenizer(self) -> Any | None:  # noqa: ANN401  transformers has no common base that types
        """The tokenizer that cut the data, which lies beside the cache."""
        return loading.find_tokenizer(str(self.store.folder / TEACHER))

    def check(self, request: Request, device: torch.device) -> None:
        """Refuse what no cache holds.

        Raises:
            InputError: Naming the signal and the layer; if there is no finished cache.
        """
        del device
        try:
            refuse_signals(request, f"the cache {self.path}", self.store.manifest)
        except ValueError as error:
            raise InputError(str(error)) from error

    def open(self, request: Request, device: torch.device) -> CachedSource:
        """Start reading.

        Raises:
            ValueError: For what it does not hold, naming the signal and the layer.
        """
        refuse_signals(request, f"the cache {self.path}", self.store.manifest)
        self.check_files()
        return CachedSource(self.store, request, device)

    def check_files(self) -> None:
        """Compare every file with the manifest, once, unless `verify` is false.

        Raises:
            InputError: Naming the first that is not as it was written.
        """
        if self.verify and not self.store.verified:
            self.store.verify(shown=os.environ.get("RANK", "0") == "0")

    def _refuse_other(self, manifest: Manifest) -> None:
        """Refuse a cache that is not what the recipe says."""
        if isinstance(self.of, Local):
            origin.refuse_other(self.path, self.of, manifest)
        if self.keep is not None and self.estimator.name != manifest.estimator.name:
            raise self._other_estimator(manifest)
        if self.keep is not None and vars(self.estimator) != vars(manifest.estimator):
            raise self._other_estimator(manifest)
        self._refuse_other_states(manifest)

    def _refuse_other_states(self, manifest: Manifest) -> None:
        """Refuse a cache without the hidden states that the recipe says it has."""
        kept = manifest.layers
        if self.states and kept is None:
            raise InputError(
                f"the cache {self.path} keeps {manifest.estimator} and no hidden states of layers, "
                "and the recipe says states: true; leave it out, or write another path and run "
                "llm-distill cache"
            )
        width = self.states_width
        if kept is not None and width not in (None, kept.width):
            raise InputError(
                f"the cache {self.path} keeps {kept.width:,} numbers of a hidden state, and the "
                f"recipe says states_width: {width}; leave it out, or write another path and run "
                "llm-distill cache"
            )

    def _other_estimator(self, manifest: Manifest) -> InputError:
        """What is kept is not what was asked for."""
        return InputError(
            f"the cache {self.path} keeps {manifest.estimator}, and the recipe says "
            f"{self.estimator}; leave keep out, or write another path and run llm-distill cache"
        )
