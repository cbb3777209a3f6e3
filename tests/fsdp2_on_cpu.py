"""Lets Accelerate choose FSDP2 on a CPU, where it would silently run DDP. Tests only."""

import os
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType


def fsdp2_on_cpu(**environment: str) -> None:
    """Call before the first TrainingArguments; variables as Accelerate's launcher sets them."""
    defaults = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    os.environ.update(defaults | environment)
    original = state.AcceleratorState.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        shared = state.PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    state.AcceleratorState.__init__ = patched
