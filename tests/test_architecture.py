"""The shape of the package: small files, short functions, documented names, mirrored tests, floors.

Everything is read from the source with `ast`; nothing of the package is imported.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llm_distill"
MOST_LINES_IN_A_FILE = 300
MOST_LINES_IN_A_FUNCTION = 60

MODULES = sorted(PACKAGE.rglob("*.py"))
# An `__init__` re-exports what its folder's own tests cover; `__main__` is one call.
MIRRORED = [path for path in MODULES if path.stem not in ("__init__", "__main__")]
SHIPPED = sorted(
    path
    for folder in (PACKAGE, ROOT / "tests", ROOT / "recipes", ROOT / "scripts")
    for path in folder.rglob("*")
    if path.suffix in (".py", ".yaml", ".yml", ".sh")
)


def name_of(path: Path) -> str:
    """The path from the root, as a test id."""
    return path.relative_to(ROOT).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def targets(node: ast.stmt) -> list[str]:
    """The names a statement binds at the top of a module, imports left out."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign(targets=nodes):
            return [target.id for target in nodes if isinstance(target, ast.Name)]
        case _:
            return []


def public_names(path: Path) -> list[str]:
    """What `__all__` says, or nothing."""
    for node in parse(path).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and "__all__" in targets(node):
            assert node.value is not None
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def is_documented(tree: ast.Module, name: str) -> bool | None:
    """Whether a definition has a docstring, a constant a string below it; None if not defined."""
    found = None
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if name not in targets(node):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = bool(ast.get_docstring(node))
        else:
            below = after.value if isinstance(after, ast.Expr) else None
            found = isinstance(below, ast.Constant) and isinstance(below.value, str)
    return found


def file_of(module: str) -> Path | None:
    """The file of a dotted module name, or None if there is no such module."""
    base = ROOT.joinpath(*module.split("."))
    candidates = (base / "__init__.py", base.with_suffix(".py"))
    return next((path for path in candidates if path.exists()), None)


def imports_of(path: Path) -> dict[str, tuple[str, str]]:
    """Every name a file imports, for type checkers too: `here -> (module, its name there)`."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0
        for alias in node.names
    }


def undocumented(path: Path) -> list[str]:
    """What is wrong with the names of `__all__`, followed to where they are defined."""
    return [
        f"{name}: {fault}"
        for name in public_names(path)
        if (fault := fault_of(path, name)) is not None
    ]


def fault_of(path: Path, name: str) -> str | None:
    """Why a public name is not a documented one, or None."""
    documented = is_documented(parse(path), name)
    if documented is not None:
        return None if documented else f"no docstring in {name_of(path)}"
    module, original = imports_of(path).get(name, ("", ""))
    if module.split(".")[0] != PACKAGE.name:
        return f"{name_of(path)} lists it in __all__ and does not define it"
    if submodule := file_of(f"{module}.{original}"):
        return None if ast.get_docstring(parse(submodule)) else "a module without a docstring"
    source = file_of(module)
    return fault_of(source, original) if source else f"there is no module {module}"


def long_functions(tree: ast.Module) -> list[str]:
    """Functions over the limit, signature and docstring included."""
    return [
        f"{node.name}: {lines} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_LINES_IN_A_FUNCTION
    ]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_IN_A_FILE


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    assert long_functions(parse(path)) == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_names_are_documented(path: Path) -> None:
    assert undocumented(path) == []


@pytest.mark.parametrize("path", MIRRORED, ids=name_of)
def test_every_module_has_a_test_file(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    mirror = ROOT / "tests" / relative.with_name(f"test_{path.stem.lstrip('_')}.py")
    assert mirror.exists(), f"{name_of(path)} has no {name_of(mirror)}"


def test_modules_import_only_lower_floors() -> None:
    run = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_names_a_folder_outside_the_repository(path: Path) -> None:
    # Joined, so that this file passes its own test.
    outside = ["/".join(("shared", folder)) for folder in ("reference", "tools", "data", "hooks")]
    outside += ["/".join(("..", "shared")), "/".join(("", "work", ""))]
    text = path.read_text(encoding="utf-8")
    assert [name for name in outside if name in text] == []


class TestTheChecksThemselves:
    """A check that cannot fail checks nothing."""

    def test_a_long_function_is_found(self) -> None:
        body = "\n".join(f"    x = {i}" for i in range(MOST_LINES_IN_A_FUNCTION))
        assert long_functions(ast.parse(f"def f():\n{body}\n")) == [
            f"f: {MOST_LINES_IN_A_FUNCTION + 1} lines"
        ]

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ('def f():\n    """Words."""', True),
            ("def f():\n    pass", False),
            ('f = 1\n"""Words."""', True),
            ("f = 1", False),
            ('f: int = 1\n"""Words."""', True),
            ("class f:\n    pass", False),
            ("g = 1", None),
        ],
    )
    def test_documentation_is_read(self, source: str, expected: bool | None) -> None:
        assert is_documented(ast.parse(source), "f") is expected
