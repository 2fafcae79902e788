"""All commands in one list: `python -m training`; `python -m training KEY` explains a setting of recipes."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from rich.table import Table

from pixelprune.command import CommandParser, plain_console
from training.command import run_command
from training.config.reference import explain, markdown

ROOT = Path(__file__).parent.parent
OTHERS = (
    ("launch", "launch/__main__.py"),
    ("data_tools", "data_tools/cli.py"),
    ("pixelprune", "pixelprune/__main__.py"),
)
"""Commands of the other packages, and the file that says what each is."""


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        example="python -m training optim.lr", prog="python -m training", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("key", nargs="?", help="a setting or a section of recipes, such as optim.lr or prune")
    parser.add_argument("--settings", action="store_true", help="print docs/settings.md, made from the code")
    args = parser.parse_args(argv)

    def do() -> None:
        if args.settings:
            sys.stdout.write(markdown())
        elif args.key:
            plain_console().print(explain(args.key))
        else:
            plain_console().print(_table())

    return run_command(do)


def commands() -> dict[str, str]:
    """Name behind `python -m` -> what it is for: the first sentence of its file."""
    found = {name: ROOT / file for name, file in OTHERS}
    for path in sorted((ROOT / "training").glob("*.py")):
        if not path.stem.startswith("_") and "__main__" in path.read_text():
            found[f"training.{path.stem}"] = path
    return {name: _first_sentence(path) for name, path in found.items()}


def _table() -> Table:
    table = Table(box=None, show_header=False, title="python -m NAME --help says more", title_justify="left")
    for name, what in commands().items():
        table.add_row(name, what)
    return table


def _first_sentence(path: Path) -> str:
    """What a file's docstring says before its first command line or end of sentence."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return text.partition(": `")[0].partition(". ")[0].rstrip(".:")


if __name__ == "__main__":
    sys.exit(main())
