"""Which rows a term reads: against positions counted by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llm_distill.losses import mse
from llm_distill.losses.needs import Items
from llm_distill.picks import Pick, Picked, pick
from llm_distill.rows import Batch, Draw, example_keys, supervised_rows, valid_rows
from tests.waiting import Waits

MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])


def batch(mask: Tensor = MASK, *, epoch: int = 0, seed: int = 0, first: int = 5) -> Batch:
    """Real tokens where the mask says so; every second one is supervised."""
    ids = torch.arange(mask.numel()).view(mask.shape) + first
    labels = torch.where((torch.arange(mask.shape[1]) % 2 == 0) & (mask != 0), ids, -100)
    keys = example_keys(ids, mask)
    return Batch(
        {},
        supervised_rows(ids, mask, labels, shift=True),
        valid_rows(ids, mask),
        draw=Draw(seed, epoch, keys),
    )


def positions(picked: Picked) -> list[tuple[int, int]]:
    return list(zip(picked.rows.sequence.tolist(), picked.rows.position.tolist(), strict=True))


def square(student: Tensor, teacher: Tensor) -> Tensor:
    return mse(student, teacher)


class TestPick:
    def test_all_rows_are_one_group(self) -> None:
        given = batch()
        picked = pick(given, Pick("valid"))
        assert (picked.items, picked.groups, picked.skipped) == (12, (12,), 0)
        assert picked.rows is given.valid
        assert pick(given, Pick("supervised")).rows is given.supervised

    def test_a_second_call_gives_the_same(self) -> None:
        given = batch()
        assert pick(given, Pick("valid", most=3)) is pick(given, Pick("valid", most=3))

    def test_sinks_are_the_first_real_tokens_wherever_padding_is(self) -> None:
        picked = pick(batch(), Pick("valid", skip=3))
        assert positions(picked) == [(0, 5), (1, 3), (1, 4), (1, 5)]
        assert picked.rows.per_sequence == (1, 3, 0)
        assert picked.rows.host_position.tolist() == [5, 3, 4, 5]
        right = pick(batch(MASK.flip(1)), Pick("valid", skip=3))
        assert positions(right) == [(0, 3), (1, 3), (1, 4), (1, 5)]

    def test_sinks_count_from_the_first_token_not_from_the_first_supervised_one(self) -> None:
        # Supervised rows predict places 2 and 4: they stand at 1 and 3 of a sequence from 0.
        picked = pick(batch(), Pick("supervised", skip=2))
        assert positions(picked) == [(1, 3)]

    def test_a_mask_that_is_not_there_means_no_padding(self) -> None:
        ids = torch.arange(8).view(2, 4)
        given = Batch({}, supervised_rows(ids, None, ids, shift=True), valid_rows(ids, None))
        assert positions(pick(given, Pick("valid", skip=3))) == [(0, 3), (1, 3)]

    @pytest.mark.parametrize("items", ["token", "sequence", "pooled"])
    def test_few_are_drawn_and_stand_for_all(self, items: Items) -> None:
        picked = pick(batch(), Pick("valid", items, most=2))
        assert picked.items == {"token": 12, "sequence": 3, "pooled": 3}[items]
        sizes = {"token": (2,), "sequence": (2, 2, 2)}
        if items == "pooled":
            assert len(picked.groups) == 2
        else:
            assert picked.groups == sizes[items]
        assert len(set(positions(picked))) == len(picked.rows)
        members = [len(picked.groups)] if picked.pooled else list(picked.groups)
        counted = sum(n * share for n, share in zip(members, picked.share, strict=True))
        assert counted == pytest.approx(picked.items)

    @pytest.mark.parametrize("items", ["token", "sequence", "pooled"])
    def test_what_is_drawn_follows_from_seed_example_and_epoch(self, items: Items) -> None:
        def drawn(given: Batch) -> list[tuple[int, int]]:
            return positions(pick(given, Pick("valid", items, most=2)))

        assert drawn(batch()) == drawn(batch())
        others = [drawn(batch(epoch=epoch)) for epoch in range(1, 9)]
        assert any(other != drawn(batch()) for other in others)
        assert any(drawn(batch(seed=seed)) != drawn(batch()) for seed in range(1, 9))

    def test_padding_changes_nothing_that_is_drawn(self) -> None:
        wide = torch.nn.functional.pad(MASK, (3, 0))
        ids = torch.arange(MASK.numel()).view(MASK.shape) + 5
        padded = torch.nn.functional.pad(ids, (3, 0))
        tokens = []
        for mask, tensor in ((MASK, ids), (wide, padded)):
            valid = valid_rows(tensor, mask)
            draw = Draw(0, 0, example_keys(tensor, mask))
            given = Batch({}, valid, valid, draw=draw)
            tokens.append(pick(given, Pick("valid", most=4, skip=1)).rows.token.tolist())
        assert tokens[0] == tokens[1]

    def test_groups_too_small_are_left_out_and_counted(self) -> None:
        tokens = pick(batch(), Pick("valid", least=13))
        assert (tokens.items, tokens.skipped, len(tokens.rows)) == (0, 1, 0)
        sequences = pick(batch(), Pick("valid", "sequence", least=3))
        assert (sequences.items, sequences.skipped, sequences.groups) == (2, 1, (4, 6))
        pooled = pick(batch(), Pick("valid", "pooled", least=4))
        assert (pooled.items, pooled.skipped, pooled.groups) == (0, 1, ())

    def test_nothing_at_all_is_not_skipped(self) -> None:
        empty = batch(torch.zeros_like(MASK))
        for items in ("token", "sequence", "pooled"):
            picked = pick(empty, Pick("valid", items, least=2))
            assert (picked.items, picked.skipped) == (0, 0)


THEIRS = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
POOLED = Pick("valid", "pooled")


def apart(mask: Tensor = MASK, theirs: Tensor = THEIRS, *, epoch: int = 0) -> Batch:
    """The same sequences in tokens of the teacher's own."""
    return replace(batch(mask, epoch=epoch), theirs=batch(theirs, epoch=epoch, first=900))


class TestTwoTokenizers:
    def test_each_side_has_the_rows_of_the_same_sequences(self) -> None:
        picked = pick(apart(), POOLED)
        theirs = picked.for_teacher
        assert (picked.items, picked.groups, theirs.groups) == (3, (4, 6, 2), (2, 5, 3))
        assert positions(picked) == positions(pick(batch(), POOLED))
        assert positions(theirs) == positions(pick(batch(THEIRS), POOLED))
        assert theirs.share == picked.share == (1.0,)

    def test_one_batch_for_both_is_picked_once(self) -> None:
        picked = pick(batch(), POOLED)
        assert picked.for_teacher is picked

    @pytest.mark.parametrize(
        ("ours", "theirs"), [((1, 0, 1), (1, 1, 1)), ((1, 1, 1), (1, 0, 1)), ((1, 0, 1), (1, 0, 1))]
    )
    def test_a_sequence_empty_for_either_is_dropped_for_both(
        self, ours: tuple[int, ...], theirs: tuple[int, ...]
    ) -> None:
        given = apart(MASK * torch.tensor(ours)[:, None], THEIRS * torch.tensor(theirs)[:, None])
        picked = pick(given, POOLED)
        assert picked.items == 2
        assert picked.rows.sequence.unique().tolist() == [0, 2]
        assert picked.for_teacher.rows.sequence.unique().tolist() == [0, 2]
        few = pick(given, replace(POOLED, least=3))
        assert (few.items, few.skipped, few.groups, few.for_teacher.groups) == (0, 1, (), ())
        assert len(few.rows) == len(few.for_teacher.rows) == 0

    def test_the_first_tokens_are_left_out_of_each_side(self) -> None:
        """The first sequence has two tokens of the teacher's, the last two of the student's."""
        picked = pick(apart(), replace(POOLED, skip=2))
        assert positions(picked) == [(1, 2), (1, 3), (1, 4), (1, 5)]
        assert positions(picked.for_teacher) == [(1, 2), (1, 3), (1, 4)]

    def test_the_same_sequences_are_drawn(self) -> None:
        seen = set()
        for epoch in range(12):
            picked = pick(apart(epoch=epoch), replace(POOLED, most=2))
            kept = picked.rows.sequence.unique().tolist()
            assert picked.for_teacher.rows.sequence.unique().tolist() == kept
            assert positions(picked) == positions(pick(batch(epoch=epoch), replace(POOLED, most=2)))
            assert (picked.items, picked.share, len(picked.groups)) == (3, (1.5,), 2)
            seen.add(tuple(kept))
        assert len(seen) == 3

    @pytest.mark.parametrize(
        "choice", [Pick("valid"), Pick("valid", "sequence"), Pick("supervised", "pooled")]
    )
    def test_what_pairs_tokens_is_refused(self, choice: Pick) -> None:
        with pytest.raises(LookupError, match="tokens of their own, which do not pair; pick valid"):
            pick(apart(), choice)

    def test_a_device_has_both_sides(self) -> None:
        moved = apart().to("meta")
        assert moved.theirs is not None
        assert moved.theirs.rows("valid").index.device.type == "meta"


class TestPicked:
    def test_pooled_states_are_means_of_sequences(self) -> None:
        given = batch()
        picked = pick(given, Pick("valid", "pooled"))
        states = torch.randn(18, 3)
        pooled = picked.gather(states.index_select(0, picked.rows.index))
        expected = [states.view(3, 6, 3)[k][MASK[k] == 1].mean(0) for k in range(3)]
        assert torch.allclose(pooled, torch.stack(expected), atol=1e-6)

    def test_pooling_waits_for_no_device(self) -> None:
        picked = pick(batch(), Pick("valid", "pooled"))
        with Waits() as waits:
            torch.ones(2).to("meta")
            assert waits.found.pop() == (2,)
            picked.gather(torch.empty(len(picked.rows), 4, device="meta"))
        assert waits.found == []

    def test_low_precision_states_are_pooled_in_fp32(self) -> None:
        picked = pick(batch(), Pick("valid", "pooled"))
        assert picked.gather(torch.ones(12, 2, dtype=torch.bfloat16)).dtype == torch.float32

    @pytest.mark.parametrize(
        ("items", "expected"),
        [
            ("token", lambda values: values.sum()),
            ("sequence", lambda values: sum(v.mean() for v in values.split([4, 6, 2]))),
        ],
    )
    def test_totals_count_tokens_or_sequences_alike(
        self, items: Items, expected: Callable[[Tensor], Tensor]
    ) -> None:
        picked = pick(batch(), Pick("valid", items))
        student, teacher = torch.randn(12, 3), torch.randn(12, 3)
        total = picked.total(square, student, teacher)
        assert torch.allclose(total, expected(square(student, teacher)))

    def test_a_loss_sees_one_sequence_at_a_time(self) -> None:
        seen: list[int] = []

        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            seen.append(len(student))
            return (student - teacher).sum(-1)

        picked = pick(batch(), Pick("valid", "sequence"))
        picked.total(loss, torch.ones(12, 2), torch.zeros(12, 2))
        assert seen == [4, 6, 2]

    @pytest.mark.parametrize("items", ["token", "sequence", "pooled"])
    def test_the_drawn_total_is_unbiased(self, items: Items) -> None:
        states = torch.linspace(0.0, 1.0, 18)[:, None].square()

        def total(choice: Pick, epoch: int) -> float:
            picked = pick(batch(epoch=epoch), choice)
            ours = picked.gather(states.index_select(0, picked.rows.index))
            return float(picked.total(square, ours, torch.zeros_like(ours)))

        whole = total(Pick("valid", items), 0)
        drawn = torch.tensor([total(Pick("valid", items, most=2), e) for e in range(400)])
        error = drawn.std() / len(drawn) ** 0.5
        assert abs(drawn.mean() - whole) < 4 * error

    @pytest.mark.parametrize("items", ["token", "sequence", "pooled"])
    def test_no_items_are_a_zero_with_a_graph(self, items: Items) -> None:
        picked = pick(batch(torch.zeros_like(MASK)), Pick("valid", items))
        states = torch.randn(18, 3, requires_grad=True)
        ours = picked.gather(states.index_select(0, picked.rows.index))
        total = picked.total(square, ours, torch.zeros_like(ours))
        total.backward()
        assert total.item() == 0.0
        assert states.grad is not None
        assert not states.grad.any()
