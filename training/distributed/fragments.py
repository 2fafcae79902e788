"""The trained state as named pieces: what this rank holds of every parameter's float32 weight and Adam moments.

ZeRO-1 and 2 keep, per optimizer group, one flat float32 partition on each rank. Named pieces of it (parameter, first
element, values) do not depend on the number of ranks: written by any number of ranks, they are read by any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from training.distributed.engine_protocol import Engine

KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + n) of the flattened parameter `name`.

    tensors: kind -> float32 (n,), views of the optimizer's own memory.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    tensors: dict[str, torch.Tensor]


def own_fragments(engine: Engine) -> Iterator[Fragment]:
    """This rank's pieces of every trained parameter of a ZeRO-1 or ZeRO-2 engine, in the model's order.

    The moments are those of `create_moments`: AdamW makes its own in the first step that is not skipped.
    """
    zero = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if not parameter.requires_grad or mapping is None:
            continue
        # Not through mapping.optim_fragment: with several groups DeepSpeed links it before all moments exist.
        state = zero.optimizer.state[zero.single_partition_of_fp32_groups[mapping.param_group_index]]
        place = mapping.get_hp_fragment_address()
        tensors = {kind: state[kind].narrow(0, place.start, place.numel) for kind in KINDS[1:]}
        tensors["weight"] = mapping.hp_fragment
        yield Fragment(name, mapping.lp_fragment_address.start, tuple(parameter.shape), tensors)


def create_moments(engine: Engine) -> None:
    """Give a fresh engine the zero moments that AdamW makes in its first step: they can be saved and filled before."""
    zero = engine.optimizer
    fused = bool(zero.optimizer.defaults.get("fused"))
    for flat in zero.single_partition_of_fp32_groups:
        state = zero.optimizer.state[flat]
        device = flat.device if fused else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["exp_avg"] = torch.zeros_like(flat)
        state["exp_avg_sq"] = torch.zeros_like(flat)


def num_adam_steps(engine: Engine) -> int:
    """Updates that AdamW has made (skipped steps do not count)."""
    zero = engine.optimizer
    counts = {int(state["step"]) for state in zero.optimizer.state.values()}
    assert len(counts) == 1, f"optimizer groups disagree on their number of updates: {counts}"
    return counts.pop()


def set_adam_steps(engine: Engine, count: int) -> None:
    for state in engine.optimizer.optimizer.state.values():
        state["step"].fill_(count)


@torch.no_grad()
def refresh_model_weights(engine: Engine, read_weight: Callable[[str], torch.Tensor]) -> None:
    """Put the float32 weights, rounded as ZeRO rounds them, into the parameters that the forward pass uses.

    read_weight(name) gives a whole flattened float32 parameter; one is in memory at a time.
    """
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(read_weight(name).view_as(parameter))
