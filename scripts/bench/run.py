"""A benchmark from its settings to its report."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

from scripts.bench import peak
from scripts.bench.arms import Answer, Arm, Benchmark, UnavailableError, errors
from scripts.bench.machine import Machine
from scripts.bench.measure import Run, interleaved
from scripts.bench.report import Report, Result
from scripts.bench.settings import (
    AttentionSettings,
    HeadSettings,
    HiddenSettings,
    StepSettings,
)

Tell = Callable[[str], None]


def quiet() -> None:
    """Let third parties speak of errors only, and reach for no network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore")


def start(settings: HeadSettings | StepSettings) -> Benchmark:
    """The benchmark of some settings, with its threads and its seed."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    if isinstance(settings, AttentionSettings):
        from scripts.bench.attention import AttentionBenchmark

        return AttentionBenchmark(settings)
    if isinstance(settings, HiddenSettings):
        from scripts.bench.hidden import HiddenBenchmark

        return HiddenBenchmark(settings)
    if isinstance(settings, StepSettings):
        from scripts.bench.step import StepBenchmark

        return StepBenchmark(settings)
    from scripts.bench.head import Head

    return Head(settings)


def execute(
    name: str, settings: HeadSettings | StepSettings, argv: Sequence[str], tell: Tell
) -> Report:
    """Time all arms, compare what they computed, and measure their peaks.

    Args:
        name: Of the benchmark.
        settings: What was asked for.
        argv: For the report.
        tell: Is told what happens now.
    """
    machine = Machine.here(settings, argv)
    benchmark = start(settings)
    chosen = [arm for arm in benchmark.arms() if settings.wants(arm.name)]
    results = {
        arm.name: Result(arm.name, arm.kind, arm.note, returned=arm.returned) for arm in chosen
    }
    runs = _prepared(benchmark, chosen, results, tell)
    tell(f"{settings.rounds} rounds of {len(runs)} arms")
    times = interleaved(
        runs, rounds=settings.rounds, device=settings.device, before=benchmark.forget
    )
    for arm_name, found in times.items():
        results[arm_name].times = found
    benchmark.forget()
    if settings.memory:
        for arm in chosen:
            if arm.name in runs and arm.memory:
                tell(f"peak of {arm.name}")
                results[arm.name].peak = peak.of(name, settings, arm.name)
    return Report(
        benchmark=name,
        title=benchmark.title,
        settings=settings,
        facts=benchmark.facts(),
        columns=benchmark.ratios,
        lean=benchmark.lean,
        machine=machine,
        results=list(results.values()),
    )


def _prepared(
    benchmark: Benchmark, chosen: Sequence[Arm], results: Mapping[str, Result], tell: Tell
) -> dict[str, Run]:
    """The untimed round: what can run, each arm compared with its right answer."""
    right: Callable[[str], Answer] = cache(benchmark.answer)
    runs: dict[str, Run] = {}
    for arm in chosen:
        tell(f"untimed: {arm.name}")
        benchmark.forget()
        try:
            run = arm.make()
            loss = run()
        except UnavailableError as error:
            results[arm.name].missing = str(error)
            continue
        except Exception as error:
            if arm.kind != "rival":
                raise
            results[arm.name].missing = f"failed: {type(error).__name__}: {error}"
            continue
        runs[arm.name] = run
        if arm.answer is not None:
            results[arm.name].loss = None if loss is None else float(loss.detach())
            results[arm.name].errors = errors(loss, benchmark.gradients(), right(arm.answer))
    return runs
