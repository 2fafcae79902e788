"""`python -m data_tools screenspot | docvqa | mcq | ...`: benchmarks as published -> evaluation records."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_tools.convert.benchmarks.chartqa import ChartQAReader
from data_tools.convert.benchmarks.documents import DocumentReader
from data_tools.convert.benchmarks.hub_tables import SUFFIX
from data_tools.convert.benchmarks.mmlongbench import MMLongBenchReader
from data_tools.convert.benchmarks.ocrbench import OCRBenchReader
from data_tools.convert.benchmarks.olmocrbench import OlmOCRBenchReader, write_answers
from data_tools.convert.benchmarks.osworld_g import OSWorldGReader
from data_tools.convert.benchmarks.screenspot import ScreenSpotReader
from data_tools.convert.benchmarks.tsv import TsvReader
from data_tools.convert.benchmarks.ui_vision import UIVisionReader
from data_tools.convert.benchmarks.vstar import VStarReader
from data_tools.convert.image_files import ImageFiles
from data_tools.convert.output import EntryReader, add_output_options, console, open_inputs, run_reader

_JSON = (".json", ".jsonl")
_OR_PARQUET = (*_JSON, SUFFIX)


@dataclass(frozen=True)
class Benchmark:
    """A command. files: what is published, for the help; prompt: the preset to ask with."""

    title: str
    files: str
    prompt: str
    read: Callable[[ImageFiles, argparse.Namespace], EntryReader]
    suffixes: tuple[str, ...] = _JSON


BENCHMARKS = {
    "screenspot": Benchmark(
        "ScreenSpot v2 or Pro",
        "ScreenSpot v2 (bbox x, y, width, height) or ScreenSpot Pro (bbox x1, y1, x2, y2). --images is the folder that "
        "img_filename is relative to. metadata.subset: v2: desktop, mobile, web; Pro: the group.",
        "computer_use",
        lambda images, options: ScreenSpotReader(images, variant=options.variant, language=options.language),
    ),
    "osworld-g": Benchmark(
        "OSWorld-G",
        "OSWorld-G.json or OSWorld-G_refined.json; --images is its folder images. Boxes, polygons and refusals.",
        "point_or_refuse",
        lambda images, _: OSWorldGReader(images),
        _OR_PARQUET,
    ),
    "ui-vision": Benchmark(
        "UI-Vision, element grounding",
        "the folder annotations/element_grounding; --images is the folder images.",
        "computer_use",
        lambda images, _: UIVisionReader(images),
    ),
    "docvqa": Benchmark(
        "DocVQA",
        "val_v1.0_withQT.json; --images is the folder that holds documents/.",
        "short_answer",
        lambda images, _: DocumentReader(images, "docvqa"),
        _OR_PARQUET,
    ),
    "infovqa": Benchmark(
        "InfoVQA",
        "infographicsVQA_val_v1.0_withQT.json; --images is the folder infographicsvqa_images.",
        "short_answer",
        lambda images, _: DocumentReader(images, "infovqa"),
        _OR_PARQUET,
    ),
    "chartqa": Benchmark(
        "ChartQA",
        "test_human.json, test_augmented.json or the folder of both; --images is the folder png.",
        "short_answer",
        lambda images, _: ChartQAReader(images),
        _OR_PARQUET,
    ),
    "ocrbench": Benchmark(
        "OCRBench",
        "OCRBench.json; --images is the folder OCRBench_Images.",
        "as_recorded",
        lambda images, _: OCRBenchReader(images),
        _OR_PARQUET,
    ),
    "mmlongbench": Benchmark(
        "MMLongBench-Doc",
        "data/samples.json; --images is a folder of page images, DOC_3.png or DOC-003.png for page 3 of DOC.pdf "
        "(pdftoppm -r 144 -png DOC.pdf pages/DOC). A question is asked with all pages of its document.",
        "document",
        lambda images, options: MMLongBenchReader(images, max_pages=options.max_pages),
    ),
    "olmocrbench": Benchmark(
        "olmOCR-Bench",
        "the folder bench_data; --images is a folder of page images laid out as bench_data/pdfs, DOC-1.png for page 1 "
        "of DOC.pdf. One record per page; `olmocrbench-answers` writes the answers for its scorer.",
        "as_recorded",
        lambda images, _: OlmOCRBenchReader(images),
    ),
    "mcq": Benchmark(
        "MMBench, MMMU, MMStar, RealWorldQA, AI2D, HR-Bench, V*",
        "a TSV of OpenCompass's shape: MMBench_DEV_EN.tsv, MMMU_DEV_VAL.tsv, MMStar.tsv, RealWorldQA.tsv, "
        "AI2D_TEST.tsv, HRBench4K.tsv, VStarBench.tsv. Pictures are written to --images, beside --out by default.",
        "option_letter (AI2D and MMMU: select_option)",
        lambda images, _: TsvReader(images),
        (".tsv", SUFFIX),
    ),
    "vstar": Benchmark(
        "V*, its authors' own file",
        "test_questions.jsonl; --images is the folder that holds direct_attributes/ and relative_position/.",
        "option_letter",
        lambda images, _: VStarReader(images),
        _OR_PARQUET,
    ),
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """One command per benchmark, and the way back for olmOCR-Bench."""
    raw = argparse.RawDescriptionHelpFormatter
    for name, benchmark in BENCHMARKS.items():
        hub = "Or the hub's Parquet, pictures in it: they are written to --images, beside --out by default.\n"
        description = (
            f"Convert {benchmark.title} as published to evaluation records.\n\nRead: {benchmark.files}\n"
            f"{hub if benchmark.suffixes == _OR_PARQUET else ''}"
            f"Ask with the prompt preset {benchmark.prompt}: `python -m training.evaluate --help`.\n"
            "What is left out is counted under its reason, on the terminal and in OUT.report.json."
        )
        parser = commands.add_parser(
            name,
            help=f"{benchmark.title} -> evaluation records",
            description=description,
            formatter_class=raw,
            example=f"python -m data_tools {name} PUBLISHED --out data/{name}.jsonl",
        )
        parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="published file(s) or their folder")
        add_output_options(parser)
        parser.set_defaults(run=partial(run_benchmark, benchmark))
        if name == "screenspot":
            variants = "auto: by the fields of each entry"
            parser.add_argument("--variant", choices=("auto", "v2", "pro"), default="auto", help=variants)
            language = "instruction language, Pro only (%(default)s)"
            parser.add_argument("--language", choices=("en", "cn"), default="en", help=language)
        if name == "mmlongbench":
            pages = "only the first so many pages; the published script takes 120, 0 all (%(default)s)"
            parser.add_argument("--max-pages", type=int, default=0, help=pages)
    back = commands.add_parser(
        "olmocrbench-answers",
        help="predictions.jsonl -> Markdown for olmOCR-Bench's scorer",
        example="python -m data_tools olmocrbench-answers PASS/predictions.jsonl --out olmOCR-bench/bench_data/mine",
    )
    back.add_argument("predictions", type=Path, help="predictions.jsonl of training.evaluate on olmocrbench records")
    back.add_argument("--out", type=Path, required=True, help="new folder, named for the model, inside bench_data")
    back.set_defaults(run=run_answers)


def run_benchmark(benchmark: Benchmark, options: argparse.Namespace) -> None:
    """Convert the files into one JSONL file. Raises ValueError when nothing came out."""
    brings_pictures = {".tsv", SUFFIX} & set(benchmark.suffixes) & _suffixes_of(options.inputs)
    if brings_pictures and options.images is None:
        options.images = options.out.parent / "images"
        options.images.mkdir(parents=True, exist_ok=True)
    files, images = open_inputs(options, benchmark.suffixes)
    run_reader(options, files, benchmark.read(images, options))


def _suffixes_of(inputs: list[Path]) -> set[str]:
    files = [file for path in inputs for file in (path.iterdir() if path.is_dir() else [path])]
    return {file.suffix.lower() for file in files}


def run_answers(options: argparse.Namespace) -> None:
    """Write the Markdown files. Raises ValueError for predictions of another benchmark."""
    console.print(f"{write_answers(options.predictions, options.out)} pages in {options.out}")
