"""The two kernels of a training step that this project chooses: attention with borders, and the chunked head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from pixelprune.attention.borders import Borders
from training.composition.toy import build_toy_model
from training.config.settings import ATTENTION_NAMES
from training.diagnosis.check import Bench, Check, Finding, milliseconds
from training.loss.supervised import LossSettings, LossSums, supervised_loss
from training.model.attention import choose_attention, load_pretrained, obstacle
from training.model.attention_check import LIMITS, Heads, attention_errors, shared_row
from training.model.sharing import SHARING_ATTENTIONS

HEADS = (
    Heads("language model", 16, 8, 128, True),
    Heads("language model", 32, 8, 128, True),
    Heads("vision tower", 16, 16, 64, False),
    Heads("vision tower", 16, 16, 72, False),
)
"""Of Qwen3-VL 2B, 4B and 8B."""
LENGTHS = (1, 199, 1, 311, 788)
VOCABULARY = 151_936
_LOSS_LIMIT, _GRADIENT_LIMIT = 2e-3, 2e-2
"""bfloat16 logits, against float32 ones of the same weights."""


def attention_checks(device: torch.device) -> list[Check]:
    """One of each attention that recipes can name; needed is what `auto` takes here."""
    chosen = choose_attention("auto", device)
    names = [name for name in ATTENTION_NAMES if name != "auto"]
    return [Check(f"attention {name}", _attention(name), is_needed=name == chosen) for name in names]


def _attention(name: str) -> Callable[[Bench], Finding]:
    def look(bench: Bench) -> Finding:
        dtype = torch.bfloat16
        if reason := obstacle(name, bench.device, dtype):
            return Finding("not here", reason)
        folder = bench.scratch / "attention"
        if not folder.exists():
            build_toy_model(folder)
        model = load_pretrained(str(folder), attention=name, dtype=dtype)
        # A CPU takes seconds for the definition in float64: shorter rows there.
        lengths = LENGTHS if bench.on_gpu else tuple(max(1, length // 8) for length in LENGTHS)
        errors = {}
        for heads in HEADS if bench.on_gpu else HEADS[::2]:
            apart = Borders.of_lengths(lengths, is_causal=heads.is_causal)
            errors[str(heads)] = attention_errors(model, heads, apart, bench.device, dtype)
            if heads.is_causal and name in SHARING_ATTENTIONS:
                shared = shared_row(lengths[1], (lengths[0], lengths[3], lengths[2]))
                errors[f"{heads}, a shared prefix"] = attention_errors(model, heads, shared, bench.device, dtype)
        worst = max(error for case in errors.values() for error in case.values())
        limit = LIMITS[dtype]
        figure = f"off by {worst:.1e} of the definition, at most {limit:.0e} ({len(errors)} shapes, both directions)"
        if worst > limit:
            wrong = [f"{case}: {name}" for case, of in errors.items() for name, error in of.items() if error > limit]
            return Finding("FAILED", f"{figure}; {'; '.join(wrong)}", "model.attention=sdpa", errors)
        return Finding("ok", figure, details=errors)

    return look


def chunked_head(bench: Bench) -> Finding:
    """Loss and gradient of the head at a published vocabulary, against all logits at once in float32."""
    num, width = (2048, 2048) if bench.on_gpu else (48, 256)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, width, generator=generator).mul_(width**-0.5).bfloat16()
    hidden = torch.randn(num, width, generator=generator).bfloat16().to(bench.device).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (num,), generator=generator).to(bench.device)
    head = nn.Linear(width, VOCABULARY, bias=False, device="meta")
    head.weight = nn.Parameter(weight.to(bench.device))

    def run() -> LossSums:
        hidden.grad = head.weight.grad = None
        sums = supervised_loss(hidden, head, labels, LossSettings(chunk_size=num // 2))
        sums.total.backward()
        return sums

    before = torch.cuda.memory_allocated(bench.device) if bench.on_gpu else 0
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    took = milliseconds(bench, run)
    peak = (torch.cuda.max_memory_allocated(bench.device) - before) / 1e9 if bench.on_gpu else None
    total, gradient = run().total.item(), hidden.grad
    some = min(num, 64)
    exact = hidden.detach()[:some].float().requires_grad_()
    reference = F.cross_entropy(exact @ head.weight.detach().float().T, labels[:some], reduction="sum")
    reference.backward()
    assert gradient is not None
    assert exact.grad is not None
    off = float((gradient[:some].float() - exact.grad).norm() / exact.grad.norm())
    with torch.no_grad():
        mine = supervised_loss(hidden[:some], head, labels[:some], LossSettings(chunk_size=some)).total.item()
    loss_off = abs(mine / reference.item() - 1)
    figure = f"{num} positions x {VOCABULARY:,} tokens: {took:.0f} ms" + (f", {peak:.2f} GB" if peak else "")
    figure += f"; loss off by {loss_off:.0e}, gradient by {off:.0e}"
    details = {"ms": took, "peak_gb": peak, "loss": total, "loss_error": loss_off, "gradient_error": off}
    if not (loss_off <= _LOSS_LIMIT and off <= _GRADIENT_LIMIT):
        return Finding("FAILED", figure, "report it: there is no other head to take", details)
    return Finding("ok", figure, details=details)
