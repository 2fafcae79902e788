"""`training.evaluate` where the second rank alone lacks the data (`other`), or all ranks do (`same`)."""

from __future__ import annotations

import os
import sys

from training import evaluate

if __name__ == "__main__":
    which, *arguments = sys.argv[1:]
    if which == "same" or os.environ["RANK"] == "1":
        arguments[arguments.index("--data") + 1] = "no/such.jsonl"
    sys.exit(evaluate.main(arguments))
