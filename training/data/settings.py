"""The settings of the data path: sources, caps, steps, and how much bad data a run tolerates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pixelprune.answers import FORMATS
from pixelprune.records.keys import STRUCTURE
from pixelprune.records.presets import Preset, get_preset
from training.config.ranges import POSITIVE, SHARE, Range, at_least, check_fields
from training.data.files.address import check_address, is_remote


@dataclass
class SourceSettings:
    """One data set of a recipe."""

    path: str
    """A .jsonl, .ndjson or .json file (also .gz or .zst), .csv, .parquet, .arrow or a WebDataset .tar, a folder of
    one kind of them, a folder written by `datasets`, or hf://datasets/OWNER/NAME from the hub.
    Files and folders may be remote: s3://, gs://, az:// or hf:// addresses, without credentials."""
    name: str = ""
    """Name in reports and record ids; the file's stem by default. Must be unique in a recipe."""
    root: str = ""
    """Folder, local or remote, that image paths are relative to and may not leave; by default that of the file."""
    format: str = "auto"
    """auto (detected per record), sharegpt or messages."""
    split: str = "train"
    """Split of a data set of the hub, of a saved DatasetDict, or of a folder whose files are named for splits."""
    weight: float = 1.0
    """How often every record is used per epoch; a fraction draws a seeded subset, another one each epoch."""
    loss_weight: float = 1.0
    """What the loss of every supervised token of this source is multiplied with, beside weights of its turns; a step's
    loss is divided by the sum of all weights, so that only the sources' ratios count."""
    prompt: str = "as_recorded"
    """What is written around every question: a name of `pixelprune.records.presets`."""
    system: str = ""
    """A system prompt instead of the preset's."""
    template: str = ""
    """A template instead of the preset's, with {question} where the record's own text belongs."""

    def __post_init__(self) -> None:
        self.preset()
        check_fields(self, loss_weight=POSITIVE)
        for key, value in (("path", self.path), ("root", self.root)):
            if is_remote(value):
                check_address(value, key)

    def preset(self) -> Preset:
        """The prompt of this source. Raises ValueError for a name or a template that is none."""
        return get_preset(self.prompt, self.system, self.template)


@dataclass
class DataSettings:
    """What is trained on, and how it is cut into optimizer steps and packs."""

    sources: list[SourceSettings] = field(default_factory=list)
    """Training data."""
    eval_sources: list[SourceSettings] = field(default_factory=list)
    """Validation data; weights are ignored, every record is used once."""
    last_turn_only: bool = False
    """Supervise the last assistant turn only, not all of them."""
    ignore_keys: list[str] = field(default_factory=list)
    """Keys of records, turns, content parts and images that say nothing about training, beyond those known to. A record
    with any other key that is not read is quarantined."""
    supervise_empty_reasoning: bool = True
    """Train on the empty reasoning block that a reasoning model's chat template writes before an answer without
    reasoning, as far as the template's generation prompt does not give it."""
    answer_format: str = "auto"
    """How the places of a record's `objects` are written: auto (boxes as boxes, points as points, relative 0-1000),
    point, box, tool_call, or one of these three with _absolute (pixels of the original image)."""
    grounding_tokens: bool = False
    """Write the things and boxes of `objects` between the tokenizer's own tokens (`<|object_ref_start|>`,
    `<|box_start|>`), and take these in texts as the tokens they are; otherwise a text that holds one is refused."""
    samples_per_step: int = 64
    """Samples in one optimizer step over all ranks (the global batch); only the last step of an epoch is shorter."""
    pack_tokens: int = 16384
    """Most LLM tokens in one pack."""
    pack_patches: int = 65536
    """Most ViT patches (four per kept block) in one pack."""
    paired: bool = False
    """Use only records that fit unpruned too, so that a Full and a PixelPrune run see the same samples per step."""
    share_prefix: Literal["off", "step", "group"] = "off"
    """off, step or group: what samples of a pack have in common at their beginning (a screenshot that many records ask
    about) is computed for each, or once: with the same order and steps, equal up to rounding, or with an order drawn
    over screenshots, so that their questions meet (docs/sharing.md)."""
    share_vision: Literal["off", "step", "group"] = "off"
    """off, step or group, as share_prefix, but of the vision tower alone: a picture that several records of a pack show
    is encoded once and its features go to each; the language model computes every record for itself. For every family
    and attention, and for records whose instructions stand before the picture and differ (docs/sharing.md)."""
    max_shared: int = 16
    """Records of one screenshot that share_prefix=group or share_vision=group lets meet in a step."""
    shuffle: bool = True
    """A new order every epoch from (seed, epoch); otherwise the order of the files."""
    max_quarantined_share: float = 0.01
    """A run refuses to start (or goes no further) when more than this share of its records cannot be used."""
    max_file_bytes: int = 268_435_456
    """Bytes of the largest image that is read, whether a file or within a record; looked at before it is read."""
    max_text_chars: int = 2_000_000
    """Most characters of all turns of one record; `max_turns` and `max_images` likewise, before any of them is rendered
    or read."""
    max_turns: int = 1000
    """Most turns of one record."""
    max_images: int = 256
    """Most images of one record."""
    max_seconds_per_record: float = 120.0
    """Seconds that each of reading, templating, tokenising and decoding a record may take when it is indexed, 0 for any
    time; one that takes longer is quarantined, and measured again under another limit."""
    index_dir: str = ""
    """Where indexes are kept, on a file system that all ranks share; by default beside each data file."""
    index_workers: int = 0
    """Processes of one rank that build the index; 0 takes all cores of the machine over its ranks."""
    num_workers: int = 4
    """Loader processes of one rank; 0 prepares batches in the training process."""
    prefetch_packs: int = 2
    """Packs that each worker prepares ahead, at least; the loader always holds one whole optimizer step."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            ignore_keys=Range("keys that are not the conversation itself", lambda keys: not STRUCTURE & set(keys)),
            answer_format=Range(f"one of {', '.join(FORMATS)}", FORMATS.__contains__),
            samples_per_step=at_least(1),
            max_shared=at_least(2),
            pack_tokens=at_least(1),
            pack_patches=at_least(4, " (one block)"),
            max_quarantined_share=SHARE,
            max_file_bytes=at_least(1),
            max_text_chars=at_least(1),
            max_turns=at_least(1),
            max_images=at_least(0),
            max_seconds_per_record=at_least(0),
            index_workers=at_least(0),
            num_workers=at_least(0),
            prefetch_packs=at_least(0),
        )
