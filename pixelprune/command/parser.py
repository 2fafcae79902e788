"""The parsers of all commands: help begins with an example that can be typed."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """example: a command line that works in a checkout, after those of docs/tutorial.md where it needs a model."""

    def __init__(self, *args: Any, example: str = "", **options: Any):
        super().__init__(*args, **options)
        self.example = example

    def format_help(self) -> str:
        text = super().format_help()
        return f"example: {self.example}\n\n{text}" if self.example else text
