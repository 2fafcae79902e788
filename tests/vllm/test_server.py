"""The OpenAI server, as deployed: many clients at once, and a server that is killed and started again."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.vllm.engine import ENVIRONMENT, MAX_TOKENS, ROOT, ask_hugging_face, needs_vllm, user

pytestmark = needs_vllm
NUM_REQUESTS = 200
CONCURRENCY = 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_server(folder: Path, port: int, log: Path):
    """An API server in a session of its own, of which nothing is left behind."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "toy", "--port", str(port), "--dtype", "float32", "--max-model-len", "2048"]
    command += ["--max-num-seqs", "8", "--enforce-eager", "--trust-request-mm-kwargs"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("a") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-3000:])
            if answers_health(port):
                break
            time.sleep(0.5)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers_health(port: int) -> bool:
    try:
        return get(port, "/health")[0] == 200
    except OSError:
        return False


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def ask(port: int, messages: list[dict], **options) -> dict:
    body = {"model": "toy", "messages": as_openai(messages), "max_tokens": MAX_TOKENS, "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body |= {"ignore_eos": True, "return_token_ids": True} | options
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return {"status": answer.status} | json.loads(answer.read())


def as_openai(messages: list[dict]) -> list[dict]:
    turns = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image_url", "image_url": {"url": data_url(part["image"])}}
                if part["type"] == "image"
                else part
                for part in content
            ]
        turns.append({**message, "content": content})
    return turns


def data_url(path: str) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def ask_until_answered(port: int, messages: list[dict]) -> dict:
    """A client that does not give up: what a load balancer does while a server starts again."""
    for _ in range(600):
        try:
            answer = ask(port, messages)
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            time.sleep(0.5)
            continue
        if answer["status"] == 200:
            return answer
        raise AssertionError(answer)
    raise AssertionError("the server did not come back")


@pytest.mark.timeout(1500)
def test_no_request_is_lost_while_the_server_is_killed_and_started_again(
    served_folder, stock_model, conversations, unusual, tmp_path
):
    folder, port, log = served_folder(), free_port(), tmp_path / "server.log"
    conversations = conversations | unusual
    names = list(conversations)
    reference = dict(
        zip(names, ask_hugging_face(stock_model(folder), folder, list(conversations.values())), strict=True)
    )
    with ThreadPoolExecutor(CONCURRENCY) as clients:
        with running_server(folder, port, log) as process:
            asked = [names[i % len(names)] for i in range(NUM_REQUESTS)]
            answers = [clients.submit(ask_until_answered, port, conversations[name]) for name in asked]
            answers[NUM_REQUESTS // 4].result()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with running_server(folder, port, log):
            for name, answer in zip(asked, answers, strict=True):
                made = answer.result()
                assert made["usage"]["prompt_tokens"] == reference[name].prompt_tokens, name
                assert made["choices"][0]["token_ids"] == reference[name].token_ids, name
            check_metrics(port)
            check_refusals(port, conversations, tmp_path)
    assert log.read_text().count("is served pruned by pred2d") == 2


def check_metrics(port: int) -> None:
    lines = dict(
        line.rsplit(" ", 1) for line in get(port, "/metrics")[1].splitlines() if line.startswith("pixelprune:")
    )
    kept = float(lines["pixelprune:request_image_tokens_kept_sum"])
    full = float(lines["pixelprune:request_image_tokens_full_sum"])
    assert 0 < kept < full
    assert float(lines["pixelprune:request_image_tokens_kept_count"]) >= NUM_REQUESTS / 2


def check_refusals(port: int, conversations: dict, scratch: Path) -> None:
    """What is not understood is the client's error and leaves the server running."""
    tall = conversations["tall"]
    unpruned = ask(port, tall, mm_processor_kwargs={"pixelprune": "none"})
    assert unpruned["usage"]["prompt_tokens"] > ask(port, tall)["usage"]["prompt_tokens"]
    for wrong, reason in (({"pixelprune": "pred3d"}, "pred3d"), ({"max_pixels": 4096}, "expected 'pixelprune' only")):
        refused = ask(port, tall, mm_processor_kwargs=wrong)
        assert refused["status"] == 400, refused
        assert reason in refused["error"]["message"]
    Image.new("F", (64, 64), 0.5).save(scratch / "float.tiff")
    refused = ask(port, [user("Where is it?", scratch / "float.tiff")])
    assert refused["status"] == 400, refused
    assert "float pixels have no defined range" in refused["error"]["message"]
    black = {"image": {"rgba_background_color": [0, 0, 0]}}
    refused = ask(port, conversations["grey with alpha"], media_io_kwargs=black)
    assert refused["status"] == 400, refused
    assert "rgba_background_color" in refused["error"]["message"]
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    refused = ask(port, [{"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}])
    assert refused["status"] == 400, refused
    assert ask(port, [user("Say hello.")])["status"] == 200
