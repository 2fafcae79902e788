"""In front of the stock classes of an untested vLLM: a checkpoint that asks for pruning is refused."""

from __future__ import annotations

import importlib
from typing import Any

import vllm

from pixelprune.vllm.plugin import ARCHITECTURES, TESTED_VERSIONS
from pixelprune.vllm.settings import served_settings


def _guarded(architecture: str) -> type:
    stock = getattr(importlib.import_module(f"vllm.model_executor.models.{ARCHITECTURES[architecture]}"), architecture)

    def new(cls: type, *, vllm_config: Any, prefix: str = "") -> Any:
        settings = served_settings(vllm_config.model_config)
        if settings is not None:
            raise ValueError(
                f"{vllm_config.model_config.model} is to be served pruned (by {settings.said_by}), which was tested "
                f"with vLLM {', '.join(TESTED_VERSIONS)} and not with {vllm.__version__}; install one of those, or "
                "serve it unpruned with --hf-overrides '{\"pixelprune\": false}'"
            )
        return stock(vllm_config=vllm_config, prefix=prefix)

    return type(architecture, (stock,), {"__new__": new, "__module__": __name__})


Qwen3VLForConditionalGeneration = _guarded("Qwen3VLForConditionalGeneration")
Qwen3VLMoeForConditionalGeneration = _guarded("Qwen3VLMoeForConditionalGeneration")
Qwen3_5ForConditionalGeneration = _guarded("Qwen3_5ForConditionalGeneration")
Qwen3_5MoeForConditionalGeneration = _guarded("Qwen3_5MoeForConditionalGeneration")
