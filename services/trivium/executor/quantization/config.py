"""`quantization_config` of a checkpoint: which format its linear layers are stored in, or why it cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trivium.config import PACKED_QUANTIZATIONS, QUANTIZATIONS
from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig, read_json
from trivium.executor.quantization.awq import read_awq
from trivium.executor.quantization.compressed_tensors import read_compressed_tensors
from trivium.executor.quantization.fp8 import read_fp8
from trivium.executor.quantization.gptq import read_gptq
from trivium.executor.quantization.scheme import Quantization

_READERS: dict[str, Callable[[JsonConfig], Quantization]] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "compressed-tensors": read_compressed_tensors,
}
_KEYS = ("quantization_config", "compression_config")
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # where older tools wrote it


def read_quantization(config: JsonConfig, directory: Path, given: str | None = None) -> Quantization | None:
    """The format of the checkpoint in `directory`, None if its weights are floats.

    given: the quantization that was asked for; the name of a format must be that of the checkpoint.

    Raises ConfigurationError, naming the method and what is supported, for a format that cannot be read.
    """
    found = _find(config, directory)
    method = None if found is None else _method(found)
    if given in PACKED_QUANTIZATIONS and given != method:
        raise ConfigurationError(
            f"quantization is {given!r}, but the checkpoint's weights are {method or 'floats'}: leave it out"
            + ("" if method else f", or let them be multiplied in {' or '.join(QUANTIZATIONS)}")
        )
    return None if found is None or method is None else _read(found, method)


def _find(config: JsonConfig, directory: Path) -> JsonConfig | None:
    """What the checkpoint says about its format."""
    for key in _KEYS:
        if config.mapping(key):
            return JsonConfig(config.mapping(key), config.file)
    for file, method in _OWN_FILES.items():
        if (directory / file).exists():
            own = read_json(directory / file)
            return JsonConfig({"quant_method": method, **own.values}, file)
    return None


def _method(config: JsonConfig) -> str:
    is_unnamed_bitsandbytes = config.values.get("load_in_4bit") or config.values.get("load_in_8bit")
    return config.string("quant_method", "bitsandbytes" if is_unnamed_bitsandbytes else None).lower()


def _read(config: JsonConfig, method: str) -> Quantization:
    if method not in _READERS:
        raise ConfigurationError(
            f"{config.file}: quantization method {method!r:.40} is not supported: {', '.join(_READERS)}; "
            "or a checkpoint in float32, bfloat16 or float16"
        )
    return _READERS[method](config)
