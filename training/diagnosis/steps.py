"""Toy models through the code of a training step: the device against the CPU, and what may stand beside it."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pixelprune.model_call import final_hidden, takes_packed_rows
from pixelprune.pack import Pack, VisionGeometry
from pixelprune.records.collator import PixelPruneCollator
from training.composition.toy import build_toy_model
from training.config.settings import ModelSettings
from training.data.upload import upload_ahead
from training.data.worker import PackResult
from training.diagnosis.check import Bench, Finding
from training.errors import UserError
from training.loss.supervised import LossSettings
from training.model.attention import choose_attention, load_pretrained
from training.model.compiled import compile_layers
from training.model.fused import check_fused, use_fused
from training.model.loading import enable_recomputation
from training.model.supervised import SupervisedModel

_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of a toy step's gradient in norm, against float32 on the CPU: TF32 may round; bfloat16 rounds every layer."""
Step = tuple[float, dict[str, torch.Tensor]]


def toy_folder(bench: Bench, family: str = "qwen3_vl") -> Path:
    """Made once."""
    folder = bench.scratch / family
    return folder if folder.exists() else build_toy_model(folder, family=family)


def toy_pack(folder: Path, *, apart: bool = False) -> list[Pack]:
    """Two screenshots and a question without one: in a row, or each alone."""
    collator = PixelPruneCollator.from_pretrained(str(folder), dummy_image=False)
    random = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for number, size in enumerate([(288, 480), None, (448, 224)]):
        content: list[dict[str, Any]] = [{"type": "text", "text": "Where is Save?"}]
        if size:
            pixels = np.full((*size, 3), 240, dtype=np.uint8)
            pixels[: size[0] // 2] = random.integers(0, 256, (size[0] // 2, size[1], 3), dtype=np.uint8)
            content.insert(0, {"type": "image", "image": Image.fromarray(pixels)})
        answer = {"role": "assistant", "content": f"({number}, 8)"}
        records.append({"messages": [{"role": "user", "content": content}, answer]})
    samples = [collator.preparer.prepare(record, None).sample for record in records]
    return [collator.pack([sample]) for sample in samples] if apart else [collator.pack(samples)]


def toy_model(bench: Bench, attention: str, dtype: torch.dtype, device: torch.device, family: str = "qwen3_vl") -> Any:
    return load_pretrained(str(toy_folder(bench, family)), attention=attention, dtype=dtype).to(device)


def step(model: Any, pack: Pack, *, recompute: int = 1) -> Step:
    """Loss and gradients, float32 on the CPU."""
    geometry = VisionGeometry.from_config(model.config)
    enable_recomputation(model.train(), ModelSettings(recompute_vit=recompute, recompute_llm=recompute))
    model.zero_grad(set_to_none=True)
    sums = SupervisedModel(model, geometry, LossSettings())(pack.to(model.device))
    sums.total.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return sums.total.item(), gradients


def difference(step: Step, reference: Step) -> float:
    """Of all gradients together, in norm; infinite where one has gradients that the other has not."""
    if step[1].keys() != reference[1].keys():
        return float("inf")
    off = sum(float((step[1][name] - gradient).double().square().sum()) for name, gradient in reference[1].items())
    whole = sum(float(gradient.double().square().sum()) for gradient in reference[1].values())
    return float(np.sqrt(off / whole)) if np.isfinite(off) else float("inf")


def training_step(bench: Bench) -> Finding:
    """Forward and backward as training chooses them, recomputed, against float32 on the CPU kept whole."""
    (pack,) = toy_pack(toy_folder(bench))
    cpu = torch.device("cpu")
    expected = step(toy_model(bench, "eager", torch.float32, cpu), pack, recompute=0)
    figures, wrong = [], False
    for dtype, limit in _LIMITS.items():
        attention = choose_attention("auto", bench.device, dtype)
        found = step(toy_model(bench, attention, dtype, bench.device), pack)
        off = difference(found, expected)
        wrong |= not off <= limit
        name = str(dtype).removeprefix("torch.")
        figures.append(f"{name} ({attention}) gradient off by {off:.0e}, at most {limit:.0e}")
    figure = "; ".join(figures)
    if wrong:
        return Finding("FAILED", figure, "do not train here; try model.attention=sdpa, and report what the GPU is")
    return Finding("ok", figure)


def host_waits(bench: Bench) -> Finding:
    """Where forward and backward make the host wait for the device, as the driver's debug mode tells."""
    if not bench.on_gpu:
        return Finding("not here", "a CPU computes at once")
    (pack,) = toy_pack(toy_folder(bench))
    model = toy_model(bench, choose_attention("auto", bench.device), torch.bfloat16, bench.device)
    geometry = VisionGeometry.from_config(model.config)
    module, on_device = SupervisedModel(model.train(), geometry, LossSettings()), pack.to(bench.device)
    module(on_device).total.backward()
    places: Counter[str] = Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module(on_device).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            places["/".join(Path(warning.filename).parts[-2:]) + f":{warning.lineno}"] += 1
    ours = {place: number for place, number in places.items() if place.split("/")[0] in ("pixelprune", "training")}
    figure = f"{sum(places.values())} in a step, {sum(ours.values())} of them ours"
    if ours:
        return Finding("FAILED", figure, "slower than need be; report it: " + ", ".join(ours), dict(places))
    return Finding("ok", figure, details=dict(places))


def upload(bench: Bench) -> Finding:
    """Packs from pinned memory, copied ahead on a stream of their own, arrive whole and in order."""
    if not bench.on_gpu:
        return Finding("not here", "nothing is copied on a CPU")
    packs = [pack.pin_memory() for pack in toy_pack(toy_folder(bench), apart=True)] * 3
    moved = list(upload_ahead([PackResult(pack, False) for pack in packs], bench.device))
    for (pack, _), original in zip(moved, packs, strict=True):
        if not all(torch.equal(a.cpu(), b) for a, b in zip(pack.tensors(), original.tensors(), strict=True)):
            return Finding("FAILED", "a pack arrived with other contents")
    return Finding("ok", f"{len(packs)} packs, bit-equal")


def fused_layers(bench: Bench) -> Finding:
    """liger-kernel's RMSNorm and SwiGLU beside the stock layers (model.liger)."""
    try:
        check_fused(bench.device, "qwen3_vl")
    except UserError as error:
        return Finding("not here", str(error).removeprefix("model.liger: "))
    return _beside_stock(bench, lambda model: use_fused(model, bench.device))


def compiled_layers(bench: Bench) -> Finding:
    """torch.compile of the layers beside the plain ones (model.compile)."""
    if not bench.on_gpu:
        return Finding("not here", "it would take minutes on a CPU")
    return _beside_stock(bench, lambda model: compile_layers(model, 16))


def _beside_stock(bench: Bench, change: Any) -> Finding:
    (pack,) = toy_pack(toy_folder(bench))
    attention = choose_attention("auto", bench.device)
    expected = step(toy_model(bench, attention, torch.bfloat16, bench.device), pack)
    model = toy_model(bench, attention, torch.bfloat16, bench.device)
    change(model)
    started = time.perf_counter()
    off = difference(step(model, pack), expected)
    figure = (
        f"gradient off by {off:.0e} of the stock layers'; the first step took {time.perf_counter() - started:.0f} s"
    )
    return Finding("ok" if off <= _LIMITS[torch.bfloat16] else "FAILED", figure, "" if off <= 0.1 else "leave it off")


@torch.no_grad()
def hybrid_rows(bench: Bench) -> Finding:
    """Qwen3.5: samples of a packed row against each alone, with kernels that take borders or without."""
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    model = toy_model(bench, choose_attention("auto", bench.device, dtype), dtype, bench.device, "qwen3_5").eval()
    geometry, folder = VisionGeometry.from_config(model.config), toy_folder(bench, "qwen3_5")
    (row,), apart = toy_pack(folder), toy_pack(folder, apart=True)
    together = final_hidden(model, row.to(bench.device), geometry).float()
    alone = torch.cat([final_hidden(model, pack.to(bench.device), geometry) for pack in apart]).float()
    off = float((together - alone).norm() / alone.norm())
    how = "kernels take the borders" if takes_packed_rows(model) else "padded batches: no kernels that take borders"
    limit = 0.05 if bench.on_gpu else 1e-4
    figure = f"{how}; off by {off:.0e}, at most {limit:.0e}"
    advice = "pip install flash-linear-attention causal-conv1d, see docs/first_gpu_run.md"
    if not off <= limit:
        return Finding("FAILED", figure, "do not train Qwen3.5 here; other families are not concerned")
    return Finding("ok", figure, advice if bench.on_gpu and not takes_packed_rows(model) else "")
