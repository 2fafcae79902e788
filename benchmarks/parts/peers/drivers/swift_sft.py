"""ms-swift's `swift sft` on the records: its own command line, called in this process so that steps can be logged."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import step_log

job = step_log.read_job()
# Its pictures are resized by qwen_vl_utils, which is set by the environment; in tokens of 32 x 32 pixels.
os.environ["IMAGE_MAX_TOKEN_NUM"] = str(job["max_pixels"] // 1024)
os.environ["IMAGE_MIN_TOKEN_NUM"] = str(job["min_pixels"] // 1024)
step_log.allow_torchvision()

import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(job["threads"])
step_log.log_every_trainer(job)

from swift.template.templates.qwen import Qwen3VLTemplate  # noqa: E402

config = transformers.AutoConfig.from_pretrained(job["model"])
# Written into the template as a number of the published vocabulary; a toy vocabulary has others.
Qwen3VLTemplate.image_token_id = config.image_token_id
Qwen3VLTemplate.video_token_id = config.video_token_id

from swift.pipelines import sft_main  # noqa: E402

options = {
    "model": job["model"],
    "model_type": "qwen3_vl",
    "template": "qwen3_vl",
    "use_hf": "true",
    "check_model": "false",
    "dataset": job["records"],
    "tuner_type": "full",
    "freeze_vit": "false",
    "freeze_aligner": "false",
    "torch_dtype": "float32",
    "attn_impl": "sdpa",
    "dataset_shuffle": "false",
    "train_dataloader_shuffle": "false",
    "split_dataset_ratio": 0,
    "lazy_tokenize": "true",
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "per_device_train_batch_size": job["batch"],
    "gradient_accumulation_steps": 1,
    "max_steps": job["steps"],
    "learning_rate": job["lr"],
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0,
    "weight_decay": 0,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": "false",
    "max_length": 1000000,
    "logging_steps": 1,
    "save_strategy": "steps" if job["save_steps"] else "no",
    "save_steps": job["save_steps"] or 10**6,
    "output_dir": job["out"],
    "add_version": "false",
    "report_to": "none",
    "seed": 0,
}
if job["device"] == "cpu":
    options["use_cpu"] = "true"
if job["resume"]:  # it takes the folder of one checkpoint
    options["resume_from_checkpoint"] = max(
        (str(path) for path in Path(job["out"]).glob("checkpoint-*")), key=lambda path: int(path.rsplit("-", 1)[1])
    )
Path(job["config"]).write_text(json.dumps(options, indent=2))
sys.argv = ["swift sft"]
sft_main([str(part) for name, value in options.items() for part in (f"--{name}", value)])
