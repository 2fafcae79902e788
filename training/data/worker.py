"""What a loader process does: the records of one pack -> the pack, and which of them went bad since the index."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from pixelprune.attention.prefixes import find_groups
from pixelprune.pack import Pack, VisionGeometry, pack_samples, row_pictures
from pixelprune.records.collator import PixelPruneCollator
from pixelprune.records.prepare import PicturePair, PreparedRecord, PrepareSettings, ShotKey
from pixelprune.records.record import RecordError
from pixelprune.selection.registry import is_recoverable
from training.data.distillation import with_cached_targets, with_full_rows
from training.data.quarantine import Quarantined
from training.data.sources import Source
from training.data.targets import TargetReader
from training.errors import UserError
from training.on_policy.draft import Draft


@dataclass(frozen=True)
class PackTask:
    """The records of one pack, and what the index knows of them: (source, row, content hash, supervised tokens,
    sum of their weights)."""

    records: tuple[tuple[int, int, int, int, float], ...]
    is_asked: tuple[bool, ...] = ()
    """Which of them the student answers itself; empty for none."""


@dataclass(frozen=True)
class PackResult:
    """A pack and the records that could not go into it; the supervised tokens that the plan counted and the pack does
    not hold, and the sum of their weights: those lost with records, and what an answer of the student is shorter than
    the record's own (below 0: longer)."""

    pack: Pack | Draft
    is_dummy: bool
    lost: tuple[Quarantined, ...] = ()
    num_lost_supervised: int = 0
    lost_loss_weight: float = 0.0

    def pin_memory(self) -> PackResult:
        """Called by torch's DataLoader. Of a draft there are no tensors yet."""
        return self if isinstance(self.pack, Draft) else dataclasses.replace(self, pack=self.pack.pin_memory())


def pack_of(result: PackResult) -> Pack:
    """The result's pack, once it is one."""
    assert not isinstance(result.pack, Draft), "its packs are made before they are handed out"
    return result.pack


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
        as_drafts: bool = False,
    ):
        """targets: cached teacher targets that go with every pack; with `prepare.with_full` full rows do instead.

        share_prefix: what samples of a pack begin with alike stands in its row once. share_vision: a picture that
        stands in several places of a row is encoded once. as_drafts: leave the packs to be made where the student
        answers some of their samples.
        """
        self.sources, self.prepare, self.geometry, self.dummy_image = sources, prepare, geometry, dummy_image
        self.targets, self.share_prefix = targets, share_prefix
        # A hybrid's shared row encodes its pictures before the rest of the model runs, as all ranks then have to.
        self.share_vision = share_vision or (share_prefix and geometry.linear_attention)
        self.as_drafts = as_drafts
        self._collator: PixelPruneCollator | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_collator": None}

    def __getitem__(self, task: PackTask) -> PackResult | PackFailure:
        if self._collator is None:
            self._collator = PixelPruneCollator(self.prepare.build(), self.geometry, dummy_image=self.dummy_image)
        records, lost, num_lost_supervised, lost_loss_weight = [], [], 0, 0.0
        is_asked: list[bool] = []
        asked = task.is_asked or (False,) * len(task.records)
        memo: dict[ShotKey, list[PicturePair]] = {}
        for (number, row, content_hash, num_supervised, loss_weight), asks in zip(task.records, asked, strict=True):
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
                weighted = record.sample.weighted(source.settings.loss_weight)
                records.append(dataclasses.replace(record, sample=weighted))
                assert self.as_drafts or not record.has_no_answer, "nobody would answer it"
                is_asked.append(asks or record.has_no_answer)
            except UserError as error:
                return PackFailure(str(error))
            except RecordError as error:
                lost.append(Quarantined(source.record_id(row), source.rows.where(row), error.reason, str(error)))
                num_lost_supervised += num_supervised
                lost_loss_weight += loss_weight
        try:
            pack = self._pack(self._collator, records, is_asked)
        except UserError as error:
            return PackFailure(str(error))
        return PackResult(pack, not records, tuple(lost), num_lost_supervised, lost_loss_weight)

    def _pack(self, collator: PixelPruneCollator, records: list[PreparedRecord], is_asked: list[bool]) -> Pack | Draft:
        samples = collator.with_dummy([record.sample for record in records])
        decode = is_recoverable(self.prepare.prune)
        full_samples = [record.full for record in records if record.full is not None] + samples[len(records) :]
        if self.as_drafts:
            asked = (*is_asked, *(False for _ in samples[len(records) :]))
            return Draft(samples, full_samples, asked, self.geometry, decode, self.share_prefix, self.share_vision)
        groups = find_groups(samples, self.geometry.image_token_id) if self.share_prefix else None
        pictures = row_pictures(samples, groups) if self.share_vision else None
        pack = pack_samples(samples, self.geometry, groups, pictures=pictures)
        if self.targets is not None:
            return with_cached_targets(pack, records, self.targets)
        if self.prepare.with_full:
            return with_full_rows(
                pack, samples, full_samples, self.geometry, decode=decode, groups=groups, pictures=pictures
            )
        return pack


def start_worker(worker_id: int) -> None:
    """One thread per loader process: there is one process per core."""
    torch.set_num_threads(1)
