"""What lmms-eval calls to learn of the model `pixelprune` (entry point group `lmms_eval.models`).

lmms-eval lists what fails here as a plugin that could not be loaded, and goes on: this module imports nothing that can.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "pixelprune"


def register() -> Any:
    """The manifest (`lmms_eval.models.registry_v2.ModelManifest`): a chat model, loaded when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_ID, chat_class_path="pixelprune.lmms.model.PixelPruneModel")
