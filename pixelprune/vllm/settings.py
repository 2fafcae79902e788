"""What a served model prunes: the settings beside its weights, and what the server or a request says instead."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixelprune.model_folder import PREPROCESSOR_FILE, PRUNE_FILE, read_model_file, read_prune_file, size_limits
from pixelprune.selection.selection import check_settings
from pixelprune.settings import PruneSettings, ResizeSettings

KEY = "pixelprune"
"""Name of our settings in `--hf-overrides` and in `mm_processor_kwargs`."""
SIZE_KEYS = ("size", "min_pixels", "max_pixels", "do_resize", "images_kwargs")
"""Arguments of the stock image processor that would size images otherwise than our own resize does."""


@dataclass(frozen=True)
class ServedSettings:
    """How images are sized and pruned, and where that was said (for the log)."""

    prune: PruneSettings
    resize: ResizeSettings
    said_by: str

    def describe(self) -> str:
        prune, resize = self.prune, self.resize
        rule = prune.strategy if prune.threshold == 0 else f"{prune.strategy} at {prune.metric} <= {prune.threshold:g}"
        return f"{rule}; images of {resize.min_pixels} to {resize.max_pixels} pixels (from {self.said_by})"

    def identity(self) -> str:
        """What an image's features depend on beside the image: part of its hash in vLLM's caches."""
        return json.dumps([dataclasses.asdict(self.prune), dataclasses.asdict(self.resize)], sort_keys=True)


def served_settings(model_config: Any) -> ServedSettings | None:
    """The settings of a server, or None where nothing asks for pruning: the stock class serves such a model.

    model_config: vLLM's. In order of precedence: `--mm-processor-kwargs '{"pixelprune": ...}'` (prune settings only),
    `--hf-overrides '{"pixelprune": ...}'`, pixelprune.json beside the weights. The value is a strategy's name, the
    path of a folder with a pixelprune.json (that of an adapter), an object with `prune` and `resize`, whose keys
    replace single settings, or false: the stock class serves the model.
    Raises ValueError for anything else.
    """
    path, revision = str(model_config.model), getattr(model_config, "revision", None)
    said = getattr(model_config.hf_config, KEY, None)
    if said is False:
        return None
    stored = read_model_file(path, PRUNE_FILE, revision)
    settings = _stored(stored, f"{path}/{PRUNE_FILE}") if stored else None
    where = f"--hf-overrides {KEY}"
    if isinstance(said, str) and Path(said).is_dir():
        settings = _of_folder(said, where)
    elif said is not None:
        if settings is None:
            limits = size_limits(json.loads(read_model_file(path, PREPROCESSOR_FILE, revision) or "{}"))
            settings = ServedSettings(PruneSettings(), ResizeSettings(**limits), where)
        settings = _replaced(settings, said, where)
    configured = (model_config.multimodal_config.mm_processor_kwargs or {}).get(KEY)
    if configured is None:
        return settings
    if settings is None:
        raise ValueError(
            f"--mm-processor-kwargs {KEY}: the model at {path} has no {PRUNE_FILE}; ask for pruning with "
            f"--hf-overrides '{{\"{KEY}\": ...}}', which also says how images are sized"
        )
    return of_request(settings, configured, f"--mm-processor-kwargs {KEY}")


def of_request(settings: ServedSettings, said: Any, where: str = "mm_processor_kwargs") -> ServedSettings:
    """The settings of one request. What it may change is `prune`: memory was measured with the server's `resize`.

    Raises ValueError for a resize of its own, an unknown setting, and pred3d.
    """
    if isinstance(said, Mapping) and "resize" in said:
        raise ValueError(f"{where}: 'resize' is a setting of the server; a request can change 'prune' only")
    replaced = _replaced(settings, said, where)
    for reason in untested(replaced.prune):
        raise ValueError(f"{where}: {reason}")
    return replaced


def untested(prune: PruneSettings) -> Iterator[str]:
    """Why images are not served so. By its name: the registry loads numba."""
    if "pred3d" in (prune.strategy, prune.budget):
        yield (
            "'pred3d' prunes the screenshots of a conversation together, which is not tested in vLLM; use "
            f"pixelprune.hf, or serve the model on all tokens: --hf-overrides '{{\"{KEY}\": false}}'"
        )


def _of_folder(folder: str, where: str) -> ServedSettings:
    file = Path(folder) / PRUNE_FILE
    if not file.is_file():
        raise ValueError(f"{where}: the folder {folder} has no {PRUNE_FILE}")
    return _stored(file.read_text(), str(file))


def _stored(content: str, name: str) -> ServedSettings:
    trained = read_prune_file(content, name)
    return ServedSettings(trained.prune, trained.resize, name)


def _replaced(settings: ServedSettings, said: Any, where: str) -> ServedSettings:
    if isinstance(said, str):
        said = {"prune": {"strategy": said}}
    if not isinstance(said, Mapping) or not set(said) <= {"prune", "resize"}:
        raise ValueError(
            f"{where}: expected the name of a strategy, the path of a folder with a {PRUNE_FILE}, or an object with "
            f"'prune' and 'resize', got {said!r}"
        )
    try:
        prune = dataclasses.replace(settings.prune, **said.get("prune", {}))
        resize = dataclasses.replace(settings.resize, **said.get("resize", {}))
        check_settings(prune)  # the strategy's name waits for the registry, which loads numba
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return ServedSettings(prune, resize, where)
