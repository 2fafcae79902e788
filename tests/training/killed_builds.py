"""Index, evaluation and teacher cache, killed at random moments: what a build keeps, makes again, and ends with.

The short form is in test_killed_builds.py, the long one in `benchmarks.kill`.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from launch.processes import descendants
from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.ranks import ROOT
from tests.samples import chat_row, draw_screen, write_jsonl
from training import cache_teacher, evaluate
from training.data.index import Index
from training.data.index_builder import build_index
from training.data.settings import SourceSettings

PATIENCE_SECONDS = 300
ROWS_A_PART = 4
INDEX_COLUMNS = ("row", "content_hash", "num_supervised", "text_tokens", "kept_blocks", "full_blocks", "image_starts")


@dataclass(frozen=True)
class Build:
    """A command that writes `num_units` things to the disk, one after the other.

    main: does what the command does, in this process. whole: the things that are whole on the disk -> what tells one
    from the same thing made again. result: what the finished build says, without what is a measured time.
    """

    command: list[str]
    main: Callable[[], Any]
    num_units: int
    whole: Callable[[], dict[str, Hashable]]
    result: Callable[[], Any]

    def finish(self) -> None:
        done = subprocess.run(self.command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]


def kill_and_finish(build: Build, num_kills: int, chance: random.Random) -> list[int]:
    """SIGKILL `num_kills` starts of a build, each at a random moment, and let the last start finish.

    Returns how many things were whole at each kill. Raises AssertionError where one of them was made again, or a
    process lives on.
    """
    kept: dict[str, Hashable] = {}
    seconds_to_first = 0.0
    counts = []
    for number in range(num_kills):
        left = build.num_units - len(kept)
        target = len(kept) + chance.randint(1, max(1, left // (num_kills - number + 1)))
        started = time.monotonic()
        process = subprocess.Popen(build.command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if number % 4 == 3:  # while it starts
            time.sleep(chance.random() * seconds_to_first)
        else:
            _until(lambda process=process, target=target: process.poll() is not None or len(build.whole()) >= target)
            seconds_to_first = seconds_to_first or time.monotonic() - started
            time.sleep(chance.random() * 0.1)
        helpers = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _until(lambda helpers=helpers: not any(_is_alive(helper.pid) for helper in helpers))
        kept = _still_there(kept, build.whole())
        counts.append(len(kept))
    build.finish()
    assert len(_still_there(kept, build.whole())) == build.num_units
    return counts


def _still_there(before: dict[str, Hashable], now: dict[str, Hashable]) -> dict[str, Hashable]:
    lost = [unit for unit, identity in before.items() if now.get(unit) != identity]
    assert not lost, f"was on the disk, and was made again or is gone: {lost}"
    return now


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- the builds ----


def index_build(folder: Path, model: Path, num_rows: int = 240) -> Build:
    """Four rows a part; a row is made again when it is measured again, which the log of its measures tells.

    Not so the last one, whose image is missing: every start of a whole index looks whether it is there by now.
    """
    folder.mkdir()
    for i in range(4):
        draw_screen(i).save(folder / f"{i}.png")
    rows = [chat_row(f"{i % 4}.png" if i % 3 else None, f"Question {i}") for i in range(num_rows - 1)]
    data = write_jsonl(folder / "d.jsonl", [*rows, chat_row("none.png")])
    log = folder / "measured.log"

    def whole() -> dict[str, Hashable]:
        measured = Counter(log.read_text().split()) if log.exists() else Counter()
        measured[str(num_rows - 1)] = 0
        if list(folder.rglob("index.parquet")):
            return {str(row): measured[str(row)] for row in range(num_rows)}
        starts = [int(part.stem.removeprefix("part-")) for part in folder.rglob("part-*.parquet")]
        return {str(row): measured[str(row)] for start in starts for row in range(start, start + ROWS_A_PART)}

    def main() -> Index:
        prepare = PrepareSettings(str(model), PruneSettings(), ResizeSettings(min_pixels=32 * 32))
        return build_index([SourceSettings(str(data))], prepare, num_workers=0, show_progress=False)

    def result() -> list[Any]:
        index = main()
        refused = [(entry.record, entry.reason) for entry in index.quarantined]
        return [np.asarray(getattr(index, name)).tolist() for name in INDEX_COLUMNS] + [refused]

    command = [sys.executable, "-m", "tests.training.data.index_program", str(data), str(model)]
    return Build(command, main, num_rows, whole, result)


def evaluation_build(folder: Path, model: Path, num_records: int = 24) -> Build:
    """Every record asked in both modes, one by one; an answer holds the time it took, so one made again differs."""
    folder.mkdir()
    data, out = folder / "docs.jsonl", folder / "out"
    rows = []
    for i in range(num_records):
        draw_screen(i).save(folder / f"{i}.png")
        content = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": f"Item {i}?"}]
        metadata = {"scorer": "anls", "answers": ["item"], "source": "docs"}
        rows.append({"messages": [{"role": "user", "content": content}], "metadata": metadata})
    write_jsonl(data, rows)

    def whole() -> dict[str, Hashable]:
        lines = [(part.parent.name, line) for part in out.glob("*/rank*.jsonl") for line in part.open()]
        found = {f"{mode} {json.loads(line)['id']}": line for mode, line in lines if line.endswith("\n")}
        assert len(found) == sum(line.endswith("\n") for _, line in lines), "answered twice"
        return dict(found)

    def result() -> list[Any]:
        texts = [(out / mode / "predictions.jsonl").read_text() for mode in ("full", "pruned")]
        answers = [[_without_times(json.loads(line)) for line in text.splitlines()] for text in texts]
        sums = [json.loads((out / mode / "result.json").read_text()) for mode in ("full", "pruned")]
        return [answers, [_without_times({**one, "data": len(one["data"])}) for one in sums]]

    words = [str(model), "--data", str(data), "--out", str(out), "--min-pixels", "1024"]
    words += ["--max-new-tokens", "4", "--batch-size", "1", "--page", "0"]
    command = [sys.executable, "-m", "training.evaluate", *words]
    return Build(command, lambda: evaluate.main(words), 2 * num_records, whole, result)


def teacher_cache_build(folder: Path, model: Path, num_records: int = 80) -> Build:
    """A record a shard, so that each is computed in a row of its own and has the same bits in any company."""
    folder.mkdir()
    for i in range(4):
        draw_screen(i).save(folder / f"{i}.png")
    data = write_jsonl(folder / "d.jsonl", [chat_row(f"{i % 4}.png", f"Question {i}") for i in range(num_records)])
    cache = folder / "cache"

    def shards() -> list[Path]:
        return sorted(cache.glob("*/shard-*.safetensors"))

    def whole() -> dict[str, Hashable]:
        return {path.name: ((state := path.stat()).st_ino, state.st_mtime_ns) for path in shards()}

    def result() -> dict[str, Any]:
        assert not list(cache.rglob("*.partial"))
        (home,) = cache.iterdir()
        tensors = {path.name: load_file(path) for path in shards()}
        return {home.name: {name: {k: _bits(v) for k, v in parts.items()} for name, parts in tensors.items()}}

    words = [
        "configs/kd_recovery_debug.yaml",
        f"model.path={model}", f"data.sources=[{{path: {data}}}]", "data.eval_sources=[]", f"kd.cache_dir={cache}",
        "kd.source=cached", "kd.cache_records=1", "resize.min_pixels=1024", "data.index_workers=0",
        "distributed.threads_per_rank=1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "training.cache_teacher", *words]
    return Build(command, lambda: cache_teacher.main(words), num_records, whole, result)


BUILDS: dict[str, Callable[..., Build]] = {
    "index": index_build,
    "evaluation": evaluation_build,
    "teacher cache": teacher_cache_build,
}


def _bits(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""


def _without_times(value: Any) -> Any:
    """JSON values without the keys that hold seconds, or the time of an image's file."""
    if isinstance(value, dict):
        left_out = {key for key in value if key.endswith("_s") or key == "fingerprint"}
        return {key: _without_times(one) for key, one in value.items() if key not in left_out}
    return [_without_times(one) for one in value] if isinstance(value, list) else value
