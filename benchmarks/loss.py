"""Peak memory and time of the training loss: chunked against all logits at once, and against checkpointed chunks.

    python -m benchmarks.loss [--device cuda] [--repeats 5]

Every variant computes the same loss of the same hidden states, forward and backward, one after the other within each
repeat. Peak memory counts the bytes of all tensors alive beyond the inputs (on CUDA what the allocator reports). The
width of the real-vocabulary case is small, so that it runs on a laptop: times say how much the *softmax side* costs,
and a wider head makes all variants more alike (with one product less for the chunked loss than for checkpointing).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from benchmarks.parts.record import markdown_table, write_record
from training.loss.supervised import LossSettings, supervised_loss

KD_WEIGHT, TEMPERATURE = 1.0, 2.0


@dataclass(frozen=True)
class Shape:
    """One problem: N positions of width D, a vocabulary, and the chunk sizes to try."""

    name: str
    num_positions: int
    width: int
    vocab: int
    chunk_sizes: tuple[int, ...]


SHAPES = (
    Shape("toy", num_positions=2048, width=64, vocab=1024, chunk_sizes=(256, 1024)),
    Shape("real vocabulary", num_positions=256, width=128, vocab=151_936, chunk_sizes=(16, 64)),
)


class Problem:
    """Seeded hidden states, labels and heads of student and teacher on one device."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        size = (shape.num_positions, shape.width)
        self.hidden = torch.randn(size, device=device, dtype=dtype).requires_grad_()
        self.teacher_hidden = torch.randn(size, device=device, dtype=dtype)
        self.labels = torch.randint(shape.vocab, (shape.num_positions,), device=device)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False, device=device, dtype=dtype)
        self.teacher_head = nn.Linear(shape.width, shape.vocab, bias=False, device=device, dtype=dtype)
        self.teacher_head.requires_grad_(False)

    def plain(self, rows: slice, kd: bool) -> Tensor:
        """The loss of some rows as one would write it: float32 logits, autograd."""
        logits = self.head(self.hidden[rows]).float()
        total = functional.cross_entropy(logits, self.labels[rows], reduction="sum")
        if kd:
            teacher = (self.teacher_head(self.teacher_hidden[rows]).float() / TEMPERATURE).log_softmax(-1)
            student = (logits / TEMPERATURE).log_softmax(-1)
            kl = functional.kl_div(student, teacher, reduction="sum", log_target=True)
            total = total + KD_WEIGHT * TEMPERATURE**2 * kl
        return total

    def checkpointed(self, chunk_size: int, kd: bool) -> Tensor:
        """The plain loss of each chunk, computed again in the backward pass."""
        starts = range(0, len(self.labels), chunk_size)
        parts = [checkpoint(self.plain, slice(i, i + chunk_size), kd, use_reentrant=False) for i in starts]
        return torch.stack(parts).sum()

    def chunked(self, chunk_size: int, kd: bool) -> Tensor:
        settings = LossSettings(kd_weight=KD_WEIGHT if kd else 0.0, temperature=TEMPERATURE, chunk_size=chunk_size)
        teacher: dict[str, Any] = {}
        if kd:
            teacher = {"teacher_hidden": self.teacher_hidden, "teacher_head": self.teacher_head}
        return supervised_loss(self.hidden, self.head, self.labels, settings, **teacher).total


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes held by tensors made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self.live.values()))
        return result


def peak_bytes(problem: Problem, loss: Callable[[], Tensor]) -> int:
    """Most bytes alive during forward and backward, beyond the inputs; the gradients are part of it."""
    problem.hidden.grad = problem.head.weight.grad = None
    if problem.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as counted:
        loss().backward()
    return counted.peak


def seconds(problem: Problem, loss: Callable[[], Tensor]) -> float:
    """Wall time of forward and backward."""
    problem.hidden.grad = problem.head.weight.grad = None
    start = time.perf_counter()
    loss().backward()
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape: Shape, kd: bool, device: str, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Rows of one problem; ratios are to the plain loss of the same repeats."""
    problem = Problem(shape, device, dtype)
    variants: dict[str, Callable[[], Tensor]] = {"all logits at once": partial(problem.plain, slice(None), kd)}
    for size in shape.chunk_sizes:
        variants[f"checkpointed, {size}"] = partial(problem.checkpointed, size, kd)
        variants[f"chunked, {size}"] = partial(problem.chunked, size, kd)
    values = {name: loss().item() for name, loss in variants.items()}
    peaks = {name: peak_bytes(problem, loss) for name, loss in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, loss in variants.items():
            times[name].append(seconds(problem, loss))
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    plain = next(iter(variants))
    return [
        {
            "shape": shape.name,
            "loss": "CE + KD" if kd else "CE",
            "variant": name,
            "peak_mib": peaks[name] / 2**20,
            "memory_ratio": peaks[name] / peaks[plain],
            "seconds": medians[name],
            "time_ratio": medians[name] / medians[plain],
            "relative_difference": abs(values[name] - values[plain]) / abs(values[plain]),
            "samples": times[name],
        }
        for name in variants
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for kd in (False, True):
            dtype = getattr(torch, arguments.dtype)
            rows += measure(shape, kd, arguments.device, dtype, arguments.repeats)
    table = markdown_table(
        [
            {
                "shape": row["shape"],
                "loss": row["loss"],
                "variant": row["variant"],
                "peak MiB": f"{row['peak_mib']:.1f}",
                "memory / plain": f"{row['memory_ratio']:.3f}",
                "ms": f"{1000 * row['seconds']:.0f}",
                "time / plain": f"{row['time_ratio']:.2f}",
            }
            for row in rows
        ]
    )
    payload = {**vars(arguments), "shapes": [asdict(shape) for shape in SHAPES], "rows": rows}
    write_record(f"loss_{arguments.device}_{arguments.dtype}", payload, table)
    print(table)


if __name__ == "__main__":
    main()
