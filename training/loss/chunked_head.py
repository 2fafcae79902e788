"""An output head and a loss on its logits, in chunks over positions.

    N = positions, C = positions of a chunk, D = model width, V = vocabulary

At V = 151,936 the float32 logits of 8,192 positions are 5 GB, and a softmax with its gradient needs them several
times over. So logits exist for `chunk_size` positions at a time, and for these the gradient is computed **in the
forward pass**, straight after their loss; the backward pass only scales what is already there. Against checkpointing
each chunk this

- saves one of four products with the output head (no logits are computed twice),
- adds the chunks' weight gradients in float32 (autograd would add them in the weight's bfloat16),
- hands each parameter its gradient once per backward, so ZeRO-2's hooks see what they see with a stock model,
- draws a LoRA dropout mask once.

Its price is the head's float32 gradient (V x D, where the head is trained and there are several chunks), which lives
from the forward to the backward pass.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

LossOfLogits = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor | None]]
"""(rows, logits (C, V), wants_grad) -> sums (num_sums,), and the gradient (C, V) of the first sum if it is wanted."""


def chunked_head_loss(
    hidden: Tensor, lm_head: nn.Module, loss_of_logits: LossOfLogits, num_sums: int, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Sum of a loss over N positions, with the logits of at most chunk_size positions alive, forward and backward.

    Args:
        hidden: (N, D); N may be 0, then the result is 0 and still connected to everything that needs a gradient.
        lm_head: any module (C, D) -> (C, V). Each of its parameters that requires a gradient receives one, zeros
            where the head does not use it: under ZeRO-2 all ranks must touch the same parameters.
        loss_of_logits: called once per chunk with detached logits; it must not overwrite them, the head may have saved
            them for its backward.

    Returns:
        The first of the sums, a scalar that carries the gradient, and the others (num_sums - 1,), which carry none;
        float32, or float64 where hidden is.
    """
    trainable = {name: weight for name, weight in lm_head.named_parameters() if weight.requires_grad}
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or bool(trainable))
    job = _Job(lm_head, tuple(trainable), loss_of_logits, num_sums, chunk_size, wants_grad)
    return _ChunkedHeadLoss.apply(job, hidden, *trainable.values())


class _Job(NamedTuple):
    """The arguments that are no tensors of the graph."""

    head: nn.Module
    weight_names: tuple[str, ...]
    loss_of_logits: LossOfLogits
    num_sums: int
    chunk_size: int
    wants_grad: bool


class _ChunkedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, hidden: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(job.num_sums, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        hidden_grad = torch.zeros_like(hidden) if job.wants_grad and hidden.requires_grad else None
        weight_grads: list[Tensor | None] = [None] * len(weights)
        for rows in _chunks(hidden.shape[0], job.chunk_size):
            chunk_sums, chunk_grad, *chunk_weight_grads = _one_chunk(job, rows, hidden, weights)
            sums += chunk_sums
            if hidden_grad is not None:
                hidden_grad[rows] = chunk_grad
            weight_grads = [_accumulate(*grads) for grads in zip(weight_grads, chunk_weight_grads, strict=True)]
            del chunk_weight_grads  # (V, D): not beside those of the next chunk
        if job.wants_grad:
            # None is left for an unused weight, and for all of them without positions.
            ready = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, weight_grads, strict=True)]
            ctx.save_for_backward(hidden_grad, *ready)
        ctx.grad_dtypes = [hidden.dtype, *(weight.dtype for weight in weights)]
        total, others = sums[0].clone(), sums[1:].clone()
        ctx.mark_non_differentiable(others)
        return total, others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.grad_dtypes, strict=True)
        return None, *(_scaled(grad, grad_total, dtype) for grad, dtype in grads)


def _one_chunk(job: _Job, rows: slice, hidden: Tensor, weights: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Sums of a chunk, gradient of its hidden states, gradients of the weights; None for what has no gradient.

    A function of its own, so that everything of size (C, V) is gone when it returns.
    """
    chunk = hidden[rows].detach().requires_grad_(job.wants_grad and hidden.requires_grad)
    # Detached leaves: hooks on the real parameters must wait for the one backward pass.
    leaves = [weight.detach().requires_grad_(job.wants_grad) for weight in weights]
    with torch.set_grad_enabled(job.wants_grad):
        logits = functional_call(job.head, dict(zip(job.weight_names, leaves, strict=True)), (chunk,))
    sums, logits_grad = job.loss_of_logits(rows, logits.detach(), job.wants_grad)
    if logits_grad is None:
        return sums, None, *(None for _ in weights)
    if chunk.requires_grad:
        return sums, *torch.autograd.grad(logits, [chunk, *leaves], logits_grad, allow_unused=True)
    return sums, None, *torch.autograd.grad(logits, leaves, logits_grad, allow_unused=True)


def _accumulate(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Sum of the chunks' gradients, in float32 from the second chunk on."""
    if total is None or part is None:
        return part if total is None else total
    return total.to(torch.promote_types(total.dtype, torch.float32)).add_(part)


def _scaled(grad: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """grad * scale, rounded once to dtype; grad itself stays, for a second backward over a retained graph."""
    if grad is None:
        return None
    # As a vector of one: CUDA would round a scalar tensor to bfloat16, the gradient's dtype, before it multiplies.
    return torch.mul(grad, scale.view(1), out=torch.empty_like(grad, dtype=dtype))


def _chunks(num_rows: int, chunk_size: int) -> Iterator[slice]:
    for start in range(0, num_rows, chunk_size):
        yield slice(start, min(start + chunk_size, num_rows))
