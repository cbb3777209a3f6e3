"""The head of a model: what it is, whole where it lies in pieces, and what is refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llm_distill.lm_head import head_of
from llm_distill.losses.fused import head_pass
from llm_distill.losses.rowwise import Nll, Tempered
from llm_distill.signals import Factored
from tests import tiny


@pytest.mark.parametrize(
    ("make", "scaled"),
    [
        (lambda: tiny.llama("teacher"), False),
        (tiny.gpt2, False),
        (lambda: tiny.gemma3(softcap=3.0), True),
        (tiny.bert, False),
    ],
)
def test_the_head_makes_the_models_own_logits(make: Callable[[], Any], scaled: bool) -> None:
    model = make()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        head = head_of(model)
        last = model.base_model(ids).last_hidden_state[0]
        torch.testing.assert_close(head.logits(last), model(ids).logits[0], rtol=1e-4, atol=1e-4)
    assert (head.softcap is not None) is scaled
    assert (head.transform is not None) is (make is tiny.bert)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel has no language-model head; logits need a"):
        head_of(tiny.llama("student").model)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One process, as a mesh."""
    dist.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("biased", [True, False])
def test_a_sharded_head_is_gathered_with_its_gradient(mesh: DeviceMesh, biased: bool) -> None:
    """The pass over the head gets plain tensors, the shards their gradients."""
    model: Any = tiny.llama("student")
    whole = torch.nn.Linear(32, tiny.VOCABULARY, bias=biased)
    sharded = torch.nn.Linear(32, tiny.VOCABULARY, bias=biased)
    for name, value in whole.named_parameters():
        sharded.register_parameter(
            name, torch.nn.Parameter(distribute_tensor(value.detach(), mesh, [Shard(0)]))
        )
    losses = []
    for layer in (whole, sharded):
        model.lm_head = layer
        head = head_of(model)
        assert not isinstance(head.weight, DTensor)
        assert (head.bias is None) is not biased
        rows = torch.linspace(-1.0, 1.0, 5 * 32).view(5, 32)
        student = Factored(rows, head).projection()
        given = (student, torch.zeros(5, tiny.VOCABULARY), torch.tensor([1, 5, 2, 0, 99]))
        loss, _ = head_pass(*given, [Nll(), Tempered()], torch.tensor([0.5, 2.0]))
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]
    for name, value in whole.named_parameters():
        slope = sharded.get_parameter(name).grad
        assert isinstance(slope, DTensor)
        assert torch.equal(slope.full_tensor(), value.grad)  # type: ignore[arg-type]  # it has one


@pytest.mark.distributed
def test_a_transform_in_pieces_is_called_whole(mesh: DeviceMesh) -> None:
    """BERT has layers between backbone and head."""
    model: Any = tiny.bert()
    hidden = torch.linspace(-1.0, 1.0, 3 * 32).view(3, 32)
    with torch.no_grad():
        expected = head_of(model).logits(hidden)
        for module in model.cls.predictions.transform.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                piece = torch.nn.Parameter(distribute_tensor(value.detach(), mesh, [Shard(0)]))
                module.register_parameter(name, piece)
        torch.testing.assert_close(head_of(model).logits(hidden), expected)
