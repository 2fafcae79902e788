"""The index at scale: many records over fewer screenshots, in one and two processes, used again, killed and resumed.

    python -m benchmarks.index [--records 1000000] [--screenshots 50000] [--texts 4000] [--folder DIR]

Screenshots are parts of the sample screenshots, each copy with a few bytes of its own, so that all are different files;
records come in a random order, which is the worst for sharing them. Their cost of decoding is small on purpose: that of
real ones is `benchmarks.data`'s. Texts of about 60 tokens are measured in one process, as they are and as they were:
one record after another through transformers' own calls. Rates of texts are by processor time; those of builds by both.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.parts.record import markdown_table, write_record
from pixelprune.records.prepare import Preparer, PrepareSettings
from pixelprune.records.reader import parse_record
from pixelprune.settings import PruneSettings, ResizeSettings
from training.composition.toy import build_tokenizer, texts_of_records, toy_config
from training.data.measuring.pictures import MeasuredPictures
from training.data.measuring.row import measure_row, measured_rows, row_steps
from training.data.settings import SourceSettings
from training.data.sources import Source, open_source

SAMPLES = Path(__file__).parents[1] / "data_tools" / "samples"
WINDOW = (384, 256)
NUM_ORIGINALS = 24
REPEATS = 5
NUM_WORDS = 4
"""Of question and answer: they make about 60 tokens with the template's."""


def write_screenshots(folder: Path, num: int) -> None:
    """num files of parts of the samples, each with bytes of its own."""
    rng = np.random.default_rng(0)
    files = sorted((SAMPLES / "images").glob("*.png"))
    for number in range(NUM_ORIGINALS):
        with Image.open(files[number % len(files)]) as page:
            left, top = (int(rng.integers(0, max(p - w, 1))) for p, w in zip(page.size, WINDOW, strict=True))
            part = page.convert("RGB").crop((left, top, left + WINDOW[0], top + WINDOW[1]))
        note = PngInfo()
        note.add_text("number", "0" * 8)
        part.save(folder / "original.png", pnginfo=note)
        data = (folder / "original.png").read_bytes()
        start = data.index(b"tEXtnumber\0")
        for copy in range(number, num, NUM_ORIGINALS):
            chunk = b"tEXtnumber\0%08d" % copy
            changed = chunk + zlib.crc32(chunk).to_bytes(4, "big")
            (folder / f"{copy}.png").write_bytes(data[:start] + changed + data[start + len(changed) :])
    (folder / "original.png").unlink()


def write_records(path: Path, num: int, num_screenshots: int) -> None:
    """Texts alone where there are no screenshots."""
    rng = np.random.default_rng(1)
    words = sorted(
        {word for file in SAMPLES.glob("*.jsonl") for text in texts_of_records(file) for word in text.split()}
    )
    screenshots = rng.permutation(np.arange(num) % num_screenshots) if num_screenshots else None
    with path.open("w") as file:
        for i in range(num):
            question, answer = (" ".join(words[w] for w in rng.integers(0, len(words), NUM_WORDS)) for _ in range(2))
            picture = [] if screenshots is None else [{"type": "image", "image": f"{screenshots[i]}.png"}]
            content = [*picture, {"type": "text", "text": f"{i} {question}"}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def write_model(folder: Path) -> Path:
    tokenizer = build_tokenizer([text for file in SAMPLES.glob("*.jsonl") for text in texts_of_records(file)])
    tokenizer.save_pretrained(folder)
    toy_config(tokenizer).save_pretrained(folder)
    return folder


def through_the_wrappers(preparer: Preparer) -> Preparer:
    """With transformers' own calls for template and tokenizer."""
    preparer.chat._rendering._compile = None
    preparer.chat._tokenise._is_stock = False
    return preparer


def measure_texts(model: Path, folder: Path, num: int) -> dict[str, float]:
    """Records a second of one core, in turns; medians."""
    write_records(folder / "texts.jsonl", num, 0)
    source = open_source(SourceSettings(str(folder / "texts.jsonl")))
    settings = PrepareSettings(str(model), PruneSettings(), ResizeSettings())
    ours, theirs = settings.build(), through_the_wrappers(settings.build())
    rows = range(len(source))
    ways: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "stage by stage, called directly": lambda: in_stages(ours, source, rows),
        "one by one, called directly": lambda: [measure_row(ours, source, row) for row in rows],
        "one by one, through the wrappers": lambda: [measure_row(theirs, source, row) for row in rows],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = []
    for _ in range(REPEATS):
        for name, measure in ways.items():
            start = time.process_time()
            results.append(measure())
            seconds[name].append(time.process_time() - start)
    assert all(result == results[0] for result in results), "the ways differ"
    rates = {name: num / statistics.median(those) for name, those in seconds.items()}
    return {"tokens": statistics.mean(row["text_tokens"] for row in results[0]), **rates}


def measure_tokenizer(model: Path, folder: Path) -> dict[str, float]:
    """Microseconds of processor time a text in the tokenizer's backend: one by one, and 128 at once in its threads."""
    source = open_source(SourceSettings(str(folder / "texts.jsonl")))
    chat = PrepareSettings(str(model), PruneSettings(), ResizeSettings()).build().chat
    texts = [chat.render(parse_record(source.rows[row]))[0] for row in range(min(len(source), 1024))]
    backend = chat.tokenizer.backend_tokenizer
    chunks = [texts[i : i + 128] for i in range(0, len(texts), 128)]
    seconds: dict[str, list[float]] = {"one by one": [], "128 at once": []}
    for _ in range(REPEATS):
        start = time.process_time()
        for text in texts:
            backend.encode(text, add_special_tokens=False)
        middle = time.process_time()
        for chunk in chunks:
            backend.encode_batch(chunk, add_special_tokens=False)
        seconds["one by one"].append(middle - start)
        seconds["128 at once"].append(time.process_time() - middle)
    return {name: 1e6 * statistics.median(those) / len(texts) for name, those in seconds.items()}


def in_stages(preparer: Preparer, source: Source, rows: range) -> list[dict[str, Any]]:
    pictures = MeasuredPictures()
    return list(measured_rows(lambda row: row_steps(preparer, source, row, pictures), rows))


class Build:
    """A build in processes of its own; the resident memory of each process over time."""

    def __init__(self, data: Path, model: Path, index_dir: Path, num_processes: int):
        command = [sys.executable, "-m", "benchmarks.parts.index_build", data, model, index_dir, str(num_processes)]
        self.index_dir = index_dir
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.memory: list[float] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def parts(self) -> int:
        return len(list(self.index_dir.rglob("part-*.parquet")))

    def result(self) -> dict[str, Any]:
        out, _ = self.process.communicate()
        assert self.process.returncode == 0, "a build failed"
        second, last = (max(self.memory[len(self.memory) * i // 4 :][: len(self.memory) // 4 + 1]) for i in (1, 3))
        return json.loads(out) | {"mib_second_quarter": second, "mib_last_quarter": last}

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _watch(self) -> None:
        while self.process.poll() is None:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            try:
                of_children = [resident_mib(int(child)) for child in children.read_text().split()]
                self.memory.append(max(of_children, default=0.0))
            except OSError:  # one has just ended
                pass
            time.sleep(0.5)


def resident_mib(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_builds(data: Path, model: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """One process, two, the finished index used again, and a build that was killed half-way."""
    found = {}
    for num_processes in (1, 2):
        name = f"{num_processes} process{'es' if num_processes > 1 else ''}"
        found[name] = Build(data, model, folder / f"index-{num_processes}", num_processes).result()
    found["used again"] = Build(data, model, folder / "index-2", 2).result()
    build = Build(data, model, folder / "index-killed", 2)
    num_parts = min(1024, -(-found["1 process"]["num_records"] // 128))
    while build.parts() < num_parts // 3 and build.process.poll() is None:
        time.sleep(0.2)
    build.kill()
    num_kept = build.parts()
    found["resumed"] = Build(data, model, folder / "index-killed", 2).result() | {"share_kept": num_kept / num_parts}
    assert found["1 process"]["num_quarantined"] == 0, "records that are none of what is measured"
    facts = ("num_records", "num_images", "sum_of_hashes", "num_kept_blocks")
    assert len({tuple(result[fact] for fact in facts) for result in found.values()}) == 1, "the indexes differ"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--screenshots", type=int, default=50_000)
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--folder", type=Path, help="where data and indexes go meanwhile")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        model = write_model(folder / "model")
        texts = measure_texts(model, folder, arguments.texts)
        tokenizer = measure_tokenizer(model, folder)
        write_screenshots(folder, arguments.screenshots)
        write_records(folder / "records.jsonl", arguments.records, arguments.screenshots)
        builds = measure_builds(folder / "records.jsonl", model, folder)
    table = describe(texts, tokenizer, builds, arguments.records, arguments.screenshots)
    sizes = {"num_records": arguments.records, "num_screenshots": arguments.screenshots}
    load = os.getloadavg()
    payload = {**sizes, "texts": texts, "tokenizer_us": tokenizer, "builds": builds, "load_averages": load}
    write_record(
        "index_cpu", payload, table + f"\n\nLoad averages at the end: {load[0]:.1f}, {load[1]:.1f}, {load[2]:.1f}."
    )
    print(table)


def describe(
    texts: dict[str, float], tokenizer: dict[str, float], builds: dict[str, dict[str, Any]], num: int, num_shots: int
) -> str:
    base = texts["one by one, through the wrappers"]
    rates = [
        {"text records": name, "records/s of one core": f"{rate:.0f}", "against the wrappers": f"{rate / base:.2f}x"}
        for name, rate in texts.items()
        if name != "tokens"
    ]
    rows = [
        {
            "build": f"{name}, {result['share_kept']:.0%} kept" if "share_kept" in result else name,
            "seconds": f"{result['seconds']:.1f}",
            "CPU s": f"{result['cpu_seconds']:.1f}",
            "records per CPU s": "" if name in ("used again", "resumed") else f"{num / result['cpu_seconds']:.0f}",
            "MiB of a measuring process, second / last quarter of the time": (
                f"{result['mib_second_quarter']:.0f} / {result['mib_last_quarter']:.0f}"
            ),
            "peak MiB of the parent": f"{result['peak_mib_parent']:.0f}",
        }
        for name, result in builds.items()
    ]
    return (
        f"Texts of {texts['tokens']:.0f} tokens, equal rows each way:\n\n{markdown_table(rates)}\n\n"
        f"The tokenizer's backend alone: {tokenizer['one by one']:.0f} µs a text one by one, "
        f"{tokenizer['128 at once']:.0f} µs 128 at once.\n\n"
        f"{num:,} records over {num_shots:,} screenshots of {WINDOW[0]}x{WINDOW[1]}, in random order; equal "
        f"indexes:\n\n{markdown_table(rows)}"
    )


if __name__ == "__main__":
    main()
