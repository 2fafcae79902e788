"""A vLLM server under load, Full and PixelPrune on the same server settings and the same screenshots.

    python -m benchmarks.serve --model FOLDER --server --max-model-len 8192

Runs in vLLM's environment. For each mode one OpenAI server is started (Full keeps all blocks, through the same code:
`--hf-overrides '{"pixelprune": "none"}'`) and asked by 1, 8 and 32 clients at once. A request is one screenshot as a
data URL and a question, answered by `--max-tokens` tokens, streamed: the client sees when the first token comes. Every
request has an image of its own (one pixel differs), so that no cache answers for the model. KV cache in use is the
largest value of the server's own gauge in a pass. What follows `--server` goes to vLLM.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from benchmarks.parts.record import markdown_table, write_record

MODES: dict[str, list[str]] = {"Full": ["--hf-overrides", '{"pixelprune": "none"}'], "PixelPrune": []}
QUESTION = "Click the button that saves the settings."
SAMPLES = Path(__file__).parent.parent / "data_tools" / "samples" / "images"


@dataclass(frozen=True)
class Reply:
    """Seconds from sending a request to its first token; tokens of its prompt."""

    first_token: float
    prompt_tokens: int


@dataclass(frozen=True)
class Pass:
    """kv_cache: the largest share in use, 0..1; first tokens in seconds, median and 90th percentile; load_average: of
    the whole machine, over the minute before the pass ended."""

    mode: str
    clients: int
    requests_per_second: float
    first_token: float
    first_token_p90: float
    prompt_tokens: float
    kv_cache: float
    load_average: float

    def row(self) -> dict[str, str]:
        return {
            "mode": self.mode,
            "clients": str(self.clients),
            "requests/s": f"{self.requests_per_second:.2f}",
            "first token, s": f"{self.first_token:.2f}",
            "90 %, s": f"{self.first_token_p90:.2f}",
            "prompt tokens": f"{self.prompt_tokens:.0f}",
            "KV cache in use": f"{self.kv_cache:.2%}",
            "load average": f"{self.load_average:.0f}",
        }


def main() -> None:
    options = _parser().parse_args()
    paths = sorted(path for path in options.images.iterdir() if path.suffix == ".png")[: options.num_images]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    passes: list[Pass] = []
    with tempfile.TemporaryDirectory() as scratch:
        for mode, arguments in MODES.items():
            with _server(options.model, [*options.server, *arguments], Path(scratch) / f"{mode}.log") as port:
                _ask(port, _data_url(pictures[0], 0), options.max_tokens)  # the first request compiles
                for clients in options.clients:
                    passes.append(_measure(mode, port, clients, pictures, options))
                    Console(stderr=True).print(str(passes[-1].row()), markup=False)
    table = markdown_table([made.row() for made in passes])
    Console().print(table, markup=False, soft_wrap=True)
    settings = {
        "model": Path(options.model).name,
        "images": options.images.name,
        "num_images": len(paths),
        "requests": options.requests,
        "max_tokens": options.max_tokens,
        "server": options.server,
    }
    if options.name:
        write_record(options.name, {"settings": settings, "passes": [asdict(made) for made in passes]}, table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint with a pixelprune.json")
    parser.add_argument("--images", type=Path, default=SAMPLES, help="folder of PNG files")
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=128, help="of each pass")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--name", help="of a record under benchmarks/results")
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="arguments of vLLM, last")
    return parser


def _measure(mode: str, port: int, clients: int, pictures: list[Image.Image], options: argparse.Namespace) -> Pass:
    """One pass: `requests` requests from `clients` clients, each of which waits for its answer."""
    first = int(time.monotonic() * 1000)  # numbers of images, never the same in two passes
    urls = [_data_url(pictures[i % len(pictures)], first + i) for i in range(options.requests)]
    gauge = _Gauge(port)
    with ThreadPoolExecutor(clients) as pool, gauge.watching():
        start = time.perf_counter()
        replies = list(pool.map(lambda url: _ask(port, url, options.max_tokens), urls))
        seconds = time.perf_counter() - start
    firsts = [reply.first_token for reply in replies]
    ninth = statistics.quantiles(firsts, n=10)[-1] if len(firsts) > 1 else firsts[0]
    tokens = statistics.mean(reply.prompt_tokens for reply in replies)
    median, load = statistics.median(firsts), os.getloadavg()[0]
    return Pass(mode, clients, len(replies) / seconds, median, ninth, tokens, gauge.largest, load)


class _Gauge:
    """The server's KV cache in use, asked for five times a second."""

    def __init__(self, port: int):
        self.port, self.largest = port, 0.0
        self._done = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        watcher = threading.Thread(target=self._watch)
        watcher.start()
        try:
            yield
        finally:
            self._done.set()
            watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            for line in _get(self.port, "/metrics").splitlines():
                if line.startswith("vllm:kv_cache_usage_perc"):
                    self.largest = max(self.largest, float(line.rsplit(" ", 1)[1]))


def _ask(port: int, image_url: str, max_tokens: int) -> Reply:
    """One streamed chat completion. Raises RuntimeError for anything but an answer."""
    content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": QUESTION}]
    body: dict[str, Any] = {
        "model": "served",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"the server answered {answer.status}: {answer.read().decode()[:500]}")
    first_token, prompt_tokens = 0.0, 0
    for line in answer:
        data = line.decode().removeprefix("data: ").strip()
        if not data.startswith("{"):
            continue
        event = json.loads(data)
        if not first_token and any(choice["delta"].get("content") for choice in event["choices"]):
            first_token = time.perf_counter() - start
        prompt_tokens = (event.get("usage") or {}).get("prompt_tokens", prompt_tokens)
    return Reply(first_token or time.perf_counter() - start, prompt_tokens)


def _data_url(picture: Image.Image, number: int) -> str:
    """The picture as PNG, its first pixel coloured by a number."""
    picture = picture.copy()
    picture.putpixel((0, 0), (number & 255, number >> 8 & 255, number >> 16 & 255))
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@contextmanager
def _server(model: str, arguments: list[str], log: Path) -> Iterator[int]:
    """The port of an OpenAI server that is up; nothing of it is left behind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--served-model-name", "served", *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not _is_up(port):
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield port
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_up(port: int) -> bool:
    try:
        _get(port, "/health")
    except OSError:
        return False
    return True


def _get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


if __name__ == "__main__":
    main()
