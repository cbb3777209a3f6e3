"""Whether maps that are chosen automatically are as good as the best one chosen by hand.

`python -m scripts.bench mapping` trains small students under every map, weight and seed, one JSON
line per training, and goes on where it was stopped; `--report` makes tables and plots of the lines.
"""
