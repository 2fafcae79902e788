"""`python -m data_tools seeclick | showui | aguvis | os-atlas | ...`: training corpora as published -> records."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_tools.convert.corpora.android_control import AndroidControlReader
from data_tools.convert.corpora.conversations import ConversationReader
from data_tools.convert.corpora.elements import ElementsReader
from data_tools.convert.corpora.gui_odyssey import GUIOdysseyReader
from data_tools.convert.corpora.reader import CorpusReader
from data_tools.convert.corpora.showui_navigation import ShowUINavigationReader
from data_tools.convert.image_files import ImageFiles
from data_tools.convert.output import add_output_options, open_inputs, run_reader


@dataclass(frozen=True)
class Corpus:
    """A command. files: what is published, for the help."""

    title: str
    files: str
    read: Callable[[ImageFiles, argparse.Namespace], CorpusReader]
    has_answer: bool = False
    has_steps: bool = False
    writes_images: bool = False
    """Pictures come in the files: they are written to --images, beside --out by default."""


CORPORA = {
    "seeclick": Corpus(
        "SeeClick's web and mobile grounding, and OS-Atlas's grounding files",
        "JSON with img_filename and elements (instruction, bbox as fractions), or instruction and bbox in the entry. "
        "One conversation per screenshot.",
        lambda images, options: ElementsReader(images, "seeclick", answer=options.answer),
        True,
    ),
    "showui": Corpus(
        "ShowUI's grounding",
        "metadata/hf_train.json with img_url and element (instruction, bbox and point as fractions); --images is the "
        "folder images. One conversation per screenshot.",
        lambda images, options: ElementsReader(images, "showui", answer=options.answer),
        True,
    ),
    "showui-navigation": Corpus(
        "ShowUI's navigation sets, GUIAct and AITW",
        "metadata/hf_train.json and its like with task, img_url and step_history; --images is the folder images. "
        "A step's conversation shows the --history screenshots before it; its own action is trained on.",
        lambda images, options: ShowUINavigationReader(images, history=options.history),
    ),
    "aguvis": Corpus(
        "AGUVIS (stages 1 and 2) and GUI-Actor, Wave-UI, UGround and AndroidControl in their form among it",
        "conversations with recipient and end_turn, places as fractions in calls. Thought and action become one turn; "
        "calls keep their form, with coordinates relative 0-1000.",
        lambda images, _: ConversationReader(images, "aguvis", calls=True),
    ),
    "os-atlas": Corpus(
        "OS-Atlas's action data",
        "conversations with thoughts and actions, places as <point>[[x,y]]</point>, relative 0-1000.",
        lambda images, _: ConversationReader(images, "os-atlas", calls=False),
    ),
    "android-control": Corpus(
        "AndroidControl",
        "its TFRecord files (android_control-00000-of-00020, ...). One conversation per episode, cut every --max-steps "
        "steps: screenshot and action in turns. Pictures are written to --images, beside --out by default.",
        lambda images, options: AndroidControlReader(
            images, max_steps=options.max_steps, with_instructions=options.with_instructions
        ),
        has_steps=True,
        writes_images=True,
    ),
    "gui-odyssey": Corpus(
        "GUI-Odyssey",
        "its folder annotations, one JSON file per episode; --images is the folder screenshots. One conversation per "
        "episode, cut every --max-steps steps. --split-file names the episodes to train on.",
        lambda images, options: GUIOdysseyReader(
            images, max_steps=options.max_steps, with_instructions=options.with_instructions
        ),
        has_steps=True,
    ),
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """One command per corpus."""
    raw = argparse.RawDescriptionHelpFormatter
    for name, corpus in CORPORA.items():
        description = (
            f"Convert {corpus.title} as published to training records.\n\nRead: {corpus.files}\n"
            "Images are found under --images by the longest end of their published path.\n"
            "What is left out is counted under its reason, on the terminal and in OUT.report.json."
        )
        parser = commands.add_parser(
            name,
            help=f"{corpus.title} -> records",
            description=description,
            formatter_class=raw,
            example=f"python -m data_tools {name} PUBLISHED --out data/{name}.jsonl",
        )
        parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="published file(s) or their folder")
        add_output_options(parser)
        if corpus.has_answer:
            parser.add_argument("--answer", choices=("point", "box"), default="point", help="form of the answers")
        if name == "showui-navigation":
            parser.add_argument("--history", type=int, default=4, help="screenshots before the last (%(default)s)")
        if name == "gui-odyssey":
            split = "splits/random_split.json or its like: only the episodes that it lists as `train`"
            parser.add_argument("--split-file", type=Path, default=None, help=split)
        if corpus.has_steps:
            parser.add_argument("--max-steps", type=int, default=8, help="steps in one record (%(default)s)")
            low_level = "give every step's own instruction (the low-level task), not the goal alone"
            parser.add_argument("--with-instructions", action="store_true", help=low_level)
        parser.set_defaults(run=partial(run_corpus, corpus))


def run_corpus(corpus: Corpus, options: argparse.Namespace) -> None:
    """Convert a corpus' files into one JSONL file. Raises ValueError when nothing came out."""
    if corpus.writes_images and options.images is None:
        options.images = options.out.parent / "images"
        options.images.mkdir(parents=True, exist_ok=True)
    # AndroidControl's files have no suffix.
    files, images = open_inputs(options, ("",)) if corpus.writes_images else open_inputs(options)
    if getattr(options, "split_file", None):
        files = _of_the_split(files, options.split_file)
    run_reader(options, files, corpus.read(images, options))


def _of_the_split(files: list[Path], split_file: Path) -> list[Path]:
    """The files that a split lists as `train`. Raises ValueError for a file of another form, and when none is left."""
    try:
        names = set(json.loads(split_file.read_bytes())["train"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--split-file {split_file}: expected JSON with a list `train` of file names") from error
    chosen = [file for file in files if file.name in names]
    if not chosen:
        raise ValueError(f"--split-file {split_file}: lists none of the {len(files)} files as `train`")
    return chosen
