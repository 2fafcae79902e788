"""Sessions as conversations in the training format, as Qwen3-VL's published computer agents are asked.

The first turn shows a screenshot and says the instruction and, in words, the actions whose screenshots are not shown
any more; every further turn is a screenshot; every answer is a sentence and a call of `computer_use`. The system prompt
that describes the call is a preset (`computer_use_agent`), as for all prompts, and not part of the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from data_tools.walk.session import Step, stretches, windows

Supervise = Literal["last", "every"]


def instruction_of(steps: Sequence[Step]) -> str:
    """What a walk without a goal was asked to do: its own actions in their order, without the last, that ends it."""
    listed = " ".join(f"{number}. {step.action.words}" for number, step in enumerate(steps[:-1], start=1))
    return f"Do these steps in their order: {listed}"


def conversations(
    name: str,
    steps: Sequence[Step],
    images: Sequence[str],
    *,
    history: int,
    supervise: Supervise,
    about: dict[str, Any],
) -> list[dict[str, Any]]:
    """The records of one session.

    images: path of every step's screenshot. supervise: "last" gives a record for every step, with up to `history`
    screenshots before it whose actions are read and not trained on; "every" cuts the session into conversations of
    `history` + 1 screenshots, all of whose actions are trained on. about: metadata of every record.
    """
    number = len(steps)
    spans = windows(number, history) if supervise == "last" else stretches(number, history + 1)
    return [_record(name, steps, images, first, last, supervise, about) for first, last in spans]


def _record(
    name: str,
    steps: Sequence[Step],
    images: Sequence[str],
    first: int,
    last: int,
    supervise: Supervise,
    about: dict[str, Any],
) -> dict[str, Any]:
    told = "\n".join(f"Step {i + 1}: {steps[i].action.words}" for i in range(first)) or "None"
    prompt = (
        "Please generate the next move according to the UI screenshot, instruction and previous actions.\n\n"
        f"Instruction: {instruction_of(steps)}\n\nPrevious actions:\n{told}"
    )
    messages: list[dict[str, Any]] = []
    for index in range(first, last + 1):
        step = steps[index]
        texts = [] if messages else [{"type": "text", "text": prompt}]
        messages.append({"role": "user", "content": [{"type": "image", "image": images[index]}, *texts]})
        read_only = {"loss": False} if supervise == "last" and index < last else {}
        answer = [{"type": "text", "text": step.action.response(step.size)}]
        messages.append({"role": "assistant", "content": answer, **read_only})
    acted = steps[last].action
    metadata = {
        **about,
        "episode_id": name,
        "step": last,
        "num_steps_before": first,
        "kinds": [step.kind for step in steps[first : last + 1]],
        "image_sizes": [list(step.size) for step in steps[first : last + 1]],
    }
    if supervise == "last":
        metadata |= {"image_size": list(steps[last].size), "action": acted.as_dict(steps[last].size)}
        if acted.name == "left_click" and acted.box is not None:
            metadata["bbox"] = [round(side) for side in acted.box]
    return {"id": f"{name}-{first:02d}-{last:02d}", "messages": messages, "metadata": metadata}
