"""Start a recipe: `python -m launch RECIPE [key=value...]`, on this machine, on the hosts of a hostfile, or on Slurm.

Exit codes: 0 finished, 2 user error, 85 stopped on request and saved (the same command continues), others failed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from launch.environment import num_gpus, rank_environment
from launch.hosts import (
    check_ssh_tools,
    hostfile_command,
    node_command,
    parse_master,
    read_hostfile,
    with_exports,
    with_lost_hosts_found,
)
from launch.local import default_num_ranks, free_port, local_command, run_local
from launch.restart import RestartPolicy
from launch.slurm import SlurmSettings, slurm_script, submit
from pixelprune.command import CommandParser, plain_console
from training.command import run_command, set_up_logging
from training.errors import UserError


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    return run_command(lambda: _launch(args))


def _launch(args: argparse.Namespace) -> int:
    if args.accept_changes:
        args.overrides.append("run.accept_changes=true")
    if args.slurm:
        return _slurm(args)
    if args.hostfile:
        return _hosts(args)
    if args.node_rank is not None or args.master:
        raise UserError("--node-rank and --master belong to a --hostfile, which is the same on all nodes")
    num_ranks = args.ranks if args.ranks is not None else default_num_ranks()
    if num_ranks < 1:
        raise UserError(f"--ranks: expected at least 1, got {num_ranks}")
    if args.dry_run:
        print(shlex.join(local_command(args.recipe, args.overrides, num_ranks)), flush=True)
        return _check(args, num_ranks, on_gpu=num_gpus() > 0)
    policy = RestartPolicy(args.restarts, args.pause)
    return run_local(args.recipe, args.overrides, num_ranks, restarts=policy, grace_seconds=args.grace)


def _check(args: argparse.Namespace, num_ranks: int, *, on_gpu: bool) -> int:
    """What of a start can be tried without one; said on stderr, so that what was printed can be piped on."""
    from training.config.recipe import load_recipe
    from training.loop.dry_run import dry_run

    dry_run(load_recipe(args.recipe, args.overrides), plain_console(stderr=True), num_ranks=num_ranks, on_gpu=on_gpu)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        example="python -m launch configs/tutorial.yaml", prog="launch", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--ranks", type=int, help="processes; one per GPU by default, two on the CPU")
    parser.add_argument("--restarts", type=int, default=0, help="restarts in a row without progress; 0: never restart")
    parser.add_argument("--pause", type=float, default=10.0, help="seconds before a restart; doubles without progress")
    parser.add_argument("--grace", type=float, default=600.0, help="seconds that ranks get to stop and save")
    parser.add_argument(
        "--accept-changes", action="store_true", help="go on although the recipe changed what is trained"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the exact command (Slurm: script), check model, data and memory, and stop",
    )
    hosts = parser.add_argument_group("several hosts")
    hosts.add_argument("--hostfile", type=Path, help="lines `name slots=8`; starts all of them over ssh")
    hosts.add_argument(
        "--node-rank", type=int, help="start only this node's ranks (0 is the file's first host), no ssh"
    )
    hosts.add_argument("--master", help="address:port of the first host, with --node-rank")
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--slurm", action="store_true", help="submit a job instead of running here")
    slurm.add_argument("--nodes", type=int, default=1)
    slurm.add_argument("--gpus-per-node", type=int, default=8)
    slurm.add_argument("--time", default="24:00:00")
    slurm.add_argument("--partition", default="")
    slurm.add_argument("--warning", type=int, default=120, help="seconds before the time limit to stop and save")
    slurm.add_argument(
        "--sbatch", action="append", default=[], help="a further option, as in --sbatch=--account=vision"
    )
    slurm.add_argument(
        "--setup", action="append", default=[], help="a line of shell before the run, as in --setup 'module load cuda'"
    )
    slurm.add_argument(
        "--srun", action="append", default=[], help="a further option of srun, as in --srun=--container-image=IMAGE"
    )
    slurm.add_argument("--python", default=sys.executable, help="the Python of the job, such as the container's own")
    return parser


def _slurm(args: argparse.Namespace) -> int:
    from training.config.recipe import load_recipe

    if args.hostfile or args.ranks:
        raise UserError("--slurm: hosts and ranks come from --nodes and --gpus-per-node; drop --hostfile and --ranks")
    config = load_recipe(args.recipe, args.overrides)
    run_folder = Path(config.run.folder) / config.run.name
    settings = SlurmSettings(
        args.nodes,
        args.gpus_per_node,
        args.time,
        args.partition,
        args.warning,
        args.restarts,
        args.sbatch,
        args.setup,
        args.srun,
        args.python,
    )
    script = slurm_script(args.recipe, args.overrides, settings, run_folder=run_folder, grace_seconds=args.grace)
    if args.dry_run:
        print(script, end="", flush=True)
        return _check(args, args.nodes * args.gpus_per_node, on_gpu=args.gpus_per_node > 0)
    return submit(script, run_folder)


def _hosts(args: argparse.Namespace) -> int:
    from launch.run import Launch, run_launch
    from training.config.recipe import load_recipe

    hosts = read_hostfile(args.hostfile)
    is_node = args.node_rank is not None
    if is_node:
        if not 0 <= args.node_rank < len(hosts):
            raise UserError(f"--node-rank: expected 0 to {len(hosts) - 1} for {args.hostfile}, got {args.node_rank}")
        if args.restarts:
            raise UserError("--restarts: one node cannot restart the others; let the scheduler start all of them again")
        address, port = parse_master(args.master or "")
    num_local = list(hosts.values())[args.node_rank or 0]

    def make_command() -> list[str]:
        if is_node:
            return node_command(
                args.recipe, args.overrides, args.hostfile, node_rank=args.node_rank, master=address, port=port
            )
        return hostfile_command(args.recipe, args.overrides, args.hostfile, port=free_port())

    if args.dry_run:
        print(shlex.join(make_command()), flush=True)
        return _check(args, sum(hosts.values()), on_gpu=num_gpus() > 0)
    if not is_node:
        check_ssh_tools()
    config = load_recipe(args.recipe, args.overrides)
    environment = rank_environment(num_local, config.distributed.threads_per_rank)
    if not is_node:
        environment = with_exports(environment, Path(config.run.folder) / config.run.name)
        environment = with_lost_hosts_found(environment, config.distributed.timeout_minutes)
    launch = Launch(
        config,
        make_command,
        environment,
        grace_seconds=args.grace,
        ranks_are_remote=not is_node,
        owns_folder=not args.node_rank,
    )
    return run_launch(launch, RestartPolicy(args.restarts, args.pause))


if __name__ == "__main__":
    set_up_logging(name="launch")
    sys.exit(main())
