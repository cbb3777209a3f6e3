"""The four kinds of targets against the whole distribution they were made of."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_distill.cache import shards
from llm_distill.cache.encoded import Encoded
from llm_distill.cache.estimator import CHUNK, Estimator, Given
from llm_distill.cache.estimators import hidden, hybrid, sampled, topk
from llm_distill.cache.shards import ShardWriter
from llm_distill.errors import InputError
from llm_distill.keys import KEY_BYTES
from llm_distill.losses.divergences import forward_kl
from llm_distill.losses.fused import head_pass
from llm_distill.losses.projection import Projection
from llm_distill.losses.rowwise import Tempered
from llm_distill.losses.sparse import Counts, TopK
from llm_distill.signals import Dense, Factored, Head

V, D = 60, 8
SPARSE = [topk(k=7), sampled(n=20), hybrid(m=3, n=10)]


def logits(rows: int = 9, vocabulary: int = V, seed: int = 0) -> Tensor:
    return 2.0 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def given(z: Tensor, vocabulary: int | None = None, seed: int = 1) -> Given:
    labels = torch.arange(len(z)) % z.shape[1]
    return Given(Dense(z), labels, vocabulary or z.shape[1], seed)


@pytest.mark.parametrize("kind", SPARSE, ids=str)
class TestSparse:
    def test_bytes_on_disk_give_the_same_targets(self, kind: Estimator) -> None:
        kept, _ = kind.encode(given(logits()))
        assert set(kept.columns) == set(kind.columns)
        raw = {
            name: np.frombuffer(column.tobytes(), np.uint8) for name, column in kept.columns.items()
        }
        said, again = (
            kind.decode([part], None) for part in (kept, Encoded(kept.rows, kept.width, raw))
        )
        for one, other in zip(vars(said).values(), vars(again).values(), strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))

    def test_examples_follow_each_other(self, kind: Estimator) -> None:
        parts = [kind.encode(given(logits(rows, seed=rows)))[0] for rows in (2, 5)]
        assert len(kind.decode(parts, None)) == 7
        assert len(kind.decode([], None)) == 0

    def test_more_rows_than_a_chunk_are_the_same_rows(self, kind: Estimator) -> None:
        z = logits(CHUNK + 5)
        kept, told = kind.encode(given(z))
        assert told.rows == len(kind.decode([kept], None)) == CHUNK + 5
        assert told.entropy == pytest.approx(
            float(-(z.softmax(-1) * z.log_softmax(-1)).sum()), rel=1e-4
        )

    def test_no_token_beyond_both_vocabularies(self, kind: Estimator) -> None:
        z = logits()
        z[:, V - 10 :] += 20.0  # the teacher's padding, which should never be told
        kept, _ = kind.encode(given(z, V - 10))
        said = cast("TopK | Counts", kind.decode([kept], None))
        assert int(said.ids.max()) < V - 10


@pytest.fixture(scope="module")
def many() -> Tensor:
    """Rows over a vocabulary of a usual size, flat: draws hardly meet."""
    return logits(400, 32_000)


class TestRoom:
    """What is reserved for rows is enough, and not far too much, once they are in a file."""

    @pytest.mark.parametrize("each", [4, 100])
    @pytest.mark.parametrize(
        "kind",
        [
            *(topk(k=k) for k in (1, 8, 64)),
            *(sampled(n=n) for n in (1, 10, 50)),
            *(hybrid(m=m, n=n) for m, n in ((1, 1), (8, 42))),
        ],
        ids=str,
    )
    def test_of_sparse_targets(
        self, many: Tensor, tmp_path: Path, kind: Estimator, each: int
    ) -> None:
        asked, there = self.written(kind, many, each, tmp_path / "it.parquet")
        assert there <= asked <= 1.5 * there + shards.most_bytes(len(kind.columns), 0, 0, 0.0)

    @pytest.mark.parametrize("sharper", [1, 8])
    @pytest.mark.parametrize(
        "kind", [topk(k=V), topk(k=20), sampled(n=20), hybrid(m=9, n=40)], ids=str
    )
    def test_a_compressor_finds_more_in_others(
        self, tmp_path: Path, kind: Estimator, sharper: int
    ) -> None:
        """Few tokens, of which most are kept, and draws of the same ones."""
        asked, there = self.written(kind, sharper * logits(400), 25, tmp_path / "it.parquet")
        assert there <= asked

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_hidden_states(self, tmp_path: Path, dtype: torch.dtype) -> None:
        head = Head(torch.randn(V, 64).to(dtype))
        said = Factored(torch.randn(400, 64).to(dtype), head)
        kept, _ = hidden().encode(Given(said, torch.zeros(400, dtype=torch.long), V, 0))
        path = tmp_path / "it.parquet"
        with ShardWriter(path, hidden().columns) as writer:
            writer.add(bytes(KEY_BYTES), kept)
        asked = shards.most_bytes(1, 400, 1, 400 * hidden().row_bytes(V, 64, dtype.itemsize))
        assert path.stat().st_size <= asked <= 1.5 * path.stat().st_size + shards.OF_FILE

    def written(self, kind: Estimator, z: Tensor, each: int, path: Path) -> tuple[float, int]:
        """Bytes that are asked for, and those of the file."""
        with ShardWriter(path, kind.columns) as writer:
            for seed, part in enumerate(z.split(each)):
                key = np.random.default_rng(seed).bytes(KEY_BYTES)
                writer.add(key, kind.encode(given(part, seed=seed))[0])
        content = len(z) * kind.row_bytes(z.shape[1], D, 4)
        examples = -(-len(z) // each)
        asked = shards.most_bytes(len(kind.columns), len(z), examples, content)
        return asked, path.stat().st_size


def test_top_k_is_near_and_says_so() -> None:
    z = logits(200)
    kept, told = topk(k=7).encode(given(z))
    said = cast("TopK", topk(k=7).decode([kept], None))
    exact = TopK.of(z, 7)
    order = exact.ids.argsort(-1)
    assert torch.equal(said.ids, exact.ids.gather(-1, order))
    p = torch.cat([exact.log_probs.gather(-1, order), exact.tail[:, None]], -1).double()
    lost = (p.exp() * (p - said.targets().double())).sum(-1)
    assert told.means()["kl"] == pytest.approx(float(lost.mean()), abs=1e-7)
    assert 0 < told.means()["kl"] < 2e-5
    assert told.means()["mass"] == pytest.approx(float(exact.log_probs.exp().sum(-1).mean()))


@pytest.mark.parametrize("kind", [sampled(n=12), hybrid(m=3, n=9)], ids=str)
def test_the_gradient_is_that_of_all_tokens_on_average(kind: Estimator) -> None:
    """Of forward KL, against the dense one in the same head pass; the error shrinks as 1/sqrt."""
    teacher, hidden_states = logits(1), torch.randn(1, D, dtype=torch.float64)
    weight = torch.randn(V, D, dtype=torch.float64)

    def slope(target: Tensor | TopK | Counts) -> Tensor:
        features = hidden_states.clone().requires_grad_()
        rows = len(target)
        total, _ = head_pass(
            Projection(features.expand(rows, -1), weight),
            target,
            torch.zeros(rows, dtype=torch.long),
            [Tempered(forward_kl)],
            torch.tensor([1.0 / rows], dtype=torch.float64),
        )
        (found,) = torch.autograd.grad(total, features)
        return found

    whole = slope(teacher.double())
    parts = [kind.encode(given(teacher, seed=seed))[0] for seed in range(3000)]
    average = slope(cast("Counts", kind.decode(parts, None)))
    one = slope(cast("Counts", kind.decode(parts[:1], None)))
    assert (average - whole).norm() < 0.02 * whole.norm()
    assert (one - whole).norm() > 2 * (average - whole).norm()


def test_hybrid_is_less_noisy_than_draws() -> None:
    z = logits(1)
    p = z.softmax(-1)[0]

    def spread(kind: Estimator) -> float:
        total = 0.0
        for seed in range(300):
            said = cast("Counts", kind.decode([kind.encode(given(z, seed=seed))[0]], None))
            dense = torch.zeros(V).scatter_add_(0, said.ids[0], said.counts[0] / said.draws)
            total += float((dense - p).square().sum())
        return total

    assert spread(hybrid(m=8, n=12)) < 0.5 * spread(sampled(n=20))


def test_weights_of_a_hybrid_sum_to_one() -> None:
    kept, _ = hybrid(m=3, n=10).encode(given(logits()))
    said = cast("Counts", hybrid(m=3, n=10).decode([kept], None))
    assert torch.allclose(said.counts.sum(-1), torch.ones(9), atol=1e-6)
    assert said.draws == 1


def test_draws_are_those_of_the_example_whatever_the_batch() -> None:
    z = logits(6)
    both = [sampled(n=9).encode(given(part, seed=3))[0] for part in (z, z.clone())]
    assert all(
        (both[0].columns[name] == both[1].columns[name]).all() for name in sampled(n=9).columns
    )


class TestStates:
    def test_exact_in_the_dtype_of_the_head(self) -> None:
        head = Head(torch.randn(V, D).bfloat16(), softcap=5.0, scale=2.0)
        states = torch.randn(9, D).bfloat16()
        kept, told = hidden().encode(Given(Factored(states, head), torch.arange(9), V, 0))
        said = cast("Factored", hidden().decode([kept], head))
        assert torch.equal(said.logits(slice(None)), Factored(states, head).logits(slice(None)))
        assert told.means() | {"entropy": 0, "nll": 0} == {
            "kl": 0,
            "mass": 1,
            "entropy": 0,
            "nll": 0,
            "worst": 0,
        }

    def test_what_comes_before_the_head_is_done_already(self) -> None:
        head = Head(torch.randn(V, D), transform=torch.tanh)
        states = torch.randn(9, D)
        kept, _ = hidden().encode(Given(Factored(states, head), torch.arange(9), V, 0))
        bare = Head(head.weight)
        said = cast("Factored", hidden().decode([kept], bare))
        assert torch.equal(said.logits(slice(None)), Factored(states, head).logits(slice(None)))

    def test_no_rows(self) -> None:
        said = cast("Factored", hidden().decode([], Head(torch.randn(V, D))))
        assert said.hidden.shape == (0, D)

    def test_logits_alone_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"keep: hidden needs .* its head is offloaded"):
            hidden().encode(given(logits()))

    def test_without_a_head(self) -> None:
        with pytest.raises(RuntimeError, match="kept without a head"):
            hidden().decode([], None)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (topk(k=0), "topk: k is 0; write a number from 1 to 60, such as 64"),
        (topk(k=61), "topk: k is 61"),
        (sampled(n=256), "sampled: n is 256; write a number from 1 to 255, such as 50"),
        (hybrid(m=60, n=3), "hybrid: m is 60; write a number from 1 to 59"),
        (hybrid(m=3, n=0), "hybrid: n is 0"),
    ],
)
def test_settings_that_do_not_fit(kind: Estimator, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind.check(V)


def test_settings_that_fit() -> None:
    for kind in (*SPARSE, hidden(), topk(k=V), sampled(n=255)):
        kind.check(V)
