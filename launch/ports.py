"""A free TCP port for the ranks to meet at, so that two runs on one machine do not collide."""

import socket


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
