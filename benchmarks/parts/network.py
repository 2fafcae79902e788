"""What moving gradients and weights between ranks costs: rings over nodes, by bandwidth and latency.

    R = ranks, S = bytes that every rank holds before (reduce-scatter) or after (all-gather)

A ring of R ranks moves R - 1 parts of S / R bytes over each of its links, and is as slow as its slowest link. Rings
are laid so that each passes a node's border once, and several of them share all ports of the node: the border's
bandwidth is the node's whole, that of a link inside is one rank's. One rank moves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """bytes/s of one rank's link inside a node and of all of a node's ports; seconds per hop; how much is reached."""

    link_bytes_per_s: float = 450e9
    node_bytes_per_s: float = 400e9
    link_latency_s: float = 2e-6
    node_latency_s: float = 6e-6
    ranks_per_node: int = 8
    reached: float = 0.8
    """Share of the bandwidths that collectives reach."""

    def ring_seconds(self, num_bytes: float, ranks: int) -> float:
        """One reduce-scatter or all-gather of `num_bytes` over a ring."""
        if ranks == 1:
            return 0.0
        num_nodes = -(-ranks // self.ranks_per_node)
        bandwidth = self.link_bytes_per_s if num_nodes == 1 else min(self.link_bytes_per_s, self.node_bytes_per_s)
        across = 0 if num_nodes == 1 else num_nodes
        # R - 1 hops; the ring has R links, `across` of them between nodes, and leaves one out.
        hops_across = across * (ranks - 1) / ranks
        latency = hops_across * self.node_latency_s + (ranks - 1 - hops_across) * self.link_latency_s
        return (ranks - 1) / ranks * num_bytes / (bandwidth * self.reached) + latency


def exposed_seconds(reductions: Sequence[float], full_after: Sequence[float]) -> float:
    """Seconds that the reductions of a backward add to it, with two buffers as in DeepSpeed 0.19.8.

    reductions: of every bucket in order. full_after: seconds of backward's compute after which the bucket is full; the
    last is the whole backward. Compute waits with a full bucket until the one before is reduced, and at the end.
    """
    full = done = before = 0.0
    for seconds, after in zip(reductions, full_after, strict=True):
        full = max(full + after - before, done)
        done, before = full + seconds, after
    return done - before
