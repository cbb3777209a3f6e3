"""Compares the vocabulary-parallel KL with the whole one; started by torchrun.

Usage: python -m tests.vocabulary_worker FILE
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_distill.losses import forward_kl
from llm_distill.losses.vocabulary_parallel import gathered_rows, vocabulary_parallel_kl
from tests.launch import finish

ROWS, WIDTH, VOCABULARY = 5, 12, 30


def drawn(dtype: torch.dtype) -> dict[str, Tensor]:
    """The same on every process: hidden states of all rows, both heads, weights of the rows."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    ranks = dist.get_world_size()
    return {
        "hidden": normal(ranks * ROWS, WIDTH),
        "head": normal(VOCABULARY, WIDTH),
        "teacher": 2 * normal(ranks * ROWS, VOCABULARY),
        "weight": normal(ranks * ROWS).abs(),
    }


def whole(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything on one process."""
    hidden, head = given["hidden"].clone().requires_grad_(), given["head"].clone().requires_grad_()
    values = forward_kl(hidden @ head.T, given["teacher"])
    (values * given["weight"]).sum().backward()
    return {"values": values.detach(), **_slopes(hidden, head)}


def sliced(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Own rows and own tokens."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows, tokens = slice(rank * ROWS, (rank + 1) * ROWS), VOCABULARY // ranks
    mine = slice(rank * tokens, (rank + 1) * tokens)
    hidden = given["hidden"][rows].clone().requires_grad_()
    head = given["head"][mine].clone().requires_grad_()
    values = vocabulary_parallel_kl(gathered_rows(hidden) @ head.T, given["teacher"][:, mine])
    (values * given["weight"]).sum().backward()
    return {"values": values.detach(), **_slopes(hidden, head)}


def _slopes(hidden: Tensor, head: Tensor) -> dict[str, Tensor]:
    assert hidden.grad is not None
    assert head.grad is not None
    return {"hidden": hidden.grad, "head": head.grad}


def off(dtype: torch.dtype) -> dict[str, float]:
    """The largest difference of each, over all processes."""
    given = drawn(dtype)
    rank, tokens = dist.get_rank(), VOCABULARY // dist.get_world_size()
    expected, found = whole(given), sliced(given)
    expected["hidden"] = expected["hidden"][rank * ROWS : (rank + 1) * ROWS]
    expected["head"] = expected["head"][rank * tokens : (rank + 1) * tokens]
    worst = torch.stack([(found[k] - expected[k]).abs().max().double() for k in sorted(found)])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(sorted(found), worst.tolist(), strict=True))


def forbidden() -> dict[str, bool]:
    """-inf on either side: a token that the teacher forbids, and one that the student does."""
    mine = slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)
    inf = -torch.inf
    teacher = torch.tensor([[0.0, 1.0, inf, 2.0], [0.0, 1.0, 2.0, 3.0]])
    student = torch.tensor([[0.0, inf, 1.0, 2.0], [1.0, 2.0, inf, inf]])
    again = torch.tensor([[0.0, 1.0, inf, 2.0], [3.0, 2.0, 1.0, 0.0]])
    given = again[:, mine].clone().requires_grad_()
    fine = vocabulary_parallel_kl(given, teacher[:, mine])
    fine.sum().backward()
    assert given.grad is not None
    bad = vocabulary_parallel_kl(student[:, mine], teacher[:, mine])
    return {
        "finite": bool(fine.isfinite().all() and given.grad.isfinite().all()),
        "identity": float(fine[0]) == 0.0,
        "infinite": bool(bad.isinf().all()),
    }


def main(file: str) -> None:
    """All of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {name: off(getattr(torch, name)) for name in ("float64", "float32")}
    found |= forbidden()
    if dist.get_rank() == 0:
        torch.save(found, file)
    finish()


if __name__ == "__main__":
    main(sys.argv[1])
