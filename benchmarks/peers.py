"""The same training through HF's Trainer, TRL, ms-swift and LLaMA-Factory, beside ours on all tokens and pruned.

    python -m benchmarks.peers --make     # the environments of the peers, once: a few GB of packages
    python -m benchmarks.peers            # what is missing of the grid, then the record
    python -m benchmarks.peers --device cuda       # on a GPU (written for it, not tried yet)

Same records in the same order, same model folder, AdamW at a constant rate, float32, one thread, no recomputation, no
loader processes. Every trainer is a process of its own, in an environment of its own, and all take turns in each round.
Steps are compared by CPU seconds, which hold on a machine that does other work; the first step of a process, which pays
for its start, is left out. What is done is kept in the folder: a run that is cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.parts.peers.drills import SAVE_STEPS, drill_damage, drill_kill, drill_kill_in_save
from benchmarks.parts.peers.environments import ENVIRONMENTS, make, python_of
from benchmarks.parts.peers.runs import DRIVERS, TRAINERS, Start, Trainer, prepare
from benchmarks.parts.peers.workloads import WORKLOADS, Record, Workload, choose_records, write_model
from benchmarks.parts.record import markdown_table, write_record

BASE = "HF Trainer"
TWINS = {"ours, Full": "HF Trainer", "ms-swift": "TRL", "LLaMA-Factory": "TRL"}
"""Trainers that supervise the same tokens: their losses are held against each other."""
LOSS_TOLERANCE = 1e-3
"""Relative: the image backends round differently (torchvision on uint8, Pillow), and a step carries it on."""
MARK = "# config:"
"""In a driver: what comes behind it is what its user writes."""

Cells = dict[str, dict[str, Any]]


class Grid:
    """The cells that are done, kept in a file."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device
        self.path = folder / f"cells_{device}.json"
        self.cells: Cells = json.loads(self.path.read_text()) if self.path.exists() else {}

    def missing(self, key: str) -> bool:
        return key not in self.cells

    def put(self, key: str, cell: dict[str, Any]) -> None:
        self.cells[key] = cell
        self.path.write_text(json.dumps(self.cells, indent=1))
        print(key, {name: value for name, value in cell.items() if name != "steps"}, flush=True)

    def start(self, trainer: Trainer, workload: Workload, name: str, **more: Any) -> Start:
        """A start in a folder made anew; nothing of an interrupted one is used."""
        folder = self.folder / workload.key / f"{name}-{trainer.key}"
        shutil.rmtree(folder, ignore_errors=True)
        return prepare(
            trainer, workload, self.records(workload), self.model(workload), folder, device=self.device, **more
        )

    def records(self, workload: Workload) -> list[Record]:
        return choose_records(workload.batch * workload.steps, self.folder / workload.key / "images")

    def model(self, workload: Workload) -> Path:
        model = self.folder / workload.key / "model"
        if not (model / "model.safetensors").exists():
            write_model(model, workload.max_pixels)
        return model


def time_steps(grid: Grid, workload: Workload, trainers: dict[Trainer, Path], number: int) -> None:
    """One round: every trainer once. Each goes first in some round: what else the machine does meets all alike."""
    turn = number % len(trainers)
    for trainer in [*list(trainers)[turn:], *list(trainers)[:turn]]:
        key = f"{workload.key}|{trainer.key}|round {number}"
        if grid.missing(key):
            start = grid.start(trainer, workload, f"round-{number}")
            code = start.finish(trainers[trainer])
            if code:
                raise SystemExit(f"{trainer.name} ended with exit code {code}; see {start.folder / 'output.txt'}")
            config = json.loads(path.read_text()) if (path := Path(start.job["config"])).exists() else None
            grid.put(key, {"start": start.starts()[0], "steps": start.rows(), "lines": num_lines(trainer, config)})


def run_drills(grid: Grid, workload: Workload, trainers: dict[Trainer, Path]) -> None:
    for trainer, python in trainers.items():
        undisturbed = grid.cells[f"{workload.key}|{trainer.key}|round 0"]["steps"]
        for name, drill in (("killed", drill_kill), ("killed in a save", drill_kill_in_save)):
            key = f"{workload.key}|{trainer.key}|{name}"
            if grid.missing(key):
                start = grid.start(trainer, workload, name.replace(" ", "-"), save_steps=SAVE_STEPS)
                grid.put(key, drill(start, python, undisturbed))
        key = f"{workload.key}|{trainer.key}|broken picture"
        if grid.missing(key):
            own = grid.folder / workload.key / f"index-of-the-broken-{trainer.key}"
            start = grid.start(trainer, workload, "broken-picture", index_dir=str(own.absolute()))
            picture = grid.records(workload)[workload.batch * 2].image
            grid.put(key, drill_damage(start, python, picture, undisturbed))


def num_lines(trainer: Trainer, config: Any) -> int:
    """Lines that a user writes: options of a recipe or a command, or the script behind the mark."""
    if config is not None:
        return len(config)
    text = (DRIVERS / trainer.driver).read_text().partition(MARK)[2].splitlines()[1:]
    return sum(bool(line.strip()) and "step_log" not in line for line in text)


def summarise(cells: Cells, workload: Workload, trainers: list[Trainer], rounds: int) -> list[dict[str, Any]]:
    """A row for each trainer; ratios are medians over the rounds, each beside the base of the same round."""
    rows = []
    done = {t.name: [cells[f"{workload.key}|{t.key}|round {number}"] for number in range(rounds)] for t in trainers}
    middle = {name: [_middle(cell, "cpu_s") for cell in found] for name, found in done.items()}
    for name, found in done.items():
        ratios = [base / own for base, own in zip(middle[BASE], middle[name], strict=True)]
        rows.append(
            {
                "workload": workload.name,
                "trainer": name,
                "cpu_s": statistics.median(middle[name]),
                "samples_per_cpu_s": workload.batch / statistics.median(middle[name]),
                "samples_per_s": workload.batch / statistics.median(_middle(cell, "wall_s") for cell in found),
                "speed_up": statistics.median(ratios),
                "speed_up_by_round": ratios,
                "peak_bytes": max(row["peak_bytes"] for row in found[0]["steps"]),
                "step_bytes": max(row["peak_bytes"] for row in found[0]["steps"]) - found[0]["start"]["held_bytes"],
                "first_start_cpu_s": found[0]["start"]["start_cpu_s"] + found[0]["steps"][0]["cpu_s"],
                "later_start_cpu_s": found[-1]["start"]["start_cpu_s"] + found[-1]["steps"][0]["cpu_s"],
                "losses": [row["loss"] for row in found[0]["steps"]],
                "repeats_itself": all(
                    [row["loss"] for row in cell["steps"]] == [row["loss"] for row in found[0]["steps"]]
                    for cell in found
                ),
                "lines": found[0]["lines"],
            }
        )
    by_name = {row["trainer"]: row for row in rows}
    for name, twin in TWINS.items():
        if name in by_name and twin in by_name:
            pairs = zip(by_name[name]["losses"], by_name[twin]["losses"], strict=True)
            by_name[name]["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
    return rows


def _middle(cell: dict[str, Any], what: str) -> float:
    return statistics.median(row[what] for row in cell["steps"][1:])


def step_table(rows: list[dict[str, Any]]) -> str:
    return markdown_table(
        [
            {
                "workload": row["workload"],
                "trainer": row["trainer"],
                "CPU s a step": f"{row['cpu_s']:.2f}",
                f"against {BASE}": f"{row['speed_up']:.2f}x",
                "samples per CPU s": f"{row['samples_per_cpu_s']:.2f}",
                "peak GB (of it in the steps)": f"{row['peak_bytes'] / 1e9:.2f} ({row['step_bytes'] / 1e9:.2f})",
                "CPU s to the end of step 1, first and later": f"{row['first_start_cpu_s']:.1f}, "
                f"{row['later_start_cpu_s']:.1f}",
                "loss, first and last": f"{row['losses'][0]:.5f}, {row['losses'][-1]:.5f}",
                "largest difference": _difference(row),
                "lines": row["lines"],
            }
            for row in rows
        ]
    )


def _difference(row: dict[str, Any]) -> str:
    if "loss_difference" not in row:
        return "-"
    verdict = "" if row["loss_difference"] <= LOSS_TOLERANCE else ", over the tolerance"
    return f"{row['loss_difference']:.1e} of {TWINS[row['trainer']]}{verdict}"


def drill_table(cells: Cells, workload: Workload, trainers: list[Trainer]) -> str:
    rows = []
    for trainer in trainers:
        killed, in_save, broken = (
            cells[f"{workload.key}|{trainer.key}|{name}"] for name in ("killed", "killed in a save", "broken picture")
        )
        rows.append(
            {
                "trainer": trainer.name,
                "killed behind step 6, saved at 4": _resumed(killed),
                "killed as the save of step 8 appears": _resumed(in_save),
                "a picture of step 3 is cut in half": _broken(broken, workload),
            }
        )
    return markdown_table(rows)


def _resumed(cell: dict[str, Any]) -> str:
    if not cell["was_alive"]:
        return "was over before the kill"
    if cell["exit_code"] or cell["goes_on_with_step"] is None:
        return f"the restart ends: `{_cell(cell['said'])}`"
    difference = cell["largest_difference"]
    equal = "equal bits" if difference == 0 else f"losses within {difference:.0e}"
    return f"goes on with step {cell['goes_on_with_step']}, {equal}"


def _broken(cell: dict[str, Any], workload: Workload) -> str:
    named = "named" if cell["names_the_picture"] else "not named"
    if cell["exit_code"]:
        return f"ends after {cell['steps_done']} steps, the picture {named}: `{_cell(cell['said'])}`"
    others = f"other losses from step {cell['other_steps'][0]} on" if cell["other_steps"] else "the same losses"
    return f"trains {cell['steps_done']} of {workload.steps} steps, the picture {named}, {others}"


def _cell(text: str) -> str:
    short = text if len(text) <= 140 else f"{text[:137]}..."
    return short.replace("|", "/").replace("`", "'")


def versions(trainers: list[Trainer]) -> dict[str, dict[str, str]]:
    """What the lists pin, and for the rest what this environment has."""
    names = ("trl", "ms_swift", "llamafactory", "transformers", "torch", "torchvision", "pillow")
    here = {}
    for name in ("transformers", "torch", "pillow"):
        here[name] = version(name)
    found = {"ours": here}
    for name in {trainer.environment for trainer in trainers} & set(ENVIRONMENTS):
        lines = (DRIVERS.parent / "requirements" / f"{name}.txt").read_text().split()
        pinned = dict(line.split("==") for line in lines)
        found[name] = here | {key: pinned[key] for key in names if key in pinned}
    return found


def describe(rounds: int, left_out: list[str], found: dict[str, dict[str, str]]) -> str:
    loads = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    environments = "; ".join(
        f"{name}: {', '.join(f'{key} {number}' for key, number in packages.items())}"
        for name, packages in sorted(found.items())
    )
    return (
        f"The committed screenshots, resized to at most 0.25 megapixels ({WORKLOADS[0].batch} in a step, "
        f"{WORKLOADS[0].steps} steps) and at native size ({WORKLOADS[1].batch} in a step, {WORKLOADS[1].steps} steps); "
        "toy Qwen3-VL, float32, one thread, AdamW at a constant rate, no recomputation, no loader processes. "
        f"Rounds: {rounds}. Against {BASE}: medians over the rounds of its CPU seconds over this trainer's, "
        "steps after the first. Losses: ours on all tokens is held against HF's Trainer, whose collator supervises the "
        "same tokens; TRL, ms-swift and LLaMA-Factory also supervise the line break behind the end token and are held "
        f"against TRL; tolerance {LOSS_TOLERANCE:g} (image backends). Lines: of the script, or options of the command "
        "or recipe, that make the runs the same. Load averages at the end: "
        f"{loads}. Left out because their environment is missing: {', '.join(left_out) or 'none'}. {environments}."
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", action="store_true", help="make the environments that are missing, and stop")
    parser.add_argument("--folder", type=Path, default=Path("runs/peers"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--no-drills", action="store_true", help="no kills, no broken picture")
    parser.add_argument("--no-record", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    environments = arguments.folder / "environments"
    if arguments.make:
        for name in ENVIRONMENTS:
            if python_of(name, environments) is None:
                print(f"making {environments / name}", flush=True)
                make(name, environments)
        return
    found = {trainer: python_of(trainer.environment, environments) for trainer in TRAINERS}
    trainers = {trainer: python.absolute() for trainer, python in found.items() if python is not None}
    left_out = [trainer.name for trainer in TRAINERS if trainer not in trainers]
    if left_out:
        print(f"left out, no environment (--make makes them): {', '.join(left_out)}", flush=True)
    if BASE in left_out:
        raise SystemExit(f"{BASE} is what the others are set beside: make its environment")
    grid = Grid(arguments.folder, arguments.device)
    for number in range(arguments.rounds):
        for workload in WORKLOADS:
            time_steps(grid, workload, trainers, number)
            if workload is WORKLOADS[0] and not arguments.no_drills:
                run_drills(grid, workload, trainers)
        # Anew after every round: what is cut off leaves a record.
        report(grid, arguments, list(trainers), left_out, number + 1)


def report(
    grid: Grid, arguments: argparse.Namespace, trainers: list[Trainer], left_out: list[str], rounds: int
) -> None:
    rows = [row for workload in WORKLOADS for row in summarise(grid.cells, workload, trainers, rounds)]
    packages = versions(trainers)
    document = describe(rounds, left_out, packages) + "\n\n" + step_table(rows)
    if not arguments.no_drills:
        document += "\n\n" + drill_table(grid.cells, WORKLOADS[0], trainers)
    print(document, flush=True)
    if not arguments.no_record:
        drills = {key: cell for key, cell in grid.cells.items() if "|round " not in key}
        payload = {"rounds": rounds, "left_out": left_out, "versions_of_peers": packages, "rows": rows}
        write_record(f"peers_toy_{arguments.device}", payload | {"drills": drills}, document)


if __name__ == "__main__":
    main()
