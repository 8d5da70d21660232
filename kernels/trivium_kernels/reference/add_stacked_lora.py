"""`add_stacked_lora` in plain torch, adapter by adapter."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from trivium_kernels.add_stacked_lora import AdapterRows, LoraStack


def add_stacked_lora(y: Tensor, x: Tensor, rows: AdapterRows, stack: LoraStack) -> None:
    for adapter, (first, last) in enumerate(pairwise(rows.starts.tolist())):
        own = rows.order[first:last]
        shrunk = F.linear(x[own], stack.shrink[adapter])
        for part, (start, end) in enumerate(pairwise(stack.bounds)):
            of_part = shrunk[:, part * stack.max_rank : (part + 1) * stack.max_rank]
            y[:, start:end].index_add_(0, own, F.linear(of_part, stack.expand[adapter, start:end]))
