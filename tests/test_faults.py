"""Rows at fault: found on the device, the first kept, told with all that helps to find it."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill.faults import CONTEXT, FIELDS, Faults, find
from llm_distill.losses.scoring import INFINITE
from llm_distill.rows import Rows, supervised_rows
from tests.fault_worker import CASES, LEGAL, RAISED
from tests.launch import launch

CPU = torch.device("cpu")
IDS = torch.arange(100, 136).view(3, 12)


def rows(*places: tuple[int, int]) -> Rows:
    """Rows at (sequence, position), each predicting the next token."""
    labels = torch.full_like(IDS, -100)
    for sequence, position in places:
        labels[sequence, position + 1] = IDS[sequence, position + 1]
    return supervised_rows(IDS, None, labels, shift=True)


def alone(values: Tensor) -> Tensor:
    return values


def told(faults: Faults, **options: Any) -> str:
    """What is raised."""
    with pytest.raises(FloatingPointError) as caught:
        faults.check(options.get("gather", alone), options.get("decode"))
    return str(caught.value)


class TestFind:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, INFINITE, -1e28])
    def test_the_first_row_and_its_first_term(self, value: float) -> None:
        values = torch.ones(3, 4)
        values[1, 2] = values[2, 2] = values[0, 3] = value
        found = find(values, rows((0, 3), (1, 0), (1, 9), (2, 4)), IDS).tolist()
        named = dict(zip(FIELDS, found, strict=False))
        assert named == {"count": 2, "term": 1, "sequence": 1, "position": 9, "label": 122}
        assert found[len(FIELDS) :] == list(range(114, 122))

    def test_no_fault(self) -> None:
        values = torch.full((2, 3), 0.99 * INFINITE)
        found = find(values, rows((0, 3), (1, 0), (1, 9)), IDS)
        assert not found.any()
        assert found.shape == (len(FIELDS) + CONTEXT,)

    @pytest.mark.parametrize(("terms", "count"), [(0, 3), (2, 0)])
    def test_no_terms_or_no_rows(self, terms: int, count: int) -> None:
        places = [(0, 3), (1, 0), (1, 9)][:count]
        assert not find(torch.zeros(terms, count), rows(*places), IDS).any()

    def test_the_host_reads_nothing(self) -> None:
        """`meta` tensors have no values that could be read."""
        given = rows((0, 3), (1, 0)).to(torch.device("meta"))
        values = torch.zeros(2, 2, device="meta")
        assert find(values, given, IDS.to("meta")).device.type == "meta"


class TestFaults:
    def test_nothing_is_raised_without_a_fault(self) -> None:
        faults = Faults(("a",), CPU)
        faults.check(alone, None)
        faults.add(find(torch.zeros(1, 1), rows((0, 3)), IDS), 1)
        faults.check(alone, None)

    def test_everything_is_told(self) -> None:
        faults = Faults(("CrossEntropy", "Logits"), CPU)
        values = torch.zeros(2, 2)
        values[1, 1] = math.nan
        faults.add(find(values, rows((0, 3), (1, 9)), IDS), 7)
        message = told(faults)
        assert message.startswith(
            "1 row had a loss that is no number, or infinite. The first: Logits at step 7 on rank "
            "0, sequence 1 of its micro-batch, position 9, which predicts token 122 after "
            "[114, 115, 116, 117, 118, 119, 120, 121]. Such rows were left out"
        )
        assert "jsd or skew_forward_kl" in message

    def test_the_first_of_several_steps_is_kept_and_all_are_counted(self) -> None:
        faults = Faults(("a",), CPU)
        bad = torch.full((1, 2), math.inf)
        faults.add(find(torch.zeros(1, 2), rows((0, 3), (1, 9)), IDS), 1)
        faults.add(find(bad, rows((2, 2), (2, 5)), IDS), 2)
        faults.add(find(bad, rows((0, 3), (1, 9)), IDS), 3)
        message = told(faults)
        assert message.startswith("4 rows had")
        assert "a at step 2 on rank 0, sequence 2 of its micro-batch, position 2," in message

    def test_the_beginning_of_a_sequence_has_fewer_tokens_before_it(self) -> None:
        faults = Faults(("a",), CPU)
        faults.add(find(torch.full((1, 1), math.nan), rows((1, 1)), IDS), 1)
        assert "predicts token 114 after [112, 113]." in told(faults)

    def test_a_tokenizer_says_the_text(self) -> None:
        faults = Faults(("a",), CPU)
        faults.add(find(torch.full((1, 1), math.nan), rows((1, 1)), IDS), 1)

        def decode(ids: list[int]) -> str:
            return " ".join(f"w{k}" for k in ids)

        assert "after [112, 113] ('w112 w113')." in told(faults, decode=decode)

    def test_another_rank_is_named_and_all_are_counted(self) -> None:
        faults, other = Faults(("a",), CPU), Faults(("a",), CPU)
        other.add(find(torch.full((1, 1), math.nan), rows((2, 4)), IDS), 5)
        theirs: list[Tensor] = []

        def keep(kept: Tensor) -> Tensor:
            theirs.append(kept)
            return kept

        told(other, gather=keep)

        def gather(kept: Tensor) -> Tensor:
            return torch.cat([kept, *theirs, *theirs])

        message = told(faults, gather=gather)
        assert message.startswith("2 rows had")
        assert "step 5 on rank 1, sequence 2" in message

    def test_asking_starts_over(self) -> None:
        faults = Faults(("a",), CPU)
        faults.add(find(torch.full((1, 1), math.nan), rows((1, 1)), IDS), 1)
        told(faults)
        faults.check(alone, None)

    def test_a_reset_forgets(self) -> None:
        faults = Faults(("a",), CPU)
        faults.add(find(torch.full((1, 1), math.nan), rows((1, 1)), IDS), 1)
        faults.reset()
        faults.check(alone, None)


@pytest.fixture(scope="module", params=[1, 2])
def ended(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """How trainings with broken models ended, for each rank."""
    folder = tmp_path_factory.mktemp("faults")
    launch("tests.fault_worker", str(folder), ranks=request.param)
    files = [folder / f"rank{rank}.json" for rank in range(request.param)]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.distributed
class TestTrainings:
    """Logged at steps 2 and 4 of 5, 8 rows per step on one process or two."""

    def test_all_ranks_raise_the_same(self, ended: list[dict[str, Any]]) -> None:
        first, *others = ended
        assert {facts["world"] for facts in first.values()} == {len(ended)}
        for rank in others:
            assert {k: v["raised"] for k, v in rank.items()} == {
                k: v["raised"] for k, v in first.items()
            }

    @pytest.mark.parametrize("kind", RAISED)
    def test_at_the_next_log(self, ended: list[dict[str, Any]], kind: str) -> None:
        facts = ended[0][kind]
        assert (facts["step"], facts["logs"]) == (2, [])
        assert "The first: Logits at step 1 on rank" in facts["raised"]

    @pytest.mark.parametrize("kind", CASES)
    def test_weights_stay_finite(self, ended: list[dict[str, Any]], kind: str) -> None:
        assert all(rank[kind]["finite"] for rank in ended)

    def test_where_it_was(self, ended: list[dict[str, Any]]) -> None:
        """Row 6 of 8, the third of the second rank; its token 50 is where the teacher breaks."""
        rank, sequence = (0, 6) if len(ended) == 1 else (1, 2)
        raised = ended[0]["teacher nan"]["raised"]
        assert raised.startswith("9 rows had a loss that is no number")
        place = (
            f"on rank {rank}, sequence {sequence} of its micro-batch, position 5, which predicts"
        )
        assert place in raised
        assert "after [72, 106, 26, 31, 30, 50] ('w72 w106 w26 w31 w30 w50')" in raised

    @pytest.mark.parametrize("kind", LEGAL)
    def test_a_loss_that_stays_finite_goes_on(self, ended: list[dict[str, Any]], kind: str) -> None:
        """Though the KL that is logged beside a bounded loss is infinite."""
        facts = ended[0][kind]
        assert (facts["raised"], facts["step"]) == (None, 5)
        logs = [log for log in facts["logs"] if "loss" in log]
        assert [log["kl"] == math.inf for log in logs] == [kind == "student -inf jsd"] * 2
        assert all(0 < log["loss/Logits"] < 20 for log in logs)

    @pytest.mark.parametrize(("kind", "steps"), [("no logs", 5), ("last", 3)])
    def test_what_no_log_tells_is_raised_at_the_end(
        self, ended: list[dict[str, Any]], kind: str, steps: int
    ) -> None:
        facts = ended[0][kind]
        assert facts["step"] == steps
        assert "The first: Logits at step 1 on rank 0" in facts["raised"]
