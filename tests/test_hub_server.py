"""The local hub serves the real clients, and refuses what the Hub refuses."""

from pathlib import Path

import pytest

from tests.hub_card import card_errors
from tests.hub_server import TOKEN, LocalHub, hub, run_with_hub, xet_hub

__all__ = ["hub", "xet_hub"]  # fixtures

PUSH_AND_PULL = """
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, vocab_size=32)
model = LlamaForCausalLM(config)
model.push_to_hub("me/student")
open("notes.txt", "w").write("by upload_folder")
HfApi().upload_folder(repo_id="me/student", folder_path=".", allow_patterns="notes.txt")
loaded, report = AutoModelForCausalLM.from_pretrained("me/student", output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
for name, weight in model.state_dict().items():
    assert torch.equal(weight, loaded.state_dict()[name]), name
"""

UPLOAD = """
from huggingface_hub import HfApi
HfApi().create_repo("me/student", exist_ok=True)
HfApi().upload_file(
    path_or_fileobj=open("README.md", "rb"), path_in_repo="README.md", repo_id="me/student"
)
"""

GOOD = """---
license: apache-2.0
language: [en, multilingual]
base_model: Qwen/Qwen3-0.6B
base_model_relation: finetune
datasets: [imdb]
tags: [distillation]
pipeline_tag: text-generation
model-index:
- name: student
  results:
  - task: {type: text-generation}
    dataset: {type: imdb, name: IMDB}
    metrics: [{type: perplexity, value: 12.5}]
---
# Student
"""


def write_card(folder: Path, card: str = GOOD) -> None:
    (folder / "README.md").write_text(card)


def test_a_model_travels_by_lfs(hub: LocalHub, tmp_path: Path) -> None:
    done = run_with_hub(PUSH_AND_PULL, hub, tmp_path)

    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "notes.txt"} <= set(hub.files("me/student"))
    assert hub.text("me/student", "notes.txt") == "by upload_folder"
    assert len(hub.asked("PUT", "/_lfs/")) == 1
    assert {r.token for r in hub.asked("POST", "/commit/")} == {TOKEN}


def test_a_model_travels_by_xet(xet_hub: LocalHub, tmp_path: Path) -> None:
    done = run_with_hub(PUSH_AND_PULL, xet_hub, tmp_path)

    assert done.returncode == 0, done.stderr
    assert xet_hub.files("me/student")["model.safetensors"].xet
    assert xet_hub.asked("GET", "xet-write-token")
    assert not xet_hub.asked("PUT")


def test_a_wrong_token_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    write_card(tmp_path)
    done = run_with_hub(UPLOAD, hub, tmp_path, token="hf_" + "wrong" * 4)

    assert done.returncode == 1
    assert "Invalid credentials" in done.stderr
    assert not hub.store.repos


def test_injected_faults_strike_as_often_as_asked(hub: LocalHub, tmp_path: Path) -> None:
    write_card(tmp_path)
    hub.fail("POST", "/commit/", 500)

    failed, done = (run_with_hub(UPLOAD, hub, tmp_path) for _ in range(2))

    assert failed.returncode == 1
    assert "injected fault" in failed.stderr
    assert done.returncode == 0, done.stderr
    assert len(hub.asked("POST", "/commit/")) == 2


def test_the_client_refuses_a_bad_card(hub: LocalHub, tmp_path: Path) -> None:
    write_card(tmp_path, GOOD.replace("apache-2.0", "gpl-3"))
    done = run_with_hub(UPLOAD, hub, tmp_path)

    assert done.returncode == 1
    assert 'ValueError: Invalid metadata in README.md.\n- "license" must be one of' in done.stderr
    assert "README.md" not in hub.files("me/student")


def test_a_good_card_and_one_without_metadata_are_accepted() -> None:
    assert card_errors(GOOD) == []
    assert card_errors("# No metadata\n") == []


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("license: apache-2.0", "license: [mit, gpl-3]", '"license[1]" must be one of'),
        ("license: apache-2.0", "license: [mit", "Invalid YAML in README.md"),
        ("Qwen/Qwen3-0.6B", "/models/qwen", '"base_model" with value "/models/qwen" is not valid'),
        ("Qwen/Qwen3-0.6B", "[a/b, a/b/c]", '"base_model[1]" with value "a/b/c" is not valid'),
        ("finetune", "distilled", '"base_model_relation" must be one of'),
        ("[imdb]", "[null]", '"datasets[0]" must be a string'),
        ("[imdb]", "[./data]", '"datasets[0]" with value "./data" is not valid'),
        ("multilingual", "EN", '"language[1]" must be an ISO 639 code'),
        ("[distillation]", "[1]", '"tags[0]" must be a string'),
        ("pipeline_tag: text-generation", "pipeline_tag: chat", '"pipeline_tag" is not in'),
        ("name: IMDB", "config: x", 'results[0].dataset.name" is required'),
        ("type: imdb,", "type: /imdb,", 'dataset.type" with value "/imdb" is not valid'),
        ("12.5", ".nan", "a metric that is not finite"),
        ("- name: student\n  results:", "- results:", '"model-index[0].name" is required'),
    ],
)
def test_bad_metadata_is_named(old: str, new: str, error: str) -> None:
    assert old in GOOD
    (message,) = card_errors(GOOD.replace(old, new))
    assert error in message
