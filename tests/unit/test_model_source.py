from pathlib import Path

import pytest

from trivium.errors import ConfigurationError
from trivium.executor.loader import HUB_PATTERNS
from trivium.model_source import find_model
from trivium.tokenizer_files import TOKENIZER_FILES


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert find_model(str(tmp_path), None, patterns=["*"]) == tmp_path


def test_a_bundled_name_stands_for_its_directory() -> None:
    assert find_model("trivium-translate", None, patterns=["*"]).name == "trivium_translate"


@pytest.mark.parametrize("source", ["./no/such/model", "/no/such/model", "a/b/c"])
def test_a_missing_directory_is_refused(source: str) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        find_model(source, None, patterns=["*"])


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigurationError, match="is a file"):
        find_model(str(tmp_path / "model.gguf"), None, patterns=["*"])


def test_a_name_that_is_no_hub_id_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="neither a directory"):
        find_model("not a model!", None, patterns=["*"])


def test_a_hub_id_that_cannot_be_downloaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConfigurationError, match=r"model org/name is neither .* the hub download failed: no network$"):
        find_model("org/name", None, patterns=["*"])


@pytest.mark.parametrize("patterns", [HUB_PATTERNS, TOKENIZER_FILES])
def test_a_hub_id_is_downloaded_without_pickles(
    patterns: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def download(source: str, **kwargs: object) -> str:
        asked.update(kwargs, source=source)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_model("org/name", "main", patterns=patterns) == tmp_path
    assert (asked["source"], asked["revision"]) == ("org/name", "main")
    assert not any("bin" in pattern or pattern in ("*", "*.pt") for pattern in patterns)
