"""Answers of a model to prompts without one, to train on: `python -m training.answer MODEL --data PROMPTS.jsonl`.

The model answers on all tokens, one process or all ranks under `torchrun --module` or `deepspeed --module`. Answers are
kept as token ids, so that a recipe trains on just what was generated, at the price of cross-entropy. With --recipe the
teacher's targets of the same answers go into that recipe's cache in the same pass (kd.source=cached). The same command
continues a pass that was killed, also on another number of ranks, and ends with the same
answers, log-probabilities within rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console

from pixelprune.answers import FORMATS
from pixelprune.command import CommandParser, plain_console
from pixelprune.prompter import Prompter
from pixelprune.records.keys import KeyRules
from pixelprune.records.objects import ObjectStyle
from pixelprune.records.presets import PRESETS
from training.answers.answer_files import AnswerFiles
from training.answers.answer_pass import AnswerPass, PassSettings, TargetStore
from training.answers.generating import Sampling
from training.command import run_command, set_up_logging
from training.config.recipe import load_recipe
from training.config.settings import ATTENTION_NAMES, Config
from training.data.sources import Source, open_sources
from training.distributed.cores import use_threads
from training.distributed.ranks import Ranks, join_ranks, leave_ranks
from training.errors import UserError
from training.evaluation.inputs import model_fingerprint, model_of, name_sources
from training.evaluation.passes import load_checkpoint
from training.exit_codes import leave_process
from training.loop.feed import prepare_settings
from training.loop.folder_lock import FolderLock
from training.model.loading import DTYPES, load_model_files
from training.teacher.files import cache_folder, load_teacher_files

THINKING = {"off": False, "on": True, "default": None}


def main(argv: list[str] | None = None) -> int:
    """The command line. User errors end with one line and exit code 2."""
    args = parser().parse_args(argv)
    return run_command(lambda: _answer(args))


def _answer(args: argparse.Namespace) -> None:
    args.checkpoint = model_of(args.model)
    ranks = join_ranks()
    try:
        _pass(args, ranks, plain_console(stderr=True, quiet=not ranks.is_first))
    finally:
        leave_ranks()


def _pass(args: argparse.Namespace, ranks: Ranks, console: Console) -> None:
    config = ranks.agree(lambda: _recipe(args))
    if ranks.device.type == "cpu":
        use_threads(config.distributed.threads_per_rank if config else 0, ranks.cores_per_rank)
    settings = ranks.agree(lambda: _settings(args, config))
    sources = ranks.agree(lambda: _sources(args))
    prompter = ranks.agree(lambda: _prompter(args, config))
    store = _store(config, ranks) if config else None
    locks = [FolderLock(args.out, "answer.lock"), *([FolderLock(store.folder, "cache.lock")] if store else [])]
    for lock in locks:
        ranks.from_first(lock.acquire)
    model = ranks.agree(lambda: load_checkpoint(args, ranks.device))
    work = AnswerPass(model, prompter, sources, settings)
    described = {
        "model": args.checkpoint,
        "weights": ranks.from_first(lambda: model_fingerprint(args.checkpoint, model.config)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "data": {source.name: [source.settings.path, source.fingerprint] for source in sources},
        "prompt": vars(sources[0].settings.preset()),
        "resize": dataclasses.asdict(prompter.resize),
        "sampling": dataclasses.asdict(settings.sampling),
        "objects": dataclasses.asdict(settings.style),
        "ignored keys": sorted(settings.rules.ignore),
        **{
            name: getattr(settings, name)
            for name in ("labelled", "limit", "batch_size", "part_size", "enable_thinking")
        },
        "by_confidence": settings.by_confidence,
        "targets": str(store.folder) if store else None,
    }
    files = AnswerFiles(args.out, described, work.num_parts)
    ranks.from_first(files.start)
    work.run(files, store, ranks, console)
    summary = ranks.from_first(lambda: files.join([source.name for source in sources]))
    if ranks.is_first:
        _say(summary, [_root(source) for source in sources], store, console)
        for lock in locks:
            lock.release()


def _root(source: Source) -> str:
    """What the answers' image paths are relative to, "" for pictures that go along."""
    return source.settings.root or (str(source.root) if isinstance(source.root, Path) else "")


def _say(summary: dict, roots: list[str], store: TargetStore | None, console: Console) -> None:
    """What came of it, and the lines of a recipe that trains on it."""
    log_prob = summary["log_prob_per_token"]
    per_token = "" if log_prob is None else f", log-probability {log_prob:.3f} per token"
    said = f"{summary['num_answers']} answers of {summary['num_tokens']} tokens{per_token}"
    cut = f"{summary['num_cut']} were cut at the limit and have no end token"
    console.print(f"{said}; {cut}; {summary['num_kept']} records kept with their own", soft_wrap=True)
    if summary["num_refused"]:
        reasons = ", ".join(f"{num} {reason}" for reason, num in summary["reasons"].items())
        console.print(f"{summary['num_refused']} refused ({reasons}): see refused.jsonl", soft_wrap=True)
    for number, (path, root) in enumerate(zip(summary["files"].values(), roots, strict=True)):
        at = f"data.sources.{number}"
        console.print(f"train on it: {at}.path={path}{f' {at}.root={root}' if root else ''}", soft_wrap=True)
    if store:
        console.print(f"teacher targets in {store.folder}: kd.source=cached", soft_wrap=True)


def _recipe(args: argparse.Namespace) -> Config | None:
    """The recipe that will train, its teacher being the model that answers."""
    if args.recipe is None:
        if args.set:
            raise UserError(f"--set: {args.set[0]} is of a recipe, and no --recipe is given")
        return None
    config = load_recipe(args.recipe, args.set)
    if not config.loss.kd_weight:
        raise UserError("--recipe: loss.kd_weight is 0, so it reads no targets; leave --recipe out, or set it above 0")
    if args.dtype and args.dtype != (config.kd.dtype or config.model.dtype):
        raise UserError(f"--dtype: the recipe's teacher computes in {config.kd.dtype or config.model.dtype} (kd.dtype)")
    args.dtype = config.kd.dtype or config.model.dtype
    teacher = config.kd.path or config.model.path
    if Path(teacher).resolve() != Path(args.checkpoint).resolve() and teacher != args.checkpoint:
        raise UserError(f"--recipe: {teacher} teaches, {args.checkpoint} answers: --set kd.path={args.checkpoint}")
    return config


def _store(config: Config, ranks: Ranks) -> TargetStore:
    student = load_model_files(config.model)
    teacher = load_teacher_files(config.kd, config.model, student)
    prepare = prepare_settings(config, student)
    return TargetStore(cache_folder(config.kd, config.model, config.loss, prepare, teacher, student, ranks), config)


def _settings(args: argparse.Namespace, config: Config | None) -> PassSettings:
    data = config.data if config else None
    try:
        sampling = Sampling(args.max_new_tokens, args.num_samples, args.temperature, args.top_k, args.top_p, args.seed)
        rules = KeyRules.ignoring([*args.ignore_keys, *(data.ignore_keys if data else ())])
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise UserError(f"--{name.replace('_', '-')}:{rest}") from error
    for name in ("batch_size", "part_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    return PassSettings(
        sampling,
        args.labelled,
        args.batch_size,
        -(-args.part_size // args.batch_size) * args.batch_size,
        THINKING[args.thinking],
        args.confidence,
        ObjectStyle(data.answer_format, data.grounding_tokens) if data else ObjectStyle(args.answer_format, False),
        rules,
        args.limit,
    )


def _sources(args: argparse.Namespace) -> list[Source]:
    settings = name_sources(args.data, prompt=args.prompt, system=args.system, template=args.template)
    if args.root:
        settings = [dataclasses.replace(one, root=args.root) for one in settings]
    try:
        return open_sources(settings)
    except ValueError as error:
        raise UserError(str(error)) from error


def _prompter(args: argparse.Namespace, config: Config | None) -> Prompter:
    """All blocks, at the sizes that the recipe trains with; without a recipe at the model's own."""
    try:
        return Prompter.load(
            args.checkpoint,
            prune="none",
            resize=config.resize if config else None,
            grounding_tokens=bool(config and config.data.grounding_tokens),
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        example="python -m training.answer runs/tutorial/start --data data_tools/samples/eval.jsonl --labelled answer "
        "--limit 2 --max-new-tokens 4 --out runs/answers",
        prog="training.answer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="model folder, hub id, or a run, whose export is taken")
    add("--data", nargs="+", required=True, help="records that end with a question (docs/data.md)")
    add("--out", type=Path, required=True, help="folder of the answers: answers/NAME.jsonl for each data file")
    add("--root", default="", help="folder that image paths are relative to; by default that of the data file")
    what = "records that end with an answer: keep them as they are, skip them, or answer them anew (default keep)"
    add("--labelled", choices=("keep", "skip", "answer"), default="keep", help=what)
    add("--limit", type=int, default=0, help="only the first n records; 0 takes all")
    add("--recipe", type=Path, help="keep teacher targets for this recipe, which trains with kd.source=cached")
    add("--set", nargs="+", default=[], metavar="key=value", help="overrides of the recipe, the same as for training")
    add(
        "--max-new-tokens", type=int, default=256, help="longest answer; one that is cut has no end token (default 256)"
    )
    add("--num-samples", type=int, default=1, help="answers to every prompt")
    add("--temperature", type=float, default=0.0, help="of the draws; 0 takes the most probable token (default)")
    add("--top-k", type=int, default=0, help="draw from the k most probable tokens only; 0 from all (default)")
    add("--top-p", type=float, default=1.0, help="draw from the fewest tokens that reach this probability (default 1)")
    add("--seed", type=int, default=0)
    what = "every token weighs the probability that the model gave it, so that what it was unsure of counts less"
    add("--confidence", action="store_true", help=what)
    add("--thinking", choices=tuple(THINKING), default="off", help="how a reasoning model is asked (default off)")
    add("--prompt", default="as_recorded", choices=tuple(PRESETS), help="what is written around every question")
    add("--system", default="", help="a system prompt instead of the preset's")
    add("--template", default="", help="a template instead of the preset's, {question} where the record's text belongs")
    add(
        "--answer-format",
        choices=FORMATS,
        default="auto",
        help="how places of `objects` are written (without a recipe)",
    )
    add("--ignore-keys", nargs="+", default=[], metavar="KEY", help="keys that say nothing, as data.ignore_keys")
    add("--batch-size", type=int, default=8, help="prompts generated together on a rank (default 8)")
    add("--part-size", type=int, default=256, help="prompts that a killed rank does again at most (default 256)")
    add("--dtype", choices=tuple(DTYPES), help="bfloat16 on an accelerator, float32 elsewhere; a recipe says it itself")
    add("--attention", default="auto", choices=ATTENTION_NAMES, help="auto takes the fastest that runs here")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


if __name__ == "__main__":
    set_up_logging()
    leave_process(main())
