"""One start of one trainer: its job, its process, and what it wrote of its steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.parts.peers.workloads import MIN_PIXELS, Record, Workload, write_records
from launch.local import free_port

ROOT = Path(__file__).parents[3]
DRIVERS = Path(__file__).parent / "drivers"
START_SECONDS = 1200


@dataclass(frozen=True)
class Trainer:
    """name: as in the tables; environment: of `environments.ENVIRONMENTS`; form: of its records (`Record`)."""

    name: str
    environment: str
    driver: str
    form: str
    strategy: str = ""

    @property
    def is_ours(self) -> bool:
        return bool(self.strategy)

    @property
    def key(self) -> str:
        return self.name.replace(" ", "_").replace(",", "")


TRAINERS = (
    Trainer("HF Trainer", "trl", "hf_trainer.py", "plain"),
    Trainer("TRL", "trl", "trl_sft.py", "plain"),
    Trainer("ms-swift", "swift", "swift_sft.py", "placeholders"),
    Trainer("LLaMA-Factory", "llamafactory", "llamafactory_sft.py", "placeholders"),
    Trainer("ours, Full", "ours", "ours.py", "ours", "none"),
    Trainer("ours, PixelPrune", "ours", "ours.py", "ours", "pred2d"),
)


@dataclass
class Start:
    """A prepared start of a trainer in a folder of its own; `resume` goes on in the same one."""

    trainer: Trainer
    folder: Path
    job: dict[str, Any]

    def launch(self, python: Path, *, resume: bool = False) -> subprocess.Popen:
        job = self.job | {"resume": resume}
        path = self.folder / "job.json"
        path.write_text(json.dumps(job, indent=2))
        threads = {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        ours = {"PYTHONPATH": str(ROOT)} if self.trainer.is_ours else {}
        rank = {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        }  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= threads | offline | ours | (rank if self.trainer.is_ours else {})
        with (self.folder / "output.txt").open("a") as output:
            return subprocess.Popen(
                [python, DRIVERS / self.trainer.driver, path],
                cwd=self.folder, env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def finish(self, python: Path, *, resume: bool = False) -> int:
        """Exit code of a start that nothing disturbs."""
        return self.launch(python, resume=resume).wait(START_SECONDS)

    def rows(self) -> list[dict[str, Any]]:
        """Of all steps of all starts, in the order in which they were done."""
        path = Path(self.job["log"])
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if "step" in row]

    def starts(self) -> list[dict[str, Any]]:
        path = Path(self.job["log"])
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if "step" not in row]

    def output(self) -> str:
        return (self.folder / "output.txt").read_text(errors="replace")


def prepare(
    trainer: Trainer, workload: Workload, records: list[Record], model: Path, folder: Path, **more: Any
) -> Start:
    """The folder of one start, made anew, with the records in the trainer's form."""
    folder.mkdir(parents=True)
    # Our records name their screenshots from the folder that they stand in.
    beside = records[0].image.parent if trainer.is_ours else folder / "data"
    path = beside / ("records.jsonl" if trainer.is_ours else "train.jsonl")
    write_records(records, trainer.form, path)
    job = {
        "model": str(model.absolute()), "records": str(path.absolute()), "out": str((folder / "out").absolute()),
        "log": str((folder / "steps.jsonl").absolute()), "config": str((folder / "config.json").absolute()),
        "batch": workload.batch, "steps": workload.steps, "lr": 1e-4, "threads": 1, "device": "cpu",
        "index_dir": str((folder.parent / "index").absolute()),
        "save_steps": 0, "min_pixels": MIN_PIXELS, "max_pixels": workload.max_pixels, "strategy": trainer.strategy,
        **more,
    }  # fmt: skip
    return Start(trainer, folder.absolute(), job)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to all processes of a start."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(happened: Any, process: subprocess.Popen) -> bool:
    """Whether `happened()` came true before the process ended."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if happened():
            return True
        time.sleep(0.001)
    return False
