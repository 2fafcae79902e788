"""A toy model with liger's kernels in Triton's interpreter, beside the stock one: prints the differences.

Triton looks for TRITON_INTERPRET as it is imported, hence a program of its own: test_fused.py starts it.
"""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from pixelprune.model_call import final_hidden
from pixelprune.pack import VisionGeometry
from training.diagnosis.steps import difference, toy_pack
from training.model.attention import load_pretrained
from training.model.fused import put_in


def as_tensors(convert):
    """The interpreter leaves float arguments as Python floats, which kernels call `.to` on; compiled, they are
    float32."""

    def converted(argument):
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.core.tensor(handle, tl.float32)
        return convert(argument)

    return converted


def main(folder: str) -> None:
    interpreter._implicit_cvt = as_tensors(interpreter._implicit_cvt)
    from liger_kernel.ops import rms_norm
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # libdevice is not interpreted; looked up when tl is
    stock = load_pretrained(folder, attention="sdpa", dtype=torch.float32).train()
    fused = copy.deepcopy(stock)
    counts = put_in(fused, rms_norm.LigerRMSNormFunction.apply, LigerSiLUMulFunction.apply)
    geometry = VisionGeometry.from_config(stock.config)
    (pack,) = toy_pack(folder)
    found = {}
    for name, model in (("stock", stock), ("fused", fused)):
        hidden = final_hidden(model, pack, geometry)
        hidden.square().mean().backward()
        found[name] = (hidden.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    (expected, gradients), (hidden, fused_gradients) = found["stock"], found["fused"]
    assert fused_gradients.keys() == gradients.keys()
    off = difference((0.0, fused_gradients), (0.0, gradients))
    off_hidden = float((hidden - expected).norm() / expected.norm())
    result = {"counts": counts, "hidden": off_hidden, "gradients": off, "compared": len(gradients)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
