"""Who may import whom (DESIGN 3), and what stays out of light processes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "trivium": ROOT / "services" / "trivium",
    "trivium_kernels": ROOT / "kernels" / "trivium_kernels",
    "trivium_gateway": ROOT / "gateway" / "trivium_gateway",
}
STDLIB_ONLY = {
    "adapters",
    "embeds",
    "errors",
    "structured_outputs",
    "params",
    "inputs",
    "outputs",
    "step",
    "config",
    "columns",
}
SERVICES = {"tokenizer", "scheduler", "executor"}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            if "_pb2" not in path.name:
                parts = path.relative_to(folder).with_suffix("").parts
                yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = ast.iter_child_nodes(tree) if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in SOURCES}


ALL = list(modules())


@pytest.mark.parametrize(("name", "path"), [m for m in ALL if m[0].startswith("trivium_kernels")])
def test_kernels_import_nothing_of_ours(name: str, path: Path) -> None:
    assert {target for target in ours(imports(path)) if not target.startswith("trivium_kernels")} == set()


@pytest.mark.parametrize(("name", "path"), [m for m in ALL if m[0].removeprefix("trivium.") in STDLIB_ONLY])
def test_base_modules_import_the_standard_library_and_each_other(name: str, path: Path) -> None:
    for target in imports(path):
        head = target.split(".")[0]
        allowed = head in sys.stdlib_module_names or target.split(".")[:2][-1] in STDLIB_ONLY
        assert allowed, f"{name} imports {target}"


@pytest.mark.parametrize(("name", "path"), [m for m in ALL if m[0].split(".")[1:2] and m[0].split(".")[1] in SERVICES])
def test_services_never_import_each_other(name: str, path: Path) -> None:
    mine = name.split(".")[1]
    for target in ours(imports(path)):
        parts = target.split(".")
        assert parts[0] != "trivium_gateway", f"{name} imports {target}"
        if len(parts) > 1 and parts[1] in SERVICES:
            assert parts[1] == mine, f"{name} imports {target}"
        if parts[0] == "trivium_kernels":
            assert mine == "executor", f"{name} imports {target}"


@pytest.mark.parametrize(("name", "path"), [m for m in ALL if m[0].startswith("trivium_gateway")])
def test_gateway_imports_no_service(name: str, path: Path) -> None:
    for target in ours(imports(path)):
        parts = target.split(".")
        assert len(parts) < 2 or parts[1] not in SERVICES, f"{name} imports {target}"


@pytest.mark.parametrize(
    "module", ["trivium.scheduler.server", "trivium.tokenizer.server", "trivium_gateway.app", "trivium.cli", "trivium"]
)
def test_light_processes_import_without_torch(module: str) -> None:
    code = f"import sys, {module}; assert 'torch' not in sys.modules, 'torch was imported'"
    env = {"PYTHONPATH": ":".join(str(ROOT / root) for root in ("services", "kernels", "gateway"))}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env=env)


def test_a_cpu_needs_no_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # importing it fails, as if it were not installed
import torch, trivium.executor.server
from trivium_kernels.dispatch import select_kernels
select_kernels(torch.device("cpu"))
try:
    select_kernels(torch.device("cuda"))
except ValueError as error:
    assert "needs Triton" in str(error)
else:
    raise AssertionError("Triton was not needed")
"""
    env = {"PYTHONPATH": ":".join(str(ROOT / root) for root in ("services", "kernels"))}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env=env)


def test_no_package_shadows_the_kernels_package_of_transformers() -> None:
    for folder in ("services", "kernels", "gateway", "protos"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()
