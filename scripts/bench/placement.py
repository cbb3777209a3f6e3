"""`placement`: what each way of holding a large teacher takes and moves, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench.mapping.tables import markdown

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedConfig

RESULTS = Path(__file__).parent / "RESULTS.md"

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "Qwen3-8B": {
        **QWEN3,
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_attention_heads": 32,
    },
    "Qwen3-32B": {
        **QWEN3,
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "intermediate_size": 25_600,
        "num_attention_heads": 64,
    },
    "Llama-3.1-70B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Of the published configs."""


@dataclass(frozen=True)
class Run:
    """Where a teacher is asked.

    Attributes:
        processes: Of a machine, one GPU each, N.
        tokens: Of one process in a forward of the teacher.
        free: Bytes of a GPU.
        inside: Bytes a second between GPUs of a machine.
        between: The same between machines.
        speed: Operations a second of a GPU.
    """

    processes: int = 8
    tokens: int = 8192
    free: float = 80e9
    inside: float = 300e9
    between: float = 25e9
    speed: float = 400e12


@dataclass(frozen=True)
class Size:
    """A teacher in bf16.

    Attributes:
        parameters: All.
        block: Those of its largest block.
        head: Those of its head.
        depth: Blocks.
        width: Of its hidden states.
    """

    parameters: int
    block: int
    head: int
    depth: int
    width: int

    @property
    def whole(self) -> float:
        """Bytes."""
        return 2.0 * self.parameters

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Size:
        """Counted on the model itself, without weights."""
        from llm_distill import blocks
        from llm_distill.placement.sizes import skeleton

        model: Any = skeleton(config)
        layers = model.get_submodule(blocks.find(model))
        return cls(
            sum(p.numel() for p in model.parameters()),
            max(sum(p.numel() for p in layer.parameters()) for layer in layers),
            model.get_output_embeddings().weight.numel(),
            config.num_hidden_layers,
            config.hidden_size,
        )

    def in_pieces(self, run: Run) -> float:
        """Bytes of a process: its piece, the block that runs, the next one, and the head."""
        return self.whole / run.processes + 2.0 * (2 * self.block + self.head)

    def gathered(self, run: Run) -> float:
        """Bytes that a process receives in a forward under fsdp2."""
        return self.whole * (run.processes - 1) / run.processes

    def summed(self, run: Run) -> float:
        """The same under tp: two sums of everyone's states in each block, by rings."""
        return 2.0 * 4 * self.depth * (run.processes - 1) * run.tokens * self.width

    def even(self, run: Run) -> float:
        """Tokens of a process below which tp moves less."""
        return self.parameters / (4.0 * self.depth * self.width * run.processes)

    def seconds(self, run: Run) -> float:
        """Of the products of a forward."""
        return 2.0 * self.parameters * run.tokens / run.speed


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    usual = Run()
    parser.add_argument("--processes", type=int, default=usual.processes, help="GPUs (default 8)")
    parser.add_argument("--tokens", type=int, default=usual.tokens, help="of one, in a forward")
    parser.add_argument("--free", type=float, default=usual.free, help="bytes of a GPU")
    parser.add_argument("--inside", type=float, default=usual.inside, help="bytes/s in a machine")
    parser.add_argument("--between", type=float, default=usual.between, help="between machines")
    parser.add_argument("--speed", type=float, default=usual.speed, help="operations/s of a GPU")
    parser.add_argument("--markdown", type=Path, nargs="?", const=RESULTS, help="append here")


def execute(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Print the table, and write it."""
    given = {k: v for k, v in vars(options).items() if k in Run.__dataclass_fields__}
    run = Run(**given)
    lines = table(run)
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print("\n".join(lines), markup=False)
    if options.markdown is not None:
        from scripts.bench.table import append

        command = f"`python -m scripts.bench {' '.join(argv)}`, reckoned, not measured"
        append(options.markdown, "\n".join([f"## {title(run)}", "", command, "", *lines]))
    return 0


def title(run: Run) -> str:
    """What was reckoned."""
    return (
        f"placement: {run.processes} GPUs of {run.free / 1e9:.0f} GB, bf16, {run.tokens:,} tokens "
        "on each"
    )


def table(run: Run) -> list[str]:
    """A column for each teacher."""
    sizes = {name: Size.of(config_of(shape)) for name, shape in SHAPES.items()}

    def row(name: str, cell: Callable[[Size], str]) -> list[str]:
        return [name, *(cell(size) for size in sizes.values())]

    def gathers(size: Size) -> str:
        moved = size.gathered(run)
        return f"{_gb(moved)} · {moved / run.inside:.2f} s · {moved / run.between:.1f} s"

    def sums(size: Size) -> str:
        return f"{_gb(size.summed(run))} · {size.summed(run) / run.inside:.2f} s"

    rates = f"at {run.inside / 1e9:.0f} · at {run.between / 1e9:.0f} GB/s"
    return markdown(
        ["", *sizes],
        [
            row("`replica` holds", lambda size: _gb(size.whole)),
            row("`fsdp2` holds, two blocks and the head whole", lambda s: _gb(s.in_pieces(run))),
            row(f"`fsdp2` moves in a forward · {rates}", gathers),
            row(f"`tp` moves · at {run.inside / 1e9:.0f} GB/s", sums),
            row("`tp` moves less below, tokens", lambda size: f"{size.even(run):,.0f}"),
            row("products of a forward", lambda size: f"{size.seconds(run):.2f} s"),
            row("`auto` takes", lambda size: f"`{chosen(size, run)}`"),
        ],
    )


def config_of(shape: Mapping[str, Any]) -> PreTrainedConfig:
    """A config of transformers."""
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.for_model(
        **shape, tie_word_embeddings=False, dtype="bfloat16"
    )
    return config


def chosen(size: Size, run: Run) -> str:
    """What `shard: auto` decides where nothing else is on the GPUs yet."""
    from llm_distill.placement import Facts, Launch, choose

    launch = Launch(run.processes, run.processes, "cuda", int(run.free))
    facts = Facts("teacher", int(size.whole), blocks="model.layers")
    return choose("auto", None, facts, launch).kind


def _gb(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.0f} GB" if size >= 3e10 else f"{size / 1e9:.1f} GB"
