"""The committed stubs are what the pinned generator makes of the protos."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = ROOT / ".venv" / "proto" / "bin" / "python"


@pytest.mark.skipif(not GENERATOR.exists(), reason="`make check` installs the generator")
def test_committed_stubs_equal_freshly_generated_ones(tmp_path: Path) -> None:
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    outputs = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
    command = [str(GENERATOR), "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos"), *outputs]
    subprocess.run([*command, *(str(proto) for proto in protos)], check=True)
    fresh = {path.name: path.read_text() for path in (tmp_path / "trivium" / "v1").iterdir()}
    committed_dir = ROOT / "services" / "trivium" / "v1"
    committed = {
        path.name: path.read_text() for path in committed_dir.iterdir() if "_pb2" in path.name and path.is_file()
    }
    assert len(fresh) == 3 * len(protos)
    assert fresh == committed
