"""Imports go one way: entry points → method and machinery → models and data."""

import ast
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "sammix_jax"

# A module may import those of its own row and of the rows below it.
LAYERS = [
    {"main"},
    {"options"},
    {"train", "evaluate", "predict", "sweep", "pretrain"},
    {"plan"},
    {"evaluation"},
    {"inference", "prepare"},
    {"config_rules"},
    {"training"},
    {"systems"},
    {"method"},
    {"config", "config_files", "presets", "weights"},
    {"models", "data"},
    {"hosts", "sharding"},
    {"errors", "faults", "flops", "compilation"},
]
RANK = {name: rank for rank, layer in enumerate(reversed(LAYERS)) for name in layer}
MODULES = sorted(PACKAGE.rglob("*.py"))

TESTS = sorted(pathlib.Path(__file__).parent.rglob("test_*.py"))


def room(path: pathlib.Path) -> str:
    """`data/volumes.py` → data; `train.py` → train."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: pathlib.Path) -> set[str]:
    """Names of this project's modules that a file imports, such as `data.volumes`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {n.removeprefix("sammix_jax.") for n in names if n.startswith("sammix_jax.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    source = room(path)
    if source == "__init__":
        assert not imported(path)
        return
    for name in imported(path):
        target = name.split(".")[0]
        assert target in RANK, f"{path}: {target} has no place in LAYERS"
        assert RANK[target] <= RANK[source], f"{path}: {source} must not import {target}"
        if source in ("models", "data"):  # neither knows of the other
            below = target == source or RANK[target] < RANK[source]
            assert below, f"{path}: {source} must not import {target}"


def test_every_package_is_installed():
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(PACKAGE.parent) for path in MODULES}
    assert set(listed["packages"]) == {".".join(folder.parts) for folder in folders}


def test_every_module_has_a_place():
    assert {room(path) for path in MODULES} - {"__init__"} == set(RANK)


def test_importing_starts_no_backend():
    """Processes are joined after the imports and before any use of JAX; with a platform that there
    is not, the first use fails."""
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in (*MODULES, *sorted((PACKAGE.parent / "configs").rglob("*.py")))
    ]
    imports = "import " + ", ".join(name.removesuffix(".__init__") for name in names)
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}
    run = lambda code: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code], cwd=PACKAGE.parent, env=environment, capture_output=True
    )
    done = run(imports)
    assert done.returncode == 0, done.stderr.decode()
    assert run("import jax; jax.numpy.arange(2)").returncode != 0


def test_run_time_needs_no_torch():
    for path in MODULES:
        roots = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                roots.add((node.module or "").split(".")[0])
            elif isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
        assert not roots & {"torch", "torchvision", "convert"}, path


def test_what_needs_torch_says_so():
    """By its mark `make parity` finds it; without, it would be skipped everywhere."""
    asking = [path for path in TESTS if 'importorskip("torch"' in path.read_text()]
    asking.remove(pathlib.Path(__file__))
    assert len(asking) > 5
    for path in asking:
        text = path.read_text()
        whole = "pytestmark = pytest.mark.torch" in text
        assert whole or text.count('importorskip("torch"') == text.count("@pytest.mark.torch"), path
