"""The client side of benchmarks.serve, against a stand-in that streams as an OpenAI server does."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from benchmarks.serve import _ask, _data_url, _measure


class StandIn(BaseHTTPRequestHandler):
    """Answers every image once; the second time is an error."""

    def do_GET(self) -> None:
        self._send('vllm:num_requests_running 3.0\nvllm:kv_cache_usage_perc{engine="0"} 0.25\n')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        if url in self.server.seen:
            self._send("the same image again", 500)
            return
        self.server.seen.add(url)
        events = [
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"content": "At"}}]},
            {"choices": [], "usage": {"prompt_tokens": 321}},
        ]
        self._send("".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def _send(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.seen = set()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_pass_asks_about_as_many_images_as_requests(port):
    options = argparse.Namespace(requests=12, max_tokens=4)
    made = _measure("Full", port, 3, [Image.new("RGB", (64, 64))] * 2, options)
    assert (made.mode, made.clients, made.prompt_tokens) == ("Full", 3, 321)
    assert made.requests_per_second > 0
    assert 0 < made.first_token <= made.first_token_p90
    assert made.row()["prompt tokens"] == "321"


def test_an_error_of_the_server_ends_the_measurement(port):
    url = _data_url(Image.new("RGB", (32, 32)), 7)
    assert _ask(port, url, 4).prompt_tokens == 321
    with pytest.raises(RuntimeError, match="the server answered 500: the same image again"):
        _ask(port, url, 4)
