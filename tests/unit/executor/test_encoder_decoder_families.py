"""Every family of the two encoder-decoder graphs against transformers, in the settings in which checkpoints differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny import BART_LIKE, T5_LIKE, VOCAB_SIZE, load_oracle, save_tiny
from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium.executor.models import bart_families, t5_families
from trivium.executor.models.bart_families import BartFamily, read_bart_config
from trivium.executor.models.registry import ARCHITECTURES
from trivium.executor.models.t5_families import T5Family, read_t5_config
from trivium.params import SamplingParams
from unit.executor.mini_scheduler import GREEDY, MiniScheduler
from unit.executor.parity import add_random_requests, generate, make_runner, random_ids, record_logits

_ODD_SIZES = {
    "d_model": 35,
    "encoder_attention_heads": 5,
    "decoder_attention_heads": 7,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_ffn_dim": 21,
    "decoder_ffn_dim": 45,
    "scale_embedding": False,
    "activation_function": "gelu_new",
}
_UNTIED = {
    "tie_word_embeddings": False,
    "encoder_attention_heads": 1,
    "decoder_attention_heads": 8,
    "decoder_layers": 1,
    "max_position_embeddings": 64,
    "activation_function": "tanh",
}
_ODD_HEADS = {
    "d_kv": 5,
    "num_heads": 3,
    "num_layers": 1,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 7,
    "relative_attention_max_distance": 11,
}
_OWN_CASES: dict[str, list[dict[str, Any]]] = {
    "bart": [{"activation_function": "quick_gelu"}],
    "mbart": [{"activation_function": "mish", "decoder_start_token_id": None}],
    "marian": [
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": VOCAB_SIZE + 40},
        {
            "share_encoder_decoder_embeddings": False,
            "decoder_vocab_size": VOCAB_SIZE - 40,
            "tie_word_embeddings": False,
        },
        {
            "decoder_vocab_size": VOCAB_SIZE + 1,
            "d_model": 33,
            "decoder_attention_heads": 3,
            "encoder_attention_heads": 1,
        },
    ],
    "pegasus": [{"activation_function": "gelu_fast", "scale_embedding": False}],
    "m2m_100": [{"pad_token_id": 7, "scale_embedding": False, "activation_function": "relu2"}],
    "blenderbot": [{"activation_function": "silu", "decoder_layers": 4}],
    "blenderbot_small": [{"activation_function": "relu", "scale_embedding": False}],
    "t5": [
        {"feed_forward_proj": "gated-relu", "layer_norm_epsilon": 1e-3},
        {"dense_act_fn": "sigmoid", "is_gated_act": True, "tie_word_embeddings": False},
        {"dense_act_fn": "leaky_relu", "feed_forward_proj": "gated-gelu", "is_gated_act": False},
    ],
    "t5_gated": [{"vocab_size": 384, "num_layers": 4, "num_decoder_layers": 1, "d_kv": 7}],  # as ByT5
    "mt5": [{"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 32}],
    "umt5": [{"feed_forward_proj": "tanh", "relative_attention_num_buckets": 32}],
}
CASES = [
    (family, overrides)
    for families, common in ((BART_LIKE, ({}, _ODD_SIZES, _UNTIED)), (T5_LIKE, ({}, _ODD_HEADS)))
    for family in families
    for overrides in (*common, *_OWN_CASES[family])
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join((case[0], *case[1])))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, overrides = request.param
    return save_tiny(family, tmp_path_factory.mktemp(family), seed=3, **overrides)


def assert_same_logits(path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Sequence[int] = ()) -> Tensor:
    """Our logits of a greedy decoding after a long decoder prompt, having compared them with transformers'."""
    scheduler, oracle = MiniScheduler(make_runner(path)), load_oracle(path)
    encoder = encoder or random_ids(33, seed=1)
    prompt = [scheduler.info.decoder_start_token_id or 0, *(token % 200 for token in random_ids(6))]
    request = scheduler.add(prompt, GREEDY, encoder=tuple(encoder))
    with monkeypatch.context() as patch:
        recorded = record_logits(patch)
        scheduler.run()
    ids = torch.tensor([encoder])
    with torch.no_grad():
        expected = oracle(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            decoder_input_ids=torch.tensor([prompt + request.output[:-1]]),
        ).logits[0, len(prompt) - 1 :]
    ours, vocab_size = torch.cat(recorded), expected.shape[1]
    assert len(ours) == len(request.output) > 1
    assert expected.std() > 0.1  # or the tolerance would mean nothing
    torch.testing.assert_close(ours[:, :vocab_size], expected, atol=1e-4, rtol=0)
    assert bool((ours[:, vocab_size:] == -torch.inf).all())
    return ours


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_logits_equal_transformers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_logits(checkpoint, monkeypatch)


def test_greedy_output_alone_and_in_a_mixed_batch_equals_generate(checkpoint: Path) -> None:
    runner, oracle = make_runner(checkpoint), load_oracle(checkpoint)
    if hasattr(oracle.config, "num_decoder_layers"):
        oracle.generation_config.use_cache = False  # its cache has as many layers as the encoder
    scheduler = MiniScheduler(runner, chunk=3)
    requests = add_random_requests(scheduler, 4)
    scheduler.run()
    expected = [generate(oracle, request) for request in requests]
    assert len({token for output in expected for token in output}) > 2
    assert len({tuple(output) for output in expected}) > 1
    assert [request.output for request in requests] == expected
    runner.reset()
    alone = MiniScheduler(runner)
    request = alone.add(list(requests[-1].prompt), encoder=requests[-1].encoder)
    alone.run()
    assert request.output == expected[-1]


_PREFIXES = dict.fromkeys(BART_LIKE, "model.") | dict.fromkeys(T5_LIKE, "")


def _names(prefix: str) -> dict[str, str]:
    sides = {side: f"{prefix}{side}.embed_tokens.weight" for side in ("encoder", "decoder")}
    return {"shared": f"{prefix}shared.weight", "head": "lm_head.weight", **sides}


def _under_every_name(tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    tensors.update({name: tensors[names["shared"]].clone() for name in names.values() if name not in tensors})


def _only_as_head(tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    shared = tensors.pop(names["shared"])
    tensors[names["head"]] = shared


def _only_of_the_decoder(tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    tensors[names["decoder"]] = tensors.pop(names["shared"])


def _all_different(tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    for index, name in enumerate(names.values()):
        tensors[name] = tensors[names["shared"]].roll(index, 0).contiguous()


def _tied_head(tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    tensors.pop(names["head"], None)


@pytest.mark.parametrize("family", [*BART_LIKE, *T5_LIKE])
@pytest.mark.parametrize(
    "store",
    [_under_every_name, _only_as_head, _only_of_the_decoder, _all_different, _tied_head],
    ids=lambda f: f.__name__,
)
def test_embeddings_stored_under_any_of_their_names_are_what_transformers_makes_of_them(
    family: str,
    store: Callable[[dict[str, Tensor], dict[str, str]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = save_tiny(family, tmp_path, seed=3)
    edit_weights(path, lambda tensors: store(tensors, _names(_PREFIXES[family])))
    assert_same_logits(path, monkeypatch)


@pytest.mark.parametrize("family", ["marian", "pegasus"])
def test_stored_sinusoids_are_used(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny(family, tmp_path)
    name = "model.encoder.embed_positions.weight"
    edit_weights(path, lambda tensors: tensors.update({name: torch.randn(128, 32)}))
    changed = assert_same_logits(path, monkeypatch)
    edit_weights(path, lambda tensors: tensors.pop(name))
    assert not torch.equal(changed, assert_same_logits(path, monkeypatch))


def test_m2m_100_does_not_count_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny("m2m_100", tmp_path, pad_token_id=7)
    ids = [5, 7, 7, 9, 10, 7, 11, 12, 7]
    with_padding = assert_same_logits(path, monkeypatch, ids)
    assert not torch.equal(with_padding, assert_same_logits(path, monkeypatch, [token for token in ids if token != 7]))
    oracle, scheduler = load_oracle(path), MiniScheduler(make_runner(path))
    requests = [scheduler.add([2], encoder=tuple(ids[start:])) for start in range(4)]
    scheduler.run()  # packed
    assert [request.output for request in requests] == [generate(oracle, request) for request in requests]


def test_logits_bias_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny("pegasus", tmp_path)
    with_bias = assert_same_logits(path, monkeypatch)
    edit_weights(path, lambda tensors: tensors.pop("final_logits_bias"))
    assert not torch.equal(with_bias, assert_same_logits(path, monkeypatch))


def test_tokens_that_only_the_encoder_has_are_never_sampled(tmp_path: Path) -> None:
    num_known = 20
    path = save_tiny("marian", tmp_path, share_encoder_decoder_embeddings=False, decoder_vocab_size=num_known)
    scheduler = MiniScheduler(make_runner(path))
    assert scheduler.info.vocab_size == VOCAB_SIZE
    sampling = SamplingParams(temperature=2.0, seed=1, max_tokens=60, min_tokens=60)
    requests = [scheduler.add([0], sampling, encoder=(VOCAB_SIZE - 1, 9)) for _ in range(3)]
    scheduler.run()
    assert {token for request in requests for token in request.output} <= set(range(num_known))


_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id")


@pytest.mark.parametrize(
    ("name", "kind", "family"),
    [
        ("BartForConditionalGeneration", transformers.BartConfig, bart_families.BART),
        ("MBartForConditionalGeneration", transformers.MBartConfig, bart_families.MBART),
        ("MarianMTModel", transformers.MarianConfig, bart_families.MARIAN),
        ("PegasusForConditionalGeneration", transformers.PegasusConfig, bart_families.PEGASUS),
        ("M2M100ForConditionalGeneration", transformers.M2M100Config, bart_families.M2M100),
        ("BlenderbotForConditionalGeneration", transformers.BlenderbotConfig, bart_families.BLENDERBOT),
        (
            "BlenderbotSmallForConditionalGeneration",
            transformers.BlenderbotSmallConfig,
            bart_families.BLENDERBOT_SMALL,
        ),
        ("T5ForConditionalGeneration", transformers.T5Config, t5_families.T5),
        ("MT5ForConditionalGeneration", transformers.MT5Config, t5_families.MT5),
        ("UMT5ForConditionalGeneration", transformers.UMT5Config, t5_families.UMT5),
    ],
)
def test_an_empty_config_means_the_defaults_of_transformers(
    name: str, kind: type[transformers.PreTrainedConfig], family: BartFamily | T5Family
) -> None:
    defaults = kind().to_dict()
    if isinstance(family, BartFamily):
        assert read_bart_config(JsonConfig({}), family) == read_bart_config(JsonConfig(defaults), family)
    else:
        assert read_t5_config(JsonConfig({}), family) == read_t5_config(JsonConfig(defaults), family)
    expected = {key: defaults[key] for key in _TOKENS if defaults.get(key) is not None}
    assert {"decoder_start_token_id": 0, **expected} == {
        "decoder_start_token_id": 0,
        **ARCHITECTURES[name].default_tokens,
    }


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bart", {"activation_function": "xielu"}, "config.json: activation_function 'xielu' is not supported: relu, "),
        ("mbart", {"d_model": 30}, "d_model 30 is not a multiple of encoder_attention_heads 4"),
        ("mbart", {"decoder_attention_heads": 5}, "d_model 32 is not a multiple of decoder_attention_heads 5"),
        ("pegasus", {"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "no tensor model.encoder.embed_tokens.weight"),
        ("marian", {"tie_word_embeddings": False}, "has no tensor lm_head.weight"),
        ("m2m_100", {"pad_token_id": -1}, "pad_token_id -1 is negative"),
        (
            "blenderbot",
            {"max_position_embeddings": 126},
            r"embed_positions.weight has shape \[128, 32\], but config.json",
        ),
        ("t5", {"feed_forward_proj": "gated-what", "dense_act_fn": None}, "feed_forward_proj 'what' is not supported"),
        ("t5", {"dense_act_fn": "prelu"}, "dense_act_fn 'prelu' is not supported"),
        ("mt5", {"feed_forward_proj": "doubly-gelu"}, "feed_forward_proj 'doubly-gelu' is not supported"),
        ("umt5", {"relative_attention_num_buckets": 3}, "relative_attention_num_buckets must be at least 4, got 3"),
        ("umt5", {"relative_attention_max_distance": 4}, "relative_attention_max_distance must be more than half"),
        ("umt5", {"num_layers": 4}, "has no tensor encoder.block.3.layer.0"),
    ],
)
def test_what_cannot_run_is_refused_by_its_name(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save_tiny(family, tmp_path)
    edit_config(path, **changes)
    with pytest.raises(ConfigurationError, match=message) as caught:
        make_runner(path)
    assert "\n" not in caught.value.message
