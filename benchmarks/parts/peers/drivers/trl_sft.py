"""TRL's SFTTrainer on the records: a data set of prompts and completions with images, and its own collator."""

from __future__ import annotations

import json
from pathlib import Path

import step_log

job = step_log.read_job()
step_log.allow_torchvision()

import torch  # noqa: E402

torch.set_num_threads(job["threads"])
# config: from here to the end is the user's script
from datasets import Dataset, Image, Sequence  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

step_log.log_every_trainer(job)
rows = []
for line in Path(job["records"]).read_text().splitlines():
    record = json.loads(line)
    question = [{"role": "user", "content": record["question"]}]
    answer = [{"role": "assistant", "content": record["answer"]}]
    rows.append({"prompt": question, "completion": answer, "images": record["images"]})
records = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
arguments = SFTConfig(
    job["out"],
    per_device_train_batch_size=job["batch"],
    max_steps=job["steps"],
    learning_rate=job["lr"],
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=1.0,
    logging_steps=1,
    save_steps=job["save_steps"] or 10**6,
    save_strategy="steps" if job["save_steps"] else "no",
    train_sampling_strategy="sequential",
    dataloader_num_workers=0,
    gradient_checkpointing=False,
    max_length=None,
    use_cpu=job["device"] == "cpu",
    bf16=False,
    report_to="none",
    seed=0,
    model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
)
trainer = SFTTrainer(job["model"], arguments, train_dataset=records)
trainer.train(resume_from_checkpoint=job["resume"] or None)
