"""The trainer: `ls` is the menu of its commands. Runs from the checkout, as its working directory."""

import logging

from pixelprune.extras import require_extra

require_extra("training", "train", ("accelerate", "datasets", "deepspeed", "omegaconf", "peft", "pyarrow", "wandb"))

# DeepSpeed says it on stdout, in front of every command's own words; `training.doctor` and the start table say it, too.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
