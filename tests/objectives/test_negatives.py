"""Facts, the crowd and the queue by hand; what ranks do together is in `test_contrastive`."""

from collections import deque

import pytest
import torch
from torch import Tensor

from llm_distill.losses.features import unit
from llm_distill.objectives.negatives import PADDING, Crowd, Facts, Queue, Ranks


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


class TestFacts:
    facts = Facts(ints(7, 8, 7, 9), ints(0, 0, 1, 1), ints(3, 4, 3, 6))

    def test_items_with_one_label_are_no_negatives(self) -> None:
        expected = torch.eye(4, dtype=torch.bool)
        expected[0, 2] = expected[2, 0] = True
        assert torch.equal(self.facts.blocked(self.facts, 0), expected)

    @pytest.mark.parametrize(
        ("apart", "near"), [(1, [(0, 1)]), (2, [(0, 1)]), (3, [(0, 1), (2, 3)])]
    )
    def test_neighbours_are_none_in_their_own_sequence(
        self, apart: int, near: list[tuple[int, int]]
    ) -> None:
        more = self.facts.blocked(self.facts, apart) ^ self.facts.blocked(self.facts, 0)
        assert more.nonzero().tolist() == sorted([*map(list, near), *[[b, a] for a, b in near]])

    def test_padding_is_no_candidate(self) -> None:
        padded = self.facts._replace(label=ints(7, PADDING, 7, PADDING))
        assert self.facts.blocked(padded, 0)[:, [1, 3]].all()

    def test_sequences_of_two_ranks_are_two(self) -> None:
        other = self.facts.on(Ranks(1, 2))
        assert not (self.facts.on(Ranks(0, 2)).sequence[:, None] == other.sequence).any()


class TestRanks:
    def test_one_process_gives_what_it_has(self) -> None:
        assert Ranks.now() == (0, 1)
        values = torch.randn(3, 2, requires_grad=True)
        gathered = Ranks.now().gather(values, most=5)
        assert torch.equal(gathered, values)
        assert not gathered.requires_grad


class TestCrowd:
    """Two ranks played by one process: what each would hold after the exchange."""

    def crowd(self, own: Tensor, everyone: Tensor, rank: int, hidden: Tensor) -> Crowd:
        waiting = torch.zeros(1, 0, own.shape[-1], dtype=own.dtype)
        return Crowd(own, everyone, hidden, waiting, Ranks(rank, 2), temperature=0.3)

    @pytest.mark.parametrize("counts", [(3, 2), (3, 0), (1, 1)])
    def test_each_rank_has_its_whole_gradient(self, counts: tuple[int, int]) -> None:
        """Of the sum over both ranks, without asking the other one in the backward."""
        most, shares = 4, (2.0, 0.5)
        raw = torch.randn(sum(counts), 1, 2, 6).double().requires_grad_()
        whole = unit(raw)
        sides = whole.detach()
        pair = torch.eye(sum(counts), dtype=torch.bool)
        pair[0, -1] = pair[-1, 0] = True  # one false negative, across the ranks
        scores = whole[:, 0, 0] @ whole[:, 0, 1].mT / 0.3
        away = pair & ~torch.eye(sum(counts), dtype=torch.bool)
        forth, back = scores.masked_fill(away, -torch.inf), scores.mT.masked_fill(away, -torch.inf)
        each = -0.5 * (forth.log_softmax(1) + back.log_softmax(1)).diagonal()
        share = torch.tensor([shares[0]] * counts[0] + [shares[1]] * counts[1]).double()
        (share * each).sum().backward()
        assert raw.grad is not None
        slots = torch.tensor([*range(counts[0]), *range(most, most + counts[1])])
        everyone = torch.zeros(2 * most, 1, 2, 6).double().index_copy(0, slots, sides)
        hidden = torch.ones(sum(counts), 2 * most, dtype=torch.bool).index_copy(1, slots, away)
        parts, found = sides.split(counts), []
        for rank, own in enumerate(parts):
            crowd = self.crowd(own, everyone, rank, hidden.split(counts)[rank])
            found.append(crowd.found(0)[0])
        sums = torch.zeros(2 * most, 2).double().index_copy(0, slots, torch.cat(found))
        weight = torch.zeros(2 * most).double().index_copy(0, slots, share)
        for rank, own in enumerate(raw.detach().split(counts)):
            leaf = own.clone().requires_grad_()
            crowd = self.crowd(unit(leaf), everyone, rank, hidden.split(counts)[rank])
            losses, owed = crowd.losses(0), crowd.owed(0, sums, weight)
            assert owed.item() == 0.0
            assert torch.allclose(losses, each.split(counts)[rank])
            (shares[rank] * losses.sum() + owed).backward()
            assert leaf.grad is not None
            assert torch.allclose(leaf.grad, raw.grad.split(counts)[rank], atol=1e-12)

    def test_found_counts_strictly_nearest_teachers(self) -> None:
        own = torch.eye(3)[:, None, None].expand(3, 1, 2, 3).contiguous()
        hidden = torch.zeros(3, 3, dtype=torch.bool)
        waiting = torch.zeros(1, 0, 3)
        sums, right = Crowd(own, own, hidden, waiting, Ranks(), 1.0).found(0)
        assert int(right) == 3
        assert torch.allclose(
            sums, torch.full((3, 2), torch.tensor([1.0, 0, 0]).logsumexp(0).item())
        )
        same = torch.ones_like(own)
        assert int(Crowd(same, same, hidden, waiting, Ranks(), 1.0).found(0)[1]) == 0


class TestQueue:
    @pytest.mark.parametrize("sizes", [(2, 1, 2), (4, 4), (0, 3, 0), (9,), (3, 11, 1)])
    def test_first_in_first_out(self, sizes: tuple[int, ...]) -> None:
        queue, expected = Queue(2, 4, 3), deque[int](maxlen=4)
        number = 0
        for size in sizes:
            labels = [PADDING if k % 3 == 1 else number + k for k in range(size)]
            number += size
            label = torch.tensor(labels, dtype=torch.long)
            queue.push(label[:, None, None].expand(size, 2, 3).float(), label)
            expected.extend(k for k in labels if k != PADDING)
        held = sorted(int(k) for k in queue.label if k != PADDING)
        assert held == sorted(expected)
        assert int(queue.seen) == sum(k != PADDING for size in sizes for k in [0] * size) - sum(
            (size + 1) // 3 for size in sizes
        )
        full = queue.label != PADDING
        assert torch.equal(queue.vectors[:, full], queue.label[full].expand(2, 3, -1).mT.float())
        assert not queue.vectors[:, ~full].any()

    def test_its_state_is_saved(self) -> None:
        queue = Queue(1, 3, 2)
        queue.push(torch.randn(2, 1, 2), ints(5, 6))
        again = Queue(1, 3, 2)
        again.load_state_dict(queue.state_dict())
        for one in (queue, again):
            one.push(torch.ones(2, 1, 2), ints(7, 8))
        assert torch.equal(queue.vectors, again.vectors)
        assert again.label.tolist() == [8, 6, 7]
