"""Where the time of a training step goes, by part of the model: forward, recomputation and backward together.

Every part's forward is a range of the profiler. An operation inside a range belongs to it; an operation of the
backward pass belongs to the part whose forward made its autograd node (the profiler gives both the same sequence
number); a recomputed layer enters its ranges again, inside backward. Times are the operations' own: on a GPU of their
kernels, on a CPU of the processor. What no range holds is the optimizer's, the data wait's or the rest.
A GPU's idle time is in no part: compare the sum with the step's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from training.model.supervised import SupervisedModel

PARTS = {
    "data wait": "#9e9e9e",
    "copy, normalise": "#c9a227",
    "ViT attention": "#08519c",
    "ViT MLP, norms": "#6baed6",
    "merger": "#7b3fa0",
    "LLM attention": "#a63603",
    "LLM MLP, norms": "#fdae6b",
    "head + loss": "#31a354",
    "optimizer, ZeRO": "#636363",
    "rest": "#d9d9d9",
}
PREFIX = "part: "


def profile_step(module: SupervisedModel, step: Callable[[], object]) -> dict[str, float]:
    """Seconds by part of one call of `step`, which runs one optimizer step of an engine around `module`."""
    on_device = next(module.parameters()).device.type == "cuda"
    seconds = dict.fromkeys(PARTS, 0.0)
    for event, part in operations_by_part(module, step):
        seconds[part] += (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
    return seconds


def operations_by_part(module: SupervisedModel, step: Callable[[], object]) -> list[tuple[Any, str]]:
    """Every operation of one call of `step`, as the host issued it, and the part that it belongs to."""
    on_device = next(module.parameters()).device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_device else [])
    with ranges(module), profile(activities=activities) as profiler:
        step()
        if on_device:
            torch.cuda.synchronize()
    # A GPU's kernels are counted with the operation that launched them.
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    part_of_node = _parts_of_nodes(events)
    return [(event, _part(event, part_of_node)) for event in events]


def _parts_of_nodes(events: list[Any]) -> dict[tuple[int, int], str]:
    """(thread, sequence number) of every autograd node -> the part whose forward made it.

    An operation that makes no node shows the number of the next one: the last to show it is the one that made it.
    """
    found = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not _is_backward(event) and (part := _range_of(event)):
            found[event.thread, event.sequence_nr] = part
    return found


def _part(event: Any, part_of_node: dict[tuple[int, int], str]) -> str:
    part = None
    while event is not None:
        if event.name.startswith(PREFIX):
            part = event.name.removeprefix(PREFIX)
        elif _is_backward(event) and (event.fwd_thread, event.sequence_nr) in part_of_node:
            part = part_of_node[event.fwd_thread, event.sequence_nr]
        elif event.name in ("data_wait", "optimizer"):
            part = {"data_wait": "data wait", "optimizer": "optimizer, ZeRO"}[event.name]
        elif "AccumulateGrad" in event.name:
            part = "optimizer, ZeRO"
        if part is not None:
            return part
        event = event.cpu_parent
    return "rest"


def _is_backward(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function") or event.scope == 1


def _range_of(event: Any) -> str | None:
    """The innermost range around an operation."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        event = event.cpu_parent
    return None


@contextmanager
def ranges(module: SupervisedModel) -> Iterator[None]:
    """Make every part's forward a range of the profiler while inside."""
    visual, text = module.model.model.visual, module.model.model.language_model
    parts: list[tuple[nn.Module, str]] = [(visual, "ViT MLP, norms"), (text, "LLM MLP, norms")]
    parts += [(block.attn, "ViT attention") for block in visual.blocks]
    parts += [(block, "ViT MLP, norms") for block in visual.blocks]
    parts += [(block, "LLM MLP, norms") for block in text.layers]
    parts += [(block.self_attn, "LLM attention") for block in text.layers if hasattr(block, "self_attn")]
    parts += [(merger, "merger") for merger in (visual.merger, *getattr(visual, "deepstack_merger_list", ()))]
    handles = [handle for part, name in parts for handle in _as_range(part, name)]
    handles += _around_the_model(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_range(module: nn.Module, name: str) -> list[Any]:
    opened: list[record_function] = []

    def enter(*_) -> None:
        opened.append(record_function(PREFIX + name))
        opened[-1].__enter__()

    def leave(*_) -> None:
        opened.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(enter),
        # always_call: recomputation stops in the middle of a layer, with an exception, once it has what it needs.
        module.register_forward_hook(leave, always_call=True),
    ]


def _around_the_model(module: SupervisedModel) -> list[Any]:
    """Before the stock model's forward inputs are made, behind it comes the loss."""
    opened: list[record_function] = []

    def begin(name: str) -> None:
        opened.append(record_function(PREFIX + name))
        opened[-1].__enter__()

    def end() -> None:
        opened.pop().__exit__(None, None, None)

    inner = module.model.model
    return [
        module.register_forward_pre_hook(lambda *_: begin("copy, normalise")),
        inner.register_forward_pre_hook(lambda *_: end()),
        inner.register_forward_hook(lambda *_: begin("head + loss")),
        module.register_forward_hook(lambda *_: end()),
    ]


def draw_profile(profiles: dict[str, dict[str, float]], title: str, path: Path) -> Path:
    """One stacked bar per way, in milliseconds, its share beside every part that is wide enough."""
    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=110)
    totals = {name: 1000 * sum(parts.values()) for name, parts in profiles.items()}
    highest = max(totals.values())
    for place, (name, parts) in enumerate(profiles.items()):
        bottom = 0.0
        for part, colour in PARTS.items():
            height = 1000 * parts[part]
            axes.bar(place, height, 0.5, bottom, color=colour, label=part if place == 0 else None)
            if height > 0.035 * highest:
                text = f"{height:,.0f} ms ({height / totals[name]:.0%})"
                light = part in ("ViT MLP, norms", "LLM MLP, norms", "rest", "data wait", "copy, normalise")
                axes.text(
                    place, bottom + height / 2, text, ha="center", va="center", fontsize=8, color="k" if light else "w"
                )
            bottom += height
        axes.text(place, bottom + 0.01 * highest, f"{bottom:,.0f} ms", ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(profiles)), list(profiles))
    axes.set_xlim(-0.5, len(profiles) - 0.5)
    axes.set_ylim(0, 1.08 * highest)
    axes.set_ylabel("milliseconds of one optimizer step")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
