"""What a loader process does: the records of one pack -> the pack, and which of them went bad since the index."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pixelprune.pack import Pack, VisionGeometry
from training.data.collator import PixelPruneCollator
from training.data.prepare import PrepareSettings
from training.data.quarantine import Quarantined
from training.data.records import RecordError
from training.data.sources import Source


@dataclass(frozen=True)
class PackTask:
    """The records of one pack, and what the index knows of them: (source, row, content hash, supervised tokens)."""

    records: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class PackResult:
    """A pack and the records that could not go into it, with the supervised tokens lost with them."""

    pack: Pack
    is_dummy: bool
    lost: tuple[Quarantined, ...] = ()
    num_lost_supervised: int = 0

    def pin_memory(self) -> PackResult:
        """Called by torch's DataLoader."""
        return PackResult(self.pack.pin_memory(), self.is_dummy, self.lost, self.num_lost_supervised)


class PackDataset(torch.utils.data.Dataset):
    """Tasks in place of indices: `dataset[task]` is a PackResult. Opens tokenizer and files in the process using it."""

    def __init__(self, sources: list[Source], prepare: PrepareSettings, geometry: VisionGeometry, dummy_image: bool):
        self.sources, self.prepare, self.geometry, self.dummy_image = sources, prepare, geometry, dummy_image
        self._collator: PixelPruneCollator | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_collator": None}

    def __getitem__(self, task: PackTask) -> PackResult:
        if self._collator is None:
            self._collator = PixelPruneCollator(self.prepare.build(), self.geometry, dummy_image=self.dummy_image)
        samples, lost, num_lost_supervised = [], [], 0
        for number, row, content_hash, num_supervised in task.records:
            source = self.sources[number]
            try:
                prepared = self._collator.preparer.prepare(
                    source.rows[row],
                    source.root,
                    record_format=source.settings.format,
                    record_id=source.record_id(row),
                    expected_hash=content_hash,
                )
                samples.append(prepared.sample)
            except RecordError as error:
                lost.append(Quarantined(source.record_id(row), source.rows.where(row), error.reason, str(error)))
                num_lost_supervised += num_supervised
        return PackResult(self._collator.pack(samples), not samples, tuple(lost), num_lost_supervised)


def start_worker(worker_id: int) -> None:
    """One thread per loader process: there is one process per core."""
    torch.set_num_threads(1)
