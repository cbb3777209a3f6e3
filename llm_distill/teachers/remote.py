"""A model behind HTTP: vLLM or SGLang tell the likeliest tokens of each row."""

from __future__ import annotations

import copy
import math
import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import SplitResult, urlsplit

from llm_distill import loading
from llm_distill.errors import InputError
from llm_distill.kinds import is_masked
from llm_distill.signals import ModelSpec
from llm_distill.teachers import probing
from llm_distill.teachers.asking import Manner, RemoteSource, refuse
from llm_distill.teachers.client import LOOPBACK, Client
from llm_distill.teachers.dialects import Name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from llm_distill.signals import Request
    from llm_distill.teachers.probing import Served

DEFAULT_KEY = "OPENAI_API_KEY"
"""Variable of the environment that is looked into where none is named."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Remote:
    """A model that a server of vLLM or SGLang runs; tokens in, tokens with log-probabilities out.

    It tells the `top_k` likeliest tokens of each row and the mass of the others, for `Logits` with
    any loss; how that mass is shared is left to `CrossEntropy`. Nothing else travels: hidden states
    and attention are refused.

    Attributes:
        url: `http://host:8000`, with or without `/v1`.
        model: As the server calls it.
        top_k: Tokens of each row; vLLM tells 20 unless it is started with `--max-logprobs 64`.
        of: Hub id or path of what is served, for config and tokenizer; by default `model`. Weights
            are never read.
        dialect: `vllm`, `sglang`, or `auto`: what the server calls itself, `vllm` by default.
        concurrency: Requests at a time, of each rank; a batch is shared out among them.
        timeout: Seconds that an answer may take.
        patience: Seconds in which a request is tried again in training; other ranks wait meanwhile,
            NCCL for 600 s.
        key_from: The variable of the environment that holds the key. By default `OPENAI_API_KEY`,
            which is sent over https and within this machine only; one that is named, everywhere.
        common: Of its tokens, how many the student has, once that is known (`cut`).

    Raises:
        InputError: For a url that is none or holds a secret, or for numbers out of range.
    """

    url: str
    model: str
    top_k: int = 20
    of: str | None = None
    dialect: Name = "auto"
    concurrency: int = 16
    timeout: float = 120.0
    patience: float = 300.0
    key_from: str | None = None
    common: int | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot work, without repeating what may be a secret."""
        object.__setattr__(self, "url", _root(self.url))
        for name, value in (("top_k", self.top_k), ("concurrency", self.concurrency)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"Remote: {name} is {value!r}; write a number from 1 on")
        for name, seconds in (("timeout", self.timeout), ("patience", self.patience)):
            if not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
                raise InputError(f"Remote: {name} is {seconds!r}; write a number of seconds, > 0")
        if self.dialect not in get_args(Name):
            raise InputError(
                f"Remote: dialect is {self.dialect!r}; write one of {', '.join(get_args(Name))}"
            )
        if self.key_from is not None and not _VARIABLE.fullmatch(self.key_from):
            raise InputError(
                "Remote: key_from is no name of a variable; put the key into the environment, and "
                f"write its name here: key_from: {DEFAULT_KEY}"
            )

    def cut(self, tokens: int) -> Remote:
        """The same, for a student that has no more than so many of its tokens.

        Heads of one family are padded to different sizes. What a server tells of padding is put
        aside and the rest normalised, as the logits of a `Local` are cut; what it does not tell
        stays in the tail.
        """
        made = copy.copy(self)  # with what the server said already
        object.__setattr__(made, "common", tokens)
        return made

    @property
    def name(self) -> str:
        """Of the model, for messages and cards; the url is nobody else's business."""
        return self.of or self.model

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of the model that is served.

        Raises:
            InputError: If it cannot be read, or belongs to a masked language model.
        """
        try:
            config = loading.load_config(self.name)
        except InputError as error:
            hint = "" if self.of else "; write of: the Hub id or the path of what is served"
            raise InputError(f"{error}{hint}") from error
        if is_masked(config):
            raise InputError(
                f"Remote: {self.name} is a masked language model, and servers tell what comes next "
                "only; write teacher: {Local: …}"
            )
        return config

    @property
    def spec(self) -> ModelSpec:
        """Depth, width and heads from the config; positions as the server allows."""
        spec = ModelSpec.of(self.config, self.name)
        lengths = (spec.positions, self._served.longest)
        return replace(spec, positions=min((n for n in lengths if n), default=None))

    def find_tokenizer(self) -> Any | None:  # noqa: ANN401  transformers has no common base that types
        """The tokenizer that lies beside `of`; None where there is none."""
        return loading.find_tokenizer(self.name)

    def check(self, request: Request, device: torch.device) -> None:
        """Ask the server whether it can teach.

        Raises:
            InputError: For signals that no server gives, by name; if it does not answer, has
                another tokenizer, or tells fewer tokens.
        """
        del device
        refuse(request, self.name)
        if request.logits:
            _ = self._probed

    def open(self, request: Request, device: torch.device) -> RemoteSource:
        """Make ready to ask.

        Raises:
            InputError: As `check`.
        """
        self.check(request, device)
        manner = Manner(
            name=self.name,
            model=self.model,
            served=self._served,
            top_k=self.top_k,
            vocabulary=self.spec.vocabulary,
            concurrency=self.concurrency,
            patience=self.patience,
            compared=not request.logits or self._probed,
            common=self.common,
        )
        return RemoteSource(self.client(), manner, device)

    def client(self) -> Client:
        """A line to the server.

        Raises:
            InputError: If the key is named and not there, or cannot be sent.
        """
        return Client(self.url, key=self._key(), timeout=self.timeout, concurrency=self.concurrency)

    @cached_property
    def _served(self) -> Served:
        """What the server says of itself."""
        client = self.client()
        try:
            return probing.find(client, self.model, self.dialect)
        finally:
            client.close()

    @cached_property
    def _probed(self) -> bool:
        """Whether its tokenizer was compared, where it can teach; else it raises."""
        vocabulary, tokenizer = self.spec.vocabulary, self.find_tokenizer()
        if self.top_k > vocabulary:
            raise InputError(
                f"Remote: top_k is {self.top_k} and {self.name} has {vocabulary} tokens; write "
                f"top_k: {vocabulary}, or fewer"
            )
        client = self.client()
        try:
            probing.check(client, self._served, self.model, self.top_k, vocabulary)
            return tokenizer is not None and probing.compare(
                client, self.model, tokenizer, self.name
            )
        finally:
            client.close()

    def _key(self) -> str | None:
        """The key, where there is one to be sent."""
        there = urlsplit(self.url)
        if self.key_from is None and there.scheme != "https" and there.hostname not in LOOPBACK:
            return None
        name = self.key_from or DEFAULT_KEY
        key = os.environ.get(name, "").strip()
        if self.key_from is not None and not key:
            raise InputError(
                f"Remote: key_from: the environment has no {self.key_from}; set it, or leave "
                "key_from out"
            )
        if not (key.isascii() and key.isprintable()):  # and not repeated
            raise InputError(
                f"Remote: the key in {name} has characters that no request can carry, such as a "
                "line break inside it; set it to one key, of plain ASCII on one line"
            )
        return key or None


def _root(url: str) -> str:
    """A url without path and slash at its end.

    Raises:
        InputError: If it is none, or if it holds a secret, which is not repeated.
    """
    try:
        parts = urlsplit(url)
    except (AttributeError, ValueError):  # not repeated: nobody knows what is in it
        raise InputError("Remote: the url cannot be read; write http://host:8000") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            "Remote: the url holds more than a host and a path, perhaps a secret; write "
            "http://host:8000, put the key into the environment, and its name into key_from"
        )
    spaced = any(char.isspace() or not char.isprintable() for char in url)
    known = parts.scheme in ("http", "https") and parts.hostname and _has_port(parts)
    if spaced or not known:
        raise InputError(f"Remote: url is {url!r}; write http://host:8000")
    return url.rstrip("/").removesuffix("/v1")


def _has_port(parts: SplitResult) -> bool:
    """Whether the port is a number, where there is one."""
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False
