"""No code of ours can run a pickle: neither `pickle` nor `torch.load` nor their kin occur in any source file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("services", "gateway", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "_compat_pickle"}
FUNCTIONS = {
    "torch.load",
    "torch.serialization.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "numpy.load",
    "numpy.lib.npyio.load",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
}
BUILTINS = {"eval", "exec", "__import__"}


def names(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported, read as an attribute of an import, or looked up on one by `getattr`."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield full_name(node, aliases)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "getattr" and isinstance(node.args[1], ast.Constant):
                yield f"{full_name(node.args[0], aliases)}.{node.args[1].value}"
            if node.func.id in BUILTINS:
                yield node.func.id
            if full_name(node.func, aliases) == "importlib.import_module" and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def full_name(node: ast.AST, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def unpicklers(source: str) -> set[str]:
    found = set(names(ast.parse(source)))
    return {name for name in found if name.split(".")[0] in MODULES or name in FUNCTIONS | BUILTINS}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_can_unpickle(path: Path) -> None:
    assert unpicklers(path.read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch as t\nread = t.load",
        "from torch import load",
        "from torch.serialization import load as read",
        "import torch\ngetattr(torch, 'load')",
        "def f():\n    import dill",
        "import numpy as np\nnp.load('x')",
        "eval('1')",
        "import importlib\nfrom importlib import import_module\nimport_module('pickle')",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert unpicklers(source)


def test_the_search_covers_the_sources() -> None:
    assert len(SOURCES) > 100
