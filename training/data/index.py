"""What every record measures after pruning: one row per record, from columns that know nothing of ranks or caps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixelprune.flops import CostModel
from pixelprune.settings import MERGE
from training.data.balance import PrefixColumns
from training.data.plan import PlanInput
from training.data.quarantine import Quarantined, count_reasons, refuse_above, write_quarantine
from training.data.settings import DataSettings
from training.data.sources import Source
from training.errors import side_write

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("reason", pa.string()),  # empty: the record can be used
        ("detail", pa.string()),
        ("content_hash", pa.int64()),
        ("text_tokens", pa.int32()),
        ("num_supervised", pa.int32()),
        ("loss_weight", pa.float64()),
        ("weight", pa.float64()),
        ("kept_blocks", pa.list_(pa.int32())),  # per image
        ("full_blocks", pa.list_(pa.int32())),
        ("prefix_hash", pa.int64()),  # of everything up to the end of the first image; 0: none that could be shared
        ("prefix_text", pa.int32()),  # tokens of it that are not the image's
        ("picture_hash", pa.int64()),  # of the first image alone; 0: none
    ]
)


@dataclass(frozen=True)
class Index:
    """The usable records of all sources of a recipe (n of them), and the ones that are not.

    source, row: int (n,), where the record is read. content_hash: int64 (n,). text_tokens, num_supervised: int64 (n,).
    loss_weight: float64 (n,), sum of the supervised tokens' weights, multiplied with the source's. weight: float64
    (n,), the record's own.
    kept_blocks, full_blocks: int64 (I,), blocks of all images in order; those of record i are at image_starts[i] to
    image_starts[i + 1] (int64 (n + 1,)).
    prefix_hash, prefix_text: int64 (n,), equal for records that begin alike up to their first image
    (`pixelprune.attention.prefixes.picture_prefix`). picture_hash: int64 (n,), equal for records with one first image.
    """

    sources: list[Source]
    source: np.ndarray
    row: np.ndarray
    content_hash: np.ndarray
    text_tokens: np.ndarray
    num_supervised: np.ndarray
    loss_weight: np.ndarray
    weight: np.ndarray
    image_starts: np.ndarray
    kept_blocks: np.ndarray
    full_blocks: np.ndarray
    prefix_hash: np.ndarray
    prefix_text: np.ndarray
    picture_hash: np.ndarray
    quarantined: list[Quarantined] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    """The Parquet sidecar of each source."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def num_records(self) -> int:
        return len(self) + len(self.quarantined)

    @property
    def num_kept(self) -> np.ndarray:
        """Kept blocks per record: int64 (n,)."""
        return self._per_record(self.kept_blocks)

    @property
    def num_full(self) -> np.ndarray:
        """All blocks per record: int64 (n,)."""
        return self._per_record(self.full_blocks)

    def _per_record(self, per_image: np.ndarray) -> np.ndarray:
        """Sums over the images of each record."""
        total = np.concatenate([[0], np.cumsum(per_image)])
        return total[self.image_starts[1:]] - total[self.image_starts[:-1]]

    def record_id(self, i: int) -> str:
        return self.sources[self.source[i]].record_id(int(self.row[i]))

    def where(self, i: int) -> str:
        return self.sources[self.source[i]].rows.where(int(self.row[i]))

    @property
    def retain_ratio(self) -> float:
        """Kept blocks over all blocks of the data set, not the mean over images. 1.0 without images."""
        total = self.num_full.sum()
        return float(self.num_kept.sum() / total) if total else 1.0

    def subset(self, keep: np.ndarray, quarantined: list[Quarantined]) -> Index:
        """The records where keep is True; the reasons of the others are added to the quarantine."""
        chosen = np.flatnonzero(keep)
        num_images = np.diff(self.image_starts)
        images = np.repeat(keep, num_images)
        return Index(
            self.sources,
            **{name: getattr(self, name)[chosen] for name in COLUMNS},
            image_starts=np.concatenate([[0], np.cumsum(num_images[chosen])]),
            kept_blocks=self.kept_blocks[images],
            full_blocks=self.full_blocks[images],
            quarantined=self.quarantined + quarantined,
            files=self.files,
        )

    def without_over_long(self, settings: DataSettings, *, with_teacher: bool = False) -> Index:
        """Quarantine what exceeds a cap after pruning (before it, too, with a teacher or for paired recipes)."""
        unpruned = with_teacher or settings.paired
        blocks = self.num_full if unpruned else self.num_kept
        tokens, patches = self.text_tokens + blocks, MERGE * MERGE * blocks
        fits = (tokens <= settings.pack_tokens) & (patches <= settings.pack_patches)
        why = " unpruned (data.paired or a teacher)" if unpruned else " after pruning"
        over_long = [
            Quarantined(
                self.record_id(i),
                self.where(i),
                "over_long",
                f"{tokens[i]} tokens and {patches[i]} patches{why}; caps are data.pack_tokens={settings.pack_tokens}, "
                f"data.pack_patches={settings.pack_patches}",
            )
            for i in np.flatnonzero(~fits).tolist()
        ]
        return self.subset(fits, over_long)

    def checked(
        self,
        settings: DataSettings,
        report: Path,
        *,
        with_teacher: bool = False,
        write_report: bool = True,
        go_on: bool = False,
    ) -> Index:
        """What a run trains on: without the over-long, refused when too much of the data cannot be used.

        Every rank calls this; the one with `write_report` writes the quarantine to `report`, or goes on without
        (`go_on`) if the disk does not take it. Raises ValueError.
        """
        index = self.without_over_long(settings, with_teacher=with_teacher)
        if write_report:
            with side_write("the quarantine", go_on=go_on):
                write_quarantine(report, index.quarantined)
        folders = ", ".join(str(file.parent) for file in self.files)
        where = f"{report}; indexed in {folders}"
        refuse_above(settings.max_quarantined_share, index.quarantined, index.num_records, where)
        return index

    def summary(self) -> dict[str, int | float | dict[str, int]]:
        """Counts for the report at the start of a run; quarantined and kept add up to the records."""
        return {
            "num_records": self.num_records,
            "num_kept": len(self),
            "num_quarantined": len(self.quarantined),
            "reasons": count_reasons(self.quarantined),
            "num_images": len(self.kept_blocks),
            "retain_ratio": self.retain_ratio,
            "num_supervised_tokens": int(self.num_supervised.sum()),
        }

    def describe(self) -> str:
        """The summary in one line."""
        summary = self.summary()
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(self.quarantined).items())
        return (
            f"{summary['num_records']} records: {summary['num_kept']} kept, {summary['num_quarantined']} quarantined"
            f"{f' ({reasons})' if reasons else ''}; {summary['num_images']} images, "
            f"retain ratio {self.retain_ratio:.3f}, {summary['num_supervised_tokens']} supervised tokens"
        )

    def plan_input(
        self, cost: CostModel, *, with_teacher: bool = False, teacher_cost: CostModel | None = None
    ) -> PlanInput:
        """The plan's columns. With an online teacher, caps and cost include the teacher's full rows.

        teacher_cost: the teacher's, where it is not a copy of the student.
        """
        flops = self._flops(cost, self.kept_blocks, training=True)
        blocks = self.num_kept
        if with_teacher:
            flops = flops + self._flops(teacher_cost or cost, self.full_blocks, training=False)
            blocks = self.num_full
        source_weight = np.array([source.settings.weight for source in self.sources], dtype=np.float64)[self.source]
        return PlanInput(
            tokens=self.text_tokens + blocks,
            patches=MERGE * MERGE * blocks,
            cost=flops,
            num_supervised=self.num_supervised,
            loss_weight=self.loss_weight,
            copies=source_weight * self.weight,
            source=self.source,
            prefixes=self._prefixes(cost, teacher_cost or cost, with_teacher=with_teacher),
            pictures=self._pictures(cost, teacher_cost or cost, with_teacher=with_teacher),
        )

    def _prefixes(self, cost: CostModel, teacher_cost: CostModel, *, with_teacher: bool) -> PrefixColumns:
        """Which records can share all up to the end of their first image, and what that is worth."""

        def flops(model: CostModel, blocks: np.ndarray, *, training: bool) -> np.ndarray:
            return model.batch_flops(
                image_tokens=blocks,
                patch_squares=(MERGE * MERGE * blocks) ** 2,
                text_tokens=self.prefix_text,
                supervised_tokens=np.zeros(len(self), dtype=np.int64),
                training=training,
            )

        kept, full = (self._first_blocks(self.prefix_hash, blocks) for blocks in (self.kept_blocks, self.full_blocks))
        blocks, prefix_cost = kept, flops(cost, kept, training=True)
        if with_teacher:
            blocks, prefix_cost = full, prefix_cost + flops(teacher_cost, full, training=False)
        return PrefixColumns(
            _numbered(self.prefix_hash), self.prefix_text + blocks, MERGE * MERGE * blocks, prefix_cost
        )

    def _pictures(self, cost: CostModel, teacher_cost: CostModel, *, with_teacher: bool) -> PrefixColumns:
        """Which records have one first image, and what the vision tower then does not compute again."""
        kept, full = (self._first_blocks(self.picture_hash, blocks) for blocks in (self.kept_blocks, self.full_blocks))
        blocks, vision_cost = kept, cost.vision_flops(kept, (MERGE * MERGE * kept) ** 2, training=True)
        if with_teacher:
            full_cost = teacher_cost.vision_flops(full, (MERGE * MERGE * full) ** 2, training=False)
            blocks, vision_cost = full, vision_cost + full_cost
        no_tokens = np.zeros(len(self), dtype=np.int64)
        return PrefixColumns(_numbered(self.picture_hash), no_tokens, MERGE * MERGE * blocks, vision_cost)

    def _first_blocks(self, hashes: np.ndarray, per_image: np.ndarray) -> np.ndarray:
        """Blocks of each record's first image, int64 (n,); 0 where the record's hash says that it has none to share."""
        first = np.minimum(self.image_starts[:-1], max(len(per_image) - 1, 0))
        return np.where(hashes > 0, per_image[first] if len(per_image) else 0, 0)

    def _flops(self, cost: CostModel, blocks: np.ndarray, *, training: bool) -> np.ndarray:
        """FLOPs per record when its images have these blocks: float64 (n,)."""
        return cost.batch_flops(
            image_tokens=self._per_record(blocks),
            patch_squares=self._per_record((MERGE * MERGE * blocks) ** 2),
            text_tokens=self.text_tokens,
            supervised_tokens=self.num_supervised,
            training=training,
        )


def _numbered(hashes: np.ndarray) -> np.ndarray:
    """Equal numbers for equal hashes; a record of hash 0 is alone, with a number behind those of the others."""
    numbers = np.unique(hashes, return_inverse=True)[1].reshape(-1)
    return np.where(hashes > 0, numbers, len(hashes) + np.arange(len(hashes)))


COLUMNS = (
    "source", "row", "content_hash", "text_tokens", "num_supervised", "loss_weight", "weight", "prefix_hash",
    "prefix_text", "picture_hash",
)  # fmt: skip


def read_index(sources: list[Source], files: list[Path]) -> Index:
    """The Parquet sidecars of all sources, joined; usable records first to last, the others as quarantine."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    images: dict[str, list[np.ndarray]] = {"num": [], "kept_blocks": [], "full_blocks": []}
    quarantined: list[Quarantined] = []
    for number, (source, file) in enumerate(zip(sources, files, strict=True)):
        table = pq.read_table(file)
        bad = pc.not_equal(table["reason"], "")
        for entry in table.filter(bad).to_pylist():
            row = entry["row"]
            quarantined.append(
                Quarantined(source.record_id(row), source.rows.where(row), entry["reason"], entry["detail"])
            )
        good = table.filter(pc.invert(bad))
        columns["source"].append(np.full(len(good), number, dtype=np.int64))
        for name in COLUMNS[1:]:
            dtype = np.float64 if name in ("loss_weight", "weight") else np.int64
            factor = source.settings.loss_weight if name == "loss_weight" else 1
            columns[name].append(good[name].to_numpy().astype(dtype) * factor)
        images["num"].append(pc.list_value_length(good["kept_blocks"]).to_numpy().astype(np.int64))
        for name in ("kept_blocks", "full_blocks"):
            images[name].append(pc.list_flatten(good[name]).to_numpy().astype(np.int64))
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Index(
        sources,
        **joined,
        image_starts=np.concatenate([[0], np.cumsum(np.concatenate(images["num"]))]),
        kept_blocks=np.concatenate(images["kept_blocks"]),
        full_blocks=np.concatenate(images["full_blocks"]),
        quarantined=quarantined,
        files=files,
    )
