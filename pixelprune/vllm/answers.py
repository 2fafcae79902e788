"""Greedy answers of one side of a comparison, in a process of its own.

`python -m pixelprune.vllm.answers hugging_face|vllm TASK.json ANSWERS.json`; see `pixelprune.vllm.parity`. vLLM's
worker for CPUs does not start in a process that has loaded numba, and both sides would share a GPU's memory.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """num_blocks: blocks of the image before pruning, which vLLM does not tell. logprobs: of the chosen tokens."""

    prompt_tokens: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    num_blocks: int = 0


def hugging_face(task: dict[str, Any]) -> list[Answer]:
    """The stock Hugging Face model through `pixelprune.hf`."""
    import torch
    from transformers import AutoModelForImageTextToText

    from pixelprune.hf import generate, prepare

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(task["model"], dtype=task["dtype"]).eval().to(device)
    answers = []
    for image in task["images"]:
        parts = [{"type": "image", "image": image}, {"type": "text", "text": task["question"]}]
        inputs = prepare(task["model"], [{"role": "user", "content": parts}])
        made = generate(model, inputs, max_new_tokens=task["max_tokens"], do_sample=False, output_logits=True)
        ids = made.token_ids[0]
        scores = torch.stack(made.output.logits)[: len(ids), 0].float().log_softmax(-1)
        chosen = scores.gather(1, torch.tensor(ids, device=scores.device)[:, None])[:, 0].tolist()
        answers.append(Answer(inputs.num_tokens, made.text, ids, chosen, inputs.num_blocks))
    return answers


def vllm(task: dict[str, Any]) -> list[Answer]:
    """vLLM, as the installed plugins and the checkpoint's settings make it."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    engine = {"limit_mm_per_prompt": {"image": 1}, "dtype": task["dtype"]} | task["engine"]
    llm = LLM(task["model"], **engine)
    sampling = SamplingParams(temperature=0, max_tokens=task["max_tokens"], logprobs=0)
    conversations = []
    for image in task["images"]:
        parts = [{"type": "image_pil", "image_pil": Image.open(image)}, {"type": "text", "text": task["question"]}]
        conversations.append([{"role": "user", "content": parts}])
    answers = []
    for output in llm.chat(conversations, sampling, use_tqdm=False):
        made = output.outputs[0]
        steps = zip(made.logprobs, made.token_ids, strict=True)
        chosen = [step[token].logprob for step, token in steps]
        # As the other side decodes: vLLM's own text leaves out the bytes of an unfinished character.
        text = llm.get_tokenizer().decode(made.token_ids, skip_special_tokens=True)
        answers.append(Answer(len(output.prompt_token_ids), text, list(made.token_ids), chosen))
    return answers


def main(side: str, task: str, answers: str) -> None:
    made = {"hugging_face": hugging_face, "vllm": vllm}[side](json.loads(Path(task).read_text()))
    Path(answers).write_text(json.dumps([dataclasses.asdict(answer) for answer in made]))


if __name__ == "__main__":
    main(*sys.argv[1:])
