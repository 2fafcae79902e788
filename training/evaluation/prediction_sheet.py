"""A picture of hits and misses for a person to look at: the screen, the box asked for, the point answered."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pixelprune.images.image import decode_image
from pixelprune.records.images import read_image
from pixelprune.settings import ResizeSettings
from training.evaluation.answering import Task
from training.evaluation.scoring import Prediction

logger = logging.getLogger(__name__)

CELL_WIDTH, PICTURE_HEIGHT, CAPTION_HEIGHT, GAP = 420, 300, 62, 8
HIT, MISS, BOX, POINT = (20, 130, 60), (200, 30, 40), (230, 20, 60), (20, 90, 255)


def draw_sheet(
    pairs: Sequence[tuple[Task, Prediction]], path: Path, resize: ResizeSettings, *, per_verdict: int = 12
) -> Path | None:
    """Write a PNG with up to `per_verdict` misses and as many hits, evenly spread; None when nothing can be drawn.

    resize: whose limit of pixels the images were decoded with. Records whose image cannot be read have no picture; they
    are in the predictions file with their error.
    """
    drawable = [(task, prediction) for task, prediction in pairs if prediction.full_blocks]
    misses = _spread([pair for pair in drawable if not pair[1].hit], per_verdict)
    hits = _spread([pair for pair in drawable if pair[1].hit], per_verdict)
    cells = []
    for task, prediction in [*misses, *hits]:
        try:
            cells.append(_draw_cell(task, prediction, resize))
        except ValueError as error:  # answered in an earlier start, unreadable or gone by now
            logger.warning("%s: %s is left out: %s", path, task.id, error)
    if not cells:
        return None
    columns = min(4, len(cells))
    rows = -(-len(cells) // columns)
    height = PICTURE_HEIGHT + CAPTION_HEIGHT
    sheet = Image.new("RGB", (columns * (CELL_WIDTH + GAP) + GAP, rows * (height + GAP) + GAP), (200, 205, 212))
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(cell, (GAP + column * (CELL_WIDTH + GAP), GAP + row * (height + GAP)))
    sheet.save(path)
    return path


def _spread(pairs: list[tuple[Task, Prediction]], count: int) -> list[tuple[Task, Prediction]]:
    step = max(1, len(pairs) / count)
    return [pairs[int(i * step)] for i in range(min(count, len(pairs)))]


def _draw_cell(task: Task, prediction: Prediction, resize: ResizeSettings) -> Image.Image:
    picture = decode_image(read_image(task.record.images[-1], task.root), resize)
    view = _view(picture.size, prediction)
    scale = min(CELL_WIDTH / (view[2] - view[0]), PICTURE_HEIGHT / (view[3] - view[1]))
    size = (max(1, round((view[2] - view[0]) * scale)), max(1, round((view[3] - view[1]) * scale)))
    cell = Image.new("RGB", (CELL_WIDTH, PICTURE_HEIGHT + CAPTION_HEIGHT), (250, 250, 250))
    cell.paste(picture.resize(size, box=view), (0, 0))
    draw = ImageDraw.Draw(cell)
    if prediction.box:
        x1, y1, x2, y2 = ((side - view[i % 2]) * scale for i, side in enumerate(prediction.box))
        draw.rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), outline=BOX, width=2)  # around it, so that it hides nothing
    if prediction.polygon:
        corners = [((x - view[0]) * scale, (y - view[1]) * scale) for x, y in prediction.polygon]
        draw.polygon(corners, outline=BOX, width=2)
    if prediction.point:
        x, y = ((side - view[i]) * scale for i, side in enumerate(prediction.point))
        x, y = min(max(x, 3), CELL_WIDTH - 4), min(max(y, 3), PICTURE_HEIGHT - 4)  # outside the picture: at its rim
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=POINT, outline=(255, 255, 255))
    draw.rectangle((0, PICTURE_HEIGHT, CELL_WIDTH, PICTURE_HEIGHT + CAPTION_HEIGHT), fill=(250, 250, 250))
    verdict = "hit" if prediction.hit else "miss"
    question = next((message.text for message in reversed(task.record.messages) if message.role == "user"), "")
    answer = prediction.error or prediction.text or "(empty)"
    problem = f" ({prediction.problem})" if prediction.problem else ""
    lines = [
        *textwrap.wrap(_which_picture(len(task.record.images)) + question, 64)[:2],
        *textwrap.wrap(f"{verdict}: {answer}{problem}", 64)[:2],
    ]
    font = ImageFont.load_default(12)
    draw.multiline_text((6, PICTURE_HEIGHT + 4), "\n".join(lines), fill=HIT if prediction.hit else MISS, font=font)
    return cell


def _which_picture(num_images: int) -> str:
    """Answers are about the last one."""
    return f"picture {num_images} of {num_images}: " if num_images > 1 else ""


def _view(size: tuple[int, int], prediction: Prediction) -> tuple[float, float, float, float]:
    """The part of the picture that is shown: all of it, or what surrounds box and point at half scale or more."""
    width, height = size
    if min(CELL_WIDTH / width, PICTURE_HEIGHT / height) >= 0.4:
        return (0.0, 0.0, float(width), float(height))
    corners = [prediction.box[:2], prediction.box[2:]] if prediction.box else list(prediction.polygon)
    if not corners:
        return (0.0, 0.0, float(width), float(height))
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    if prediction.point:
        xs.append(min(max(prediction.point[0], 0), width))
        ys.append(min(max(prediction.point[1], 0), height))
    w = min(width, max(CELL_WIDTH / 0.5, 1.2 * (max(xs) - min(xs))))
    h = min(height, max(PICTURE_HEIGHT / 0.5, 1.2 * (max(ys) - min(ys))))
    left = min(max((min(xs) + max(xs) - w) / 2, 0), width - w)
    top = min(max((min(ys) + max(ys) - h) / 2, 0), height - h)
    return (left, top, left + w, top + h)
