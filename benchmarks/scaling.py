"""Step time on 8 to 1,024 ranks, simulated from the real plan: Full and PixelPrune, and what is lost to what.

    python -m benchmarks.scaling [--shapes 4b] [--ranks 8 32 128 512 1024] [--picture docs/images/scaling.png]

Nothing here is measured on ranks. Lengths are drawn as in `benchmarks.plan`; the plan of training cuts them into packs;
FLOPs are the cost model's, recomputation included, over an assumed sustained rate; the network is a stated model
(`benchmarks.parts.network`). A micro-step takes its slowest pack's compute and the gradient reduction that its
backward does not hide: DeepSpeed's ZeRO-2 all-reduces every bucket (two passes of a ring) in every micro-step, and
the embeddings, tied head included, come last. An optimizer step adds the update of a rank's shard and the all-gather
of weights. The loader's time is the measured one of `data_cpu`, and waits only where it exceeds the step.

Efficiency is the compute of the step spread evenly over all ranks, as a share of the step's time. weak: samples per
rank and step are fixed. strong: samples per step are fixed.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt

from benchmarks.parts.network import Network, exposed_seconds
from benchmarks.parts.record import markdown_table, write_record
from benchmarks.parts.shapes import TEXT, random_model
from benchmarks.plan import PACK_TOKENS, SAMPLES_PER_RANK, Lengths, draw
from pixelprune.flops import CostModel
from training.config.settings import Config
from training.data.balance import waste_bound
from training.data.plan import PlanSettings, StepPlan, plan_epoch
from training.distributed.engine import bucket_elements
from training.model.parameters import part_of

LOSSES = ("imbalance", "ragged", "communication", "optimizer", "data")
COLOURS = {
    "compute": "#3182bd",
    "imbalance": "#fd8d3c",
    "ragged": "#fdd0a2",
    "communication": "#756bb1",
    "optimizer": "#636363",
    "data": "#bdbdbd",
}


@dataclass(frozen=True)
class Fleet:
    """What is assumed of every rank."""

    flops_per_s: float = 0.4 * 989e12
    """Sustained: 40 % of an H100's dense bf16 peak, an assumption."""
    backward_share: float = 0.75
    """Of a micro-step's compute, with every layer recomputed: one forward, then three forwards' worth."""
    memory_bytes_per_s: float = 0.7 * 3.35e12
    update_bytes_per_weight: float = 34
    """AdamW in float32: weight, two moments and gradient read, three of them written, bf16 weight written, clipping."""
    gradient_bytes: int = 2
    weight_bytes: int = 2
    loader_s_per_sample: float = 0.014
    loader_workers: int = 8


@dataclass(frozen=True)
class Gradients:
    """Elements of the gradients, in the order in which backward makes them, and ZeRO's bucket."""

    llm: float
    vision: float
    embeddings: float
    bucket: float

    @classmethod
    def of(cls, model: Any, bucket: int) -> Gradients:
        embeddings = float(model.get_input_embeddings().weight.numel())
        sizes = [(part_of(name), float(parameter.numel())) for name, parameter in model.named_parameters()]
        llm = sum(size for part, size in sizes if part == "llm")
        return cls(llm - embeddings, sum(size for part, size in sizes if part != "llm"), embeddings, bucket)

    @property
    def total(self) -> float:
        return self.llm + self.vision + self.embeddings

    def buckets(self, vision_share: float) -> list[tuple[float, float]]:
        """Elements of every bucket, and the share of backward's compute after which it is full.

        vision_share: of that compute. Within the language model, and within the vision tower, gradients come evenly;
        the embeddings' come with the end of it, in a bucket of their own.
        """
        llm_share, parts = 1 - vision_share, []
        for elements, start, share in ((self.llm, 0.0, llm_share), (self.vision, llm_share, vision_share)):
            number = math.ceil(elements / self.bucket)
            parts += [(elements / number, start + share * (i + 1) / number) for i in range(number)]
        return [*parts, (self.embeddings, 1.0)]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step: evenly spread compute, and what comes on top."""

    compute: float
    imbalance: float
    ragged: float
    communication: float
    optimizer: float
    data: float
    unavoidable: float = 0.0
    """Part of imbalance and ragged that no plan of the step's samples could avoid: a sample cannot be split."""

    @property
    def total(self) -> float:
        return self.compute + sum(getattr(self, name) for name in LOSSES)


def step_time(
    cost: np.ndarray, num_samples: int, gradients: Gradients, vision_share: float, fleet: Fleet, network: Network
) -> StepTime:
    """The time of one optimizer step whose packs cost these FLOPs (micro-steps, ranks).

    vision_share: of the FLOPs. imbalance: ranks that wait for the slowest pack of a micro-step. ragged: the same in the
    last micro-step, which holds what was left over.
    """
    seconds = cost / fleet.flops_per_s
    ranks = cost.shape[1]
    slowest, mean = seconds.max(axis=1), seconds.mean(axis=1)
    waits = slowest - mean
    ragged = float(waits[-1]) if len(waits) > 1 else 0.0
    communication = 0.0
    if ranks > 1:
        buckets = gradients.buckets(vision_share)
        all_reduces = [2 * network.ring_seconds(fleet.gradient_bytes * elements, ranks) for elements, _ in buckets]
        for backward_s in fleet.backward_share * slowest:
            communication += exposed_seconds(all_reduces, [backward_s * share for _, share in buckets])
        gathers = max(1, round(gradients.total / gradients.bucket))
        communication += gathers * network.ring_seconds(fleet.weight_bytes * gradients.total / gathers, ranks)
    optimizer = gradients.total / ranks * fleet.update_bytes_per_weight / fleet.memory_bytes_per_s
    busy = float(slowest.sum()) + communication + optimizer
    loader = num_samples / ranks * fleet.loader_s_per_sample / fleet.loader_workers
    return StepTime(
        float(mean.sum()), float(waits.sum()) - ragged, ragged, communication, optimizer, max(0.0, loader - busy)
    )


def simulate(
    lengths: Lengths, cost: CostModel, ranks: int, samples: int, gradients: Gradients, fleet: Fleet, network: Network
) -> StepTime:
    """The mean step of an epoch over these lengths."""
    inputs = lengths.plan_input(cost)
    vision = lengths.plan_input(replace(cost, llm_linear=0.0, llm_attention=0.0, llm_delta=0.0, head=0.0))
    vision_share = float(vision.cost.sum() / inputs.cost.sum())
    # What a layer computes a second time is a third of what the cost model counts; head and mergers are too small here.
    inputs = replace(inputs, cost=inputs.cost * 4 / 3)
    settings = PlanSettings(samples, PACK_TOKENS, 4 * PACK_TOKENS)
    steps: list[StepPlan] = list(plan_epoch(inputs, settings, epoch=0, world_size=ranks))
    times = []
    for step in steps:
        time = step_time(step.cost, step.num_samples, gradients, vision_share, fleet, network)
        bound = waste_bound(inputs.cost[step.rows], ranks) / fleet.flops_per_s
        times.append(replace(time, unavoidable=max(0.0, bound - time.compute)))
    return StepTime(*(float(np.mean([getattr(time, name) for time in times])) for name in asdict(times[0])))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    meta = random_model(arguments.shapes, device=torch.device("meta"), dtype=torch.bfloat16)
    gradients = Gradients.of(meta, bucket_elements(Config().distributed.reduce_bucket_size, meta))
    cost = CostModel.from_config(meta.config)
    rows = []
    for scaling in ("weak", "strong"):
        for ranks in arguments.ranks:
            samples = SAMPLES_PER_RANK * ranks if scaling == "weak" else arguments.strong_samples
            if samples < ranks:
                continue
            pruned = draw(arguments.data, samples * arguments.steps)
            full = replace(pruned, kept=pruned.full)
            for node_bandwidth in arguments.node_gbytes:
                network = Network(node_bytes_per_s=node_bandwidth * 1e9)
                times = {
                    mode: simulate(lengths, cost, ranks, samples, gradients, Fleet(), network)
                    for mode, lengths in (("Full", full), ("PixelPrune", pruned))
                }
                rows += [
                    {
                        "scaling": scaling,
                        "ranks": ranks,
                        "samples_per_step": samples,
                        "node_gbytes_per_s": node_bandwidth,
                        "mode": mode,
                        "retain_ratio": float(pruned.kept.sum() / pruned.full.sum()) if mode != "Full" else 1.0,
                        "step_s": time.total,
                        "efficiency": time.compute / time.total,
                        "speed_up": times["Full"].total / time.total,
                        "flops_ratio": times["Full"].compute / time.compute,
                        **asdict(time),
                    }
                    for mode, time in times.items()
                ]
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    return markdown_table(
        [
            {
                "scaling": row["scaling"],
                "ranks": row["ranks"],
                "samples/step": row["samples_per_step"],
                "node GB/s": f"{row['node_gbytes_per_s']:g}",
                "mode": row["mode"],
                "step s": f"{row['step_s']:.2f}",
                "efficiency": f"{row['efficiency']:.1%}",
                **{name: f"{row[name] / row['step_s']:.1%}" for name in LOSSES},
                "unavoidable": f"{row['unavoidable'] / row['step_s']:.1%}",
                "speed-up": f"{row['speed_up']:.2f}x",
                "FLOPs ratio": f"{row['flops_ratio']:.2f}x",
            }
            for row in rows
        ]
    )


def draw_picture(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Efficiency over ranks, and the parts of PixelPrune's step on the slowest network."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), dpi=100)
    networks = sorted({row["node_gbytes_per_s"] for row in rows}, reverse=True)
    for axis, scaling in zip(axes[:2], ("weak", "strong"), strict=True):
        for network, style in zip(networks, ("o-", "s--", "^:", "v-."), strict=False):
            for mode, colour in (("Full", "C7"), ("PixelPrune", "C0")):
                chosen = _chosen(rows, scaling, network, mode)
                axis.plot(
                    [row["ranks"] for row in chosen],
                    [100 * row["efficiency"] for row in chosen],
                    style,
                    color=colour,
                    markersize=4,
                    label=f"{mode}, {network:g} GB/s per node",
                )
        axis.set_xscale("log", base=2)
        ticks = sorted({row["ranks"] for row in rows})
        axis.set_xticks(ticks, [str(number) for number in ticks])
        axis.minorticks_off()
        axis.set_xlabel("ranks")
        axis.set_ylim(0, 103)
        axis.set_ylabel("efficiency, %")
        samples = {row["samples_per_step"] for row in rows if row["scaling"] == scaling}
        fixed = (
            f"{SAMPLES_PER_RANK} samples per rank and step" if scaling == "weak" else f"{max(samples)} samples per step"
        )
        axis.set_title(f"{scaling} scaling: {fixed}", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    chosen = _chosen(rows, "weak", networks[-1], "PixelPrune")
    bottom = np.zeros(len(chosen))
    for name, colour in COLOURS.items():
        shares = np.array([100 * row[name] / row["step_s"] for row in chosen])
        axes[2].bar([str(row["ranks"]) for row in chosen], shares, bottom=bottom, color=colour, label=name)
        bottom += shares
    axes[2].set_title(f"PixelPrune, weak, {networks[-1]:g} GB/s per node", fontsize=9)
    axes[2].set_xlabel("ranks")
    axes[2].set_ylabel("share of the step, %")
    axes[2].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _chosen(rows: list[dict[str, Any]], scaling: str, network: float, mode: str) -> list[dict[str, Any]]:
    wanted = {"scaling": scaling, "node_gbytes_per_s": network, "mode": mode}
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def assumptions(arguments: argparse.Namespace) -> str:
    fleet, network = Fleet(), Network()
    return (
        f"Simulated, not measured. Shape {arguments.shapes}, data as `benchmarks.plan` draws {arguments.data!r}, packs "
        f"of {PACK_TOKENS} tokens, {arguments.steps} optimizer steps each. Assumed: {fleet.flops_per_s / 1e12:.0f} "
        f"TFLOP/s sustained per rank, every layer recomputed; ZeRO-2 all-reduces {fleet.gradient_bytes}-byte "
        "gradients in every micro-step, in buckets, beside backward, the embeddings' after it; "
        f"{network.ranks_per_node} ranks per node, {network.link_bytes_per_s / 1e9:.0f} GB/s per rank inside a node, "
        f"{network.reached:.0%} of bandwidths reached, {1e6 * network.link_latency_s:g} us per hop inside and "
        f"{1e6 * network.node_latency_s:g} us between nodes; loader {1000 * fleet.loader_s_per_sample:g} ms per sample "
        f"(record data_cpu) with {fleet.loader_workers} workers per rank. Losses are shares of the "
        "step; unavoidable is the part of imbalance that no plan avoids, since a sample cannot be split."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=list(TEXT), default="4b")
    parser.add_argument("--data", choices=["screens", "documents", "mixed"], default="screens")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128, 512, 1024])
    parser.add_argument("--strong-samples", type=int, default=4096, help="samples per step of strong scaling")
    parser.add_argument("--node-gbytes", type=float, nargs="+", default=[400.0, 50.0], help="GB/s of a node's ports")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps simulated for each row")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments)
    table, note = table_of(rows), assumptions(arguments)
    print(f"{note}\n\n{table}")
    if arguments.picture:
        draw_picture(rows, f"Simulated step, {arguments.shapes} shape, {arguments.data}", arguments.picture)
    if not arguments.no_record:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        assumed = {"fleet": asdict(Fleet()), "network": asdict(Network())}
        write_record("scaling", {"settings": options, "assumed": assumed, "rows": rows}, f"{note}\n\n{table}")


if __name__ == "__main__":
    main()
