"""KL and agreement of two models, against plain loops in float64."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_distill import Local, comparing, loading
from llm_distill.binding import make_batch
from llm_distill.collation import RowCollator
from llm_distill.comparing import compare, hear
from llm_distill.data import Collator
from llm_distill.placement import Launch
from llm_distill.quantising import settings
from llm_distill.rows import Batch
from llm_distill.signals import Request
from llm_distill.teachers import local
from tests import reference, tiny

CPU = torch.device("cpu")
LOGITS = Request(logits=True)


def batches(*, shift: bool = True) -> list[Batch]:
    """Three sequences, then two, of different lengths."""
    collate = RowCollator(Collator(pad_token_id=0), shift=shift, valid=False)
    rows = tiny.rows(5)
    parts = ([rows[k] for k in range(3)], [rows[3], rows[4]])
    return [make_batch(collate(part), None, seed=0, epoch=0) for part in parts]


@torch.no_grad()
def naive(folder: Path, word: str, given: list[Batch]) -> tuple[float, float, int]:
    """Token by token, from what transformers says."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    small = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings(word, torch.float32), device_map={"": CPU}
    )
    kl, alike, tokens = 0.0, 0, 0
    for batch in given:
        logits = [m(**batch.inputs).logits.flatten(0, 1).double() for m in (whole, small)]
        for place in batch.supervised.index.tolist():
            p, q = (reference.log_softmax(z[place].tolist()) for z in logits)
            kl += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            alike += p.index(max(p)) == q.index(max(q))
            tokens += 1
    return kl / tokens, alike / tokens, tokens


@pytest.mark.parametrize("word", ["bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8"])
@pytest.mark.parametrize("rows", [3, 128])
def test_it_is_the_mean_over_supervised_tokens(
    word: Any, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "ROWS", rows)
    tiny.llama("teacher").save_pretrained(tmp_path)
    teacher, given, args = Local(str(tmp_path), quantize=word), batches(), tiny.arguments(tmp_path)
    source = teacher.open(LOGITS, CPU)
    found = compare(hear(teacher, given, args), given, source, "m", args)
    expected = naive(tmp_path, word, given)
    assert found[0] == pytest.approx(expected[0], rel=1e-2)
    assert found[1:] == pytest.approx(expected[1:], rel=1e-6)
    assert expected[0] > 1e-5


FAMILIES: dict[str, Callable[[], Any]] = {
    "tied": lambda: tiny.llama("teacher", tied=True),
    "gpt2": tiny.gpt2,
    "gemma2": tiny.gemma2,
    "bert": tiny.bert,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_that_are_one_read_nothing(family: str, tmp_path: Path) -> None:
    """Heads with soft caps, scales, biases and layers before them."""
    FAMILIES[family]().save_pretrained(tmp_path)
    teacher, args = Local(str(tmp_path), quantize="bitsandbytes_8bit"), tiny.arguments(tmp_path)
    given = batches(shift=family != "bert")
    said = hear(teacher, given, args)
    found = compare(said, given, teacher.unquantised.open(LOGITS, CPU), "m", args)
    assert abs(found[0]) < 1e-7
    assert found[1:] == (1.0, sum(len(batch.supervised) for batch in given))
    small = compare(said, given, teacher.open(LOGITS, CPU), "m", args)
    assert small[0] > 1e-6


def test_weights_on_disk_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the head is not in memory, logits are kept."""
    tiny.llama("teacher").save_pretrained(tmp_path)
    teacher, given = Local(str(tmp_path), quantize="torchao_int8"), batches()
    args = tiny.arguments(tmp_path)
    whole = hear(teacher, given, args)
    load = loading.load_model
    blocks = {f"model.layers.{k}": "disk" for k in range(4)}
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}

    def on_disk(*positional: Any, **options: Any) -> Any:
        assert options["device_map"] == "auto"
        return load(*positional, **options | {"device_map": places | blocks | {"lm_head": "disk"}})

    monkeypatch.setattr(local, "launched", lambda device: Launch(free=1_000_000))
    monkeypatch.setattr(loading, "load_model", on_disk)
    apart = hear(teacher, given, args)
    assert whole.head is not None
    assert apart.head is None
    monkeypatch.undo()
    source = teacher.open(LOGITS, CPU)
    expected = compare(whole, given, source, "m", args)
    assert compare(apart, given, source, "m", args) == pytest.approx(expected, rel=1e-4)


def test_it_lets_the_whole_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.llama("teacher").save_pretrained(tmp_path)
    teacher = Local(str(tmp_path), quantize="torchao_int8")
    sources: list[Any] = []
    opens = Local.open

    def watched(self: Local, *given: Any) -> Any:
        sources.append(opens(self, *given))
        assert self.quantize is None
        return sources[-1]

    monkeypatch.setattr(Local, "open", watched)
    hear(teacher, batches(), tiny.arguments(tmp_path))
    assert [source.model for source in sources] == [None]
    with pytest.raises(RuntimeError, match="a fault on the way"):
        hear(teacher, [Broken()], tiny.arguments(tmp_path))  # type: ignore[list-item]
    assert [source.model for source in sources] == [None, None]


class Broken:
    """What is no batch."""

    @property
    def inputs(self) -> None:
        """As of a batch."""
        raise RuntimeError("a fault on the way")
