"""Saving and resuming a run: any number of ranks writes, any other reads; a kill at any moment loses no checkpoint.

Saving copies this rank's state to host memory between two steps and writes it from a thread while training goes on.
No thread takes part in a collective: every rank renames its finished files into place, and the first rank marks the
checkpoint complete, with the hashes of all files, once it sees all of them. The folder must therefore be on a file
system that all ranks share.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import random
import shutil
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from training.checkpoint import files as files
from training.checkpoint.proof import marker_text, read_marker, what_is_broken
from training.config.settings import CheckpointSettings
from training.data.loader import Cursor
from training.distributed.engine_protocol import Engine
from training.distributed.fragments import (
    Fragment,
    num_adam_steps,
    own_fragments,
    refresh_model_weights,
    set_adam_steps,
)
from training.distributed.ranks import Ranks
from training.errors import RankError, UserError
from training.tracking.meter import RunTotals

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_MARGIN_BYTES = 64 << 20
_POLL_SECONDS = 0.2
_CRASH_SECONDS = 60.0
"""How long a process that ends with a save under way waits for it: the other ranks may never write their part."""


@dataclass(frozen=True)
class RunState:
    """Everything of a run that is not a tensor: where the data continues, what was counted, which tracker run it is.

    order: what the order of samples depended on (`Feed.order`): the cursor has a meaning under it alone.
    base: hash of the model that the run started from (`hash_weights`); "" in checkpoints of earlier versions.
    num_steps, lr_factor: the length of the schedule, and the share of the peak learning rate in the last step (-1
    where it is not known). ramp: [first step, share there, steps] on the way to a changed schedule; empty without one.
    changes: what was changed on the way with run.accept_changes, as the model card says it.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    totals: RunTotals = field(default_factory=RunTotals)
    num_skipped: int = 0
    tracker_id: str = ""
    order: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    num_steps: int = 0
    lr_factor: float = -1.0
    ramp: list[float] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> RunState:
        """Of a checkpoint's state.json; what an earlier version did not write has its default."""
        own = {entry.name: content[entry.name] for entry in fields(cls) if entry.name in content}
        return cls(**own | {"cursor": Cursor(*content["cursor"]), "totals": RunTotals(**content["totals"])})


class Checkpointer:
    """Writes checkpoints of one run below `folder/checkpoints` and finds the one to continue from."""

    def __init__(self, folder: Path, settings: CheckpointSettings, ranks: Ranks, facts: dict[str, str]):
        """facts: file name -> content, written into every checkpoint (resolved recipe, versions)."""
        self.root = folder / "checkpoints"
        self.settings, self.ranks, self.facts = settings, ranks, facts
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._verified: Path | None = None
        atexit.register(self._leave)

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole by its hashes, the same on all ranks; None where there is none at all.

        Leftovers of killed saves are removed. A complete checkpoint whose files are not as they were written is set
        aside and the one before it taken, said loudly. Raises UserError instead with checkpoint.on_broken=stop, and
        where every checkpoint is broken: to start anew in silence would lose the run.
        """
        complete = self.ranks.from_first(self._without_leftovers)
        broken: list[tuple[Path, list[str]]] = []
        for folder in reversed(complete):
            problems = self._problems(folder)
            if not problems:
                self._verified = folder
                self._report_broken(broken, folder)
                return folder
            broken.append((folder, problems))
            if self.settings.on_broken == "stop":
                break
        self._report_broken(broken, None)
        return None

    def _without_leftovers(self) -> list[Path]:
        """Complete checkpoints, oldest first, when what killed saves left is gone."""
        complete = files.complete_checkpoints(self.root)
        for leftover in files.incomplete_checkpoints(self.root):
            logger.warning("removing %s: its save was cut short", leftover)
            is_old = bool(complete) and files.step_of(leftover) < files.step_of(complete[-1])
            self._delete(leftover, is_old=is_old)
        return complete

    def _problems(self, folder: Path) -> list[str]:
        """What is broken of a checkpoint, known to all ranks, each of which reads its share of the files."""
        own = what_is_broken(folder, part=self.ranks.rank, num_parts=self.ranks.world_size)
        shares = self.ranks.gather(own)
        if not any(shares) and self.ranks.is_first and read_marker(folder) is None:
            logger.warning("%s: of an earlier version, without hashes: its files are read as they are", folder)
        return [line for share in shares for line in share]

    def _report_broken(self, broken: list[tuple[Path, list[str]]], whole: Path | None) -> None:
        """Say what was broken and what is lost by going back to `whole`; UserError where nothing is to go back to."""
        if not broken:
            return
        said = "; ".join(f"{folder}: {', '.join(problems)}" for folder, problems in broken)
        if whole is None:
            way_out = (
                "put back a copy of it, or go back to the checkpoint before it with checkpoint.on_broken=fall_back"
                if self.settings.on_broken == "stop"
                else "no whole checkpoint is left: put back a copy, or start anew under another run.name"
            )
            raise UserError(f"broken checkpoint: {said}; {way_out}")
        if self.ranks.is_first:
            newest = files.step_of(broken[0][0])
            for folder, problems in broken:
                logger.error("%s is BROKEN: %s; set aside as %s", folder, ", ".join(problems), files.set_aside(folder))
            logger.error(
                "going back to %s: the %d optimizer steps after it, up to %d, are lost and made again",
                whole, newest - files.step_of(whole), newest,
            )  # fmt: skip

    def save(self, engine: Engine, state: RunState, *, wait: bool = False) -> None:
        """Start writing the state after optimizer step `state.step`; every rank calls this. With `wait`, finish it.

        A save that is still being written is finished first, see `finish`.
        """
        self.finish()
        fragments = [
            Fragment(f.name, f.start, f.shape, {kind: _to_host(tensor) for kind, tensor in f.tensors.items()})
            for f in own_fragments(engine)
        ]
        content = {
            "format_version": FORMAT_VERSION,
            "world_size": self.ranks.world_size,
            "num_adam_steps": num_adam_steps(engine),
            **asdict(state),
            "cursor": list(state.cursor),
        }
        arguments = (
            files.checkpoint_folder(self.root, state.step),
            fragments,
            _random_state(self.ranks.device),
            content,
        )
        self._writer = threading.Thread(
            target=self._write_or_keep_error, args=arguments, name="checkpoint", daemon=True
        )
        self._writer.start()
        if wait:
            self.finish()

    @property
    def has_failed(self) -> bool:
        """Whether the save in the background has met an error on this rank that was not raised yet."""
        return self._error is not None

    def wait(self) -> None:
        """Until the save under way is on disk or has failed, which `has_failed` tells; `finish` reports it."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _leave(self) -> None:
        """As the process ends. After a crash the save under way gets a moment, not the time that training gives it."""
        if self._writer is not None and self._writer.is_alive():
            logger.warning("a save is under way: it has %.0f s to become complete", _CRASH_SECONDS)
            self._writer.join(_CRASH_SECONDS)

    def finish(self) -> bool:
        """Wait for the save under way and tell whether all went well; earlier checkpoints are intact if not.

        A failure is raised as RankError, once; with on_error=continue it is logged instead.
        """
        self.wait()
        error, self._error = self._error, None
        if error is None:
            return True
        kept = [folder.name for folder in files.complete_checkpoints(self.root)]
        message = (
            f"saving a checkpoint in {self.root} failed: {error}; complete ones: {', '.join(kept) or 'none'} "
            "(free space, lower checkpoint.keep_last, or move run.folder)"
        )
        if self.settings.on_error == "stop":
            raise RankError(message) from error
        logger.error("rank %d: %s; going on (checkpoint.on_error=continue)", self.ranks.rank, message)
        return False

    def state_of(self, folder: Path) -> RunState:
        """What of a checkpoint is not a tensor. Raises UserError for another version's format."""
        return RunState.from_json(self._content(folder))

    def _content(self, folder: Path) -> dict[str, Any]:
        content = json.loads((folder / "state.json").read_text())
        if content["format_version"] != FORMAT_VERSION:
            raise UserError(f"{folder}: format {content['format_version']}, expected {FORMAT_VERSION}")
        return content

    @torch.no_grad()
    def load(self, engine: Engine, folder: Path) -> None:
        """Put a checkpoint into a fresh engine, whatever number of ranks wrote it.

        Raises UserError when it is not of this model with these parts trained.
        """
        content = self._content(folder)
        reader = files.FragmentReader(folder)
        for fragment in own_fragments(engine):
            for kind, tensor in fragment.tensors.items():
                tensor.copy_(reader.read(fragment.name, kind, fragment.start, tensor.numel()))
        trained = {name for name, p in engine.module.named_parameters() if p.requires_grad}
        if trained != set(reader.shapes):
            num_others = len(trained ^ set(reader.shapes))
            raise UserError(
                f"{folder}: {num_others} parameters are trained only in one of run and checkpoint; optim.*.freeze "
                "differs: use the checkpoint's own recipe or a new run.name"
            )
        refresh_model_weights(engine, lambda name: reader.read(name, "weight"))
        set_adam_steps(engine, content["num_adam_steps"])
        engine.global_steps = content["step"]
        self._restore_random_state(folder, content["world_size"])

    def _restore_random_state(self, folder: Path, world_size: int) -> None:
        """Generators continue where they were; on another number of ranks they start from (seed, rank) anew."""
        if world_size == self.ranks.world_size:
            _set_random_state(load_file(files.random_file(folder, self.ranks.rank, world_size)), self.ranks.device)

    def _write_or_keep_error(self, folder: Path, fragments: list[Fragment], generators: dict, content: dict) -> None:
        try:
            self._write(folder, fragments, generators, content)
        except Exception as error:  # noqa: BLE001 - raised again by finish() in the training thread
            self._error = error
            if self.ranks.is_first:
                if not (folder / files.MARKER).exists():
                    shutil.rmtree(folder, ignore_errors=True)
            else:
                # Spares the first rank the wait. An empty file needs no room, and where even that fails it times out.
                with contextlib.suppress(OSError):
                    files.failure_file(folder, self.ranks.rank).touch()

    def _write(self, folder: Path, fragments: list[Fragment], generators: dict, content: dict) -> None:
        rank, world_size = self.ranks.rank, self.ranks.world_size
        folder.mkdir(parents=True, exist_ok=True)
        self._require_space(folder, sum(t.nbytes for f in fragments for t in f.tensors.values()))
        hashes = {}
        path = files.random_file(folder, rank, world_size)
        hashes[path.name] = files.write_tensors(path, generators, {})
        if rank == 0:
            for name, text in {**self.facts, "state.json": json.dumps(content, indent=2)}.items():
                hashes[name] = files.write_bytes(folder / name, text.encode())
        path = files.fragment_file(folder, rank, world_size)
        hashes[path.name] = files.write_fragments(path, fragments)
        files.write_bytes(files.hashes_file(folder, rank), json.dumps(hashes).encode())
        if rank == 0:
            hashes = self._hashes_of_all_ranks(folder)
            files.write_bytes(folder / files.MARKER, marker_text(hashes).encode())
            self._delete_old()

    def _require_space(self, folder: Path, num_bytes: int) -> None:
        """OSError unless what all ranks have yet to write fits; each writes about as much as this one, `num_bytes`."""
        to_write = self.ranks.world_size * num_bytes - files.size_of(folder) + _MARGIN_BYTES
        free = shutil.disk_usage(folder).free
        if free < to_write:
            raise OSError(
                f"{to_write / 1e9:.2f} GB needed by {self.ranks.world_size} ranks together, {free / 1e9:.2f} GB free"
            )

    def _hashes_of_all_ranks(self, folder: Path) -> dict[str, str]:
        """Wait for every rank's part; the hashes of all files, taken out of the ranks' own."""
        deadline = time.monotonic() + 60 * self.settings.save_timeout_minutes
        parts = [files.hashes_file(folder, rank) for rank in range(self.ranks.world_size)]
        missing = set(parts)
        while missing := {path for path in missing if not path.exists()}:
            if failed := sorted(folder.glob(files.failure_file(folder, "*").name)):
                raise OSError(f"{len(failed)} other ranks could not write their part ({failed[0].name})")
            if time.monotonic() > deadline:
                raise OSError(
                    f"{len(missing)} ranks did not write their part within {self.settings.save_timeout_minutes} minutes"
                )
            time.sleep(_POLL_SECONDS)
        hashes: dict[str, str] = {}
        for part in parts:
            hashes.update(json.loads(part.read_text()))
            part.unlink()
        return hashes

    def _delete_old(self) -> None:
        """Those beyond `keep_last`, but never the one that was read back and found whole when the run was resumed."""
        complete = files.complete_checkpoints(self.root)
        every = self.settings.keep_every_steps
        for folder in complete[: -max(1, self.settings.keep_last)]:
            if folder == self._verified or (every and files.step_of(folder) % every == 0):
                continue
            self._delete(folder, is_old=True)

    @staticmethod
    def _delete(folder: Path, *, is_old: bool) -> None:
        """An old one that stays (on NFS, while a process has a file open) does no harm. RankError for a later one."""
        try:
            files.delete_checkpoint(folder)
        except OSError as error:
            if not is_old:
                # Its parts would be taken for those of the next save of this step.
                raise RankError(f"{folder}: cannot be removed ({error}); remove it and start again") from error
            logger.warning("%s: an old checkpoint that could not be deleted (%s)", folder, error)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that training does not touch."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of all generators as tensors: no pickle in a checkpoint."""
    version, keys, gauss = random.getstate()
    numpy_state: tuple = np.random.get_state(legacy=True)  # type: ignore[assignment]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *keys], dtype=torch.int64),
        # random.gauss keeps the second number of a pair; NaN stands for none.
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy_keys": torch.from_numpy(numpy_state[1].astype(np.int64)),
        "numpy_position": torch.tensor([numpy_state[2]], dtype=torch.int64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, *keys = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(keys), None if math.isnan(gauss) else gauss))
    np.random.set_state(
        ("MT19937", state["numpy_keys"].numpy().astype(np.uint32), int(state["numpy_position"][0]), 0, 0.0)
    )
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
