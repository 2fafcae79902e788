"""LoRA adapters as the trainer exports them (`lora.merge_on_export: false`), on a base model without settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from pixelprune.family import FAMILIES, lora_targets
from pixelprune.settings import PruneSettings
from tests.vllm.conftest import SERVED, write_settings
from tests.vllm.engine import ask_hugging_face, ask_vllm, assert_same, needs_vllm

pytestmark = needs_vllm
RANK, ALPHA = 4, 32.0
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")


def make_adapter(folder: Path, model: torch.nn.Module) -> Path:
    """Names and configuration of an export; the model itself takes the same weights, merged."""
    torch.manual_seed(0)
    folder.mkdir()
    weights = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if ".language_model.layers." in name and name.endswith(LAYERS):
                down = torch.randn(RANK, module.in_features) / module.in_features**0.5
                up = torch.randn(module.out_features, RANK) / 16
                weights[f"base_model.model.{name}.lora_A.weight"] = down
                weights[f"base_model.model.{name}.lora_B.weight"] = up
                module.weight += ALPHA / RANK * up @ down
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "target_modules": lora_targets(FAMILIES["qwen3_vl"], ("llm",)),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_settings(folder, PruneSettings(), SERVED)
    return folder


def test_an_adapter_brings_its_settings(served_folder, stock_model, conversations, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(served_folder(), base)
    (base / "pixelprune.json").unlink()
    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    model.generation_config.eos_token_id = None
    adapter = make_adapter(tmp_path / "adapter", model)
    asked = [conversations[name] for name in ("wide", "odd", "two images", "text", "second turn with image")]
    reference = ask_hugging_face(model, served_folder(), asked)
    without = ask_hugging_face(stock_model(served_folder()), served_folder(), asked)
    assert all(one.token_ids != other.token_ids for one, other in zip(reference, without, strict=True))
    engine = {"enable_lora": True, "max_lora_rank": 8, "hf_overrides": {"pixelprune": str(adapter)}}
    (served,) = ask_vllm(base, asked, tmp_path, engine=engine, lora=str(adapter))
    assert_same(served, reference)
