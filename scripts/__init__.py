"""Commands of this repository; `python -m scripts.quickstart` is the first one to try."""
