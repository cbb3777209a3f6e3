"""Benchmarks: how far from the floor, and beside which rivals.

`python -m scripts.bench head` times the loss from hidden states to gradients, `python -m
scripts.bench step` a whole training step. Rivals are optional: `pip install trl liger-kernel`.
"""
