"""Kill drill: what is killed, damaged or cut off, started again until it is finished, and held against the undisturbed.

    python -m benchmarks.kill                     # all parts, an hour or two
    python -m benchmarks.kill --only builds       # the record keeps the other parts as they are

runs     SIGKILL to one rank, to every process of the run, and to the front process alone, in turn, at random moments;
         every other kill waits for a save and hits it half-written. A killed run must end with the losses, gradient
         norms and weights of the run that nobody disturbed: bit for bit on the same number of ranks, and within a
         tolerance when it goes on with another number (sums over ranks round differently). The run is one epoch, so
         equal steps mean that every sample was seen exactly once.
damage   A checkpoint with a flipped bit, cut in half, without its state; a disk that takes nothing any more; a loader
         worker and a process of the index killed: the same bits at the end.
builds   Index, evaluation and teacher cache killed at random moments: equal to undisturbed ones, and nothing made again
         that was whole on the disk.

Lost hosts, cables and front processes on several hosts are `benchmarks.hosts`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.parts.damage_drills import DAMAGES, drill_damage
from benchmarks.parts.drill_runs import NUM_STEPS, VICTIMS, Kill, Run, has_equal_bits, largest_difference, prepare
from benchmarks.parts.record import RESULTS, describe_machine, markdown_table, write_record
from tests.training.killed_builds import BUILDS, kill_and_finish  # the same drill as in the tests, in its long form

PARTS = ("runs", "damage", "builds")
LIMITS = {"float32": 1e-5, "bfloat16": 1e-3}
"""Largest relative difference of a loss on another number of ranks."""
BUILD_SIZES = {"index": 600, "evaluation": 60, "teacher cache": 120}
"""Records, enough for twenty kills to find each build at work."""


def drill_same_ranks(folder: Path, number: int, reference: Run, chance: random.Random) -> dict:
    run = Run(folder, f"killed-{number:02d}")
    kill = run.kill(Kill(VICTIMS[number % len(VICTIMS)], in_save=number % 2 == 1), chance)
    run.finish(2)
    return {**asdict(kill), "equal_bits": has_equal_bits(run, reference)}


def drill_other_ranks(folder: Path, number: int, dtype: str, reference: Run, chance: random.Random) -> dict:
    """2 ranks, killed; 1 rank, killed; 2 ranks to the end."""
    run = Run(folder, f"changed-{dtype}-{number:02d}", f"model.dtype={dtype}")
    for num_ranks in (2, 1):
        kill = run.kill(Kill(VICTIMS[number % len(VICTIMS)], in_save=number % 2 == 1, num_ranks=num_ranks), chance)
    run.finish(2)
    return {**asdict(kill), "dtype": dtype, "largest_difference": largest_difference(run, reference)}


def drill_builds(folder: Path, num_kills: int, seed: int) -> list[dict]:
    """All builds side by side; the undisturbed ones one after the other, in this process."""
    folder.mkdir()
    model = folder.parent / "toy"
    killed = {name: make(folder / name.replace(" ", "-"), model, BUILD_SIZES[name]) for name, make in BUILDS.items()}
    with ThreadPoolExecutor() as pool:
        drills = {n: pool.submit(kill_and_finish, b, num_kills, random.Random(seed)) for n, b in killed.items()}
    rows = []
    for name, make in BUILDS.items():
        undisturbed = make(folder / f"undisturbed-{name.replace(' ', '-')}", model, BUILD_SIZES[name])
        undisturbed.main()
        counts = drills[name].result()
        hits = sum(0 < count < undisturbed.num_units for count in counts)
        row = {"build": name, "kills": num_kills, "found_at_work": hits, "num_units": undisturbed.num_units}
        rows.append({**row, "whole_at_kills": counts, "equal": killed[name].result() == undisturbed.result()})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.kill", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rank-changes", type=int, default=2, help="runs on 2, 1, 2 ranks, for each dtype")
    parser.add_argument("--kills", type=int, default=20, help="of each build")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    args = parser.parse_args()
    console, chance = Console(), random.Random(args.seed)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="kill-"))
    prepare(folder)
    made: dict[str, list[dict]] = {}
    if "runs" in args.only:
        made["runs"], made["rank_changes"] = _drill_runs(folder, args, chance, console)
    if "damage" in args.only:
        reference = Run(folder, "reference-damage")
        reference.finish(2)
        made["damage"] = []
        for number, what in enumerate(DAMAGES):
            made["damage"].append(drill_damage(folder, number, what, reference, chance))
            console.print(made["damage"][-1])
    if "builds" in args.only:
        made["builds"] = drill_builds(folder / "builds", args.kills, args.seed)
        console.print(made["builds"])
    record = _joined(made, args.seed)
    write_record("kill", record, _document(record))
    console.print(_document(record), markup=False)
    if not args.keep:
        shutil.rmtree(folder)
    return 0 if all(map(_is_good, (row for rows in made.values() for row in rows))) else 1


def _drill_runs(folder: Path, args: argparse.Namespace, chance: random.Random, console: Console) -> tuple[list, list]:
    references = {
        "float32": Run(folder, "reference"),
        "bfloat16": Run(folder, "reference-bf16", "model.dtype=bfloat16"),
    }
    for dtype, reference in references.items():
        if dtype == "float32" or args.rank_changes:
            reference.finish(2)
    rows, changes = [], []
    for number in range(args.runs):
        rows.append(drill_same_ranks(folder, number, references["float32"], chance))
        console.print(number + 1, rows[-1])
    for number in range(args.rank_changes):
        for dtype, reference in references.items():
            changes.append(drill_other_ranks(folder, number, dtype, reference, chance))
            console.print("2 -> 1 -> 2 ranks:", changes[-1])
    return rows, changes


def _is_good(row: dict) -> bool:
    if "largest_difference" in row:
        return row["largest_difference"] <= LIMITS[row["dtype"]] and not row["left_over"]
    return bool(row.get("equal_bits", row.get("equal"))) and not row.get("left_over")


def _joined(made: dict[str, list[dict]], seed: int) -> dict[str, Any]:
    """What was made now in place of the record's, the rest as it stands there; each part with its machine."""
    path = RESULTS / "kill.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    machine = describe_machine()
    rows = {part: before[part] for part in ("runs", "rank_changes", "damage", "builds") if part in before}
    machines = {part: cpu for part, cpu in before.get("machines", {}).items() if part in rows}
    cpu = f"{machine['cpu']}, {machine['cores']} cores"
    return {"steps": NUM_STEPS, "seed": seed, **(rows | made), "machines": machines | dict.fromkeys(made, cpu)}


def _document(record: dict[str, Any]) -> str:
    tables = {
        "SIGKILL at random moments": ("runs", _table(record.get("runs", []), record.get("rank_changes", []))),
        "Damaged, refused, killed helpers": ("damage", [_damage_row(row) for row in record.get("damage", [])]),
        "Builds under SIGKILL at random moments": ("builds", [_build_row(row) for row in record.get("builds", [])]),
    }
    pieces = [
        f"## {title}\n\n{markdown_table(rows)}\n\nOn: {record['machines'].get(part, 'not said')}."
        for title, (part, rows) in tables.items()
        if rows
    ]
    return "\n\n".join([*pieces, "Hosts, cables and front processes that are lost: [hosts](hosts.md)."])


def _damage_row(row: dict) -> dict:
    return {
        "what was done": row["what"],
        "exit codes": ", ".join(map(str, row["codes"])),
        "said": row["said"],
        "steps made again": row["steps_again"],
        "same losses and weights": "bit-equal" if row["equal_bits"] else "NO",
    }


def _build_row(row: dict) -> dict:
    return {
        "build": row["build"],
        "units": row["num_units"],
        "kills": row["kills"],
        "found at work": row["found_at_work"],
        "same result": "equal" if row["equal"] else "NO",
        "made again of what was whole": 0,
    }


def _table(rows: list[dict], changes: list[dict]) -> list[dict]:
    table = []
    for victim in VICTIMS:
        mine = [row for row in rows if row["victim"] == victim]
        if mine:
            table.append(
                {
                    "killed": f"{victim}, 2 ranks",
                    "runs": len(mine),
                    "in a save": sum(row["in_save"] for row in mine),
                    "median steps done again": statistics.median(r["after_step"] - r["resumed_from"] for r in mine),
                    "same losses and weights": f"{sum(row['equal_bits'] for row in mine)}, bit-equal",
                    "processes left over": sum(len(row["left_over"]) for row in mine),
                }
            )
    for dtype in dict.fromkeys(row["dtype"] for row in changes):
        mine = [row for row in changes if row["dtype"] == dtype]
        worst = max(row["largest_difference"] for row in mine)
        table.append(
            {
                "killed": f"twice, 2 -> 1 -> 2 ranks, {dtype}",
                "runs": len(mine),
                "in a save": sum(row["in_save"] for row in mine),
                "median steps done again": statistics.median(r["after_step"] - r["resumed_from"] for r in mine),
                "same losses and weights": f"largest relative difference of a loss {worst:.1e}",
                "processes left over": sum(len(row["left_over"]) for row in mine),
            }
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
