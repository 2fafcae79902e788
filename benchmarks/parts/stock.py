"""Training as plain Hugging Face code does it: the stock model, image processor, chat template, loss and AdamW.

Its two usual forms: samples one by one (gradients accumulated), and the samples of a step as one padded batch. The
processor is the PIL one, as in `pixelprune`: the stock `Qwen3VLProcessor` needs torchvision, and its text side is what
is written out here (placeholders repeated by the image's grid).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

from pixelprune.settings import ResizeSettings

IGNORED = -100
PLACEHOLDER = "<|image_pad|>"


class StockTrainer:
    """A stock model with the weights of `source`, and everything that one of its optimizer steps takes.

    attention: a stock name. resize: the size limits of the pictures.
    """

    def __init__(self, source: nn.Module, tokenizer: Any, resize: ResizeSettings, *, attention: str, lr: float):
        # A copy: the attention is noted in the config, and the source would lose its own.
        config = copy.deepcopy(source.config)
        self.model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
        self.model.load_state_dict(source.state_dict())
        first = next(source.parameters())
        self.model.to(first.device, first.dtype).train()
        self.tokenizer = tokenizer
        self.processor = Qwen2VLImageProcessorPil(
            patch_size=16,
            merge_size=2,
            temporal_patch_size=2,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"shortest_edge": resize.min_pixels, "longest_edge": resize.max_pixels},
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, fused=True)

    def step(self, records: list[dict[str, Any]], root: Path, *, padded: bool) -> float:
        """One optimizer step from files to weights; returns the mean loss per supervised token."""
        samples = [self.tokens(record, root) for record in records]
        num_supervised = sum(int((labels != IGNORED).sum()) for _, labels, _ in samples)
        total = 0.0
        for batch in [samples] if padded else [[sample] for sample in samples]:
            output = self.model(**self.inputs(batch), num_items_in_batch=num_supervised)
            output.loss.backward()
            total += float(output.loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def tokens(self, record: dict[str, Any], root: Path) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """A record's ids and labels, (L,) each, and its images' features; what follows the prompt is supervised."""
        messages = record["messages"]
        names = [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]
        features = self.processor(images=[Image.open(root / name) for name in names], return_tensors="pt")
        texts = [
            self.tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=is_prompt)
            for part, is_prompt in ((messages[:-1], True), (messages, False))
        ]
        for grid in features["image_grid_thw"]:
            num_blocks = int(grid.prod()) // 4
            texts = [text.replace(PLACEHOLDER, "<|placeholder|>" * num_blocks, 1) for text in texts]
        prompt, whole = (
            self.tokenizer(text.replace("<|placeholder|>", PLACEHOLDER), add_special_tokens=False)["input_ids"]
            for text in texts
        )
        # The turn's end is learnt, the line break behind it is not.
        ids = torch.tensor(whole).reshape(-1)
        labels = ids.clone()
        labels[: len(prompt)] = IGNORED
        end = int((ids == self.tokenizer.eos_token_id).nonzero().max())
        labels[end + 1 :] = IGNORED
        return ids, labels, features

    def inputs(self, batch: list[tuple[torch.Tensor, torch.Tensor, Any]]) -> dict[str, torch.Tensor]:
        """Right-padded, on the device: what the stock processor and the usual collators hand over."""
        device = next(self.model.parameters()).device
        pad = self.tokenizer.pad_token_id
        ids, labels, features = zip(*batch, strict=True)
        rows = nn.utils.rnn.pad_sequence(list(ids), batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(one) for one in ids])
        arguments = {
            "input_ids": rows,
            "attention_mask": (torch.arange(rows.shape[1]) < lengths[:, None]).long(),
            "labels": nn.utils.rnn.pad_sequence(list(labels), batch_first=True, padding_value=IGNORED),
            "mm_token_type_ids": (rows == self.model.config.image_token_id).int(),
            "pixel_values": torch.cat([one["pixel_values"] for one in features]),
            "image_grid_thw": torch.cat([one["image_grid_thw"] for one in features]),
        }
        return {name: value.to(device) for name, value in arguments.items()}
