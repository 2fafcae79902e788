"""A table that was killed in the middle of a cell, on one rank and on two, goes on and ends as if it never was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import screen
from training import tables

ROOT = Path(__file__).parents[2]
NUM_RECORDS = 7
ROWS = ("Full", "Pred-2D")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with (folder / "docs.jsonl").open("w") as file:
        for number in range(NUM_RECORDS):
            Image.fromarray(screen(2, 3, seed=number)).save(folder / f"{number}.png")
            content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": f"Item {number}?"}]
            metadata = {"scorer": "anls", "answers": ["item"], "source": "docs"}
            file.write(json.dumps({"messages": [{"role": "user", "content": content}], "metadata": metadata}) + "\n")
    return folder / "docs.jsonl"


def arguments(model: Path, data: Path, out: Path) -> list[str]:
    words = ["strategies", "--model", str(model), "--data", str(data), "--out", str(out), "--only", *ROWS]
    return [*words, "--min-pixels", "1024", "--max-new-tokens", "3", "--batch-size", "1", "--page", "0"]


def run(module: str, ranks: int, *words: str) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [*start, module, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def answered(out: Path) -> Counter[tuple[str, str]]:
    """(cell, record) of every whole line on disk."""
    parts = (out / "cells").glob("*/*/rank*.jsonl")
    return Counter((part.parent.parent.name, json.loads(line)["id"]) for part in parts for line in part.open())


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_table_goes_on_and_ends_with_the_same_figures(ranks, toy_folder, data, tmp_path):
    assert tables.main(arguments(toy_folder, data, tmp_path / "whole")) == 0
    out = tmp_path / "killed"
    done = run("tests.training.tables_program", ranks, str(ranks - 1), *arguments(toy_folder, data, out))
    assert done.returncode == (-signal.SIGKILL if ranks == 1 else 1), done.stderr[-3000:]
    assert not (out / "strategies.md").exists()
    before = answered(out)
    assert NUM_RECORDS + 2 <= len(before) < 2 * NUM_RECORDS, "the first cell whole, the second begun"
    kept = {part: part.read_text() for part in (out / "cells").glob("*/*/rank*.jsonl")}
    done = run("training.tables", ranks, *arguments(toy_folder, data, out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "strategies.md").read_text() == (tmp_path / "whole" / "strategies.md").read_text()
    found, expected = (json.loads((folder / "strategies.json").read_text()) for folder in (out, tmp_path / "whole"))
    assert found == expected
    assert all(part.read_text().startswith(text) for part, text in kept.items()), "nothing on disk is made again"
    after = answered(out)
    assert set(after.values()) == {1}
    assert len(after) == 2 * NUM_RECORDS
