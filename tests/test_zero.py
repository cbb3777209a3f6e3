"""DeepSpeed's configuration is set aside and comes back; with DeepSpeed itself in tests/zero3."""

from collections.abc import Iterator
from typing import Any

import pytest
from transformers.integrations import deepspeed as hf_deepspeed

from llm_distill import zero
from tests import tiny


class Config:
    """What transformers keeps, without DeepSpeed."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        hf_deepspeed.set_hf_deepspeed_config(self)

    def is_zero3(self) -> bool:
        return bool(self.config.get("stage") == 3)


@pytest.fixture
def alive() -> Iterator[Config]:
    """A configuration of ZeRO-3."""
    yield Config({"stage": 3})
    hf_deepspeed.unset_hf_deepspeed_config()


def test_without_deepspeed() -> None:
    assert not zero.is_running()
    assert not zero.is_zero3()
    with zero.aside():
        assert not zero.is_running()


def test_models_that_are_loaded_meanwhile_are_whole(alive: Config) -> None:
    assert zero.is_running()
    assert zero.is_zero3()
    with zero.aside():
        assert not zero.is_running()
        with zero.aside():
            assert not zero.is_zero3()
        assert not zero.is_zero3()
    assert hf_deepspeed.deepspeed_config() is alive.config


def test_it_comes_back_after_an_error(alive: Config) -> None:
    with pytest.raises(OSError, match="gone"), zero.aside():
        raise OSError("gone")
    assert hf_deepspeed.deepspeed_config() is alive.config


def test_a_stage_that_leaves_models_whole() -> None:
    kept = Config({"stage": 2})
    assert zero.is_running()
    assert not zero.is_zero3()
    del kept
    assert not zero.is_running()


def test_another_engine(alive: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_deepspeed, "HfDeepSpeedConfig", Config)
    with zero.instead({"stage": 3, "other": True}):
        assert hf_deepspeed.deepspeed_config() == {"stage": 3, "other": True}
    assert hf_deepspeed.deepspeed_config() is alive.config


def test_contradictions(alive: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trying(Config):
        mismatches: list[str]

        def trainer_config_process(self, args: Any) -> None:
            self.mismatches = [f"- ds clipping={self.config['clipping']} vs hf {args.max_steps}"]

    monkeypatch.setattr(hf_deepspeed, "HfTrainerDeepSpeedConfig", Trying)
    found = zero.mismatches({"clipping": 1.0}, tiny.arguments("out"))
    assert found == ["ds clipping=1.0 vs hf 3"]
    assert hf_deepspeed.deepspeed_config() is alive.config
