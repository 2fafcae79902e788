"""A Slurm job of one recipe: the sbatch script, and handing it in.

One task per node, and each task is this package's front process around `deepspeed --no_ssh`. Why not DeepSpeed's own
multi-node start: it needs ssh between compute nodes, which many clusters forbid, and its processes would live outside
of Slurm's control. Why not torchrun: it replaces the ranks' exit code by 1, so that a run that was stopped and saved
could not be told from a crash.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from training.errors import UserError
from training.exit_codes import FINISHED, RESUMABLE, USER_ERROR


@dataclass(frozen=True)
class SlurmSettings:
    """What the job asks for."""

    num_nodes: int = 1
    gpus_per_node: int = 8
    time: str = "24:00:00"
    partition: str = ""
    warning_seconds: int = 120
    """This long before the time limit the run is asked to stop: one step and one save must fit."""
    num_restarts: int = 0
    """Times a job that failed is put back into the queue. A job that ran out of time is put back always."""
    options: list[str] = field(default_factory=list)
    """Further #SBATCH options, as in --account=vision."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the run, as in `module load cuda`; what they export reaches every node."""
    srun_options: list[str] = field(default_factory=list)
    """Further options of srun, such as a container's image and mounts."""
    python: str = sys.executable
    """The interpreter on the nodes."""


def slurm_script(
    recipe: Path, overrides: list[str], settings: SlurmSettings, *, run_folder: Path, grace_seconds: float
) -> str:
    """The sbatch script. It runs in the checkout, which it was submitted from and all nodes must share."""
    options = [
        f"--job-name={run_folder.name}",
        f"--nodes={settings.num_nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={settings.gpus_per_node}",
        "--exclusive",
        "--mem=0",
        f"--time={settings.time}",
        *([f"--partition={settings.partition}"] if settings.partition else []),
        f"--signal=B:USR1@{settings.warning_seconds}",
        "--requeue",
        "--open-mode=append",
        *settings.options,
    ]
    has_own_output = any(option.startswith(("--output", "-o")) for option in settings.options)
    front = [settings.python, "-m", "launch", str(recipe), *overrides, "--grace", f"{grace_seconds:g}"]
    return _TEMPLATE.format(
        options="\n".join(f"#SBATCH {option}" for option in options),
        checkout=shlex.quote(str(Path.cwd())),
        hosts=shlex.quote(f"{run_folder}/hosts-") + '"$SLURM_JOB_ID"',
        slots=settings.gpus_per_node,
        folder=shlex.quote(str(run_folder)),
        output="" if has_own_output else _OUTPUT.format(folder=shlex.quote(str(run_folder))),
        setup="".join(f"{line}\n" for line in settings.setup) or _NO_SETUP,
        srun_options="".join(f"{shlex.quote(option)} " for option in settings.srun_options),
        front=shlex.join(front),
        resumable=RESUMABLE,
        final=f"{FINISHED}|{USER_ERROR}|{RESUMABLE}",
        num_restarts=settings.num_restarts,
        wait_seconds=_WAIT_SECONDS,
    )


# Why no kill on a bad exit: the first node that ends with 85 would have Slurm kill the others as they end, and the step
# would report 137 in place of 85. Nodes that outlive another one, by more than an export at the end may take, are
# killed: after a crash, ranks on other nodes may wait for it in a collective.
_WAIT_SECONDS = 900

# Why the script opens its log: Slurm does before the script runs, and ends a job without a word where the folder is not
# there. What little was said before lies where sbatch was called, as slurm-ID.out.
_OUTPUT = """\
exec >> {folder}/slurm-"$SLURM_JOB_ID".log 2>&1 && rm -f "slurm-$SLURM_JOB_ID.out"
"""
_NO_SETUP = (
    "# Lines like `module load ...` belong here: --setup LINE; options of srun, such as a container's: --srun=...\n"
)

# Why the script asks the step instead of letting Slurm signal it: B: sends the warning to this shell alone, and the
# shell knows then that a later code 85 means "out of time" and not "somebody cancelled", which must not be requeued.
_TEMPLATE = """\
#!/bin/bash
{options}
set -u
cd {checkout} || exit 1  # the packages are found in the working directory, and paths in the recipe start there
mkdir -p {folder} || exit 1
{output}{setup}hosts={hosts}
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots={slots}/' > "$hosts"
master=$(head -n 1 "$hosts" | cut -d ' ' -f 1):$((20000 + SLURM_JOB_ID % 20000))

# Every node: the front process, which hands signals to its ranks. No core binding: ranks and loaders share the node.
srun --cpu-bind=none --kill-on-bad-exit=0 --wait={wait_seconds} {srun_options}bash -c \\
  'exec "$@" --node-rank "$SLURM_NODEID"' front {front} --hostfile "$hosts" --master "$master" &
step=$!

out_of_time=0
trap 'out_of_time=1; kill -USR1 "$step"' USR1
# A trapped signal ends `wait` early: wait until the step itself has ended, then take its code.
wait "$step"
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"; code=$?

case $code in
  {resumable}) [ "$out_of_time" = 1 ] && scontrol requeue "$SLURM_JOB_ID" ;;
esac
case $code in
  {final}) ;;
  *) [ "${{SLURM_RESTART_COUNT:-0}}" -lt {num_restarts} ] && scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
"""


def submit(script: str, run_folder: Path) -> int:
    """Write the script into the run's folder and hand it in; returns sbatch's exit code. Raises UserError."""
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: no `sbatch` on PATH; run this on a login node, or see the script with --dry-run")
    run_folder.mkdir(parents=True, exist_ok=True)
    path = run_folder / "job.sbatch"
    path.write_text(script)
    return subprocess.run(["sbatch", str(path)], check=False).returncode
