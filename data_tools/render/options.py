"""The options of every command that has Chromium draw pages: which screens, what files, which browser."""

from __future__ import annotations

import argparse

from data_tools.render.view import Viewport


def add_screen_options(parser: argparse.ArgumentParser, viewports: str) -> None:
    """--viewports and --themes; viewports: the default."""
    add = parser.add_argument
    add("--viewports", default=viewports, help="WIDTHxHEIGHT[@SCALE],... (%(default)s)")
    add("--themes", default="light,dark", help="light, dark or light,dark: prefers-color-scheme (%(default)s)")


def add_output_options(parser: argparse.ArgumentParser, sheet: int, drawn: str) -> None:
    """--png-level, --sheet and --chromium; sheet: how many of what is `drawn` it shows by default."""
    add = parser.add_argument
    add(
        "--png-level", type=int, default=6, choices=range(1, 10), metavar="1-9", help="compression effort (%(default)s)"
    )
    what = f"{drawn} drawn onto sheet.png, 0 for none (%(default)s)"
    add("--sheet", type=int, default=sheet, metavar="N", help=what)
    add("--chromium", default=None, help="Chromium's executable (default: the first found on PATH)")


def viewports_of(options: argparse.Namespace) -> tuple[Viewport, ...]:
    """Raises ValueError for one that cannot be read."""
    return tuple(Viewport.parse(text) for text in options.viewports.split(","))


def themes_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Raises ValueError for anything but light and dark."""
    themes = tuple(options.themes.split(","))
    if not themes or set(themes) - {"light", "dark"}:
        raise ValueError(f"--themes: expected light, dark or light,dark, got {options.themes!r}")
    return themes
