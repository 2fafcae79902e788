"""Fuzz drill: damaged records in every dimension, each trained on or quarantined, none over its time limit.

    python -m benchmarks.fuzz --records 5000

JSON lines and Parquet, texts, files of any name, kind and size, images, turns and counts, under several chat templates.
Every 250 records are a data set of their own, indexed by processes under the time limit and loaded once. A record that
is neither trained on nor quarantined, one that is both, and one that exceeds the limit end the drill.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.parts.record import markdown_table, write_record
from tests.training.data import mutants  # the same mutants as in the tests, of which this is the long form

NUM_A_CASE = 250
MAX_SECONDS = 60.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="print alone")
    args = parser.parse_args(argv)
    began = time.monotonic()
    trained, refused = 0, Counter[str]()
    names = list(mutants.TEMPLATES)
    num_cases = -(-args.records // NUM_A_CASE)
    for number in range(num_cases):
        with tempfile.TemporaryDirectory() as name:
            folder, rng = Path(name), random.Random(args.seed * 100_003 + number)
            sources = mutants.write_case(rng, folder, NUM_A_CASE)
            template = names[number % len(names)]
            prepare = mutants.settings_for(mutants.write_model_folder(folder / "model", template))
            index, reasons = mutants.accounted(
                folder, sources, prepare, NUM_A_CASE, num_workers=1, max_seconds=MAX_SECONDS
            )
        trained += len(index)
        refused += reasons
        print(f"{number + 1} of {num_cases} ({template}): {len(index)} trained on, {dict(reasons)}", flush=True)
        if reasons["too_slow"]:
            raise AssertionError(f"{reasons['too_slow']} records took longer than {MAX_SECONDS:g} s (case {number})")
    num = trained + sum(refused.values())
    rows = [{"outcome": "trained on", "records": trained}]
    rows += [{"outcome": f"quarantined: {reason}", "records": count} for reason, count in refused.most_common()]
    table = markdown_table(rows)
    print(table)
    if not args.no_record:
        payload = {"records": num, "seed": args.seed, "seconds": time.monotonic() - began, "outcomes": rows}
        write_record("fuzz", payload, f"{num} records, none over {MAX_SECONDS:g} s.\n\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
