"""What pruning did to requests, beside vLLM's own metrics at `/metrics`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

BUCKETS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


def observe_request(num_kept: int, num_full: int) -> None:
    """Count one request with images: its image tokens as served, and what they would be without pruning."""
    kept, full = _histograms()
    kept.observe(num_kept)
    full.observe(num_full)


@lru_cache
def _histograms() -> tuple[Any, Any]:
    from prometheus_client import Histogram

    names = (
        ("pixelprune:request_image_tokens_kept", "Image tokens of a request after pruning."),
        ("pixelprune:request_image_tokens_full", "Image tokens that the request would have without pruning."),
    )
    kept, full = (Histogram(name, text, buckets=BUCKETS) for name, text in names)
    return kept, full
