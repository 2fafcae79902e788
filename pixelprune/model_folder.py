"""A model folder or hub id, opened once for all that prepares its inputs: everything but the weights."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pixelprune.family import family_of
from pixelprune.files import path_meant
from pixelprune.settings import PruneSettings, ResizeSettings

if TYPE_CHECKING:
    from pixelprune.pack import VisionGeometry

__all__ = [
    "PREPROCESSOR_FILE",
    "PRUNE_FILE",
    "ModelFolder",
    "TrainedWith",
    "is_hub_id",
    "prune_file",
    "read_model_file",
    "read_prune_file",
    "size_limits",
]

PRUNE_FILE = "pixelprune.json"
"""Beside a trained model's weights: what of its training inference has to repeat (`TrainedWith`)."""
PREPROCESSOR_FILE = "preprocessor_config.json"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


class TrainedWith(NamedTuple):
    """How a model's prompts were made in training. grounding_tokens: `data.grounding_tokens`."""

    prune: PruneSettings
    resize: ResizeSettings
    grounding_tokens: bool = False


@dataclass(frozen=True)
class ModelFolder:
    """config and tokenizer as transformers loads them; preprocessor: content of preprocessor_config.json, or {}."""

    path: str
    config: Any
    tokenizer: Any
    preprocessor: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path, *, trust_remote_code: bool = False) -> ModelFolder:
        """Raises ValueError in one line: nothing loadable, an unsupported family, no images, another model's tokenizer.

        trust_remote_code: run code that comes with the folder. Without it such a folder is refused.
        """
        from transformers import AutoConfig, AutoTokenizer

        path = str(path)
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except Exception as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            if "trust_remote_code" in str(error):
                said = "it brings code of its own; read it, then set trust_remote_code"
            elif not (Path(path).is_dir() or is_hub_id(path)):
                meant = path_meant(Path(path))
                said = "there is no such folder" + (f"; did you mean {meant}?" if meant else "")
            raise ValueError(f"{path} is not a loadable model folder: {said}") from error
        family_of(config)
        if getattr(config, "image_token_id", None) is None:
            raise ValueError(f"{path}: a {config.model_type} model takes no images (no image_token_id in its config)")
        _check_image_token(tokenizer, config, path)
        stored = read_model_file(path, PREPROCESSOR_FILE)
        return cls(path, config, tokenizer, _object(stored, f"{path}/{PREPROCESSOR_FILE}") if stored else {})

    @cached_property
    def geometry(self) -> VisionGeometry:
        """What packing needs of the vision tower. Raises ValueError for a family or sizes that are not supported."""
        from pixelprune.pack import VisionGeometry  # torch loads here: processes that only index do without

        return VisionGeometry.from_config(self.config, self.preprocessor)


def is_hub_id(path: str) -> bool:
    """Whether a path that is no folder here may be a hub id, OWNER/NAME; others are typos that no network knows."""
    return _HUB_ID.fullmatch(path) is not None and not Path(path).is_dir()


def read_model_file(path: str, name: str, revision: str | None = None) -> str | None:
    """A file of a model folder or hub id (at a revision); None where it has none."""
    if not path:
        return None
    if not Path(path).is_dir():
        from transformers.utils import cached_file

        # Optional files: absent from the repository, or from the local copy of a machine without network.
        found = cached_file(
            path,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(found).read_text() if found else None
    file = Path(path) / name
    return file.read_text() if file.exists() else None


def read_prune_file(content: str, name: str = PRUNE_FILE) -> TrainedWith:
    """The settings a model was trained with, from the JSON beside its weights. Raises ValueError naming the file."""
    try:
        stored = json.loads(content)
        grounding_tokens = stored.get("grounding_tokens", False)
        if not isinstance(grounding_tokens, bool):
            raise ValueError(f"{name}: 'grounding_tokens': expected true or false, got {grounding_tokens!r}")
        return TrainedWith(PruneSettings(**stored["prune"]), ResizeSettings(**stored["resize"]), grounding_tokens)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: expected the objects 'prune' and 'resize' with known settings: {error}") from error


def prune_file(trained: TrainedWith) -> str:
    """The JSON that `read_prune_file` reads."""
    stored = {"prune": dataclasses.asdict(trained.prune), "resize": dataclasses.asdict(trained.resize)}
    return json.dumps(stored | {"grounding_tokens": trained.grounding_tokens}, indent=2) + "\n"


def size_limits(preprocessor: dict[str, Any]) -> dict[str, int]:
    """min_pixels and max_pixels of the image processor; its `size` names them shortest_edge and longest_edge."""
    size = preprocessor.get("size") or {}
    size = size if isinstance(size, Mapping) else dataclasses.asdict(size)
    limits = {
        "min_pixels": size.get("shortest_edge") or preprocessor.get("min_pixels"),
        "max_pixels": size.get("longest_edge") or preprocessor.get("max_pixels"),
    }
    return {name: int(value) for name, value in limits.items() if value}


def _check_image_token(tokenizer: Any, config: Any, path: str) -> None:
    """Raises ValueError for a tokenizer without the config's image token, such as the one of a single token that
    transformers makes, in silence, out of a folder without tokenizer files."""
    if tokenizer.convert_ids_to_tokens(config.image_token_id) is None:
        raise ValueError(
            f"{path}: its tokenizer has {len(tokenizer)} tokens and no image token (id {config.image_token_id}); save "
            "the model's tokenizer beside the weights"
        )


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected an object, got {type(content).__name__}")
    return content
