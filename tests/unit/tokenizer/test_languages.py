"""Languages and sides of the encoder-decoder families: ids as transformers' own tokenizers give them."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import AutoTokenizer, T5Tokenizer

from trivium.errors import InvalidRequestError
from trivium.inputs import PairTexts
from trivium.tokenizer.tokenizer import Tokenizer
from unit.tokenizer.tiny_languages import FAMILIES, Family, Multilingual, save_multilingual

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")

TEXT = "the quick brown fox, ça va très bien"
TARGET_TEXT = "le renard brun saute"
# family -> (source code, its other spellings), (target code, its other spellings)
LANGUAGES: dict[Multilingual, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mbart": (("de_DE", "de", "de-AT", "deu", "DE_de"), ("ro_RO", "ro", "ron", "ro-MD")),
    "mbart50": (("en_XX", "en", "en-US", "eng_Latn"), ("fr_XX", "fr", "fra_Latn", "fr-CA")),
    "nllb": (("eng_Latn", "en", "en-US", "eng"), ("zho_Hant", "zh-TW", "zh_Hant", "ZHO_HANT")),
    "m2m_100": (("en", "en_XX", "eng_Latn", "en-GB"), ("zh", "zh-CN", "zho_Hans", "ZH")),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, str]:
    """Family -> directory of its tokenizer."""
    root = tmp_path_factory.mktemp("families")
    return {family: save_multilingual(root / family, family) for family in FAMILIES}


def load_oracle(source: str, family: Family) -> Any:
    # transformers itself cannot load UMT5 from its sentencepiece file; its model is T5's.
    return (T5Tokenizer if family == "umt5" else AutoTokenizer).from_pretrained(source)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_encodes_both_sides_and_decodes_as_transformers_does(
    family: Family, sources: dict[Family, str]
) -> None:
    tokenizer, oracle = Tokenizer.load(sources[family]), load_oracle(sources[family], family)
    target = {"marian_many": "fra", "madlad": "fr"}.get(family)
    prefix = {"marian_many": ">>fra<< ", "madlad": "<2fr> "}.get(family, "")
    pair = tokenizer.encode_pair(PairTexts(encoder=TEXT, decoder=TARGET_TEXT, target_language=target))
    assert list(pair.encoder) == oracle(prefix + TEXT)["input_ids"]
    if family == "m2m_100":
        oracle.tgt_lang = "fr"
    expected = oracle(text_target=TARGET_TEXT, add_special_tokens=False)["input_ids"]
    assert list(pair.decoder) == expected
    target_side = {"use_source_tokenizer": False} if family.startswith("marian") else {}
    text = oracle.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False, **target_side)
    assert tokenizer.decode(expected) == text and "renard" in text.replace("⁇", "")


@pytest.mark.parametrize("family", LANGUAGES)
def test_the_source_language_changes_the_special_tokens_as_src_lang_does(
    family: Multilingual, sources: dict[Family, str]
) -> None:
    tokenizer, oracle = Tokenizer.load(sources[family]), load_oracle(sources[family], family)
    names, _ = LANGUAGES[family]
    default = oracle(TEXT)["input_ids"]
    oracle.src_lang = names[0]
    for name in names:
        pair = tokenizer.encode_pair(PairTexts(encoder=TEXT, source_language=name))
        assert list(pair.encoder) == oracle(TEXT)["input_ids"]
    assert list(tokenizer.encode_pair(PairTexts(encoder=TEXT)).encoder) == default == tokenizer.encode([TEXT])[0]


@pytest.mark.parametrize("family", LANGUAGES)
def test_the_target_language_is_told_to_the_decoder(family: Multilingual, sources: dict[Family, str]) -> None:
    tokenizer, oracle = Tokenizer.load(sources[family]), load_oracle(sources[family], family)
    _, names = LANGUAGES[family]
    settings = {} if family == "m2m_100" else {"return_tensors": None}
    source = LANGUAGES[family][0][0]
    inputs = oracle._build_translation_inputs(TEXT, src_lang=source, tgt_lang=names[0], **settings)
    for name in names:
        pair = tokenizer.encode_pair(PairTexts(encoder=TEXT, source_language=source, target_language=name))
        assert list(pair.encoder) == inputs["input_ids"]
        ids = (pair.decoder_start_token_id, pair.forced_bos_token_id)
        token_id = inputs["forced_bos_token_id"]
        assert ids == ((token_id, None) if family == "mbart" else (None, token_id))
        assert not pair.needs_target_language
    # mBART's default is in the model: its decoder start token
    assert tokenizer.encode_pair(PairTexts(encoder=TEXT)).needs_target_language == (family != "mbart")
    assert tokenizer.decode([token_id, *inputs["input_ids"]]) == tokenizer.decode(inputs["input_ids"])


@pytest.mark.parametrize(
    ("family", "text", "language", "expected"),
    [
        ("marian_many", TEXT, "fr", f">>fra<< {TEXT}"),
        ("marian_many", TEXT, "pt-BR", f">>por<< {TEXT}"),
        ("marian_many", f">>deu<< {TEXT}", None, f">>deu<< {TEXT}"),
        ("marian_many", f">>deu<< {TEXT}", "de", f">>deu<< {TEXT}"),
        ("madlad", TEXT, "fra", f"<2fr> {TEXT}"),
        ("madlad", TEXT, "zh-CN", f"<2zh> {TEXT}"),
        ("madlad", f" <2de> {TEXT}", None, f" <2de> {TEXT}"),
    ],
)
def test_a_language_that_belongs_into_the_text_stands_before_it_once(
    family: Family, text: str, language: str | None, expected: str, sources: dict[Family, str]
) -> None:
    pair = Tokenizer.load(sources[family]).encode_pair(PairTexts(encoder=text, target_language=language))
    assert list(pair.encoder) == load_oracle(sources[family], family)(expected)["input_ids"]
    assert pair.forced_bos_token_id is None and not pair.needs_target_language


def test_marian_sides_have_different_models(sources: dict[Family, str]) -> None:
    tokenizer = Tokenizer.load(sources["marian_split"])
    pair = tokenizer.encode_pair(PairTexts(encoder=TARGET_TEXT, decoder=TARGET_TEXT))
    assert pair.encoder[:-1] != pair.decoder
    assert tokenizer.decode(pair.decoder) == TARGET_TEXT
    detokenizer = tokenizer.detokenizer()
    parts = [detokenizer.push([token_id])[0] for token_id in pair.decoder]
    assert "".join(parts) + detokenizer.push([], final=True)[0] == TARGET_TEXT


@pytest.mark.parametrize(
    ("family", "languages", "param", "code"),
    [
        ("nllb", {"target_language": "zh"}, "target_language", "ambiguous_language"),
        ("nllb", {"target_language": "tlh"}, "target_language", "unknown_language"),
        ("nllb", {"source_language": "klingon"}, "source_language", "unknown_language"),
        ("mbart50", {"target_language": "zh-TW"}, "target_language", "unknown_language"),
        ("m2m_100", {"source_language": ""}, "source_language", "invalid_value"),
        ("m2m_100", {"source_language": "x" * 100}, "source_language", "invalid_value"),
        ("marian_many", {}, "target_language", "missing_language"),
        ("marian_many", {"source_language": "de", "target_language": "fr"}, "source_language", "unknown_language"),
        ("marian", {"target_language": "de"}, "target_language", "unknown_language"),
        ("madlad", {}, "target_language", "missing_language"),
        ("madlad", {"source_language": "en", "target_language": "fr"}, "source_language", "unsupported_parameter"),
        ("t5", {"source_language": "en"}, "source_language", "unsupported_parameter"),
        ("pegasus", {"target_language": "en"}, "target_language", "unsupported_parameter"),
    ],
)
def test_languages_that_the_model_does_not_have_are_refused_by_name(
    family: Family, languages: dict[str, str], param: str, code: str, sources: dict[Family, str]
) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        Tokenizer.load(sources[family]).encode_pair(PairTexts(encoder=TEXT, **languages))
    assert (raised.value.param, raised.value.code) == (param, code)


def test_an_unknown_language_is_answered_with_valid_codes(sources: dict[Family, str]) -> None:
    with pytest.raises(InvalidRequestError, match=r"'xx' is not a language of this model; it has .*fra_Latn"):
        Tokenizer.load(sources["nllb"]).encode_pair(PairTexts(target_language="xx"))


def test_a_text_that_names_another_language_than_the_request_is_refused(sources: dict[Family, str]) -> None:
    with pytest.raises(InvalidRequestError, match="differs from >>deu<<") as raised:
        Tokenizer.load(sources["marian_many"]).encode_pair(PairTexts(">>deu<< one", target_language="fr"))
    assert raised.value.param == "target_language"


def test_marian_takes_the_languages_that_it_translates_between(sources: dict[Family, str]) -> None:
    tokenizer = Tokenizer.load(sources["marian"])
    pair = tokenizer.encode_pair(PairTexts(TEXT, source_language="en-GB", target_language="fra"))
    assert list(pair.encoder) == tokenizer.encode([TEXT])[0] and pair.forced_bos_token_id is None


@pytest.mark.parametrize("family", LANGUAGES)
def test_threads_with_different_languages_do_not_disturb_each_other(
    family: Multilingual, sources: dict[Family, str]
) -> None:
    tokenizer = Tokenizer.load(sources[family])
    codes = list(tokenizer.languages.sources)[:4]  # type: ignore[union-attr]
    calls = [
        PairTexts(f"{TEXT} {i}", source_language=code) for i, code in zip(range(400), itertools.cycle([*codes, None]))
    ]
    alone = [tokenizer.encode_pair(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode_pair, calls)) == alone


def test_language_tokens_among_the_special_tokens_begin_the_decoder_prompt() -> None:
    tokenizer = Tokenizer.load("trivium-translate")
    pair = tokenizer.encode_pair(PairTexts("one", target_language="fr-FR"))
    assert tokenizer.decode(pair.decoder_prefix, skip_special_tokens=False) == "<fr>"
    assert list(pair.encoder) == tokenizer.encode(["one"])[0]
    assert tokenizer.encode_pair(PairTexts("one")).decoder_prefix == ()
