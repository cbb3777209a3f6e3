"""Tiny seeded models and data for every test; nothing here touches a network."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels are interpreted; Triton must know it before transformers imports it, through torch.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import LlamaForCausalLM

from tests import tiny

PACKAGE = Path(__file__).resolve().parents[1] / "llm_distill"

TRITON = ("losses/kernel_forms.py", "losses/kernel_rows.py")
"""Modules that need it; only Linux has it."""


def pytest_configure(config: pytest.Config) -> None:
    """Leave out what cannot be imported here, by name: any other import error is one."""
    if importlib.util.find_spec("triton") is None:
        ignored = [str(PACKAGE / name) for name in TRITON]
        config.option.ignore = [*(config.option.ignore or []), *ignored]


@pytest.fixture(autouse=True)
def _quiet_threads() -> None:
    """One thread: these machines have two cores, and tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture
def student() -> LlamaForCausalLM:
    """A Llama of 2 blocks, width 32, 4 heads."""
    return tiny.llama("student")


@pytest.fixture
def teacher() -> LlamaForCausalLM:
    """A Llama of 4 blocks, width 64, 8 heads."""
    return tiny.llama("teacher")
