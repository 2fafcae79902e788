"""One screenshot with its elements, and the records made of it."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.records import grounding_record
from data_tools.render.instructions import Instructor
from data_tools.render.view import Element, Viewport
from pixelprune.answers import format_point

MAX_AREA = 0.4
"""Elements that cover more of the screenshot than this are left out: any click hits them."""


@dataclass(frozen=True)
class RenderSettings:
    """What is rendered, and how much of it becomes records."""

    viewports: tuple[Viewport, ...]
    themes: tuple[str, ...] = ("light", "dark")
    alternate_themes: bool = False
    """One theme per page and viewport, in turn, instead of every theme."""
    num_scrolls: int = 1
    """Scroll positions per page and viewport: the top, then one viewport (less a tenth) further each."""
    max_elements: int = 8
    """Elements per screenshot; text and icons alternate while both last."""
    num_instructions: int = 1
    """Instructions per element, each of another template."""
    seed: int = 0
    page_timeout: float = 20.0
    """Seconds for one page in one viewport and theme, all its scroll positions together."""
    javascript: bool = False
    source: str = "render"
    png_level: int = 6


@dataclass(frozen=True)
class Shot:
    """One screenshot: uint8 (H, W, 3), its usable elements, and what was left out for which reason."""

    page: str
    viewport: Viewport
    theme: str
    scroll: int
    image: np.ndarray
    elements: list[Element]
    dropped: Counter[str]

    @property
    def name(self) -> str:
        stem, _, suffix = self.page.rpartition(".")
        slug = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[-60:]
        is_unique = slug == stem and suffix == "html"  # else two pages could share the slug
        digest = "" if is_unique else "-" + hashlib.sha256(self.page.encode()).hexdigest()[:8]
        scroll = f"-s{self.scroll}" if self.scroll else ""
        return f"{slug}{digest}-{str(self.viewport).replace('@', 'at')}-{self.theme}{scroll}"


def usable(shot: Shot) -> tuple[list[Element], Instructor, Counter[str]]:
    """The elements that an instruction can mean, and why the others were left out."""
    instructor = Instructor(shot.elements)
    dropped = Counter(shot.dropped)
    area = shot.image.shape[0] * shot.image.shape[1]
    kept = []
    for element in shot.elements:
        if not element.is_clickable:
            continue
        x1, y1, x2, y2 = element.box
        reason = "too large" if (x2 - x1) * (y2 - y1) > MAX_AREA * area else instructor.refusal(element)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(element)
    return kept, instructor, dropped


def choose(elements: list[Element], count: int, rng: random.Random) -> list[Element]:
    """`count` elements at random, text and icons in turn while both last."""
    shuffled = rng.sample(elements, len(elements))
    kinds = [[e for e in shuffled if e.kind == kind] for kind in ("text", "icon")]
    mixed = [e for pair in itertools.zip_longest(*kinds) for e in pair if e is not None]
    return mixed[:count]


def shot_records(shot: Shot, settings: RenderSettings, dropped: Counter[str]) -> list[dict[str, Any]]:
    """Records of one screenshot; reasons of elements left out are added to `dropped`."""
    elements, instructor, reasons = usable(shot)
    dropped += reasons
    rng = random.Random(f"{settings.seed}|{shot.name}|{shot.page}")
    chosen = choose(elements, settings.max_elements, rng)
    dropped["not drawn (--max-elements)"] += len(elements) - len(chosen)
    height, width = shot.image.shape[:2]
    records: list[dict[str, Any]] = []
    for element in chosen:
        x1, y1, x2, y2 = element.box
        answer = format_point((x1 + x2) / 2, (y1 + y2) / 2, (width, height))
        metadata = {
            "source": settings.source,
            "page": shot.page.rsplit(".", 1)[0],
            "bbox": [round(side) for side in element.box],
            "image_size": [width, height],
            "element": element.kind,
            "name": element.name,
            "role": element.role,
            "viewport": str(shot.viewport),
            "theme": shot.theme,
            "scroll": shot.scroll,
        }
        for instruction in instructor.instructions(element, rng, settings.num_instructions):
            record_id = f"{settings.source}-{shot.name}-{len(records):02d}"
            record = grounding_record(record_id, f"images/{shot.name}.png", instruction.text, answer, metadata)
            record["metadata"] = {**metadata, "template": instruction.template}
            records.append(record)
    return records
