"""A model in the terminal, with images, kept blocks and the time to the first token: `python -m pixelprune chat`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.text import Text

from pixelprune.command import plain_console, print_error
from pixelprune.conversation import Conversation
from pixelprune.extras import INFERENCE, require_transformers

__all__ = ["chat"]

HELP = (
    "/image PATH... shows images with the next question, /new starts over, /quit or Ctrl-D ends; Ctrl-C ends an answer"
)
PROMPT = "> "


class _Printer:
    """A streamer of the stock `generate`: prints an answer as it comes, and knows when its first token came.

    Text is written up to its last whole character; what moves a terminal's cursor or changes its colours is shown as
    what it is.
    """

    def __init__(self, tokenizer: Any, out: IO[str]):
        self.tokenizer, self.out = tokenizer, out
        self.first: float | None = None
        self.num_tokens = 0
        self._ids: list[int] = []
        self._num_written = 0
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The prompt's token ids, then those of each new token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.first = self.first or time.perf_counter()
        ids = value.flatten().tolist()
        self._ids += ids
        self.num_tokens += len(ids)
        self._write(is_last=False)

    def end(self) -> None:
        self._write(is_last=True)

    def _write(self, *, is_last: bool) -> None:
        text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if is_last or not text.endswith("\ufffd"):  # half of a character
            self.out.write(as_text(text[self._num_written :]))
            self.out.flush()
            self._num_written = len(text)


def as_text(text: str) -> str:
    """Characters that a terminal would obey are escaped: an answer may hold what an image told the model to write."""
    return "".join(one if one.isprintable() or one in "\n\t" else f"\\x{ord(one):02x}" for one in text)


def chat(
    folder: str,
    images: Iterable[Path],
    *,
    strategy: str | None = None,
    max_new_tokens: int | None = None,
    trust_remote_code: bool = False,
    lines: IO[str] | None = None,
    console: Console | None = None,
) -> None:
    """Read questions from `lines` (standard input) until it ends, and answer them.

    folder: a model folder or hub id; a run's folder stands for its export. images: shown with the first question.
    strategy: prunes otherwise than the model was trained, "none" for all tokens.
    Raises ValueError for a model that cannot be opened; what is wrong with a turn is a line, and the chat goes on.
    """
    console, lines = console or plain_console(), lines or sys.stdin
    require_transformers(INFERENCE, "chat")
    folder = _model_of(folder)
    console.print(f"loading {folder}", style="dim", soft_wrap=True)
    model = _loaded(folder, trust_remote_code)

    def begin() -> Conversation:
        return Conversation(model, folder, prune=strategy, trust_remote_code=trust_remote_code)

    conversation = begin()
    console.print(HELP, style="dim", soft_wrap=True)
    waiting = list(images)
    for line in _questions(lines, console):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            conversation, waiting = begin(), []
        elif command == "/image":
            waiting += _found(rest, console)
        elif line.startswith("/"):
            print_error(f"{command}: expected {HELP}")
        elif _answered(conversation, line, waiting, max_new_tokens, console):
            waiting = []


def _model_of(folder: str) -> str:
    """The export of a run's folder."""
    export = Path(folder) / "export"
    is_run = not (Path(folder) / "config.json").exists() and (export / "config.json").exists()
    return str(export) if is_run else folder


def _loaded(folder: str, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a loadable model folder: {str(error).splitlines()[0]}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _questions(lines: IO[str], console: Console) -> Iterator[str]:
    """Lines that are not empty; a prompt stands before each where a person types."""
    while True:
        if lines is sys.stdin and sys.stdin.isatty():
            try:
                line = input(PROMPT) + "\n"  # with the line editing of a terminal
            except EOFError:
                line = ""
        else:
            line = lines.readline()
        if not line:
            return
        if line.strip():
            if not (lines is sys.stdin and sys.stdin.isatty()):
                console.print(Text(f"{PROMPT}{as_text(line.strip())}"), soft_wrap=True)
            yield line.strip()


def _found(names: str, console: Console) -> list[Path]:
    paths = [Path(name).expanduser() for name in ([names] if Path(names).expanduser().is_file() else names.split())]
    found = [path for path in paths if path.is_file()]
    for path in paths:
        if path not in found:
            print_error(f"/image: there is no {path} here")
    if found:
        console.print(f"with the next question: {', '.join(map(str, found))}", style="dim", soft_wrap=True)
    return found


def _answered(
    conversation: Conversation, question: str, images: list[Path], max_new_tokens: int | None, console: Console
) -> bool:
    """One turn; whether it was taken up into the conversation."""
    content = [*({"type": "image", "image": str(path)} for path in images), {"type": "text", "text": question}]
    printer = _Printer(conversation.prompter.tokenizer, console.file)
    started = time.perf_counter()
    try:
        conversation.ask(content, max_new_tokens=max_new_tokens, streamer=printer)
    except KeyboardInterrupt:
        console.print("\nstopped; this turn is forgotten", style="dim")
        return False
    except (ValueError, OSError) as error:
        print_error(error)
        return False
    seconds = time.perf_counter() - started
    console.print()
    for path, image in zip(images, conversation.images[len(conversation.images) - len(images) :], strict=True):
        kept, full = image.selection.num_kept, image.num_full_blocks
        console.print(f"{path}: {kept} of {full} blocks kept ({kept / full:.1%})", style="dim", soft_wrap=True)
    facts = [f"{conversation.num_tokens} tokens in all"]
    if printer.first is not None:
        facts.append(f"first token after {printer.first - started:.2f} s")
        if printer.num_tokens > 1:
            rate = (printer.num_tokens - 1) / max(1e-9, seconds - (printer.first - started))
            facts.append(f"{printer.num_tokens} tokens, then {rate:.1f} tokens/s")
    console.print("; ".join(facts), style="dim", soft_wrap=True)
    return True
