"""Loading, encoding and decoding: the same as transformers, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

from trivium.errors import ConfigurationError, InvalidRequestError
from trivium.tokenizer.chat_template import MAX_PROMPT_CHARS
from trivium.tokenizer.tokenizer import MAX_TEXTS, Tokenizer
from unit.tokenizer.tiny_tokenizers import BOS, EOS, Kind, make_backend, make_tokenizer, save_family, save_model

TEXT = "the quick brown fox, ça va très bien"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "byte_fallback", "wordpiece"])
def test_a_saved_tokenizer_loads_and_encodes_as_before(kind: Kind, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_model(tmp_path, kind))
    assert tokenizer.encode([TEXT]) == make_tokenizer(kind).encode([TEXT])


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("family", ["marian", "m2m_100", "t5", "byt5"])
def test_every_family_loads_from_its_checkpoint_files_and_streams_what_transformers_decodes(
    family: Literal["marian", "m2m_100", "t5", "byt5"], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(save_family(tmp_path, family))
    (ids,) = tokenizer.encode([TEXT])
    backend = tokenizer._backend
    assert ids == backend(TEXT)["input_ids"]
    assert ids[-1] == backend.eos_token_id
    for skip in (True, False):
        expected = backend.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        if skip:
            expected = expected.removeprefix("__en__ ")  # only real checkpoints list their language tokens
        detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
        parts = [detokenizer.push([token_id])[0] for token_id in ids]
        assert "".join(parts) + detokenizer.push([], final=True)[0] == expected


def test_special_tokens_are_added_unless_told_otherwise(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_family(tmp_path, "byt5"))
    assert tokenizer.encode(["ab"]) == [[100, 101, 1]]
    assert tokenizer.encode(["ab"], add_special_tokens=False) == [[100, 101]]


def test_text_that_spells_a_special_token_becomes_it() -> None:
    tokenizer = make_tokenizer()
    (ids,) = tokenizer.encode([f"{BOS}x"])
    assert ids[0] == tokenizer._backend.bos_token_id


def test_truncation_and_padding_of_the_files_do_not_apply() -> None:
    backend = make_backend()
    backend.backend_tokenizer.enable_truncation(2)
    backend.backend_tokenizer.enable_padding(length=50)
    assert Tokenizer(backend).encode([TEXT]) == make_tokenizer().encode([TEXT])


def test_no_texts_are_no_ids() -> None:
    assert make_tokenizer().encode([]) == []
    assert make_tokenizer().encode([""]) == [[]]


def test_threads_may_share_a_tokenizer() -> None:
    tokenizer = make_tokenizer()
    texts = [TEXT * (n % 7 + 1) for n in range(200)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda text: tokenizer.decode(tokenizer.encode([text])[0]), texts))
    assert results == texts


def test_ids_without_a_token_have_no_text() -> None:
    tokenizer = make_tokenizer()
    (ids,) = tokenizer.encode(["one"])
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 2**31 - 1]) == "one"


def test_decode_skips_special_tokens_on_demand() -> None:
    tokenizer = make_tokenizer()
    (ids,) = tokenizer.encode([f"one{EOS}"])
    assert tokenizer.decode(ids) == "one"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"one{EOS}"


def test_too_much_text_is_refused() -> None:
    for texts in ([""] * (MAX_TEXTS + 1), ["x" * (MAX_PROMPT_CHARS + 1)]):
        with pytest.raises(InvalidRequestError):
            make_tokenizer().encode(texts)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        make_tokenizer().encode(["\ud800"])
    assert raised.value.code == "invalid_unicode"


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama", "qwen2", "marian"])
def test_a_directory_without_tokenizer_files_is_refused_in_one_line(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ConfigurationError, match="there are no tokenizer files"):
        Tokenizer.load(str(tmp_path))


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    source = save_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigurationError) as raised:
        Tokenizer.load(source)
    assert "\n" not in raised.value.message


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil"}))
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ConfigurationError, match="custom code"):
        Tokenizer.load(str(tmp_path))


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_the_service_loads_tokenizers_without_torch(tmp_path: Path) -> None:
    sources = [save_model(tmp_path / "bpe"), *(save_family(tmp_path / name, name) for name in ("t5", "marian"))]  # type: ignore[arg-type]
    code = (
        "import sys\n"
        "import trivium.tokenizer.server\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "from trivium.tokenizer.torch_free import forbid_torch\n"
        "from trivium.tokenizer.tokenizer import Tokenizer\n"
        "forbid_torch()\n"
        f"tokenizers = [Tokenizer.load(source) for source in {sources!r}]\n"
        "assert tokenizers[0].render_chat([{'role': 'user', 'content': 'hi'}])\n"
        "assert all(tokenizer.decode(tokenizer.encode(['one two'])[0]) for tokenizer in tokenizers)\n"
        "loaded = [name for name, module in sys.modules.items() if name.partition('.')[0] == 'torch' and module]\n"
        "assert loaded == [], loaded\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONWARNINGS": "ignore"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
