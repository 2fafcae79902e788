"""The trainer: `ls` is the menu of its commands. Runs from the checkout, as its working directory."""

from pixelprune.extras import require_extra

require_extra("training", "train", ("accelerate", "datasets", "deepspeed", "omegaconf", "peft", "pyarrow", "wandb"))
