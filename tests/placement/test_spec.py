"""What cannot be asked for."""

from typing import Any

import pytest

from llm_distill.errors import InputError
from llm_distill.placement.spec import SHARDS, check_spec


def test_what_can(subtests: Any) -> None:
    for shard in SHARDS:
        with subtests.test(shard):
            check_spec(shard, None, None, loaded=False)
    check_spec("auto", None, "auto", loaded=True)


@pytest.mark.parametrize(
    ("shard", "size", "device_map", "loaded", "message"),
    [
        ("fsdp", None, None, False, "shard is 'fsdp'; write one of auto, replica, fsdp2, hsdp, tp"),
        ("fsdp2", None, None, True, "shard='fsdp2' is for models that are loaded here, piece by"),
        ("auto", 2, None, True, "and this one is loaded; give its id or path"),
        ("tp", None, "auto", False, "shard='tp' and device_map='auto' both say where"),
    ],
)
def test_what_cannot(shard: str, size: Any, device_map: Any, loaded: bool, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_spec(shard, size, device_map, loaded=loaded)
