"""Pruning inside the vision tower (the paper's Table 7): all blocks up to layer k, the kept ones from then on.

k = -1 drops them before the first layer, which is PixelPrune itself; the last layer's number gathers the finished
features. Made of forward hooks on the stock model, which are gone when the call is; nothing is patched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pixelprune.hf import PrunedInputs, stock_model
from pixelprune.images.image import PrunedImage
from pixelprune.pack import VisionGeometry, pack_samples, vision_inputs
from pixelprune.settings import MERGE

__all__ = ["DepthPruning", "encode_pruned_after", "pruned_after"]

Args = tuple[Any, ...]

# P = patches of all images before pruning, K = of those kept, four per block and in the order of the blocks


@dataclass(frozen=True)
class DepthPruning:
    """Rows that stay. rows: (K,) indices of kept patches among all; grids: (images, 3) synthetic grids of what is kept,
    as `pixelprune.pack.vision_inputs` writes them."""

    rows: torch.Tensor
    grids: torch.Tensor

    @classmethod
    def of(cls, images: list[PrunedImage], device: Any) -> DepthPruning:
        """images: as pruned; their full patches are given to the tower in the same order."""
        per_block, start, grids = [], 0, []
        for image in images:
            keep = torch.from_numpy(image.selection.keep.reshape(-1))
            per_block.append(keep.nonzero().flatten() + start)
            start += keep.numel()
            grids.append([1, MERGE, MERGE * int(keep.sum())])
        blocks = torch.cat(per_block)
        rows = (blocks[:, None] * MERGE**2 + torch.arange(MERGE**2)).flatten()
        return cls(rows.to(device), torch.tensor(grids, device=device))

    @property
    def lengths(self) -> torch.Tensor:
        """(images,) kept patches of each."""
        return self.grids.prod(dim=1)


@contextmanager
def pruned_after(visual: Any, k: int, pruning: DepthPruning) -> Iterator[None]:
    """Within this context, a forward of the stock tower on all patches computes all of them in layers 0 to k, and the
    kept ones behind; its features, DeepStack's too, are those of the kept blocks.

    Raises ValueError for a layer that the tower has not.
    """
    num_layers = len(visual.blocks)
    if not -1 <= k < num_layers:
        raise ValueError(f"depth: expected a layer from -1 (before the first) to {num_layers - 1}, got {k}")
    rows = pruning.rows
    borders = torch.nn.functional.pad(pruning.lengths.cumsum(0), (1, 0)).to(torch.int32)

    def drop(_: Any, args: Args, kwargs: dict[str, Any]) -> tuple[Args, dict[str, Any]]:
        return (args[0][rows], *args[1:]), kwargs

    def shorten(_: Any, args: Args, kwargs: dict[str, Any]) -> tuple[Args, dict[str, Any]]:
        cos, sin = kwargs["position_embeddings"]
        kwargs |= {"position_embeddings": (cos[rows], sin[rows]), "cu_seqlens": borders.to(args[0].device)}
        return args, kwargs | {"max_seqlen": int(pruning.lengths.max())}

    def gather(_: Any, args: Args) -> Args:
        return (args[0][rows], *args[1:])

    with ExitStack() as stack:
        for number, block in enumerate(visual.blocks[k + 1 :]):
            if number == 0:
                stack.callback(block.register_forward_pre_hook(drop, with_kwargs=True).remove)
            stack.callback(block.register_forward_pre_hook(shorten, with_kwargs=True).remove)
        for layer, merger in zip(
            getattr(visual, "deepstack_visual_indexes", ()), getattr(visual, "deepstack_merger_list", ()), strict=True
        ):
            if layer <= k:
                stack.callback(merger.register_forward_pre_hook(gather).remove)
        if k == num_layers - 1:
            stack.callback(visual.merger.register_forward_pre_hook(gather).remove)
        yield


@torch.no_grad()
def encode_pruned_after(model: Any, k: int, inputs: PrunedInputs, full: PrunedInputs) -> dict[str, Any]:
    """The vision tower's features for `pixelprune.hf.generate(model, inputs, features=...)`, pruned behind layer k.

    full: the same conversations prepared with strategy "none". Raises ValueError where they are not the same, or where
    images were scaled (strategy "resize"), which has no rows to drop.
    """
    images = [image for sample in inputs.samples for image in sample.images]
    whole = [image for sample in full.samples for image in sample.images]
    if [image.selection.keep.shape for image in images] != [image.selection.keep.shape for image in whole]:
        raise ValueError("depth: expected the same conversations, pruned by a mask and prepared with strategy 'none'")
    if not images:
        return {}
    stock = stock_model(model, full.prompter)
    prompter = full.prompter
    normalisation = {"image_mean": prompter.image_mean, "image_std": prompter.image_std}
    geometry = VisionGeometry.from_config(stock.config, normalisation)
    visual = stock.model.visual
    device = next(visual.parameters()).device
    arguments = vision_inputs(pack_samples(full.samples, geometry).to(device), geometry, visual.dtype)
    pruning = DepthPruning.of(images, device)
    with pruned_after(visual, k, pruning):
        features = stock.model.get_image_features(**arguments | {"image_grid_thw": pruning.grids}, return_dict=True)
    return {"mm_encoder_outputs": {"image": features}}
