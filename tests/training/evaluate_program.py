"""`training.evaluate` where the second rank alone lacks the data (`other`), or all ranks do (`same`)."""

from __future__ import annotations

import os
import sys

from training import evaluate
from training.exit_codes import leave_process

if __name__ == "__main__":
    which, *arguments = sys.argv[1:]
    if which == "same" or os.environ["RANK"] == "1":
        arguments[arguments.index("--data") + 1] = "no/such.jsonl"
    leave_process(evaluate.main(arguments))
