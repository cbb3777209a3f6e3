"""Tiny seeded models and data for every test; nothing here touches a network."""

import os

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
