"""How a teacher is spread over processes: a pure function of sizes and of the launch.

Everything that cannot work is refused here, before a weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llm_distill.errors import InputError
from llm_distill.placement.machines import check_copies, check_size, uneven

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llm_distill.placement.machines import Launch
    from llm_distill.placement.spec import Shard

SHARE = 0.5
"""Of a device's free memory that a whole teacher may take; the student, its optimizer and its
activations come later and need the rest."""


@dataclass(frozen=True)
class Facts:
    """What is known of a model before its weights load.

    Attributes:
        name: For messages.
        size: Bytes of its weights.
        heads: Query heads of a block.
        kv_heads: Heads of keys and values of a block.
        splits: Whether transformers knows how to split its layers (tensor parallelism).
        blocks: Path of the list of its blocks; None where it is not to be found.
        quantised: Whether its weights are stored in fewer bits, and so cannot be cut into pieces.
        travels: Whether they may wait in memory or on disk for their turn on the device.
    """

    name: str
    size: int
    heads: int = 0
    kv_heads: int = 0
    splits: bool = False
    blocks: str | None = None
    quantised: bool = False
    travels: bool = True


@dataclass(frozen=True)
class Placement:
    """Where the pieces of a model lie; the product of the three numbers is the processes.

    Attributes:
        kind: What was chosen; `offload` over this process's device, memory and disk.
        fsdp: Processes that hold a piece each, and gather a block when it runs (`zero3`: a layer).
        replicas: Copies of all pieces.
        tp: Processes that compute each layer together.
        room: Bytes of the device that it may take, the rest being for the student; 0: all it needs.
        reason: In words.
    """

    kind: Literal["replica", "fsdp2", "hsdp", "tp", "zero3", "offload"]
    fsdp: int = 1
    replicas: int = 1
    tp: int = 1
    room: int = 0
    reason: str = ""

    @property
    def pieces(self) -> int:
        """Processes that share one copy."""
        return self.fsdp * self.tp

    def describe(self, facts: Facts) -> str:
        """One line for the log.

        >>> placed = Placement("fsdp2", fsdp=8, reason="as asked")
        >>> placed.describe(Facts("Qwen3-32B", 65_520_000_000))
        'teacher Qwen3-32B: 65.5 GB, fsdp2, 8.2 GB on each of 8 processes (as asked)'
        """
        told = f"teacher {facts.name}: {_gigabytes(facts.size)}, {self.kind}"
        if self.pieces > 1:
            copies = f" x {self.replicas} copies" if self.replicas > 1 else ""
            split = f"{self.tp} x {self.fsdp}" if self.tp > 1 and self.fsdp > 1 else self.pieces
            each = _gigabytes(facts.size // self.pieces)
            told += f", {each} on each of {split} processes{copies}"
        return f"{told} ({self.reason})"


def compare(word: str, small: Facts, large: Facts) -> str:
    """What quantising saves, for the log.

    >>> compare("bitsandbytes_4bit", Facts("Qwen3-32B", 17 * 10**9), Facts("", 65 * 10**9))
    'teacher Qwen3-32B: bitsandbytes_4bit, 17.0 GB instead of 65.0 GB'
    """
    sizes = f"{_gigabytes(small.size)} instead of {_gigabytes(large.size)}"
    return f"teacher {small.name}: {word}, {sizes}"


def choose(shard: Shard, size: int | None, facts: Facts, launch: Launch) -> Placement:
    """Where the weights go.

    Args:
        shard: What was asked for. `auto`: whole on every process where that takes at most half of
            the free memory, else in pieces inside each machine, else, in one process, over its
            device, its memory and its disk.
        size: Processes that share a copy (`hsdp`) or a layer (`tp`); by default those of a machine.
        facts: Of the model.
        launch: Of the run.

    Raises:
        InputError: If it does not go with the launch or the model.

    >>> from llm_distill.placement import Launch
    >>> launch = Launch(world=16, local=8, device="cuda", free=80 * 10**9)
    >>> choose("auto", None, Facts("7B", 15 * 10**9), launch).kind
    'replica'
    >>> placed = choose("auto", None, Facts("70B", 141 * 10**9, blocks="model.layers"), launch)
    >>> placed.kind, placed.fsdp, placed.replicas
    ('hsdp', 8, 2)
    """
    if shard == "auto":
        if size is not None:
            raise InputError(
                f"teacher {facts.name}: shard_size={size} without a shard; write shard: hsdp or tp "
                "beside it, or leave it out"
            )
        return _automatic(facts, launch)
    if shard == "replica":
        _refuse_size(shard, size, facts)
        return Placement("replica", replicas=launch.world, reason="as asked")
    _check_launch(shard, facts, launch)
    if shard in ("fsdp2", "zero3"):
        _refuse_size(shard, size, facts)
        placed = Placement(shard, fsdp=launch.world, reason="as asked")
        return _checked(placed, facts) if shard == "fsdp2" else placed
    shared = launch.local if size is None else size
    check_size(shard, size, facts.name, launch)
    rest = launch.world // shared
    if shard == "hsdp":
        check_copies(rest, facts.name, launch)
        return _checked(Placement("hsdp", shared, replicas=rest, reason="as asked"), facts)
    placed = Placement("tp", fsdp=rest, tp=shared, reason="as asked")
    _check_heads(placed, facts)
    return _checked(placed, facts) if rest > 1 else placed


def _automatic(facts: Facts, launch: Launch) -> Placement:
    """Whole where that fits; else in pieces inside a machine; else over all this process has."""
    room = int(SHARE * launch.free)
    told = f"of {_gigabytes(launch.free)} free on {launch.device}"
    if facts.size <= room:
        reason = f"it takes {facts.size / max(1, launch.free):.0%} {told}"
        return Placement("replica", replicas=launch.world, reason=reason)
    reason = f"whole it would take more than half {told}"
    if launch.world == 1 and facts.travels:
        return Placement("offload", room=room, reason=reason)
    if facts.blocks is None or facts.quantised:
        why = "weights are quantised" if facts.quantised else "blocks are not to be found"
        pieces = "wait elsewhere" if launch.world == 1 else "lie in pieces"
        raise InputError(
            f"teacher {facts.name} takes {_gigabytes(facts.size)}, more than half {told}, and its "
            f"{why}, so that it cannot {pieces}; write shard: replica to load it whole all "
            "the same, or take a smaller teacher"
        )
    if not launch.even:
        raise InputError(
            f"teacher {facts.name} takes {_gigabytes(facts.size)}, more than half {told}, and "
            f"{uneven(launch)}, so that a copy cannot lie in pieces inside each; start the same "
            "number on every machine, or write shard: fsdp2, which keeps one copy on all of them"
        )
    inside = launch.local if launch.local > 1 else launch.world
    copies = launch.world // inside
    if copies == 1:
        return Placement("fsdp2", fsdp=inside, reason=reason)
    return Placement("hsdp", fsdp=inside, replicas=copies, reason=reason)


def _check_launch(shard: str, facts: Facts, launch: Launch) -> None:
    """Refuse pieces where there is one process."""
    if launch.world == 1:
        raise InputError(
            f"teacher {facts.name}: shard={shard!r} spreads it over processes and there is one; "
            "start several (accelerate launch --num_processes 8 …; on a CPU torchrun "
            "--nproc_per_node 2 …), or write device_map: auto"
        )
    if shard == "zero3" and not launch.deepspeed:
        raise InputError(
            f"teacher {facts.name}: shard='zero3' needs a run of DeepSpeed (recipes/accelerate/"
            "zero3.yaml), and this is none; write shard: fsdp2"
        )
    if facts.quantised:
        raise InputError(
            f"teacher {facts.name}: its weights are quantised and cannot be cut into pieces; write "
            "shard: replica"
        )


def _refuse_size(shard: str, size: int | None, facts: Facts) -> None:
    """Refuse a number that says nothing."""
    if size is not None:
        raise InputError(
            f"teacher {facts.name}: shard={shard!r} takes no shard_size ({size}); leave it out, or "
            "write shard: hsdp to keep several copies"
        )


def _check_heads(placed: Placement, facts: Facts) -> None:
    """Refuse tensor parallelism that the model has no plan or too few heads for."""
    if not facts.splits:
        raise InputError(
            f"teacher {facts.name}: transformers has no tensor-parallel plan for it; write shard: "
            "fsdp2"
        )
    counts: Mapping[str, int] = {"query": facts.heads, "key and value": facts.kv_heads}
    for what, count in counts.items():
        if count % placed.tp:
            world = placed.tp * placed.fsdp
            fitting = [
                n for n in range(2, placed.tp) if world % n == count % n == facts.heads % n == 0
            ]
            instead = f"shard_size: {fitting[-1]}, or shard: fsdp2" if fitting else "shard: fsdp2"
            raise InputError(
                f"teacher {facts.name}: {placed.tp} processes cannot share its {count} {what} "
                f"heads; write {instead}"
            )


def _checked(placed: Placement, facts: Facts) -> Placement:
    """A placement in pieces, of a model whose blocks are known."""
    if facts.blocks is None:
        raise InputError(
            f"teacher {facts.name}: its blocks are not to be found, so that all of it would be "
            "gathered at once; write shard: replica, or take another teacher"
        )
    return placed


def _gigabytes(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"
