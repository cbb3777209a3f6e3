"""Benchmarks: how far from the floor, and beside which rivals.

`python -m scripts.bench head` times the loss from hidden states to gradients, `python -m
scripts.bench step` a whole training step; `python -m scripts.bench mapping` compares layer maps.
Rivals are optional: `pip install trl liger-kernel`.
"""
