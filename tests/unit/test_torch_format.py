"""Files of `torch.save` read without torch: what torch wrote is what comes out, and nothing else is ever done."""

from __future__ import annotations

import base64
import io
import random
import resource
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from embeds import saved
from trivium.embeds import MAX_EMBEDS_BYTES
from trivium.errors import InvalidRequestError
from trivium.prompt_embeds import decode_embeds
from trivium.torch_format import TensorFormatError, open_torch_checkpoint, read_torch_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUM_MUTATIONS = 10_000
MAX_EXTRA_BYTES = 256 * 2**20


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_all_strides_are_what_torch_saved(dtype: torch.dtype) -> None:
    whole = torch.randn(5, 7).to(dtype)
    for tensor in (whole, whole.T, whole[1:3], whole[:, 2:5], whole[::2, ::3], whole[0], whole[2, 3], whole[:, None]):
        read = read_torch_tensor(saved(tensor))
        assert read.dtype == str(dtype).removeprefix("torch.")
        assert np.array_equal(read.to_float32(), tensor.float().numpy())


def test_values_are_views_and_cannot_be_written() -> None:
    data = saved(torch.ones(4))
    values = read_torch_tensor(data).values
    assert not values.flags.owndata and not values.flags.writeable


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_checkpoint_is_the_state_dict_that_torch_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6), nn.BatchNorm1d(4)).to(dtype)
    module[1].weight = module[0].weight  # tied: two names, one storage
    state = module.state_dict()
    path = tmp_path / "pytorch_model.bin"
    for version in (state, dict(state)):
        torch.save(version, path)
        read = open_torch_checkpoint(path)
        assert set(read) == set(state)
        for name, tensor in state.items():
            assert tuple(read[name].values.shape) == tuple(tensor.shape)
            if dtype is torch.bfloat16 and tensor.dtype is dtype:
                assert np.array_equal(read[name].values, tensor.view(torch.uint16).numpy())
            else:
                assert np.array_equal(read[name].values, tensor.numpy())
        assert np.shares_memory(read["0.weight"].values, read["1.weight"].values)


def test_opening_a_checkpoint_does_not_read_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({f"layer.{index}": torch.zeros(2**20) for index in range(64)}, path)
    before = _resident_bytes()
    opened = open_torch_checkpoint(path)
    assert len(opened) == 64 and _resident_bytes() - before < 32 * 2**20


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02}q\x00.", saved([torch.ones(2)]), saved({"a": 1})])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(TensorFormatError):
        open_torch_checkpoint(tmp_path / "x.bin")


def with_program(program: bytes) -> bytes:
    """A file of `torch.save` with another pickle in it."""
    old, buffer = zipfile.ZipFile(io.BytesIO(saved(torch.ones(2, 3)))), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, program if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
REBUILD = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
TAIL = b"\x89ccollections\nOrderedDict\n)RtR."


def tensor_program(offset: bytes, shape: bytes, strides: bytes) -> bytes:
    return REBUILD + STORAGE + offset + shape + strides + TAIL


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def pair(first: int, second: int) -> bytes:
    return number(first) + number(second) + b"\x86"


def test_the_programs_below_differ_from_one_that_is_read() -> None:
    read = read_torch_tensor(with_program(tensor_program(b"K\x00", pair(2, 3), pair(3, 1))))
    assert read.values.tolist() == [[1.0] * 3] * 2


HOSTILE = {
    "a command": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "a builtin": b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
    "torch.load": b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
    "a name of the reader": b"\x80\x02ctrivium.torch_pickle\nrun_program\n)R.",
    "a new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "an extension": b"\x80\x02\x82\x01.",
    "an instance": b"\x80\x02(ios\nsystem\n.",
    "a persistent id of text": b"\x80\x02Pabc\n.",
    "a later protocol": b"\x80\x04N.",
    "no end": b"\x80\x02N",
    "more at the end": b"\x80\x02N.N",
    "an empty stack": b"\x80\x02.",
    "a mark": b"\x80\x02(.",
    "no mark": b"\x80\x02t.",
    "an unkept value": b"\x80\x02h\x05.",
    "a string without bytes": b"\x80\x02X\xff\xff\xff\xff.",
    "a string of no text": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "a long integer": b"\x80\x02\x8a\xff" + bytes(255) + b".",
    "a name without an end": b"\x80\x02c" + b"a" * 4000,
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dict in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "a key of a tuple": b"\x80\x02}))s.",
    "tuples of tuples": b"\x80\x02)q\x00" + b"(h\x00h\x00h\x00h\x00tq\x00" * 300 + b".",
    "a storage alone": b"\x80\x02" + STORAGE + b".",
    "a storage that is missing": tensor_program(b"K\x00", pair(2, 3), pair(3, 1)).replace(b"\x000X", b"\x009X"),
    "another count": tensor_program(b"K\x00", pair(2, 3), pair(3, 1)).replace(b"K\x06tQ", b"K\x05tQ"),
    "a path": tensor_program(b"K\x00", pair(2, 3), pair(3, 1)).replace(
        b"\x01\x00\x00\x000X", b"\x05\x00\x00\x00../..X"
    ),
    "a negative size": tensor_program(b"K\x00", pair(-2, -3), pair(3, 1)),
    "a negative stride": tensor_program(b"K\x05", pair(2, 3), pair(-3, -1)),
    "a negative offset": tensor_program(number(-1), pair(2, 3), pair(3, 1)),
    "an offset behind the end": tensor_program(b"K\x01", pair(2, 3), pair(3, 1)),
    "a huge offset": tensor_program(number(2**62), pair(2, 3), pair(3, 1)),
    "a huge stride": tensor_program(b"K\x00", pair(2, 3), pair(2**62, 1)),
    "a huge shape": tensor_program(b"K\x00", pair(2**62, 2**62), pair(0, 0)),
    "a huge empty shape": tensor_program(b"K\x00", pair(0, 2**62), pair(0, 0)),
    "rows that overlap": tensor_program(b"K\x00", pair(3, 3), pair(1, 1)),
    "fewer strides": tensor_program(b"K\x00", pair(2, 3), number(1) + b"\x85"),
    "many dimensions": tensor_program(b"K\x00", b"(" + b"K\x01" * 9 + b"t", b"(" + b"K\x01" * 9 + b"t"),
    "a size of true": tensor_program(b"K\x00", b"\x88K\x03\x86", pair(3, 1)),
    "a shape of a list": tensor_program(b"K\x00", b"](K\x02K\x03e", pair(3, 1)),
    "a large program": b"\x80\x02" + b"N" * 5000 + b".",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_program_is_refused(case: str) -> None:
    with pytest.raises(TensorFormatError):
        read_torch_tensor(with_program(HOSTILE[case]))


def test_a_stride_of_a_single_row_does_not_matter() -> None:
    read = read_torch_tensor(with_program(tensor_program(b"K\x00", pair(1, 6), pair(2**62, 1))))
    assert read.values.shape == (1, 6)


def _zip(count: int, method: int = zipfile.ZIP_STORED, size: int = 1) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for index in range(count):
            file.writestr(f"archive/data/{index}", bytes(size))
        file.writestr("archive/data.pkl", HOSTILE["a storage alone"])
    return buffer.getvalue()


def _with_count(data: bytes, count: int) -> bytes:
    end = data.rfind(b"PK\5\6")
    return data[: end + 8] + struct.pack("<HH", count, count) + data[end + 12 :]


@pytest.mark.parametrize(
    "data",
    [
        _zip(100_000),
        _zip(1, zipfile.ZIP_DEFLATED, 2**28),
        _with_count(_zip(3), 65_534),
        _with_count(_zip(3), 0xFFFF),
        _with_count(_zip(3), 0),
        _zip(3)[:-1],
        _zip(3)[10:],
        b"PK\5\6" + b"\xff" * 18,
        b"PK\5\6" + bytes(18),
    ],
    ids=["many entries", "a bomb", "a wrong count", "no 64-bit directory", "no entry", "cut", "moved", "ones", "zeros"],
)
def test_a_hostile_zip_file_is_refused_at_once(data: bytes) -> None:
    start = time.thread_time()
    with pytest.raises(TensorFormatError):
        read_torch_tensor(data)
    assert time.thread_time() - start < 1.0


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` with bytes changed, cut out, doubled or put in, the more often where the structure is."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        position = rng.randrange(len(changed))
        match rng.randrange(6):
            case 0 | 1:
                changed[position] = rng.randrange(256)
            case 2:
                changed[position] ^= 1 << rng.randrange(8)
            case 3:
                size = rng.choice((1, 2, 4, 8))
                value = rng.choice((0, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)) & (256**size - 1)
                changed[position : position + size] = value.to_bytes(size, "little")
            case 4:
                del changed[position : position + rng.randrange(1, 40)]
            case _:
                changed[position:position] = changed[position : position + rng.randrange(1, 40)]
    return bytes(changed)


def test_ten_thousand_mutated_files_raise_nothing_but_our_error() -> None:
    rng = random.Random(7)
    tensor = torch.randn(3, 4)
    seeds = [saved(tensor), saved(tensor.bfloat16()), with_program(tensor_program(b"K\x00", pair(2, 3), pair(3, 1)))]
    seeds.append(safetensors.torch.save({"x": tensor}))
    num_read = 0
    before, start, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter(), 0.0
    for index in range(NUM_MUTATIONS):
        data = _mutated(seeds[index % len(seeds)], rng)
        began = time.perf_counter()
        try:
            decode_embeds(base64.b64encode(data).decode())
            num_read += 1
        except InvalidRequestError as error:
            assert error.param == "prompt_embeds" and len(error.message) < 500
        slowest = max(slowest, time.perf_counter() - began)
    assert 100 < num_read < 0.9 * NUM_MUTATIONS  # both ways are taken
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MAX_EXTRA_BYTES
    assert slowest < 1.0 and time.perf_counter() - start < 25


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.complex64])
def test_a_dtype_that_is_not_read_is_named_as_the_reason(dtype: torch.dtype) -> None:
    with pytest.raises(TensorFormatError, match="the dtype is none of bfloat16, bool, float16, float32"):
        read_torch_tensor(saved(torch.ones(2, 2).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_prompt_stays_within_its_memory(dtype: torch.dtype) -> None:
    rows = torch.ones(MAX_EMBEDS_BYTES // 4 // 1024, 1024, dtype=dtype)
    text = base64.b64encode(saved(rows)).decode()
    too_long = "A" * (MAX_EMBEDS_BYTES * 3 // 2)
    tracemalloc.start()
    try:
        embeds = decode_embeds(text)
        assert len(embeds.data) == MAX_EMBEDS_BYTES
        assert tracemalloc.get_traced_memory()[1] < 256 * 2**20
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        with pytest.raises(InvalidRequestError, match="larger"):
            decode_embeds({"data": "AAAA", "shape": [2**20, 2**20], "dtype": "float32"})
        with pytest.raises(InvalidRequestError, match="larger"):
            decode_embeds(too_long)
        assert tracemalloc.get_traced_memory()[1] - held < 2**20
    finally:
        tracemalloc.stop()
