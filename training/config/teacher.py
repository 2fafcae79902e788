"""Which teacher a run learns from, beside the settings of the loss: `loss.kd_weight > 0` switches it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.config.ranges import SHARE, at_least, check_fields

Precision = Literal["", "bfloat16", "float32"]


@dataclass
class TeacherSettings:
    """The teacher sees all tokens of the records whose pruned form the student is trained on (paper section 4.3)."""

    path: str = ""
    """Folder or hub id of the teacher, of the student's family and vocabulary; "" = model.path, the student's own
    initial weights (also after a resume: never the checkpoint)."""
    source: Literal["online", "cached"] = "online"
    """online (the teacher runs on every pack) or cached (`python -m training.cache_teacher RECIPE` ran it once)."""
    dtype: Precision = ""
    """bfloat16 or float32: the precision the teacher computes in; "" = model.dtype."""
    sharding: Literal["replica", "zero3"] = "replica"
    """replica (every rank holds the teacher) or zero3 (its weights are spread over the ranks)."""
    cache_dir: str = "runs/teacher_cache"
    """Where cached targets are kept, in one folder per teacher (its weights, its images' sizes, ...)."""
    cache_dtype: Precision = ""
    """bfloat16 or float32: the precision of cached hidden states; "" = the teacher's."""
    top_k: int = 0
    """Learn from the teacher's k largest log-probabilities alone (0 = from all): a cache holds them in place of hidden
    states, to save space, and an online teacher says what such a cache would. The distillation term is then a lower
    bound of the whole one, see `training.loss.divergence.distil_top_k`."""
    cache_records: int = 1024
    """Records in one shard of the cache: what a killed `cache_teacher` does again, at most, on each rank."""

    on_policy: float = 0.0
    """Share of the samples that the student answers itself, as it is at that step; the online teacher grades every
    token of these answers, and the records' labels are not used. Drawn anew for every step; records that have no
    answer are always among them."""
    on_policy_max_new_tokens: int = 128
    """Longest such answer, tokens; one that is cut has no end token."""
    on_policy_temperature: float = 1.0
    """Temperature at which the student draws them; 0 takes its most probable token."""
    on_policy_batch_size: int = 8
    """Answers that a rank generates together."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            cache_records=at_least(1),
            top_k=at_least(0, " (0 = all)"),
            on_policy=SHARE,
            on_policy_max_new_tokens=at_least(1),
            on_policy_temperature=at_least(0),
            on_policy_batch_size=at_least(1),
        )
