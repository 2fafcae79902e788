"""What an evaluation pass depends on besides its settings: which weights, which data, and where its results belong."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from training.data.settings import SourceSettings
from training.errors import UserError

_READ_WHOLE = (".json", ".jinja", ".txt", ".model")
_WEIGHTS = (".safetensors", ".bin")


def model_fingerprint(checkpoint: str, config: Any) -> str:
    """Changes with the model: names, sizes and times of its weights, content of what stands beside them.

    checkpoint: a model folder, or a hub id, of which the commit is told. config: as the model was loaded with.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return f"commit {getattr(config, '_commit_hash', None)}"
    digest = xxhash.xxh3_64()
    for path in sorted(folder.iterdir()):
        if path.suffix in _WEIGHTS:
            stat = path.stat()
            digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        elif path.suffix in _READ_WHOLE:
            data = path.read_bytes()
            digest.update(f"{path.name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def model_of(checkpoint: str) -> str:
    """The model folder of what was named: a run's folder stands for its export. Raises UserError where it has none."""
    folder = Path(checkpoint)
    if (folder / "config.json").exists() or not (folder / "config.yaml").exists():
        return checkpoint
    if (folder / "export" / "config.json").exists():
        return str(folder / "export")
    raise UserError(
        f"{checkpoint} is a run that has no export yet; write one with `python -m training.export {checkpoint} "
        f"-o {folder / 'export'}`"
    )


def default_out(checkpoint: str) -> Path:
    """Beside a model folder, never in it: the next export replaces the folder. For a hub id below `evaluation`."""
    folder = Path(checkpoint)
    if folder.is_dir():
        folder = Path(os.path.abspath(folder))
        return folder.with_name(f"{folder.name}-evaluation")
    return Path("evaluation") / checkpoint.replace("/", "--")


def name_sources(
    paths: Sequence[str], *, prompt: str = "as_recorded", system: str = "", template: str = ""
) -> list[SourceSettings]:
    """The data of the command line; files of one stem are named by as many folders in front of it as tell them apart.

    prompt, system, template: of all of them. Raises UserError for data given twice and for a prompt that is none.
    """
    tails = [(*Path(path).absolute().parts[:-1], Path(path).stem) for path in paths]
    settings = []
    for path, tail in zip(paths, tails, strict=True):
        lengths = range(1, len(tail) + 1)
        own = [n for n in lengths if sum(other[-n:] == tail[-n:] for other in tails) == 1]
        if not own and paths.count(path) > 1:
            raise UserError(f"--data: {path} is given twice")
        name = "/".join(tail[-own[0] :]) if own else Path(path).name  # the same but for the suffix
        try:
            settings.append(SourceSettings(path, name=name, prompt=prompt, system=system, template=template))
        except ValueError as error:
            raise UserError(f"--{error}") from error
    return settings
