"""What tells one model's weights from another's: a hash of all of them, byte for byte."""

from __future__ import annotations

from pathlib import Path

import xxhash

from training.model.tensor_files import weight_paths
from training.model.weights import PICKLES

_READ_BYTES = 1 << 26


def hash_weights(path: str) -> str:
    """xxh3-128 of a model's config and weights: fine-tuned weights have the sizes and names of those before.

    path: a model folder, or a hub id that was downloaded. Raises UserError where it holds no weights.
    """
    folder = local_folder(path)
    digest = xxhash.xxh3_128()
    digest.update((folder / "config.json").read_bytes())
    pickles = sorted(folder.glob(PICKLES))
    for file in pickles if pickles and not any(folder.glob("*.safetensors")) else weight_paths(folder):
        with file.open("rb") as stream:
            while chunk := stream.read(_READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def local_folder(path: str) -> Path:
    """The local folder of a model folder or hub id."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
