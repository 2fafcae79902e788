"""Independent references: the stock pipeline, and pruning written from its definition on the full model's parts."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from pixelprune.images.image import PrunedImage, prune_pixels
from pixelprune.sample import ChatTokens, Sample, build_sample
from pixelprune.settings import PruneSettings

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


def stock_processor(min_pixels: int = 32 * 32, max_pixels: int = 4096 * 4096) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
    )


def chat_of(tokenizer, question: str, answer: str, num_images: int) -> ChatTokens:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    head = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    prompt = tokenizer(head, add_special_tokens=False)["input_ids"]
    target = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    ids = np.array(prompt + target, dtype=np.int64)
    return ChatTokens(ids, np.arange(len(ids)) >= len(prompt))


def make_sample(
    tokenizer, images: list[np.ndarray], question: str, answer: str, strategy: str = "pred2d", name: str = ""
) -> Sample:
    pruned = [prune_pixels(image, PruneSettings(strategy=strategy), image.shape[:2]) for image in images]
    chat = chat_of(tokenizer, question, answer, len(images))
    return build_sample(chat, pruned, image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"), record_id=name)


def stock_inputs(tokenizer, images: list[np.ndarray], question: str, answer: str) -> dict:
    """What stock code feeds: PIL image processor, chat template, placeholders repeated per block."""
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    chat = chat_of(tokenizer, question, answer, len(images))
    inputs: dict = {}
    ids = chat.input_ids
    if images:
        features = stock_processor()(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        inputs = {"pixel_values": features["pixel_values"], "image_grid_thw": features["image_grid_thw"]}
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == image_token] = (features["image_grid_thw"].prod(-1) // 4).numpy()
        ids = np.repeat(ids, repeats)
    input_ids = torch.from_numpy(ids)[None]
    return inputs | {"input_ids": input_ids, "mm_token_type_ids": (input_ids == image_token).int()}


@torch.no_grad()
def brute_force_logits(model, tokenizer, images: list[np.ndarray], pruned: list[PrunedImage], question, answer):
    """Pruning by definition: embed every patch at its full-grid position, drop rows before ViT block 0, run the
    blocks on what is left, drop the same placeholders (with their positions) from the unpruned LLM sequence."""
    inputs = stock_inputs(tokenizer, images, question, answer)
    visual, text = model.model.visual, model.model.language_model
    rows_kept = [torch.from_numpy(image.selection.keep.reshape(-1)) for image in pruned]
    taps = getattr(visual, "deepstack_visual_indexes", [])
    embeds, deepstack = [], []
    start = 0
    for grid, kept in zip(inputs["image_grid_thw"], rows_kept, strict=True):
        end = start + int(grid.prod())
        hidden = visual.patch_embed(inputs["pixel_values"][start:end])
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid[None], visual.num_grid_per_side, "bilinear", True, 2
        )
        hidden = hidden + (visual.pos_embed(indices) * weights[:, :, None]).sum(1)
        rotary = visual.rotary_pos_emb(hidden, get_vision_position_ids(grid[None], 2))
        patches = kept.repeat_interleave(4)
        hidden, rotary = hidden[patches], tuple(part[patches] for part in rotary)
        borders = torch.tensor([0, len(hidden)], dtype=torch.int32)
        layers = []
        for depth, block in enumerate(visual.blocks):
            hidden = block(hidden, cu_seqlens=borders, position_embeddings=rotary)
            if depth in taps:
                layers.append(visual.deepstack_merger_list[taps.index(depth)](hidden))
        embeds.append(visual.merger(hidden))
        deepstack.append(layers)
        start = end
    positions, _ = model.model.get_rope_index(**{k: v for k, v in inputs.items() if k != "pixel_values"})
    is_image = inputs["mm_token_type_ids"][0].bool()
    column_kept = torch.ones(len(is_image), dtype=torch.bool)
    column_kept[is_image] = torch.cat(rows_kept)
    ids = inputs["input_ids"][:, column_kept]
    hidden = model.get_input_embeddings()(ids).clone()
    hidden[0, is_image[column_kept]] = torch.cat(embeds)
    extra = {}
    if taps:
        extra["visual_pos_masks"] = is_image[column_kept][None]
        extra["deepstack_visual_embeds"] = [torch.cat(layer) for layer in zip(*deepstack, strict=True)]
    out = text(
        inputs_embeds=hidden,
        position_ids=torch.cat([torch.arange(ids.shape[1])[None, None], positions[:, :, column_kept]]),
        use_cache=False,
        **extra,
    )
    return model.lm_head(out.last_hidden_state)[0]
