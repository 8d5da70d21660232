"""Prompt embeddings as callers give them, in every form, and what they become: checked float32 rows.

Forms: a torch tensor or numpy array (offline), raw bytes with shape and dtype (gRPC), and over REST base64 text of a
`torch.save` file or a safetensors file, or an object {"data": base64, "shape": [...], "dtype": ...} of raw bytes.
Numbers are float32, float16 or bfloat16, little-endian. Sizes are checked before anything is decoded or allocated;
no torch is needed here. Every complaint is an InvalidRequestError about `prompt_embeds`.
"""

from __future__ import annotations

import binascii
import json
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trivium.embeds import MAX_EMBEDS_BYTES, PromptEmbeds, RawTensor
from trivium.errors import InvalidRequestError
from trivium.torch_format import FLOAT_DTYPES, LAYOUTS, TensorFormatError, float32_of, read_torch_tensor

PARAM = "prompt_embeds"

MAX_HEADER_BYTES = 65536  # of a file around the numbers
MAX_FILE_BYTES = MAX_EMBEDS_BYTES + MAX_HEADER_BYTES
MAX_MAGNITUDE = 1e15  # the square of a larger number does not fit into float32
_RAW_KEYS = frozenset({"data", "shape", "dtype"})
_ZIP_MAGIC = b"PK"
_SAFETENSORS_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def decode_embeds(value: object) -> PromptEmbeds:
    """What a REST client sent as one prompt: base64 text, or an object with raw bytes in base64, shape and dtype."""
    if isinstance(value, str):
        data = _decode_base64(value)
        return _to_rows(*(_read_torch(data) if data[:2] == _ZIP_MAGIC else _read_safetensors(data)))
    if isinstance(value, dict) and set(value) == _RAW_KEYS:
        if not isinstance(value["data"], str) or not isinstance(value["shape"], list):
            raise _invalid("data must be base64 text, shape a list")
        return to_prompt_embeds(RawTensor(_decode_base64(value["data"]), tuple(value["shape"]), value["dtype"]))
    raise _invalid("expected base64 text or an object of data, shape and dtype")


def to_prompt_embeds(value: object) -> PromptEmbeds:
    """What an offline or gRPC caller gave: a PromptEmbeds is taken as it is, the numbers of others are checked."""
    if isinstance(value, PromptEmbeds):
        return value
    if isinstance(value, RawTensor):
        return _to_rows(*_read_raw(value))
    if isinstance(value, np.ndarray):
        if value.dtype.name not in FLOAT_DTYPES:
            raise _wrong_dtype(value.dtype.name)
        return _to_rows(value.dtype.name, value)
    if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
        return _from_torch(value)
    raise _invalid(f"expected a tensor or an array, got {type(value).__name__}")


def _from_torch(tensor: Any) -> PromptEmbeds:
    """`tensor` is a torch.Tensor, whatever it is made of."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in FLOAT_DTYPES:
        raise _wrong_dtype(dtype)
    if str(tensor.layout) != "torch.strided" or tensor.is_nested or tensor.is_meta or tensor.is_quantized:
        raise _invalid("the tensor is not dense")
    _check_shape(tuple(tensor.shape))
    return _to_rows("float32", tensor.detach().cpu().float().numpy())


def _to_rows(dtype: str, values: npt.NDArray[Any]) -> PromptEmbeds:
    num_tokens, hidden_size = _check_shape(values.shape)
    rows = float32_of(dtype, values)
    if not (rows.max() <= MAX_MAGNITUDE and rows.min() >= -MAX_MAGNITUDE):  # also for what is not a number
        raise InvalidRequestError(
            f"{PARAM} has a value that is not finite or beyond {MAX_MAGNITUDE:g}", param=PARAM, code="non_finite"
        )
    return PromptEmbeds.of(rows.astype("<f4", copy=False).tobytes(), num_tokens, hidden_size)


def _read_torch(data: bytes) -> tuple[str, npt.NDArray[Any]]:
    try:
        tensor = read_torch_tensor(data)
    except TensorFormatError as error:
        raise _invalid(str(error)) from None
    return tensor.dtype, tensor.values


def _read_safetensors(data: bytes) -> tuple[str, npt.NDArray[Any]]:
    """The one tensor of a safetensors file, whatever its name (https://github.com/huggingface/safetensors)."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise _invalid("neither a torch.save nor a safetensors file")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        raise _invalid("neither a torch.save nor a safetensors file") from None
    if not isinstance(header, dict):
        raise _invalid("the safetensors header is no object")
    header.pop("__metadata__", None)
    if len(header) != 1:
        raise _invalid(f"the safetensors file holds {len(header)} tensors, not one")
    entry = next(iter(header.values()))
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or not _is_sizes(entry.get("shape")):
        raise _invalid("the safetensors header is broken")
    body = data[8 + length :]
    if entry.get("data_offsets") != [0, len(body)]:
        raise _invalid(f"the safetensors offsets do not fit its {len(body)} bytes")
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"]) or str(entry["dtype"])
    return _read_raw(RawTensor(body, tuple(entry["shape"]), dtype))


def _read_raw(tensor: RawTensor) -> tuple[str, npt.NDArray[Any]]:
    if not isinstance(tensor.dtype, str) or tensor.dtype not in FLOAT_DTYPES:
        raise _wrong_dtype(tensor.dtype)
    if not _is_sizes(tensor.shape):
        raise _invalid("the shape must be numbers, 0 or more")
    num_tokens, hidden_size = _check_shape(tensor.shape)
    layout = LAYOUTS[tensor.dtype]
    if len(tensor.data) != num_tokens * hidden_size * layout.itemsize:
        raise _invalid(f"{len(tensor.data)} bytes are not shape {list(tensor.shape)} of {tensor.dtype}")
    return tensor.dtype, np.frombuffer(tensor.data, layout).reshape(tensor.shape)


def _check_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or 0 in shape:
        raise _invalid(f"the shape must be [num_tokens, hidden_size], none of them 0, got {list(shape)!s:.60}")
    if shape[0] * shape[1] * 4 > MAX_EMBEDS_BYTES:
        raise _too_large()
    return shape[0], shape[1]


def _is_sizes(shape: object) -> bool:
    return isinstance(shape, (list, tuple)) and all(type(size) is int and 0 <= size < 2**31 for size in shape)


def _decode_base64(text: str) -> bytes:
    if len(text) > (MAX_FILE_BYTES + 2) // 3 * 4:
        raise _too_large()
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # also for what is not ASCII
        raise _invalid("not base64") from None
    if not data:
        raise _invalid("empty")
    return data


def _wrong_dtype(dtype: object) -> InvalidRequestError:
    return _invalid(f"the dtype must be one of {', '.join(sorted(FLOAT_DTYPES))}, got {dtype!r:.40}")


def _too_large() -> InvalidRequestError:
    return InvalidRequestError(
        f"{PARAM} is larger than {MAX_EMBEDS_BYTES} bytes of float32", param=PARAM, code="too_long"
    )


def _invalid(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{PARAM}: {message}", param=PARAM, code="invalid_prompt_embeds")
