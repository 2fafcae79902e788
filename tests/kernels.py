"""Linear-attention kernels and tests on a CPU: the stock layers call installed kernels whatever device they are on."""

from __future__ import annotations

import pytest

from pixelprune import model_call
from pixelprune.family import FAMILIES


def needs_plain_layers(family: str) -> None:
    """Skip a test that runs this family on a CPU where either kernel is installed: each is bound by itself."""
    if FAMILIES[family].linear_attention and any(map(model_call._has_kernel, model_call.KERNEL_PACKAGES)):
        pytest.skip("linear-attention kernels are installed: the model does not run on a CPU")
