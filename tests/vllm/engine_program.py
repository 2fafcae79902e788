"""A vLLM engine in a process of its own: `python -m tests.vllm.engine_program TASK.json ANSWERS.json`.

TASK: model, engine (arguments of `vllm.LLM`), conversations, max_tokens; optional: rounds (the same conversations
again), one_by_one, options (`mm_processor_kwargs` per conversation), lora (a folder), mutate (text positions for kept
blocks), pretend_version (of vLLM).
ANSWERS: rounds, each a list of prompt_tokens, token_ids, logprobs of those tokens, cached (tokens from the prefix
cache); served_by, the model's class.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tests.vllm.served_class import class_of


def main() -> None:
    import vllm
    from vllm import LLM

    task = json.loads(Path(sys.argv[1]).read_text())
    vllm.__version__ = task.get("pretend_version", vllm.__version__)
    if task.get("mutate"):
        give_images_text_positions()
    llm = LLM(task["model"], **task["engine"])
    answers = [ask(llm, task) for _ in range(task.get("rounds", 1))]
    Path(sys.argv[2]).write_text(json.dumps({"rounds": answers, "served_by": served_by(llm)}))


def ask(llm: Any, task: dict) -> list[dict]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    conversations = [with_pictures(messages) for messages in task["conversations"]]
    sampling = SamplingParams(temperature=0, max_tokens=task["max_tokens"], ignore_eos=True, logprobs=0)
    lora = LoRARequest("adapter", 1, task["lora"]) if task.get("lora") else None
    if task.get("one_by_one") or "options" in task:
        options = task.get("options", [None] * len(conversations))
        outputs = [
            llm.chat([c], sampling, lora_request=lora, mm_processor_kwargs=o, use_tqdm=False)[0]
            for c, o in zip(conversations, options, strict=True)
        ]
    else:
        outputs = llm.chat(conversations, sampling, lora_request=lora, use_tqdm=False)
    return [answer_of(output) for output in outputs]


def answer_of(output: Any) -> dict:
    made = output.outputs[0]
    steps = zip(made.logprobs, made.token_ids, strict=True)
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "token_ids": list(made.token_ids),
        "logprobs": [step[token].logprob for step, token in steps],
        "cached": output.num_cached_tokens or 0,
    }


def with_pictures(messages: list[dict]) -> list[dict]:
    """Image parts as vLLM's offline interface takes them."""
    turns = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image_pil", "image_pil": Image.open(part["image"])} if part["type"] == "image" else part
                for part in content
            ]
        turns.append({**message, "content": content})
    return turns


def served_by(llm: Any) -> list[str]:
    """Module and name of the model's class in every worker."""
    return llm.apply_model(class_of)


def give_images_text_positions() -> None:
    """What a server without our positions would compute: tokens counted one by one."""
    import torch

    from pixelprune.vllm import models

    def counted(rule: Any, tokens: list[int], features: list) -> tuple[torch.Tensor, int]:
        return torch.arange(len(tokens)).expand(3, -1).clone(), 0

    models.kept_positions = counted


if __name__ == "__main__":
    main()
