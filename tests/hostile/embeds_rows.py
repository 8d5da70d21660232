"""B63 to B71: tensors from clients. Mutated ones: tests/unit/test_torch_format.py."""

from __future__ import annotations

import base64
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from embeds import encoded, raw, saved
from hostile.row import (
    COMPLETIONS,
    ENCODER_HIDDEN_SIZE,
    HIDDEN_SIZE,
    KEY,
    LLAMA,
    MAX_MODEL_LEN,
    MISSING,
    Door,
    Refusal,
    Row,
    Taken,
    bad,
    cases,
    chat,
    completion,
    to,
    translation,
)  # fmt: skip

SENTINEL = Path(tempfile.gettempdir()) / f"trivium-hostile-{os.getpid()}"  # made by whoever runs what a file says
VECTORS = torch.arange(3 * HIDDEN_SIZE, dtype=torch.float32).reshape(3, HIDDEN_SIZE) / 50
REFUSED, LONG = bad("invalid_prompt_embeds", "prompt_embeds"), bad("context_length_exceeded", "prompt_embeds")
NON_FINITE = bad("non_finite", "prompt_embeds")
TOUCH = f"touch {SENTINEL}".encode()
CALL = b"\x80\x02cposix\nsystem\nX" + len(TOUCH).to_bytes(4, "little") + TOUCH + b"\x85R."


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def torch_file(rows: object, **entries: bytes) -> str:
    """A file of `torch.save` with some entries replaced; `data_pkl` for data.pkl."""
    old, buffer = zipfile.ZipFile(io.BytesIO(saved(rows))), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, entries.get(name.rpartition("/")[2].replace(".", "_"), old.read(name)))
    return text(buffer.getvalue())


def zip_file(*names: str, data: bytes = b"", compression: int = zipfile.ZIP_STORED) -> str:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name in names:
            file.writestr(name, data)
    return text(buffer.getvalue())


def safe_header(**entry: Any) -> str:
    fields = {"dtype": "F32", "shape": [1, HIDDEN_SIZE], "data_offsets": [0, 4 * HIDDEN_SIZE], **entry}
    header = json.dumps({"x": fields}).encode()
    return text(len(header).to_bytes(8, "little") + header + bytes(4 * HIDDEN_SIZE))


def safe(**tensors: torch.Tensor) -> str:
    return text(safetensors.torch.save(tensors))


def embeds(number: str, answer: Refusal | Taken, **given: Any) -> list[Row]:
    """One row per value of `prompt_embeds`; underscores in names stand for spaces."""
    calls = {name.replace("_", " "): completion(prompt="", prompt_embeds=value) for name, value in given.items()}
    return cases(number, *((name, call, answer) for name, call in calls.items()))


ROWS: list[Row] = [
    *embeds("B63", REFUSED, not_base64="%%%%", not_ascii="äöü", url_safe="-_-_", whitespace="AAAA\nAAAA", empty="",
            five=5, true=True, empty_list=[]),
    *cases("B63", ("too many", completion(prompt="", prompt_embeds=["AAAA"] * 65),
                   bad("too_many_prompts", "prompt_embeds"))),
    *embeds(
        "B64", REFUSED,
        no_tensor=text(b"hello, world"),
        plain_pickle=text(CALL),
        zip_without_data=zip_file("archive/version"),
        zip_bomb=zip_file("archive/data.pkl", data=bytes(2**28), compression=zipfile.ZIP_DEFLATED),
        path_outside=zip_file("../../etc/data.pkl", "archive/version"),
        many_entries=zip_file(*(f"archive/{index}" for index in range(20_000))),
        big_endian=torch_file(VECTORS, byteorder=b"big"),
        short_storage=torch_file(VECTORS, **{"0": b"1234"}),
    ),
    *embeds(
        "B65", REFUSED,
        call=torch_file(VECTORS, data_pkl=CALL),
        reduce=torch_file(VECTORS, data_pkl=b"\x80\x02cos\nsystem\n)R."),
        extension=torch_file(VECTORS, data_pkl=b"\x80\x02\x82\x01."),
        memo=torch_file(VECTORS, data_pkl=b"\x80\x02" + b"]q\x00h\x00" * 10_000 + b"."),
        other_global=torch_file(VECTORS, data_pkl=b"\x80\x02cbuiltins\neval\n."),
        endless_text=torch_file(VECTORS, data_pkl=b"\x80\x02X\xff\xff\xff\xff."),
    ),
    *embeds(
        "B66", REFUSED,
        sparse=encoded(VECTORS.to_sparse()),
        csr=torch_file(VECTORS, data_pkl=b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n)R."),
        quantized=torch_file(VECTORS, data_pkl=b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R."),
        meta=encoded(VECTORS.to("meta")),
        list_of_tensors=encoded([VECTORS]),
        stride_0=encoded(VECTORS[:1].expand(4, -1)),
        **{str(dtype): encoded(VECTORS.to(dtype))
           for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)},
        raw_negative={**raw(VECTORS), "shape": [-3, -HIDDEN_SIZE]},
        raw_overflow={**raw(VECTORS), "shape": [2**62, 4]},
        raw_shape={**raw(VECTORS), "shape": [3, HIDDEN_SIZE + 1]},
        raw_shape_of_text={**raw(VECTORS), "shape": ["3", HIDDEN_SIZE]},
        raw_dtype={**raw(VECTORS), "dtype": "float64"},
        raw_other_keys={**raw(VECTORS), "device": "cuda"},
        raw_numbers={**raw(VECTORS), "data": [1.0]},
        raw_without_shape={"data": "AAAA"},
        safetensors_two=safe(a=VECTORS, b=VECTORS + 1),
        safetensors_dtype=safe(a=VECTORS.double()),
        safetensors_offsets=safe_header(data_offsets=[0, 2**40]),
        safetensors_backwards=safe_header(data_offsets=[4 * HIDDEN_SIZE, 0]),
        safetensors_shape=safe_header(shape=[2, HIDDEN_SIZE]),
        safetensors_shape_of_text=safe_header(shape="ab"),
        safetensors_deep=text((4096).to_bytes(8, "little") + b"[" * 4096),
        safetensors_long_header=text((2**60).to_bytes(8, "little") + b"{}"),
    ),
    *embeds("B66", bad("too_long", "prompt_embeds"), raw_huge={**raw(VECTORS), "shape": [2**31 - 1, 2**31 - 1]}),
    *embeds("B67", REFUSED, no_dimension=encoded(VECTORS[0, 0]), one=encoded(VECTORS[0]), three=encoded(VECTORS[None]),
            no_rows=encoded(VECTORS[:0]), too_wide=encoded(torch.zeros(2, HIDDEN_SIZE + 1))),
    *embeds("B67", LONG, longer_than_the_context=encoded(torch.zeros(MAX_MODEL_LEN + 1, HIDDEN_SIZE))),
    *embeds("B68", NON_FINITE, not_a_number=encoded(VECTORS * float("nan")), infinite=encoded(VECTORS + float("inf")),
            too_large=encoded(torch.full((1, HIDDEN_SIZE), 1e38)), minus=encoded(torch.full((1, HIDDEN_SIZE), -1e38))),
    *cases(
        "B69",
        *((f"{name} {maker.__name__}", maker(prompt_embeds=[encoded(VECTORS), wrong, encoded(VECTORS)]),
           bad("invalid_prompt_embeds", "prompt_embeds[1]"))
          for maker in (completion, chat)
          for name, wrong in
          (("no tensor", "AAAA"), ("width", encoded(VECTORS[:, 1:])), ("nested", [encoded(VECTORS)]))),
    ),
    *cases(
        "B70",
        ("off", to(COMPLETIONS, {"model": LLAMA, "prompt_embeds": "AAAA"}, Authorization=f"Bearer {KEY}"),
         bad("feature_disabled", "prompt_embeds")),
        door=Door.LOCKED,
    ),
    *(
        Row(f"B71 beside {prompt!s}", completion(prompt=prompt, prompt_embeds=encoded(VECTORS)),
            Taken(lambda answer, count=count: len(answer["choices"]) == count))  # type: ignore[misc]
        for prompt, count in (("", 1), (None, 1), (MISSING, 1), ("a", 2), (["a", "b"], 3))
    ),
    *cases(
        "B71",
        ("of an encoder", translation(prompt="", prompt_embeds=encoded(VECTORS[:, :ENCODER_HIDDEN_SIZE])), Taken()),
    ),
]  # fmt: skip
