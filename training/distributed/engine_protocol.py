"""What of DeepSpeed's engine this project uses, as types: DeepSpeed itself has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from pixelprune.pack import Pack
from training.loss.supervised import LossSums


class ZeroOptimizer(Protocol):
    """ZeRO-1 or 2 around AdamW.

    overflow: whether the last step was skipped, its loss or gradient not finite.
    single_partition_of_fp32_groups: this rank's flat float32 weights (n,), one tensor per parameter group; the keys of
    `optimizer.state`.
    """

    overflow: bool
    optimizer: torch.optim.Optimizer
    param_groups: list[dict[str, Any]]
    single_partition_of_fp32_groups: Sequence[torch.Tensor]


class Engine(Protocol):
    """The trained module in DeepSpeed's hands.

    module: the one it was built with, its parameters those that the forward pass uses. global_steps: optimizer steps
    that DeepSpeed has counted, skipped ones included.
    """

    module: nn.Module
    optimizer: ZeroOptimizer
    device: torch.device
    global_steps: int

    def __call__(self, pack: Pack) -> LossSums: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Whether the next backward is the last of an optimizer step."""

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> Any: ...

    def step(self) -> Any: ...

    def get_global_grad_norm(self) -> float | torch.Tensor:
        """Of the last optimizer step, before clipping."""
