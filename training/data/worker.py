"""What a loader process does: the records of one pack -> the pack, and which of them went bad since the index."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from pixelprune.attention.prefixes import find_groups
from pixelprune.pack import Pack, VisionGeometry, pack_samples, row_pictures
from pixelprune.records.collator import PixelPruneCollator
from pixelprune.records.prepare import PictureMemo, PreparedRecord, PrepareSettings
from pixelprune.records.record import RecordError
from pixelprune.selection.registry import is_recoverable
from training.data.distillation import with_cached_targets, with_full_rows
from training.data.quarantine import Quarantined
from training.data.sources import Source
from training.data.targets import TargetReader
from training.errors import UserError


@dataclass(frozen=True)
class PackTask:
    """The records of one pack, and what the index knows of them: (source, row, content hash, supervised tokens,
    sum of their weights)."""

    records: tuple[tuple[int, int, int, int, float], ...]


@dataclass(frozen=True)
class PackResult:
    """A pack and the records that could not go into it, with the supervised tokens lost with them
    and the sum of their weights."""

    pack: Pack
    is_dummy: bool
    lost: tuple[Quarantined, ...] = ()
    num_lost_supervised: int = 0
    lost_loss_weight: float = 0.0

    def pin_memory(self) -> PackResult:
        """Called by torch's DataLoader."""
        return dataclasses.replace(self, pack=self.pack.pin_memory())


@dataclass(frozen=True)
class PackFailure:
    """What the user must fix before this pack can be made: an error would reach the run as a worker's traceback."""

    message: str


class PackDataset(torch.utils.data.Dataset):
    """Tasks in place of indices, results or failures for them. Opens tokenizer and files in the process using it."""

    def __init__(
        self,
        sources: list[Source],
        prepare: PrepareSettings,
        geometry: VisionGeometry,
        dummy_image: bool,
        targets: TargetReader | None = None,
        *,
        share_prefix: bool = False,
        share_vision: bool = False,
    ):
        """targets: cached teacher targets that go with every pack; with `prepare.with_full` full rows do instead.

        share_prefix: what samples of a pack begin with alike stands in its row once. share_vision: a picture that
        stands in several places of a row is encoded once.
        """
        self.sources, self.prepare, self.geometry, self.dummy_image = sources, prepare, geometry, dummy_image
        self.targets, self.share_prefix, self.share_vision = targets, share_prefix, share_vision
        self._collator: PixelPruneCollator | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_collator": None}

    def __getitem__(self, task: PackTask) -> PackResult | PackFailure:
        if self._collator is None:
            self._collator = PixelPruneCollator(self.prepare.build(), self.geometry, dummy_image=self.dummy_image)
        records, lost, num_lost_supervised, lost_loss_weight = [], [], 0, 0.0
        memo: PictureMemo = {}
        for number, row, content_hash, num_supervised, loss_weight in task.records:
            source = self.sources[number]
            try:
                record = self._collator.preparer.prepare(
                    source.rows[row],
                    source.root,
                    record_format=source.settings.format,
                    preset=source.settings.preset(),
                    record_id=source.record_id(row),
                    expected_hash=content_hash,
                    memo=memo,
                )
                records.append(record)
            except UserError as error:
                return PackFailure(str(error))
            except RecordError as error:
                lost.append(Quarantined(source.record_id(row), source.rows.where(row), error.reason, str(error)))
                num_lost_supervised += num_supervised
                lost_loss_weight += loss_weight
        try:
            pack = self._pack(self._collator, records)
        except UserError as error:
            return PackFailure(str(error))
        return PackResult(pack, not records, tuple(lost), num_lost_supervised, lost_loss_weight)

    def _pack(self, collator: PixelPruneCollator, records: list[PreparedRecord]) -> Pack:
        samples = collator.with_dummy([record.sample for record in records])
        groups = find_groups(samples, self.geometry.image_token_id) if self.share_prefix else None
        pictures = row_pictures(samples, groups) if self.share_vision else None
        pack = pack_samples(samples, self.geometry, groups, pictures=pictures)
        if self.targets is not None:
            return with_cached_targets(pack, records, self.targets)
        if self.prepare.with_full:
            full_samples = [record.full for record in records if record.full is not None]
            full_samples += samples[len(records) :]  # the dummy
            decode = is_recoverable(self.prepare.prune)
            return with_full_rows(
                pack, samples, full_samples, self.geometry, decode=decode, groups=groups, pictures=pictures
            )
        return pack


def start_worker(worker_id: int) -> None:
    """One thread per loader process: there is one process per core."""
    torch.set_num_threads(1)
