"""`add_lora` in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from trivium_kernels.add_lora import LoraWeights


def add_lora(y: Tensor, x: Tensor, groups: Sequence[tuple[Tensor | None, LoraWeights]]) -> None:
    for rows, weights in groups:
        shrunk = F.linear(x if rows is None else x[rows], weights.shrink)
        for part in weights.expand:
            width, rank = part.matrix.shape
            target, source = y.narrow(1, part.start, width), shrunk.narrow(1, part.first_rank, rank)
            if rows is None:
                target.addmm_(source, part.matrix.T)
            else:
                target.index_add_(0, rows, F.linear(source, part.matrix))
