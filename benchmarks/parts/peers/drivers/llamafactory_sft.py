"""LLaMA-Factory on the records: its YAML and the entry in dataset_info.json, run in this process."""

from __future__ import annotations

import json
from pathlib import Path

import step_log

job = step_log.read_job()
step_log.allow_torchvision()
step_log.pretend_torchaudio()

import torch  # noqa: E402

torch.set_num_threads(job["threads"])
step_log.log_every_trainer(job)

from llamafactory.train.tuner import run_exp  # noqa: E402

records = Path(job["records"])
entry = {
    "records": {
        "file_name": records.name,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
}
(records.parent / "dataset_info.json").write_text(json.dumps(entry, indent=2))
options = {
    "model_name_or_path": job["model"],
    "template": "qwen3_vl_nothink",
    "dataset": "records",
    "dataset_dir": str(records.parent),
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "freeze_vision_tower": False,
    "freeze_multi_modal_projector": False,
    "freeze_language_model": False,
    "image_max_pixels": job["max_pixels"],
    "image_min_pixels": job["min_pixels"],
    "cutoff_len": 1000000,
    "flash_attn": "sdpa",
    "disable_gradient_checkpointing": True,
    "disable_shuffling": True,
    "per_device_train_batch_size": job["batch"],
    "gradient_accumulation_steps": 1,
    "max_steps": job["steps"],
    "learning_rate": job["lr"],
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "preprocessing_num_workers": None,
    "dataloader_num_workers": 0,
    "tokenized_path": None,
    "overwrite_cache": True,
    "logging_steps": 1,
    "save_strategy": "steps" if job["save_steps"] else "no",
    "save_steps": job["save_steps"] or 10**6,
    "output_dir": job["out"],
    "overwrite_output_dir": False,
    "use_cpu": job["device"] == "cpu",
    "bf16": False,
    "report_to": "none",
    "seed": 0,
}
Path(job["config"]).write_text(json.dumps(options, indent=2))
run_exp(options)
