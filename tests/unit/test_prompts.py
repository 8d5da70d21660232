"""Prompt forms, and what becomes of them for each kind of model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from toy import make_info
from trivium import zip_enc_dec_prompt_lists
from trivium.errors import ContextLengthError, InvalidRequestError
from trivium.inputs import EncodedPair, EncodedPrompt, PairTexts
from trivium.params import SamplingParams
from trivium.prompt_truncation import Truncation
from trivium.prompts import encode_prompt, resolve_max_tokens


class Letters:
    """One token per letter; special tokens are a trailing 1."""

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [[ord(c) % 40 for c in text] + [1] * add_special_tokens for text in texts]

    async def encode_pair(self, texts: PairTexts) -> EncodedPair:
        """Target languages: "xx" is forced as 30, "yy" is the start token 31, "zz" is the prefix 32."""
        encoder, decoder = ("" if text is None else text for text in (texts.encoder, texts.decoder))
        return EncodedPair(
            encoder=tuple((await self.encode([encoder]))[0]) if texts.encoder is not None else (),
            decoder=tuple((await self.encode([decoder], add_special_tokens=False))[0]),
            decoder_prefix=(32,) if texts.target_language == "zz" else (),
            decoder_start_token_id=31 if texts.target_language == "yy" else None,
            forced_bos_token_id=30 if texts.target_language == "xx" else None,
            needs_target_language=texts.target_language is None and "many" in encoder,
        )


DECODER_ONLY = make_info(bos_token_id=2)
ENCODER_DECODER = make_info(is_encoder_decoder=True, max_encoder_len=20, decoder_start_token_id=0)
LETTERS_AB = tuple(ord(c) % 40 for c in "ab")


async def encode(prompt: Any, *, encoder_decoder: bool = False) -> EncodedPrompt:
    return await encode_prompt(prompt, Letters(), ENCODER_DECODER if encoder_decoder else DECODER_ONLY)


@pytest.mark.asyncio
@pytest.mark.parametrize("prompt", ["ab", {"prompt": "ab"}])
async def test_text_is_tokenized_with_special_tokens(prompt: Any) -> None:
    assert await encode(prompt) == EncodedPrompt((*LETTERS_AB, 1), text="ab")


@pytest.mark.asyncio
async def test_token_ids_are_used_as_they_are() -> None:
    assert await encode({"prompt_token_ids": [3, 4], "prompt": "shown"}) == EncodedPrompt((3, 4), text="shown")


@pytest.mark.asyncio
async def test_an_empty_prompt_becomes_bos() -> None:
    assert (await encode({"prompt_token_ids": []})).token_ids == (2,)


@pytest.mark.asyncio
@pytest.mark.parametrize("prompt", ["ab", {"encoder_prompt": "ab", "decoder_prompt": None}])
async def test_a_single_prompt_is_the_encoder_input(prompt: Any) -> None:
    encoded = await encode(prompt, encoder_decoder=True)
    assert encoded == EncodedPrompt((0,), encoder_token_ids=(*LETTERS_AB, 1), encoder_text="ab")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        ("ab", (0, *LETTERS_AB)),
        ({"prompt": "ab"}, (0, *LETTERS_AB)),
        ({"prompt_token_ids": [7, 8]}, (0, 7, 8)),
        ({"prompt_token_ids": [0, 8]}, (0, 8)),
        ({"prompt_token_ids": []}, (0,)),
        ("", (0,)),
    ],
)
async def test_an_explicit_decoder_prompt_begins_with_the_start_token(decoder: Any, expected: tuple[int, ...]) -> None:
    encoded = await encode(
        {"encoder_prompt": {"prompt_token_ids": [5]}, "decoder_prompt": decoder}, encoder_decoder=True
    )
    assert encoded.token_ids == expected and encoded.encoder_token_ids == (5,)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("language", "decoder", "expected", "forced"),
    [
        ("xx", None, (0,), 30),
        ("xx", "", (0,), 30),
        ("xx", "ab", (0, 30, *LETTERS_AB), None),
        ("xx", {"prompt_token_ids": [0, 30, 7]}, (0, 30, 7), None),
        ("yy", None, (31,), None),
        ("yy", "ab", (31, *LETTERS_AB), None),
        ("yy", {"prompt_token_ids": [31, 7]}, (31, 7), None),
        ("zz", None, (0, 32), None),
        ("zz", "ab", (0, 32, *LETTERS_AB), None),
        ("zz", {"prompt_token_ids": [32, 7]}, (0, 32, 7), None),
    ],
)
async def test_a_target_language_is_told_once(
    language: str, decoder: Any, expected: tuple[int, ...], forced: int | None
) -> None:
    prompt = {"encoder_prompt": "ab", "decoder_prompt": decoder, "target_language": language}
    encoded = await encode(prompt, encoder_decoder=True)
    assert (encoded.token_ids, encoded.forced_bos_token_id) == (expected, forced)


@pytest.mark.asyncio
async def test_a_text_prompt_names_languages_too() -> None:
    encoded = await encode({"prompt": "ab", "source_language": "en", "target_language": "xx"}, encoder_decoder=True)
    assert encoded.forced_bos_token_id == 30 and encoded.token_ids == (0,)


@pytest.mark.asyncio
async def test_another_start_token_takes_the_place_of_the_models_own() -> None:
    prompt = {"encoder_prompt": "ab", "decoder_prompt": None, "decoder_start_token_id": 9}
    assert (await encode(prompt, encoder_decoder=True)).token_ids == (9,)


@pytest.mark.asyncio
async def test_a_multilingual_model_wants_a_target_language_unless_the_decoder_prompt_or_the_model_has_one() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        await encode("many", encoder_decoder=True)
    assert (raised.value.param, raised.value.code) == ("target_language", "missing_language")
    assert await encode({"encoder_prompt": "many", "decoder_prompt": "ab"}, encoder_decoder=True)
    assert await encode_prompt("many", Letters(), dataclasses.replace(ENCODER_DECODER, forced_bos_token_id=5))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("prompt", "encoder_decoder", "param"),
    [
        ({"prompt": "ab", "target_language": "xx"}, False, "target_language"),
        ({"prompt": "ab", "source_language": "en"}, False, "source_language"),
        ({"prompt": "ab", "target_language": 5}, True, "target_language"),
        ({"prompt_token_ids": [5], "source_language": "en"}, True, "source_language"),
        ({"encoder_prompt": {"prompt": "ab", "target_language": "xx"}}, True, "encoder_prompt"),
        ({"encoder_prompt": "ab", "decoder_start_token_id": 10**9}, True, "decoder_start_token_id"),
        ({"encoder_prompt": "ab", "decoder_start_token_id": "x"}, True, "decoder_start_token_id"),
    ],
)
async def test_languages_and_start_tokens_that_do_not_fit_are_refused(
    prompt: Any, encoder_decoder: bool, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        await encode(prompt, encoder_decoder=encoder_decoder)
    assert raised.value.param == param


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("prompt", "encoder_decoder", "param"),
    [
        (None, False, "prompt"),
        (5, False, "prompt"),
        ({}, False, "prompt"),
        ({"prompt": 5}, False, "prompt"),
        ({"prompt_token_ids": "abc"}, False, "prompt"),
        ({"prompt_token_ids": [1, -1]}, False, "prompt[1]"),
        ({"prompt_token_ids": [1, True]}, False, "prompt[1]"),
        ({"prompt_token_ids": [1, 50]}, False, "prompt[1]"),
        ("\ud800", False, "prompt"),
        ({"encoder_prompt": "a", "decoder_prompt": "b"}, False, "encoder_prompt"),
        ({"decoder_prompt": "b"}, True, "encoder_prompt"),
        ({"encoder_prompt": "a", "decoder_prompt": 3}, True, "decoder_prompt"),
        ({"encoder_prompt": {"encoder_prompt": "a", "decoder_prompt": "b"}}, True, "encoder_prompt"),
        ({"encoder_prompt": "a", "decoder_prompt": "b", "extra": 1}, True, "prompt"),
        ({"prompt_token_ids": []}, True, "prompt"),
    ],
)
async def test_bad_prompts_are_refused_by_name(prompt: Any, encoder_decoder: bool, param: str) -> None:
    with pytest.raises(InvalidRequestError) as info:
        await encode(prompt, encoder_decoder=encoder_decoder)
    assert info.value.param == param


def test_zip_pairs_both_lists() -> None:
    assert zip_enc_dec_prompt_lists(["a", "b"], ["c", None]) == [
        {"encoder_prompt": "a", "decoder_prompt": "c"},
        {"encoder_prompt": "b", "decoder_prompt": None},
    ]
    with pytest.raises(InvalidRequestError, match="1 encoder prompts but 2"):
        zip_enc_dec_prompt_lists(["a"], ["b", "c"])


def test_unlimited_max_tokens_fills_the_context() -> None:
    assert resolve_max_tokens(EncodedPrompt((1,) * 50), SamplingParams(max_tokens=None), DECODER_ONLY) == 150


@pytest.mark.parametrize(
    ("prompt", "sampling", "numbers"),
    [
        (EncodedPrompt((1,) * 200), SamplingParams(), ("200", "200")),
        (EncodedPrompt((1,) * 190), SamplingParams(max_tokens=11), ("190", "11", "200")),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    prompt: EncodedPrompt, sampling: SamplingParams, numbers: tuple[str, ...]
) -> None:
    with pytest.raises(ContextLengthError) as info:
        resolve_max_tokens(prompt, sampling, DECODER_ONLY)
    assert all(number in info.value.message for number in numbers)


def test_a_long_encoder_input_is_refused_never_truncated() -> None:
    with pytest.raises(ContextLengthError, match=r"21 tokens.*takes 20"):
        resolve_max_tokens(EncodedPrompt((0,), encoder_token_ids=(3,) * 21), SamplingParams(), ENCODER_DECODER)


WITH_ROWS = dataclasses.replace(DECODER_ONLY, hidden_size=2)
PAIR_WITH_ROWS = dataclasses.replace(ENCODER_DECODER, hidden_size=2)


def rows(count: int) -> dict[str, Any]:
    return {"prompt_embeds": np.arange(2 * count, dtype=np.float32).reshape(count, 2)}


@pytest.mark.asyncio
async def test_a_prompt_of_parts_is_put_together_in_their_order() -> None:
    parts = ["ab", rows(2), {"prompt_token_ids": [5]}, rows(1), rows(2)]
    encoded = await encode_prompt({"prompt_parts": parts}, Letters(), WITH_ROWS)  # type: ignore[typeddict-item]
    assert encoded.token_ids == (*LETTERS_AB, 0, 0, 5, 0, 0, 0)  # and no special tokens around the text
    assert encoded.embeds is not None and encoded.embeds.places == ((2, 4), (5, 8))
    numbers = np.frombuffer(encoded.embeds.data, "<f4").reshape(-1, 2)
    assert numbers[:, 0].tolist() == [0, 2, 0, 0, 2]
    assert encoded.own_ids == (*LETTERS_AB, 5) and encoded.text is None
    one_piece = await encode_prompt({"prompt_parts": ["a", rows(1), "b"]}, Letters(), WITH_ROWS)  # type: ignore[typeddict-item]
    assert one_piece.text == "ab"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("decoder", "languages", "ids", "places"),
    [
        (rows(2), {}, (0, 0, 0), ((1, 3),)),
        ({"prompt_parts": [{"prompt_token_ids": [0, 7]}, rows(1)]}, {}, (0, 7, 0), ((2, 3),)),
        ({"prompt_parts": [rows(1), "a"]}, {"target_language": "xx"}, (0, 30, 0, ord("a") % 40), ((2, 3),)),
        (rows(1), {"target_language": "zz"}, (0, 32, 0), ((2, 3),)),
    ],
)
async def test_a_decoder_prompt_of_embeddings_comes_behind_the_start_token(
    decoder: Any, languages: Any, ids: tuple[int, ...], places: Any
) -> None:
    prompt = {"encoder_prompt": "a", "decoder_prompt": decoder, **languages}
    encoded = await encode_prompt(prompt, Letters(), PAIR_WITH_ROWS)  # type: ignore[arg-type]
    assert encoded.token_ids == ids and encoded.forced_bos_token_id is None
    assert encoded.embeds is not None and encoded.embeds.places == places


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_parts": []}, "prompt_parts must be a list of 1 to 256"),
        ({"prompt_parts": "ab"}, "prompt_parts must be a list"),
        ({"prompt_parts": ["a"] * 257}, "prompt_parts must be a list"),
        ({"prompt_parts": ["a"], "prompt_embeds": 1}, "unknown keys in prompt: prompt_embeds"),
        ({"prompt_parts": [{"prompt_parts": ["a"]}]}, "must not have parts itself"),
        ({"prompt_parts": [{"encoder_prompt": "a"}]}, "must not be an encoder/decoder pair itself"),
        ({"prompt_parts": [{"prompt_token_ids": [3, 999]}]}, r"prompt\[0\]\[1\] is 999"),
        ({"prompt_parts": [rows(1), {"prompt_embeds": np.ones((1, 3), np.float32)}]}, "rows of 3 numbers"),
    ],
)
async def test_parts_that_make_no_prompt_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await encode_prompt(prompt, Letters(), WITH_ROWS)


@pytest.mark.asyncio
async def test_a_prompt_with_embeddings_is_not_cut() -> None:
    prompt: Any = {"prompt_parts": ["abc", rows(2)]}
    whole = await encode_prompt(prompt, Letters(), WITH_ROWS, truncation=Truncation(5))
    assert len(whole.token_ids) == 5
    with pytest.raises(InvalidRequestError, match="truncate_prompt_tokens cuts text and token ids only"):
        await encode_prompt(prompt, Letters(), WITH_ROWS, truncation=Truncation(4))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "unknown keys in prompt: multi_modal_data"),
        ({"prompt_token_ids": [5], "cache_salt": "x"}, "unknown keys in prompt: cache_salt"),
        ({"prompt_embeds": np.zeros((1, 4), np.float32), "odd": 1}, "unknown keys in prompt: odd"),
        ({"prompt_parts": ["a"], "prompt": "b"}, "unknown keys in prompt: prompt"),
        ({"prompt_parts": [{"prompt": "a", "odd": 1}]}, r"unknown keys in prompt\[0\]: odd"),
    ],
)
async def test_keys_that_mean_nothing_are_refused(prompt: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        await encode(prompt)


@pytest.mark.asyncio
async def test_keys_without_a_value_are_left_out() -> None:
    assert await encode({"prompt": "ab", "multi_modal_data": None}) == await encode("ab")


@pytest.mark.asyncio
async def test_parts_in_parts_are_refused_however_deep() -> None:
    prompt: Any = {"prompt": "a"}
    for _ in range(5000):
        prompt = {"prompt_parts": [prompt]}
    with pytest.raises(InvalidRequestError, match=r"prompt\[0\] must not have parts itself"):
        await encode(prompt)
