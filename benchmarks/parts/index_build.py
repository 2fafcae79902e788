"""Builds the index of a file of records in a process of its own and says on stdout what it cost, as JSON.

python -m benchmarks.parts.index_build DATA MODEL INDEX_DIR NUM_PROCESSES
"""

from __future__ import annotations

import json
import resource
import sys
import time

from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from training.data.index_builder import build_index
from training.data.settings import SourceSettings

if __name__ == "__main__":
    data, model, index_dir, num_processes = sys.argv[1:]
    prepare = PrepareSettings(model, PruneSettings(), ResizeSettings())
    start = time.monotonic()
    index = build_index(
        [SourceSettings(data)],
        prepare,
        index_dir=index_dir,
        num_workers=int(num_processes),
        show_progress=False,
        max_seconds=600.0,
    )
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(
        json.dumps(
            {
                "seconds": time.monotonic() - start,
                "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in usages),
                "peak_mib_parent": usages[0].ru_maxrss / 1024,
                "num_records": len(index),
                "num_quarantined": len(index.quarantined),
                "num_images": len(index.kept_blocks),
                "sum_of_hashes": int(index.content_hash.sum(dtype="uint64")),
                "num_kept_blocks": int(index.kept_blocks.sum()),
            }
        )
    )
