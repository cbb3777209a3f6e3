"""One shard: what the teacher says of each example, whatever it was asked together with."""

import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from llm_distill import HiddenStates
from llm_distill.cache import frames
from llm_distill.cache.estimator import Estimator
from llm_distill.cache.estimators import hidden, hybrid, sampled
from llm_distill.cache.frames import Frame
from llm_distill.cache.layers import coded
from llm_distill.cache.shards import ShardReader
from llm_distill.cache.store import Store
from llm_distill.caching import write_cache
from llm_distill.caching.asking import write_shard
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.layers import explicit
from llm_distill.losses.sparse import TopK
from llm_distill.rows import Batch
from llm_distill.signals import Factored, Request, Signals
from tests import caches, tiny

if TYPE_CHECKING:
    from llm_distill.teachers import Source


def test_targets_are_the_teachers_of_each_row(tmp_path: Path) -> None:
    made = caches.capture(tmp_path)
    made.folder.mkdir()
    source = made.run.teacher.open(Request(logits=True), made.args.device)
    ticks: list[int] = []
    part = made.parts[1]
    shard = write_shard(made, part, source, ticks.append)
    assert sum(ticks) == shard.rows == made.rows(part)
    assert shard.bytes == (made.folder / part.file).stat().st_size
    assert made.is_whole(part)
    reader = ShardReader.open(made.folder / part.file, made.estimator.columns)
    keys = [key for group in reader.keys_by_group() for key in group]
    assert keys == [made.named["train"].keys[place] for place in part.places]
    teacher = tiny.llama("teacher")
    found = [e for g in range(reader.file.num_row_groups) for e in reader.read(g).examples]
    for place, kept in zip(part.places, found, strict=True):
        row = made.datasets["train"][place]
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        wanted = [k for k, label in enumerate(row["labels"][1:]) if label != -100]
        exact = TopK.of(logits[wanted], 16)
        said = cast("TopK", made.estimator.decode([kept], None))
        assert torch.equal(said.ids, exact.ids.sort(-1).values)
        assert torch.allclose(said.tail, exact.tail, rtol=2e-3, atol=1e-4)
        label = kept.halves("facts", 2)[0].tolist()
        targets = torch.tensor(row["labels"])[1:][wanted]
        true = logits[wanted].log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        assert label == pytest.approx(true.tolist(), rel=2e-3, abs=1e-3)


@pytest.mark.parametrize("keep", [caches.TOP, sampled, hybrid, hidden])
@pytest.mark.parametrize("rows", ["supervised", "valid"])
def test_states_are_the_teachers_of_each_token(
    tmp_path: Path, keep: Callable[[], Estimator], rows: Any
) -> None:
    """Of an example without a supervised token as well, where all tokens are asked for."""
    hint = HiddenStates(layers=partial(explicit, pairs=[[2, 3]]), rows=rows)
    own: dict[str, Any] = {"data_collator": Collator(pad_token_id=0)}
    made = caches.capture(tmp_path, keep, hints=[hint], shard_rows=10**6, **own)
    assert made.layers is not None
    write_cache(made)
    part = made.parts[0]
    assert (3 in part.places) == (rows == "valid")
    store = Store.open(made.folder)
    found = store.fetch([made.named["train"].keys[place] for place in part.places])
    frame, teacher = store.frames()[3], tiny.llama("teacher")
    for place, kept in zip(part.places, found, strict=True):
        row = made.datasets["train"][place]
        with torch.no_grad():
            out = teacher(torch.tensor([row["input_ids"]]), output_hidden_states=True)
        exact = out.hidden_states[3][0]
        if rows == "supervised":
            exact = exact[[k for k, label in enumerate(row["labels"][1:]) if label != -100]]
        read = frame.states(coded([kept], 3, 64).values())
        assert kept.rows == sum(label != -100 for label in row["labels"][1:])
        assert read.shape == exact.shape
        away = (exact - frame.centre).square().sum(1)
        assert ((read - exact).square().sum(1) / away).max() < 1e-3


def test_states_that_are_no_numbers(tmp_path: Path) -> None:
    hint = HiddenStates(layers=partial(explicit, pairs=[[2, 4]]))
    made = caches.capture(tmp_path, hints=[hint])
    made.folder.mkdir()
    frames.save({4: Frame.of(torch.randn(9, 64))}, made.folder)
    asked = Request(logits=True, hidden=frozenset({4}))
    source = made.run.teacher.open(asked, made.args.device)

    def broken(given: Batch) -> Signals:
        said = source(given)
        return replace(said, states={4: said.states[4] * torch.nan})

    message = r"example \d+: hidden state 4 of the teacher: numbers that are not finite"
    with pytest.raises(InputError, match=message):
        write_shard(made, made.parts[0], cast("Source", broken), int)
    assert [path.name for path in made.folder.iterdir()] == [frames.FILE]


class Drawing:
    """A collator that supervises fewer tokens each time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        self.calls += 1
        batch = Collator(pad_token_id=0)(examples)
        batch["labels"][:, -1 - self.calls % 3 :] = -100
        return batch


def test_a_collator_that_draws_is_refused(tmp_path: Path) -> None:
    made = caches.capture(tmp_path, data_collator=Drawing())
    made.folder.mkdir()
    source = made.run.teacher.open(Request(logits=True), made.args.device)
    with pytest.raises(InputError, match=r"supervised tokens now and .* the data_collator draws"):
        write_shard(made, made.parts[0], source, int)


@pytest.mark.parametrize("full", [True, False])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    made = caches.capture(tmp_path)
    made.folder.mkdir()
    source = made.run.teacher.open(Request(logits=True), made.args.device)

    def fail(path: Path) -> str:
        assert path.exists()
        raise OSError(errno.ENOSPC if full else errno.EIO, "no luck")

    monkeypatch.setattr("llm_distill.cache.fingerprints.of_file", fail)
    expected = InputError if full else OSError
    with pytest.raises(expected, match="is full; whole shards stay" if full else "no luck"):
        write_shard(made, made.parts[0], source, int)
    assert list(made.folder.iterdir()) == []


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("keep", [caches.TOP, sampled, hybrid, hidden])
def test_logits_that_are_no_numbers(
    tmp_path: Path, keep: Callable[[], Estimator], number: float
) -> None:
    """The example is named, before anything of its shard is written."""
    model = tiny.llama("teacher")
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny.rows(1)[0]["input_ids"][0]] = number
    message = r"example \d+: the .* of the teacher are not finite; leave it out, or load .* dtype"
    with pytest.raises(InputError, match=message):
        write_cache(caches.capture(tmp_path, keep, model=model))
    assert not list((tmp_path / "cache").glob("*.parquet"))


def test_hidden_states_that_the_head_forgives(tmp_path: Path) -> None:
    """A soft cap makes numbers of an infinite state."""
    made = caches.capture(tmp_path, hidden)
    made.folder.mkdir()
    source = made.run.teacher.open(Request(logits=True), made.args.device)

    def broken(given: Batch) -> Signals:
        said = source(given)
        whole = cast("Factored", said.whole)
        head = replace(whole.head, weight=torch.ones_like(whole.head.weight), softcap=30.0)
        return replace(said, distribution=Factored(torch.full_like(whole.hidden, torch.inf), head))

    with pytest.raises(InputError, match=r"example \d+: the last hidden states of the teacher are"):
        write_shard(made, made.parts[0], cast("Source", broken), int)
