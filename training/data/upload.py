"""Copies the next pack to the GPU on a stream of its own while the current one is being computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from pixelprune.pack import Pack
from training.data.worker import PackResult, pack_of


def upload_ahead(results: Iterable[PackResult], device: torch.device) -> Iterator[tuple[Pack, PackResult]]:
    """Every result with its pack on `device`; on CUDA the pack after it is already on its way by then.

    On other devices packs stay where they are.
    """
    if device.type != "cuda":
        yield from ((pack_of(result), result) for result in results)
        return
    stream = copy_stream(device)
    waiting: _Upload | None = None
    for result in results:
        upload = _Upload.begin(result, stream)
        if waiting is not None:
            yield waiting.finish()
        waiting = upload
    if waiting is not None:
        yield waiting.finish()


@lru_cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of all copies to this device.

    torch keeps freed memory apart by stream: a stream for every step would reserve a pack's memory for each of the 32
    that torch hands out in turn, and now and then be the one that DeepSpeed's reductions run on.
    """
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class _Upload:
    """A copy that was queued on its own stream; `copied` is reached when it is done."""

    pack: Pack
    result: PackResult
    copied: torch.cuda.Event

    @classmethod
    def begin(cls, result: PackResult, stream: torch.cuda.Stream) -> _Upload:
        with torch.cuda.stream(stream):
            pack = pack_of(result).to(stream.device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        return cls(pack, result, copied)

    def finish(self) -> tuple[Pack, PackResult]:
        """Let the computing stream, not the host, wait for this copy; keep its memory until that stream has read it."""
        current = torch.cuda.current_stream(self.pack.input_ids.device)
        current.wait_event(self.copied)
        for tensor in self.pack.tensors():
            tensor.record_stream(current)
        return self.pack, self.result
