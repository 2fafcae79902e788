"""What vLLM calls in each of its processes when it starts (entry point group `vllm.general_plugins`).

vLLM logs an exception while it *loads* an entry point and then serves without the plugin: this module imports nothing
that can fail. Exceptions of the called function end the start.
"""

from __future__ import annotations

TESTED_VERSIONS = ("0.32", "0.33")
"""Releases of vLLM whose model and processor code the plugin was written against (`docs/serving.md`)."""
ARCHITECTURES = {
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
}
"""Stock architectures that are served pruned, and the module of `vllm.model_executor.models` each lives in."""


def register() -> None:
    """Put classes in front of the stock ones, under their names.

    They hand a checkpoint without prune settings to the stock class. In a vLLM outside TESTED_VERSIONS, the classes
    only refuse checkpoints that ask for pruning.
    """
    import vllm
    from vllm import ModelRegistry

    module = "models" if is_tested(vllm.__version__) else "untested"
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"pixelprune.vllm.{module}:{architecture}")


def is_tested(version: str) -> bool:
    """Whether a version of vLLM, such as "0.32.0" or "0.33.1+cu130", is of one of the TESTED_VERSIONS."""
    return ".".join(version.split(".")[:2]) in TESTED_VERSIONS
