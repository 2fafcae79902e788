"""The one typed tree behind every recipe. Sections live beside the code they steer; the rest is here.

Defaults < recipe < command line. Values are checked beside their field, contradictions in `training.config.rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pixelprune.settings import PruneSettings, ResizeSettings
from training.config.ranges import (
    AUTO,
    BELOW_1,
    EVERY_K,
    FOLDER_NAME,
    POSITIVE,
    SHARE,
    Range,
    at_least,
    check_fields,
)
from training.config.teacher import TeacherSettings
from training.data.settings import DataSettings
from training.errors import UserError
from training.loss.supervised import LossSettings
from training.model.lora import LoraSettings

AttentionName = Literal["auto", "flash_attention_3", "flash_attention_2", "varlen", "sdpa", "eager"]
ATTENTION_NAMES: tuple[AttentionName, ...] = get_args(AttentionName)
"""Values of model.attention; `training.model.attention` explains them."""


@dataclass
class RunSettings:
    """Where a run lives and what makes it repeatable."""

    name: str = "run"
    """Name of the run: its folder below `folder`, and its name in tracking."""
    folder: str = "runs"
    """Parent folder of all runs."""
    seed: int = 0
    """Seeds data order, dropout and everything random."""
    accept_changes: bool = False
    """Continue a run although its recipe now says otherwise what is trained (threshold, learning rates, loss weights,
    ...): such changes are named and refused without it. What a checkpoint is bound to stays refused."""

    def __post_init__(self) -> None:
        check_fields(self, name=FOLDER_NAME, seed=at_least(0))


@dataclass
class ModelSettings:
    """Which model is trained and what of it."""

    path: str = ""
    """Hugging Face folder or hub id of the model."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """bfloat16 or float32: precision of weights and activations (gradients accumulate in float32 either way)."""
    attention: AttentionName = "auto"
    """auto (the fastest that runs here), flash_attention_3, flash_attention_2, varlen (torch's own flash kernels), sdpa
    or eager; see training/model/attention.py."""
    check_attention: bool = True
    """Hold the attention against its definition on this device before the first step (milliseconds), and refuse to
    train when it computes wrong."""
    recompute_vit: int = AUTO
    """Recompute the activations of every k-th ViT layer in backward; 1 = all layers, 0 = none, -1 = as little as the
    memory estimate at the start allows (training/loop/memory.py). Results are the same, speed and memory are not."""
    recompute_llm: int = AUTO
    """The same for the language model's layers."""
    liger: bool = False
    """RMSNorm and SwiGLU of this model through the fused kernels of liger-kernel (GPU only, model/fused.py)."""
    compile: bool = False
    """Compile the repeated layers of both towers with torch.compile (training/model/compiled.py)."""
    compile_max_recompiles: int = 16
    """Versions of a layer that may be compiled, for other lengths and modes, before it runs uncompiled (said in the
    log)."""
    allow_pickle: bool = False
    """Read weights that are pickles (pytorch_model.bin) where there are no safetensors. Reading one can run what is in
    it: leave off unless you made it."""
    trust_remote_code: bool = False
    """Run code that comes with the model folder. Leave off unless you have read it."""

    def __post_init__(self) -> None:
        check_fields(self, recompute_vit=EVERY_K, recompute_llm=EVERY_K, compile_max_recompiles=at_least(1))


@dataclass
class GroupSettings:
    """One part of the model."""

    freeze: bool = False
    """Leave these weights as they are."""
    lr: float | None = None
    """Learning rate of this part; optim.lr when not given."""

    def __post_init__(self) -> None:
        check_fields(self, lr=POSITIVE)


@dataclass
class OptimSettings:
    """AdamW with warm-up and cosine decay, and the parts of the model it steers."""

    lr: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay; never on norms, biases and embeddings."""
    beta1: float = 0.9
    """Decay of Adam's first moment (mean of gradients) from step to step."""
    beta2: float = 0.95
    """Decay of Adam's second moment (mean of their squares)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_skipped_in_a_row: int = 5
    """Steps with a non-finite loss or gradient are skipped and counted; so many in a row end the run."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    vit: GroupSettings = field(default_factory=GroupSettings)
    merger: GroupSettings = field(default_factory=GroupSettings)
    """The merger and the DeepStack mergers."""
    llm: GroupSettings = field(default_factory=GroupSettings)

    def __post_init__(self) -> None:
        check_fields(
            self,
            lr=POSITIVE,
            weight_decay=at_least(0),
            beta1=BELOW_1,
            beta2=BELOW_1,
            eps=POSITIVE,
            max_skipped_in_a_row=at_least(1),
            max_grad_norm=at_least(0, " (0 = no clipping)"),
        )


@dataclass
class ScheduleSettings:
    """How long, and how the learning rate moves."""

    max_steps: int = 0
    """Optimizer steps to run; 0 means `epochs` decides."""
    epochs: float = 1.0
    """Passes over the data when max_steps is 0."""
    warmup_steps: int = 0
    """Steps of linear warm-up from lr / warmup_steps."""
    min_lr_ratio: float = 0.1
    """The cosine ends at this share of the peak learning rate."""
    rewarm_steps: int = 0
    """Where a run continues under another schedule (made longer, say): steps from the last learning rate to the new
    curve, on a line; 0 follows the new curve at once."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            max_steps=at_least(0, " (0 = schedule.epochs decides)"),
            epochs=at_least(0),
            warmup_steps=at_least(0),
            min_lr_ratio=SHARE,
            rewarm_steps=at_least(0),
        )


@dataclass
class DistributedSettings:
    """How ranks share the work."""

    zero_stage: Literal[1, 2] = 2
    """1 or 2: what ZeRO shards over ranks (optimizer states; also gradients). 1 needs model.dtype=float32."""
    threads_per_rank: int = 0
    """CPU threads of a rank; 0: OMP_NUM_THREADS where you set it, else an even share of the cores this job may use."""
    timeout_minutes: float = 30.0
    """A collective that hangs for this long ends the run."""
    reduce_bucket_size: int = 200_000_000
    """Elements of gradients that ZeRO reduces at once (two such buffers on a GPU; why: distributed/engine.py)."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed settings, merged into the generated JSON: those that observe a run or carry its gradients
    (`training.config.rules` lists them). Others would change what is computed or what a checkpoint holds."""

    def __post_init__(self) -> None:
        check_fields(self, threads_per_rank=at_least(0), timeout_minutes=POSITIVE, reduce_bucket_size=at_least(1))


@dataclass
class CheckpointSettings:
    """What is kept on disk."""

    every_steps: int = 0
    """Save the full training state every n steps; 0 saves only at the end and when stopped."""
    keep_last: int = 2
    """Complete checkpoints to keep; older ones are deleted, save the one that the run was last resumed from."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this step are kept for good; 0 keeps none beyond keep_last."""
    on_error: Literal["stop", "continue"] = "stop"
    """stop or continue: what a failed save or a row of metrics that cannot be written (disk full) does to the run;
    earlier checkpoints are intact either way."""
    on_broken: Literal["fall_back", "stop"] = "fall_back"
    """fall_back or stop: what a start does where the newest checkpoint's files are not as they were written (each has
    a hash): go on from the newest whole one, or let someone look."""
    on_changed_data: Literal["stop", "next_epoch"] = "stop"
    """stop or next_epoch: what a start does where the data, its order or data.samples_per_step are not the
    checkpoint's: refuse, or go on with a new epoch of what there is now."""
    save_timeout_minutes: float = 30.0
    """How long the first rank waits for the others to write their part."""
    export_at_end: bool = True
    """Write the trained model as a Hugging Face folder when the run ends."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            every_steps=at_least(0),
            keep_last=at_least(1),
            keep_every_steps=at_least(0),
            save_timeout_minutes=POSITIVE,
        )


TRACKERS = ("tensorboard", "mlflow", "swanlab")


@dataclass
class TrackingSettings:
    """What is written where. metrics.jsonl is always written to the run's folder."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto (online when logged in, else offline), online, offline or disabled."""
    also: list[str] = field(default_factory=list)
    """Trackers beside wandb: tensorboard (into the run's folder), mlflow, swanlab; each of their packages is yours to
    install (docs/recipes.md)."""
    project: str = "pixelprune"
    """wandb's project; MLflow's experiment, SwanLab's project."""
    group: str = ""
    """wandb's group of runs, such as one experiment."""
    tags: list[str] = field(default_factory=list)
    """wandb's tags of the run."""
    log_every: int = 1
    """Steps between two rows of metrics."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            also=Range(
                f"a list of {', '.join(TRACKERS)}, each once",
                lambda names: set(names) <= set(TRACKERS) and len(set(names)) == len(names),
            ),
            log_every=at_least(1),
        )


@dataclass
class EvalSettings:
    """Validation loss on data.eval_sources, and grounding accuracy on those of its records that have a box."""

    every_steps: int = 0
    """Steps between two validations; 0 validates only before the first and after the last step."""
    at_start: bool = True
    """Validate before the first step, so that there is something to compare with."""
    grounding_every_steps: int = 0
    """Steps between two evaluations by generation (and one at the end); the best is exported. 0 makes none."""
    grounding_samples: int = 256
    """Records answered each time: a fixed random sample of those with metadata.bbox; 0 takes all."""
    grounding_on_full: bool = False
    """Evaluate on all tokens too (PixelPrune -> Full), as eval_accuracy_full."""
    grounding_batch_size: int = 8
    """Conversations generated together on a rank."""
    grounding_max_new_tokens: int = 64
    """Longest answer, tokens."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            every_steps=at_least(0),
            grounding_every_steps=at_least(0),
            grounding_samples=at_least(0, " (0 = all)"),
            grounding_batch_size=at_least(1),
            grounding_max_new_tokens=at_least(1),
        )


@dataclass
class Config:
    """A whole run. `python -m training.train RECIPE --show` prints it resolved."""

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    prune: PruneSettings = field(default_factory=PruneSettings)
    resize: ResizeSettings = field(default_factory=ResizeSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    kd: TeacherSettings = field(default_factory=TeacherSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)

    @property
    def pruning(self) -> PruneSettings:
        """`prune`, its direction decided by what is trained on."""
        return self.prune.resolved(last_turn_only=self.data.last_turn_only)


class ConfigError(UserError):
    """A recipe that cannot be run, in one line: which field, what was expected, what came."""
