"""`python -m scripts.bench remote`: what asking a server costs on this side of the line."""
