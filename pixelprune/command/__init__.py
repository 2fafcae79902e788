"""What commands of all packages share: how one ends, what it prints on, and how it shows that it goes on."""

from pixelprune.command.console import plain_console
from pixelprune.command.ending import INTERRUPTED, USER_ERROR, print_error, run_command
from pixelprune.command.parser import CommandParser
from pixelprune.command.progress import ProgressLine

__all__ = ["INTERRUPTED", "USER_ERROR", "CommandParser", "ProgressLine", "plain_console", "print_error", "run_command"]
