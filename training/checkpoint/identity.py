"""What of a recipe a checkpoint is bound to, what may change with the user's yes, and what may change at any time.

The data and their order are bound by `training.loop.feed`, the base model by its fingerprint.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from pixelprune.settings import PruneSettings
from training.config.recipe import config_to_dict
from training.config.settings import Config
from training.data.settings import SourceSettings

Kind = Literal["bound", "asked", "said"]

RULES: tuple[tuple[str, Kind], ...] = (
    ("model.dtype", "bound"),
    ("model.*", "said"),
    ("prune.threshold", "asked"),
    ("prune.*", "bound"),
    ("resize.max_decoded_pixels", "said"),
    ("resize.*", "bound"),
    ("loss.ce_weight", "asked"),
    ("loss.kd_weight", "asked"),
    ("loss.temperature", "asked"),
    ("loss.teacher_temperature", "asked"),
    ("loss.chunk_size", "said"),
    ("loss.*", "bound"),
    ("kd.path", "asked"),
    ("kd.dtype", "asked"),
    ("kd.cache_dtype", "asked"),
    ("kd.top_k", "asked"),
    ("kd.on_policy_batch_size", "said"),
    ("kd.on_policy*", "asked"),
    ("kd.*", "said"),
    ("optim.*.freeze", "bound"),
    ("optim.max_skipped_in_a_row", "said"),
    ("optim.*", "asked"),
    ("lora.merge_on_export", "said"),
    ("lora.dropout", "asked"),
    ("lora.*", "bound"),
    ("schedule.warmup_steps", "asked"),
    ("schedule.min_lr_ratio", "asked"),
    ("schedule.*", "said"),
    ("data.last_turn_only", "asked"),
    ("data.supervise_empty_reasoning", "asked"),
    ("data.sources.*.loss_weight", "asked"),
    ("data.sources.*.prompt", "asked"),
    ("data.sources.*.system", "asked"),
    ("data.sources.*.template", "asked"),
    ("data.*", "said"),
    ("run.*", "said"),
    ("distributed.*", "said"),
    ("checkpoint.*", "said"),
    ("tracking.*", "said"),
    ("eval.*", "said"),
)
"""Pattern of a setting -> what a run that continues does when it changed; the first that fits counts.

bound: refused. asked: it changes from here on what is trained, in silence otherwise: run.accept_changes. said: printed.
"""

_NOT_COMPARED = ("run.accept_changes",)
_LEAVES = ("distributed.deepspeed",)
"""Settings whose value is a mapping."""


class _Absent:
    def __str__(self) -> str:
        return "(no such setting)"


ABSENT = _Absent()


class Change(NamedTuple):
    """A setting that is another one than in the checkpoint's recipe."""

    key: str
    before: Any
    after: Any

    @property
    def kind(self) -> Kind:
        return "said" if self.after is ABSENT else kind_of(self.key)

    def __str__(self) -> str:
        return f"{self.key} {_said(self.before)} -> {_said(self.after)}"


def kind_of(key: str) -> Kind:
    """How a dotted setting is bound to the checkpoints of a run. Raises KeyError for one that no rule names."""
    for pattern, kind in RULES:
        if fnmatchcase(key, pattern):
            return kind
    raise KeyError(f"{key}: no rule in training.checkpoint.identity says what a changed value does to a run")


def changes_between(stored: dict[str, Any], config: Config) -> list[Change]:
    """What differs between the recipe that a checkpoint holds and the present one, in the order of the settings.

    stored: the checkpoint's config.yaml. A setting that it does not have, being older, had its default.
    """
    before, after = _flat(stored), _flat(config_to_dict(config))
    defaults = _flat(config_to_dict(Config()))
    for key in after:
        before.setdefault(key, defaults.get(key, _source_default(key, before)))
    for settings in (before, after):
        _decide_direction(settings)
    keys = [*after, *(key for key in before if key not in after)]
    changes = [Change(key, before[key], after.get(key, ABSENT)) for key in keys if key not in _NOT_COMPARED]
    return [change for change in changes if change.before != change.after]


def _decide_direction(settings: dict[str, Any]) -> None:
    """auto is compared as what it comes to, which another data.last_turn_only changes."""
    if "pred3d" in (settings["prune.strategy"], settings["prune.budget"]) and settings["prune.direction"] == "auto":
        settings["prune.direction"] = PruneSettings().resolved(last_turn_only=settings["data.last_turn_only"]).direction


def _source_default(key: str, stored: dict[str, Any]) -> Any:
    """Of a data source's setting: its default where the checkpoint's recipe had this source, else ABSENT."""
    source, _, name = key.rpartition(".")
    return getattr(SourceSettings, name, ABSENT) if f"{source}.path" in stored else ABSENT


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value. Lists of mappings are numbered; other lists are values."""
    is_numbered = isinstance(content, list) and any(isinstance(item, dict) for item in content)
    if prefix in _LEAVES or not (is_numbered or isinstance(content, dict)):
        return {prefix: content}
    items = enumerate(content) if is_numbered else content.items()
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}".lstrip("."))
    return flat


def _said(value: Any) -> str:
    return "''" if value == "" else "not given" if value is None else str(value)
