from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_distill.errors import InputError
from llm_distill.recipe import document


class TestRead:
    def test_a_missing_file_names_the_nearest(self, tmp_path: Path) -> None:
        (tmp_path / "logits.yaml").write_text("student: a")
        with pytest.raises(InputError, match=r"logit\.yaml does not exist; .* has logits\.yaml"):
            document.read(tmp_path / "logit.yaml")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is a folder"):
            document.read(tmp_path)

    @pytest.mark.parametrize(
        ("text", "kind"), [("", "empty"), ("- a", "a list"), ("word", "a str"), ("# a", "empty")]
    )
    def test_the_root_is_a_mapping(self, tmp_path: Path, text: str, kind: str) -> None:
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(InputError, match=f"is {kind}; it must be a mapping"):
            document.read(tmp_path / "r.yaml")

    def test_other_encodings(self, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_bytes("student: é".encode("latin-1"))
        with pytest.raises(InputError, match="not UTF-8"):
            document.read(tmp_path / "r.yaml")


class TestParse:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-5", 1e-5),
            ("1E5", 1e5),
            ("-.5", -0.5),
            ("3", 3),
            ("no", "no"),
            ("yes", "yes"),
            ("on", "on"),
            ("true", True),
            ("null", None),
            ("~", None),
            ("", None),
            ("2024-01-01", "2024-01-01"),
            ("1:30", "1:30"),
            ("010", "010"),
            ("1_000", "1_000"),
            ("'1e-5'", "1e-5"),
        ],
    )
    def test_plain_words_mean_what_they_look_like(self, text: str, value: Any) -> None:
        parsed = document.parse(text, "x")
        assert parsed == value
        assert type(parsed) is type(value)

    def test_a_key_that_stands_twice_is_refused_with_both_lines(self) -> None:
        text = "training:\n  seed: 1\n  lr: 2\n  seed: 3\n"
        with pytest.raises(InputError, match=r"x, line 4: 'seed' stands twice, .* in line 2"):
            document.parse(text, "x")

    def test_a_fault_has_its_line(self) -> None:
        with pytest.raises(InputError, match="x, line 3: expected"):
            document.parse("a: 1\nb: [1,\n", "x")

    def test_python_objects_are_refused(self) -> None:
        with pytest.raises(InputError, match="could not determine a constructor"):
            document.parse("a: !!python/object/apply:os.system ['true']", "x")

    @pytest.mark.parametrize("text", ["1: a", "a: {true: b}", "a: [{2.5: c}]"])
    def test_keys_are_words(self, text: str) -> None:
        with pytest.raises(InputError, match="is no word"):
            document.parse(text, "x")

    def test_aliases_work(self) -> None:
        assert document.parse("a: &x {b: 1}\nc: *x", "x") == {"a": {"b": 1}, "c": {"b": 1}}

    def test_a_flood_of_aliases_is_refused(self) -> None:
        many = ", ".join(["*x"] * (document.MOST_ALIASES + 1))
        with pytest.raises(InputError, match="one alias too many"):
            document.parse(f"a: &x 1\nb: [{many}]", "x")

    def test_loops_are_refused(self) -> None:
        with pytest.raises(InputError, match="contains itself"):
            document.parse("a: &x [*x]", "x")

    def test_towers_are_refused(self) -> None:
        with pytest.raises(InputError, match="nested too deeply"):
            document.parse("[" * 5000 + "]" * 5000, "x")

    def test_books_are_refused(self) -> None:
        with pytest.raises(InputError, match="that is no recipe"):
            document.parse("a" * (document.MOST_CHARACTERS + 1), "x")

    def test_two_documents_are_refused(self) -> None:
        with pytest.raises(InputError, match="another document"):
            document.parse("a: 1\n---\nb: 2\n", "x")


def test_what_is_dumped_reads_back() -> None:
    words = ["no", "1e5", "2024-01-01", "true", "null", "~", "", "010", "1:30", "x: y", "é", "#"]
    content = {"a": words, "b": {"c": [1, 1e-5, 0.1, True, None, [[1, 2]]]}, "d": {}, "e": words}
    text = document.dump(content)
    assert document.parse(text, "x") == content
    assert "&" not in text
    assert yaml.safe_load(text)["b"] == content["b"]


class TestOverride:
    CONTENT = {  # noqa: RUF012  never written to
        "student": "a/b",
        "training": {"seed": 1},
        "objectives": [{"CrossEntropy": {"weight": 0.1}}, "Logits"],
    }

    @pytest.mark.parametrize(
        ("key", "text", "path", "value"),
        [
            ("training.seed", "2", ("training", "seed"), 2),
            ("training.learning_rate", "1e-5", ("training", "learning_rate"), 1e-5),
            ("student", "./here", ("student",), "./here"),
            ("student", "{Local: {model: x}}", ("student",), {"Local": {"model": "x"}}),
            (
                "objectives.0.CrossEntropy.weight",
                "1",
                ("objectives", 0, "CrossEntropy"),
                {"weight": 1},
            ),
            (
                "objectives.1.Logits.temperature",
                "2.0",
                ("objectives", 1),
                {"Logits": {"temperature": 2.0}},
            ),
            ("objectives.1", "CrossEntropy", ("objectives", 1), "CrossEntropy"),
            ("peft.r", "4", ("peft",), {"r": 4}),
        ],
    )
    def test_one_value_changes(self, key: str, text: str, path: Any, value: Any) -> None:
        before = document.dump(self.CONTENT)
        changed = document.override(self.CONTENT, key, text)
        for step in path:
            changed = changed[step]
        assert changed == value
        assert document.dump(self.CONTENT) == before

    def test_names_of_arguments_keep_a_component_together(self) -> None:
        content = {"loss": {"Logits": {"loss": "jsd"}}}
        changed = document.override(content, "loss.Logits.loss.jsd.beta", "0.1")
        assert changed == {"loss": {"Logits": {"loss": {"jsd": {"beta": 0.1}}}}}

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            (
                "objectives.2.Logits.weight",
                r"no entry '2'; there is 0 \(CrossEntropy\), 1 \(Logits\)",
            ),
            ("objectives.Logits.weight", "no entry 'Logits'"),
            ("student.Local.dtype", r"'Local' is looked for in 'a/b'.*give the whole"),
            ("training.seed.more", "'more' is looked for in 1"),
        ],
    )
    def test_places_that_are_not_there(self, key: str, message: str) -> None:
        with pytest.raises(InputError, match=rf"^--{key}: .*{message}|^--{key}: {message}"):
            document.override(self.CONTENT, key, "1")

    def test_a_value_that_is_no_yaml(self) -> None:
        with pytest.raises(InputError, match=r"^--data\.path"):
            document.override(self.CONTENT, "data.path", "[1,")
