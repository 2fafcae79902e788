"""Independent references for generation: stock prompts, and decoding written from the definition of pruning."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from pixelprune.settings import ResizeSettings
from tests.pixelprune.reference import stock_processor

SMALL = ResizeSettings(min_pixels=32 * 32)
NUM_NEW = 8


def user(text: str, *images) -> list[dict]:
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]


def stock_prompt(tokenizer, messages: list[dict]) -> dict:
    """Stock chat template, stock image processor, placeholders repeated per block: what users of stock code feed."""
    turns, pictures = [], []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            pictures += [Image.fromarray(part["image"]) for part in content if "image" in part]
            content = [{"type": "image"} if "image" in part else part for part in content]
        turns.append({**message, "content": content})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    inputs: dict = {}
    if pictures:
        inputs = dict(stock_processor()(images=pictures, return_tensors="pt"))
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == image_token] = (inputs["image_grid_thw"].prod(-1) // 4).numpy()
        ids = np.repeat(ids, repeats)
    input_ids = torch.from_numpy(ids)[None]
    return inputs | {"input_ids": input_ids, "mm_token_type_ids": (input_ids == image_token).int()}


def padded_stock_prompts(tokenizer, conversations: list[list[dict]]) -> dict:
    prompts = [stock_prompt(tokenizer, messages) for messages in conversations]
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)

    def left_pad(name, value):
        rows = [torch.nn.functional.pad(p[name][0], (longest - p[name].shape[1], 0), value=value) for p in prompts]
        return torch.stack(rows)

    mask = torch.stack([(torch.arange(longest) >= longest - p["input_ids"].shape[1]).long() for p in prompts])
    return {
        "input_ids": left_pad("input_ids", tokenizer.pad_token_id),
        "mm_token_type_ids": left_pad("mm_token_type_ids", 0),
        "attention_mask": mask,
        "pixel_values": torch.cat([p["pixel_values"] for p in prompts if "pixel_values" in p]),
        "image_grid_thw": torch.cat([p["image_grid_thw"] for p in prompts if "pixel_values" in p]),
    }


@torch.no_grad()
def decode_uncached(model, tokenizer, messages: list[dict], keeps: list[np.ndarray], steps: int):
    """Greedy decoding without a cache, from the definition: in every step the stock position rule runs over the
    *unpruned* sequence so far, omitted columns are dropped from the ids and positions, and the whole row is computed.

    Returns token ids and the logits (steps, V) they were chosen from.
    """
    inputs = stock_prompt(tokenizer, messages)
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    vision = {}
    kept_blocks = torch.from_numpy(np.concatenate([np.ones(0, bool), *(keep.reshape(-1) for keep in keeps)]))
    if keeps:
        features = model.model.get_image_features(**full_grid_arguments(model, inputs, keeps))
        vision = {"mm_encoder_outputs": {"image": features}}
    ids, chosen, logits = inputs["input_ids"], [], []
    for _ in range(steps):
        is_image = ids[0] == image_token
        positions, _ = model.model.get_rope_index(
            ids, mm_token_type_ids=is_image[None].int(), image_grid_thw=inputs.get("image_grid_thw")
        )
        columns = torch.ones(ids.shape[1], dtype=torch.bool)
        columns[is_image] = kept_blocks
        text_row = torch.arange(int(columns.sum()))[None, None]
        out = model(
            input_ids=ids[:, columns],
            position_ids=torch.cat([text_row, positions[:, :, columns]]),
            use_cache=False,
            **vision,
        )
        logits.append(out.logits[0, -1])
        chosen.append(int(out.logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[chosen[-1]]])], dim=1)
    return chosen, torch.stack(logits)


def full_grid_arguments(model, inputs: dict, keeps: list[np.ndarray]) -> dict:
    """The stock pixels and grid geometry, reduced to the patches of kept blocks."""
    grid = inputs["image_grid_thw"]
    rows = torch.from_numpy(np.concatenate([keep.reshape(-1) for keep in keeps])).repeat_interleave(4)
    counts = torch.tensor([4 * int(keep.sum()) for keep in keeps])
    visual = model.model.visual
    indices, weights = get_vision_interpolation_indices_and_weights(grid, visual.num_grid_per_side, "bilinear", True, 2)
    ones = torch.ones_like(counts)
    return {
        "pixel_values": inputs["pixel_values"][rows],
        "image_grid_thw": torch.stack([ones, 2 * ones, counts // 2], dim=1),
        "image_position_ids": get_vision_position_ids(grid, 2)[rows],
        "image_interp_indices": indices[rows],
        "image_interp_weights": weights[rows],
        "image_cu_seqlens": torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
    }


@torch.no_grad()
def logits_from_the_start(model, tokenizer, ids: list[int], images: list[np.ndarray], keeps: list[np.ndarray]):
    """Logits (L, V) of every token of a pruned row, in one uncached pass with the stock position rule.

    ids: the row with one placeholder per image.
    """
    inputs = dict(stock_processor()(images=[Image.fromarray(image) for image in images], return_tensors="pt"))
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    row = np.array(ids)
    repeats = np.ones(len(row), dtype=np.int64)
    repeats[row == image_token] = [keep.size for keep in keeps]
    full = torch.from_numpy(np.repeat(row, repeats))[None]
    is_image = full[0] == image_token
    positions, _ = model.model.get_rope_index(
        full, mm_token_type_ids=is_image[None].int(), image_grid_thw=inputs["image_grid_thw"]
    )
    columns = torch.ones(full.shape[1], dtype=torch.bool)
    columns[is_image] = torch.from_numpy(np.concatenate([keep.reshape(-1) for keep in keeps]))
    out = model(
        input_ids=full[:, columns],
        position_ids=torch.cat([torch.arange(int(columns.sum()))[None, None], positions[:, :, columns]]),
        mm_encoder_outputs={"image": model.model.get_image_features(**full_grid_arguments(model, inputs, keeps))},
        use_cache=False,
    )
    return out.logits[0]


def logits_of(generation, row: int = 0) -> torch.Tensor:
    return torch.stack([step[row] for step in generation.output.logits])
