"""Copies the next pack to the GPU on a stream of its own while the current one is being computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from pixelprune.pack import Pack
from training.data.worker import PackResult


def upload_ahead(results: Iterable[PackResult], device: torch.device) -> Iterator[tuple[Pack, PackResult]]:
    """Every result with its pack on `device`; on CUDA the pack after it is already on its way by then.

    On other devices packs stay where they are.
    """
    if device.type != "cuda":
        yield from ((result.pack, result) for result in results)
        return
    stream = torch.cuda.Stream(device)
    waiting: _Upload | None = None
    for result in results:
        upload = _Upload.begin(result, stream)
        if waiting is not None:
            yield waiting.finish()
        waiting = upload
    if waiting is not None:
        yield waiting.finish()


@dataclass(frozen=True)
class _Upload:
    """A copy that was queued on its own stream; `copied` is reached when it is done."""

    pack: Pack
    result: PackResult
    copied: torch.cuda.Event

    @classmethod
    def begin(cls, result: PackResult, stream: torch.cuda.Stream) -> _Upload:
        with torch.cuda.stream(stream):
            pack = result.pack.to(stream.device, non_blocking=True)
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
