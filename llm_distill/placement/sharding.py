"""Loading a frozen model in pieces: each process reads and keeps only its slices.

transformers does the loading; what is added here is a plan for models it has none for, and that
nothing stays gathered after a forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers.distributed.configuration_utils import DistributedConfig

from llm_distill import loading, pieces
from llm_distill.placement.sizes import skeleton

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from llm_distill.placement.choice import Facts, Placement

FREED, KEPT = "free_full_weight", "keep_full_weight"
"""Plans of transformers: whether a group's weights go once it has run. We free the kept ones too;
the word decides how it groups a tied head."""

BACKBONE = "run_backbone"
"""The method that runs all but the head of a model in pieces; FSDP gathers for methods it knows."""


def load_sharded(
    name: str,
    config: PreTrainedConfig,
    placement: Placement,
    facts: Facts,
    *,
    dtype: torch.dtype | str,
    backbone: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A frozen model of which this process holds its pieces.

    A collective: every process of the run calls it.

    Args:
        name: Id or path.
        config: Of the model, perhaps cut.
        placement: As `choose` made it.
        facts: Of the same model.
        dtype: A torch dtype, its name, or `auto`.
        backbone: Leave the language-model head out.
        options: For `from_pretrained`.

    Raises:
        RuntimeError: If fewer groups were made than there are blocks: all of it would be gathered
            at once, with the same numbers.
    """
    plan = None
    if placement.fsdp > 1:
        # FSDP gives its root another class, under which transformers records no hidden states: the
        # backbone must not be the root.
        backbone = False
        bare = skeleton(config, trust_remote_code=bool(options.get("trust_remote_code")))
        plan = None if _plans(bare) else _own_plan(bare, facts)
    model = loading.load_model(
        name,
        config,
        dtype=dtype,
        backbone=backbone,
        distributed_config=DistributedConfig(
            tp_size=placement.tp,
            fsdp_size=placement.fsdp,
            dp_replicate_size=placement.replicas,
            fsdp_plan=plan,
        ),
        **options,
    )
    model.eval().requires_grad_(requires_grad=False)
    if placement.fsdp > 1:
        _free_after_forward(model)
        _check_groups(model, facts)
    return model


def run_backbone(model: PreTrainedModel) -> Any:  # noqa: ANN401  a method of the model
    """What runs all but the head: of a model in pieces through its root, which gathers them."""
    own = model.__dict__.get(BACKBONE)
    return model.base_model if own is None else own


def groups(model: nn.Module) -> list[str]:
    """The modules whose weights are gathered together, one at a time."""
    return [
        name or "<root>" for name, module in model.named_modules() if isinstance(module, FSDPModule)
    ]


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights that this process holds now."""
    return sum({id(weight): pieces.resident(weight) for weight in model.parameters()}.values())


def _plans(bare: PreTrainedModel) -> bool:
    """Whether transformers' own plan finds the blocks of a model."""
    names = {name for name, _ in bare.named_modules()}
    prefixes = [rule.partition(".*")[0] for rule in bare.fsdp_plan if ".*" in rule]
    return bool(prefixes) and all(prefix in names for prefix in prefixes)


def _own_plan(bare: PreTrainedModel, facts: Facts) -> dict[str, str]:
    """Each block, the embedding and the head for themselves."""
    names = {id(module): name for name, module in bare.named_modules()}
    ends = (bare.get_input_embeddings(), bare.get_output_embeddings())
    return {f"{facts.blocks}.*": FREED} | {names[id(m)]: KEPT for m in ends if id(m) in names}


def _free_after_forward(model: PreTrainedModel) -> None:
    """Nothing stays gathered: a frozen model has no backward that would want it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(reshard_after_forward=True, recurse=False)

    def backbone(**inputs: Any) -> Any:  # noqa: ANN401  what the backbone returns
        return model.base_model(**inputs)

    model.__dict__[BACKBONE] = backbone
    register_fsdp_forward_method(model, BACKBONE)


def _check_groups(model: PreTrainedModel, facts: Facts) -> None:
    """Refuse a model that would be gathered whole."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    made = groups(model)
    if len(made) <= depth:
        raise RuntimeError(
            f"teacher {facts.name} ({type(model).__name__}) lies in {len(made)} groups and has "
            f"{depth} blocks: {', '.join(made)}; please report it, and write shard: replica"
        )
