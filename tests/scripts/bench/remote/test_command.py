"""The benchmark runs and prints a row for each dialect and k."""

import pytest

from scripts.bench import __main__ as command


def test_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    argv = "remote --sequences 3 --length 8 --k 2 4 --vocab 50 --rounds 1 --concurrency 2"
    assert command.main(argv.split()) == 0
    shown = capsys.readouterr().out
    assert shown.count("vllm") == shown.count("sglang") == 2
    assert "3 sequences of 8 tokens" in shown
