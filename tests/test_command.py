"""How every command ends: one line, text in [brackets] whole, exit code 2, said once whichever launcher started it."""

from __future__ import annotations

import argparse
import errno
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.rule import Rule
from rich.table import Table

from data_tools.cli import build_parser as data_tools_parser
from pixelprune.__main__ import _parser as pixelprune_parser
from pixelprune.command import CommandParser, plain_console, run_command
from tests.ranks import ROOT
from training import command
from training.errors import RankError, UserError

WRONG = {
    "training.__main__": ["no/[such]"],
    "training.train": ["no/[such].yaml"],
    "training.doctor": ["--json", "no/[such]/found.json"],
    "training.inspect": ["no/[such].yaml"],
    "training.cache_teacher": ["no/[such].yaml"],
    "training.answer": ["no/[such]", "--data", "no/[such].jsonl", "--out", "out"],
    "training.evaluate": ["no/[such]", "--data", "no/[such].jsonl"],
    "training.report": ["no/[such]"],
    "training.tables": ["grounding", "--model", "no/[such]", "--data", "no/[such].jsonl", "--out", "out"],
    "training.export": ["no/[such]", "-o", "out"],
    "training.compose": ["--vision", "./no/[such]", "--language", "./no/[such]", "--out", "out"],
    "launch": ["no/[such].yaml"],
    "data_tools": ["render", "no/[such]", "--out", "out"],
    "pixelprune": ["show", "no/[such].png", "-o", "out.png"],
}


@pytest.mark.parametrize("module", WRONG)
def test_what_is_the_users_is_one_line_and_exit_code_2(module, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", module, *WRONG[module]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "no/[such]" in line
    assert "Traceback" not in done.stderr


def test_every_command_is_tried_here():
    commands = {f"training.{path.stem}" for path in (ROOT / "training").glob("*.py") if "main(" in path.read_text()}
    assert commands - {"training.toy_model"} <= set(WRONG)  # it has no input that could be wrong
    # Any of them may be started on several ranks: test_train.py, test_evaluate.py and the next test do so.
    for name in commands:
        assert "from training.command import run_command" in (ROOT / f"{name.replace('.', '/')}.py").read_text(), name


def test_under_torchrun_it_is_said_once():
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--module"]
    done = subprocess.run(
        [*start, "training.inspect", "no/such.yaml"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("error: no/such.yaml: no such recipe") == 1


def fail(error: BaseException):
    def do() -> None:
        raise error

    return do


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_refuses_is_one_line_that_names_the_file(code, capsys):
    assert command.run_command(fail(OSError(code, "refused", "some/file"))) == 2
    assert capsys.readouterr().err == "error: some/file: refused\n"


def test_text_in_brackets_is_text(capsys):
    table = Table("[run]", title="a[title]")
    table.add_row("b[data]")
    plain_console(width=40).print("c[path]", ":smile:", table, Rule("d[rule]"))
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("[run]", "a[title]", "b[data]", "c[path]", "d[rule]", ":smile:")), printed


def test_faults_of_the_program_keep_their_traceback():
    for error in (ValueError("bug"), OSError(errno.EBADF, "bug"), KeyError("bug")):
        with pytest.raises(type(error)):
            command.run_command(fail(error))


def test_a_rank_that_is_not_the_first_speaks_of_its_own_mistakes_only(monkeypatch, capsys):
    monkeypatch.setattr(command, "_is_first_here", lambda: False)
    waited = []
    monkeypatch.setattr(command.time, "sleep", waited.append)
    assert command.run_command(fail(UserError("of all"))) == 2
    assert waited == [command.SECONDS_TO_SPEAK]  # the first must have spoken before this one leaves
    assert command.run_command(fail(RankError("of this one"))) == 2
    assert capsys.readouterr().err == "error: of this one\n"


def test_a_rank_that_loses_another_says_so_in_one_line_and_waits_for_the_other_s_code(monkeypatch, caplog):
    """What gloo raises is a RuntimeError as any other; a traceback of it tells nothing."""
    waited = []
    monkeypatch.setattr(command.time, "sleep", waited.append)
    words = (
        "[/x/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:18631. This is typically caused by a crash.\nmore"
    )
    assert command.run_command(fail(RuntimeError(words))) == command.LOST_PEER
    (record,) = caplog.records
    assert "another one did" in record.message
    assert "Connection closed by peer" in record.message
    assert "\n" not in record.message
    assert waited == [command.SECONDS_TO_SPEAK]
    with pytest.raises(RuntimeError):
        command.run_command(fail(RuntimeError("bug")))


def test_names_that_are_not_unicode_and_ctrl_c(capsys):
    path = Path(b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert run_command(fail(ValueError(f"{path} [x]"))) == 2
    assert capsys.readouterr().err == "error: caf\\udce9 [x]\n"
    assert run_command(fail(KeyboardInterrupt())) == 130
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 85) == 85


def commands_of(parser: argparse.ArgumentParser) -> dict[str, CommandParser]:
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return commands.choices


@pytest.mark.parametrize(("package", "build"), [("data_tools", data_tools_parser), ("pixelprune", pixelprune_parser)])
def test_help_of_every_inner_command_begins_with_an_example_that_it_takes(package, build):
    parser = build()
    for name, inner in commands_of(parser).items():
        first = inner.format_help().partition("\n")[0]
        start, module, *words = shlex.split(first.removeprefix("example: "))[1:]
        assert (start, module, words[0]) == ("-m", package, name), first
        parser.parse_args(words)


def test_a_file_that_is_not_there_is_named_with_what_was_meant(tmp_path, capsys):
    (tmp_path / "train.jsonl").touch()
    assert run_command(lambda: open(tmp_path / "trian.jsonl").close()) == 2
    said = capsys.readouterr().err
    meant = tmp_path / "train.jsonl"
    assert said == f"error: {tmp_path}/trian.jsonl: No such file or directory; did you mean {meant}?\n"
