"""Hugging Face's Trainer on the records: what a user writes for a vision-language model, collator included."""

from __future__ import annotations

import json
from pathlib import Path

import step_log

job = step_log.read_job()
step_log.allow_torchvision()

import torch  # noqa: E402

torch.set_num_threads(job["threads"])
# config: from here to the end is the user's script
from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments  # noqa: E402

step_log.log_every_trainer(job)
processor = AutoProcessor.from_pretrained(job["model"])
model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype="float32", attn_implementation="sdpa")
records = [json.loads(line) for line in Path(job["records"]).read_text().splitlines()]


def collate(batch):
    images = [[Image.open(path) for path in record["images"]] for record in batch]
    prompts, texts = [], []
    for record in batch:
        question = [{"type": "image"}, {"type": "text", "text": record["question"]}]
        messages = [{"role": "user", "content": question}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        prompts.append(prompt)
        texts.append(f"{prompt}{record['answer']}<|im_end|>\n")
    inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    labels = inputs["input_ids"].clone()
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    start = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    for row, ids in zip(labels, inputs["input_ids"], strict=True):
        header = int((ids == start).nonzero()[-1]) + len(processor.tokenizer("<|im_start|>assistant\n")["input_ids"])
        row[:header] = -100
        row[int((ids == end).nonzero()[-1]) + 1 :] = -100
    return {**inputs, "labels": labels}


arguments = TrainingArguments(
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
    remove_unused_columns=False,
    dataloader_num_workers=0,
    use_cpu=job["device"] == "cpu",
    report_to="none",
    seed=0,
)
trainer = Trainer(model, arguments, data_collator=collate, train_dataset=records)
trainer.train(resume_from_checkpoint=job["resume"] or None)
