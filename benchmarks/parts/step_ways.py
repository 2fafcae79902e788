"""The ways to train that `benchmarks.train_step` compares: one engine, and for each way its own packs and teacher.

Full, PixelPrune, Resize and the two teachers differ in the data and in what the loss is given, not in the trained
weights: they share one model, one optimizer and one memory, so nothing but the way changes from step to step.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.parts.shapes import random_model, shape_config
from pixelprune.flops import CostModel
from pixelprune.settings import MERGE
from training.composition.toy import build_tokenizer
from training.config.recipe import load_recipe
from training.config.settings import Config
from training.data.index import Index
from training.data.loader import MicroBatch
from training.distributed.engine import build_engine
from training.distributed.ranks import Ranks
from training.loop.context import RunContext
from training.loop.feed import Feed, build_feed, prepare_settings, training_loader
from training.loop.teacher_cache import build_cache
from training.model.attention import choose_attention
from training.model.loading import DTYPES, load_model_files, prepare_layers
from training.model.lora import add_adapters
from training.model.parameters import freeze_parts
from training.model.supervised import SupervisedModel, Teacher
from training.teacher.files import TeacherPlan, plan_teacher
from training.teacher.teachers import build_teacher

RECIPE = Path(__file__).parents[2] / "configs" / "debug.yaml"
MODES: dict[str, tuple[str, ...]] = {
    "Full": ("prune.strategy=none",),
    "PixelPrune": (),
    "Resize": ("prune.strategy=resize",),
    "KD cached": ("loss.kd_weight=1", "kd.source=cached"),
    "KD online": ("loss.kd_weight=1", "kd.source=online"),
}
WITH_TEACHER = ("KD cached", "KD online")
NO_CAP = 2**30


@dataclass(frozen=True)
class Step:
    """What one optimizer step took. seconds: by phase (forward, backward, optimizer, data_wait, step)."""

    seconds: dict[str, float]
    metrics: dict[str, float]
    model_flops: float
    executed_flops: float
    whole_square: float | None
    """The executed ones in the paper's convention; None with a teacher."""
    held_bytes: int | None
    """Before the step: weights, optimizer states, and on a CPU the program."""
    peak_bytes: int | None


@dataclass
class Way:
    """One way to train, with its packs ready to come."""

    name: str
    config: Config
    feed: Feed
    teacher: Teacher | None
    steps: Iterator[tuple[int, Iterator[MicroBatch]]]
    executed: np.ndarray
    whole_square: np.ndarray | None
    """FLOPs per record of the index, recomputation and teacher included."""
    warm_up_steps: int
    done: list[Step] = field(default_factory=list)

    def rows(self, record_ids: list[str]) -> list[int]:
        number = {self.feed.index.record_id(row): row for row in range(len(self.feed.index))}
        return [number[record] for record in record_ids if record in number]


class Bench:
    """The one model and engine, and the ways that step it."""

    def __init__(self, shape: str, folder: Path, overrides: list[str], ranks: Ranks, records: Path):
        self.shape, self.folder, self.ranks, self.records = shape, folder, ranks, records
        self.overrides = overrides
        self.model_folder = write_model_folder(shape, folder / "model")
        self.config = self._config("PixelPrune")
        self.files = load_model_files(self.config.model)
        dtype = DTYPES[self.config.model.dtype]
        self.attention = choose_attention(self.config.model.attention, ranks.device, dtype)
        self.model = random_model(shape, device=ranks.device, dtype=dtype, attention=self.attention)
        freeze_parts(self.model, self.config.optim)
        add_adapters(self.model, self.config.lora)
        prepare_layers(self.model, self.config.model, ranks.device)
        self.module = SupervisedModel(self.model, self.files.geometry, self.config.loss)
        self.engine = build_engine(
            self.module, ranks, self.config.distributed, self.config.optim, self.config.model.dtype
        )
        self.engine.train()
        self.cost = CostModel.from_config(self.files.config)
        self.recomputed = recomputed_shares(self.model)

    def way(self, name: str, *more: str, pack_samples: int, packs: int, num_steps: int) -> Way:
        """The packs of a way: `packs` of `pack_samples` samples in every step, the same samples for all ways.

        more: fields of the recipe that this way sets beyond those of its name.
        """
        config = self._config(name, f"data.samples_per_step={pack_samples * packs}", *more)
        context = RunContext(config, self.ranks, self.folder, self.files)
        teacher_plan: TeacherPlan | None = None
        if name in WITH_TEACHER:
            self._save_weights()
            if config.kd.source == "cached":
                build_cache(config, self.ranks)
            teacher_plan = plan_teacher(
                config.kd, config.model, config.loss, prepare_settings(config, self.files), self.files, self.ranks
            )
        feed = build_feed(context, config.data.sources, shuffle=True, teacher_plan=teacher_plan)
        feed = with_packs_of(feed, pack_samples)
        teacher = build_teacher(config.kd, config.model, config.loss, teacher_plan, self.ranks, self.attention)
        loader = training_loader(context, feed, num_steps=num_steps)
        executed = executed_flops(self.cost, feed.index, self.recomputed)
        whole_square = (
            executed_flops(self.cost.whole_square(), feed.index, self.recomputed) if teacher is None else None
        )
        if name == "KD online":
            executed += feed.plan_input.cost - feed.index.plan_input(self.cost).cost
        elif name == "KD cached":
            executed += self.cost.head * feed.index.num_supervised
        workers = config.data.num_workers
        # Packs that the workers made while another way was training come first: their wait is no measurement.
        ahead = workers * max(config.data.prefetch_packs, -(-packs // max(workers, 1)) + 1)
        return Way(name, config, feed, teacher, loader.steps(), executed, whole_square, -(-ahead // packs))

    def prepare(self, way: Way) -> None:
        """Let the one module learn in this way from here on."""
        self.module.loss, self.module.teacher = way.config.loss, way.teacher

    def forget_teacher(self) -> None:
        """Give back what the last way's teacher held."""
        self.module.teacher = None
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def _config(self, name: str, *more: str) -> Config:
        common = [
            f"model.path={self.model_folder}", f"run.folder={self.folder}", f"run.name={name.replace(' ', '_')}",
            f"data.index_dir={self.folder}/index", f"kd.cache_dir={self.folder}/teacher_cache",
            "data.eval_sources=[]", "eval.at_start=false", f"data.pack_tokens={NO_CAP}", f"data.pack_patches={NO_CAP}",
            "resize.min_pixels=65536", "resize.max_pixels=16777216", "data.max_quarantined_share=0",
            f"data.sources.0.path={self.records}", f"data.sources.0.root={self.records.parent}",
            "optim.lr=1e-6",
        ]  # fmt: skip
        return load_recipe(RECIPE, [*common, *self.overrides, *MODES[name], *more])

    def _save_weights(self) -> None:
        """A teacher is loaded from files: the student's initial weights, as training does."""
        if not list(self.model_folder.glob("*.safetensors")):
            self.model.save_pretrained(self.model_folder)


def write_model_folder(shape: str, folder: Path) -> Path:
    """Config, tokenizer and preprocessor of a shape, as a model folder without weights."""
    shape_config(shape).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor) + "\n")
    return folder


def with_packs_of(feed: Feed, pack_samples: int) -> Feed:
    """The feed with caps that hold `pack_samples` of its longest samples."""
    settings = dataclasses.replace(
        feed.plan_settings,
        pack_tokens=pack_samples * int(feed.plan_input.tokens.max()),
        pack_patches=pack_samples * int(feed.plan_input.patches.max()),
    )
    return dataclasses.replace(feed, plan_settings=settings)


def recomputed_shares(model: Any) -> tuple[float, float]:
    """Share of the layers of the ViT and of the language model that are computed a second time in backward."""
    parts = (model.model.visual.blocks, model.model.language_model.layers)
    shares = [np.mean([bool(getattr(layer, "gradient_checkpointing", False)) for layer in part]) for part in parts]
    return float(shares[0]), float(shares[1])


def executed_flops(cost: CostModel, index: Index, recomputed: tuple[float, float]) -> np.ndarray:
    """FLOPs per record of forward, backward and recomputation: float64 (n,).

    The cost model counts three forwards; a recomputed layer is a fourth. Patch embedding, mergers and head are computed
    once whatever the policy.
    """
    vit_share, llm_share = recomputed
    starts = index.image_starts
    rows = []
    for row in range(len(index)):
        kept = index.kept_blocks[starts[row] : starts[row + 1]].tolist()
        sample = {
            "kept_blocks": kept,
            "text_tokens": int(index.text_tokens[row]),
            "supervised_tokens": int(index.num_supervised[row]),
        }
        forward = cost.breakdown(**sample, training=False)
        embedding = cost.patch_embed * MERGE * MERGE * sum(kept)
        vit = forward["vit_attention"] + forward["vit_linear"] - embedding
        llm = forward["llm_attention"] + forward["llm_linear"] + forward["llm_delta"]
        rows.append(cost.sample_flops(**sample, training=True) + vit_share * vit + llm_share * llm)
    return np.array(rows)
