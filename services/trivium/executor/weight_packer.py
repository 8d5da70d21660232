"""Keeping weights as small as a checkpoint stores them, for the ops that multiply them so.

A stored layer becomes integers of 4 bits (those of 2 bits, too), or bytes with a scale per output, or per output and
block of inputs. What is neither becomes floats, and a log line at the end of loading says why. All of it happens on the
host, layer by layer, and what is packed goes to the device.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from trivium.executor.gpu_linear import ByteProduct, FloatProduct, Int4Product, StackedProduct
from trivium.executor.linear import Product
from trivium.executor.quantization.grouped_weight import GroupedWeight
from trivium_kernels.byte_linear import SCALE_BLOCK, ByteLinear, ByteWeight
from trivium_kernels.int4_linear import Int4Linear, Int4Weight, can_stack_int4, pack_int4, stack_int4

logger = logging.getLogger(__name__)

_INT4_BITS = 4
_INT8 = torch.iinfo(torch.int8)
_FLOAT8_NAN = 0x7F  # all bits but the sign

Piece: TypeAlias = Int4Weight | ByteWeight | GroupedWeight | Tensor  # the latter two are to be floats


@dataclass(frozen=True, slots=True)
class StoredPart:
    """What is wanted of the stored layer `name`: its weight or a part of that, [out_features, in_features]."""

    name: str
    weight: Tensor | GroupedWeight


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """product: with the bias. num_bytes: of the weight."""

    product: Product
    shape: tuple[int, int]
    num_bytes: int


class WeightPacker:
    """Packs the layers of one checkpoint, and counts what became of them.

    device, dtype: of everything that comes from here, where it is not packed.
    """

    def __init__(self, int4: Int4Linear, byte: ByteLinear, device: torch.device, dtype: torch.dtype) -> None:
        self._int4 = int4
        self._byte = byte
        self._device = device
        self._dtype = dtype
        self._num_bytes = 0
        self._packed: Counter[str] = Counter()  # kind of weight -> stored layers
        self._unpacked: dict[str, list[str]] = {}  # reason -> stored layers

    def pack(self, parts: Iterable[StoredPart], bias: Tensor | None) -> PackedLayer:
        """One layer of `parts`, whose outputs are stacked. bias: of all of them, on the device.

        Each part is packed before the next one is asked for.
        """
        pieces = [self._piece(part) for part in parts]
        products: list[Product] = []
        start = num_bytes = 0
        for run in _runs(pieces):
            stop = start + sum(_shape(piece)[0] for piece in run)
            product, run_bytes = self._product(run, None if bias is None else bias[start:stop])
            products.append(product)
            start, num_bytes = stop, num_bytes + run_bytes
        self._num_bytes += num_bytes
        product = products[0] if len(products) == 1 else StackedProduct(tuple(products))
        return PackedLayer(product, (start, _shape(pieces[0])[1]), num_bytes)

    def log(self) -> None:
        """What became of all layers so far: a line, and one for those that could not stay packed."""
        if self._packed:
            kinds = ", ".join(f"{count} in {kind}" for kind, count in self._packed.most_common())
            logger.info("packed layers: %s, %.1f MiB", kinds, self._num_bytes / 2**20)
        if self._unpacked:
            logger.warning(
                "layers unpacked to %s: %s",
                str(self._dtype).removeprefix("torch."),
                "; ".join(f"{_named(names)} ({reason})" for reason, names in self._unpacked.items()),
            )

    def _piece(self, part: StoredPart) -> Piece:
        if isinstance(part.weight, Tensor):
            return part.weight
        packed = pack_weight(part.weight)
        if packed is None:
            self._unpacked.setdefault(_why_unpacked(part.weight), []).append(part.name)
            return part.weight
        kind = "int4" if isinstance(packed, Int4Weight) else str(packed.values.dtype).removeprefix("torch.")
        self._packed[kind] += 1
        return packed

    def _product(self, run: Sequence[Piece], bias: Tensor | None) -> tuple[Product, int]:
        """(product, bytes of its weight) of pieces of one kind that can be stacked."""
        fours = [piece for piece in run if isinstance(piece, Int4Weight)]
        if fours:
            four = stack_int4(fours).to(self._device)
            return Int4Product(self._int4, four, bias), four.num_bytes
        eights = [piece for piece in run if isinstance(piece, ByteWeight)]
        if eights:
            values = torch.cat([piece.values for piece in eights]).to(self._device)
            scales = torch.cat([piece.scales for piece in eights], dim=-1).to(self._device)
            return ByteProduct(self._byte, ByteWeight(values, scales), bias), values.nbytes + scales.nbytes
        weight = self._floats([piece for piece in run if isinstance(piece, (Tensor, GroupedWeight))])
        return FloatProduct(weight, bias), weight.nbytes

    def _floats(self, pieces: Sequence[Tensor | GroupedWeight]) -> Tensor:
        num_rows = sum(piece.shape[0] for piece in pieces)
        weight = torch.empty((num_rows, pieces[0].shape[1]), dtype=self._dtype, device=self._device)
        start = 0
        for piece in pieces:
            stop = start + piece.shape[0]
            weight[start:stop].copy_(piece if isinstance(piece, Tensor) else piece.dequantize())
            start = stop
        return weight


def pack_weight(weight: GroupedWeight) -> Int4Weight | ByteWeight | None:
    """`weight` as an op multiplies it, with the same meaning; None if none does."""
    if weight.values.is_floating_point():
        return _float_bytes(weight)
    return _int4(weight) if weight.bits <= _INT4_BITS else _integer_bytes(weight)


def _int4(weight: GroupedWeight) -> Int4Weight:
    values, zeros = weight.values, weight.zero_points
    if values.dtype == torch.int8:
        half = 1 << (weight.bits - 1)
        values, zeros = values + half, zeros + half
    return pack_int4(values, zeros, weight.scales, weight.groups)


def _integer_bytes(weight: GroupedWeight) -> ByteWeight | None:
    """Moved by their zero points, which a byte must still hold: those in the middle, of symmetric weights, it does."""
    scales = _byte_scales(weight)
    if scales is None:
        return None
    zeros = weight.zero_points.short()
    values = weight.values.short()
    values -= zeros if weight.num_groups == 1 else zeros[:, weight.groups]
    if values.min() < _INT8.min or values.max() > _INT8.max:
        return None
    return ByteWeight(values.to(torch.int8), scales)


def _float_bytes(weight: GroupedWeight) -> ByteWeight | None:
    scales = _byte_scales(weight)
    if scales is None or weight.values.dtype != torch.float8_e4m3fn or bool(weight.zero_points.any()):
        return None
    if ((weight.values.view(torch.uint8) & _FLOAT8_NAN) == _FLOAT8_NAN).any():
        return None
    return ByteWeight(weight.values, scales)


def _byte_scales(weight: GroupedWeight) -> Tensor | None:
    """float32 [out_features] or [num_blocks, out_features]; None if a block has inputs of several groups."""
    if weight.num_groups == 1:
        return weight.scales[:, 0].float().contiguous()
    group_of_block = weight.groups[::SCALE_BLOCK]
    expected = group_of_block.repeat_interleave(SCALE_BLOCK)[: len(weight.groups)]
    if (weight.groups != expected).any():
        return None
    return weight.scales[:, group_of_block].T.float().contiguous()


def _why_unpacked(weight: GroupedWeight) -> str:
    is_float = weight.values.is_floating_point()
    kind = str(weight.values.dtype).removeprefix("torch.") if is_float else f"{weight.bits}-bit integers"
    if _byte_scales(weight) is None:
        return f"{kind} without a scale for each {SCALE_BLOCK} inputs"
    return f"{kind} that are no numbers" if is_float else f"{kind} with zero points"


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Neighbours that can be multiplied at once."""
    run: list[Piece] = []
    for piece in pieces:
        if run and not _can_stack(run[-1], piece):
            yield run
            run = []
        run.append(piece)
    yield run


def _can_stack(first: Piece, second: Piece) -> bool:
    match first, second:
        case Int4Weight(), Int4Weight():
            return can_stack_int4(first, second)
        case ByteWeight(), ByteWeight():
            return first.values.dtype == second.values.dtype and first.has_block_scales == second.has_block_scales
        case ((Tensor() | GroupedWeight()), (Tensor() | GroupedWeight())):
            return True
    return False


def _shape(piece: Piece) -> tuple[int, int]:
    match piece:
        case Int4Weight():
            return piece.out_features, piece.in_features
        case ByteWeight():
            return piece.values.shape[0], piece.values.shape[1]
    return piece.shape[0], piece.shape[1]


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
