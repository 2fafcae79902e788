"""Rendering real HTML documentation: records made, what was left out, and the time, beside the committed sample pages.

python -m benchmarks.render [--docs FOLDER] [--max-pages N]

The default folder is what Debian's documentation packages install. Nothing that is rendered is kept.
"""

import argparse
import json
import os
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.parts.record import markdown_table, write_record
from data_tools.records import read_jsonl
from data_tools.render.output import prepare_out
from data_tools.render.pages import RenderReport, render, split_pages
from data_tools.render.shot import RenderSettings
from data_tools.render.site import Site
from data_tools.render.view import Viewport
from pixelprune.selection.stats import DatasetStats, ImageStats, find_images, measure_files
from pixelprune.settings import PruneSettings, ResizeSettings

VIEWPORTS = (Viewport(1366, 768), Viewport(390, 844, 2.0))
PAGES = Path(__file__).parents[1] / "data_tools" / "pages"


def measure(name: str, folder: Path, max_pages: int) -> tuple[dict[str, Any], RenderReport]:
    """Render up to `max_pages` pages, drawn at random, and count."""
    site = Site(folder)
    pages = site.crawl()
    random.Random(0).shuffle(pages)
    pages = pages[:max_pages]
    settings = RenderSettings(VIEWPORTS, alternate_themes=True, source="benchmark")
    held_out = split_pages(pages, eval_pages=[], eval_fraction=0.1, seed=0)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        prepare_out(out, overwrite=False)
        *_, report = render(site, pages, out, settings, held_out)
        records = [r for split in report.num_records for r in read_jsonl(out / f"{split}.jsonl")]
        num_outside = sum(not _is_inside(record["metadata"]) for record in records)
        paths, unreadable = find_images([out / "images"])
        outcomes = list(measure_files(paths, {"pred2d": PruneSettings()}, ResizeSettings(), num_threads=1))
        images = [outcome for outcome in outcomes if isinstance(outcome, ImageStats)]
        if unreadable or len(images) != report.num_images:
            raise ValueError(f"{report.num_images} screenshots written, {len(images)} readable")
        num_bytes = sum(path.stat().st_size for path in (out / "images").iterdir())
        retain_ratio = DatasetStats(images).retain_ratio("pred2d")
    kinds = Counter(record["metadata"]["element"] for record in records)
    row = {
        "pages": f"{name} ({report.num_pages})",
        "screenshots": report.num_images,
        "records": len(records),
        "pages with records": len({record["metadata"]["page"] for record in records}),
        "text / icon": f"{kinds['text']} / {kinds['icon']}",
        "pages failed": len(report.dropped_pages),
        "centres outside": num_outside,
        "seconds": round(report.seconds),
        "screenshots/s": round(report.num_images / report.seconds, 2),
        "KB per screenshot": round(num_bytes / report.num_images / 1000),
        "retain ratio, pred2d": f"{retain_ratio:.1%}",
    }
    return row, report


def _is_inside(metadata: dict[str, Any]) -> bool:
    x1, y1, x2, y2 = metadata["bbox"]
    width, height = metadata["image_size"]
    return 0 <= x1 + x2 <= 2 * width and 0 <= y1 + y2 <= 2 * height


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("/usr/share/doc"))
    parser.add_argument("--max-pages", type=int, default=260)
    options = parser.parse_args()
    rows, details = [], {}
    for name, folder in (("sample pages", PAGES), ("HTML documentation", options.docs)):
        row, report = measure(name, folder, options.max_pages)
        rows.append(row)
        details[name] = report.as_dict()
        Console().print_json(json.dumps(row))
    reasons = Counter(details["HTML documentation"]["dropped_elements"]).most_common()
    dropped = [{"elements of the documentation left out": reason, "count": count} for reason, count in reasons]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    browser = details["HTML documentation"]["browser"]
    shots = f"Viewports {', '.join(map(str, VIEWPORTS))}; light and dark in turn; one browser, one tab."
    setting = f"{browser}; other work ran beside (load averages at the end: {load}).\n\n{shots}"
    table = f"{setting}\n\n{markdown_table(rows)}\n\n{markdown_table(dropped)}"
    payload = {
        "command": "python -m benchmarks.render",
        "load_averages": os.getloadavg(),
        "rows": rows,
        "reports": details,
    }
    Console().print(write_record("render_cpu", payload, table).with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
