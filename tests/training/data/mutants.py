"""Records damaged in every dimension that a data set has, and the account that each of them is given."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pixelprune.flops import CostModel
from pixelprune.pack import VisionGeometry
from pixelprune.records.limits import RecordLimits
from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import chat_row, draw_screen, encode
from training.composition.toy import build_tokenizer, toy_config
from training.data.index import Index
from training.data.index_builder import build_index
from training.data.loader import LoaderSettings, PackLoader
from training.data.plan import PlanSettings
from training.data.quarantine import read_quarantine
from training.data.settings import DataSettings, SourceSettings

LIMITS = RecordLimits(max_file_bytes=200_000, max_text_chars=4000, max_turns=40, max_images=6)
TEMPLATES = {
    "toy": None,
    "marks": "{%- for m in messages -%}[{{ m.role }}]{%- if m.role == 'assistant' -%}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{%- elif m.content is string -%}{{ m.content }}{%- else -%}{%- for p in m.content -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}{%- endfor -%}{%- endif -%}"
    "{%- endfor -%}",
    "adds lists to strings": "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}",
    "refuses odd texts": "{%- if (messages[0].content | string | length) % 2 -%}"
    "{{ raise_exception('odd') }}{%- endif -%}"
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.content is string -%}{{ m.content }}"
    "{%- else -%}"
    "{%- for p in m.content -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}",
}  # fmt: skip
"""By name: the toy model's own (None), and those that a user may bring."""
TEXTS = [
    "<image>",
    "<img>",
    "<img>a.png</img>",
    "</img>",
    "é🙂",
    "\ud800",
    "\0",
    "<|im_end|>",
    "<think>",
    "x" * 50,
    "\n",
]
SIZES = [(1, 1), (64, 64), (33, 31), (300, 2), (2, 300), (640, 480), (1500, 900)]


def write_model_folder(folder: Path, template: str) -> Path:
    tokenizer = build_tokenizer()
    if TEMPLATES[template] is not None:
        tokenizer.chat_template = TEMPLATES[template]
    tokenizer.save_pretrained(folder)
    toy_config(tokenizer).save_pretrained(folder)
    return folder


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Cut, overwrite, insert or repeat bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(changed)) if changed else 0
        action = rng.randrange(4)
        if action == 0:
            del changed[i:]
        elif action == 1:
            changed[i : i + 4] = rng.randbytes(4)
        elif action == 2:
            changed[i:i] = rng.randbytes(rng.randint(1, 64))
        else:
            del changed[i : i + rng.randint(1, 64)]
    return bytes(changed)


def image_name(rng: random.Random, folder: Path, number: int) -> str:
    """A file of any name, kind and size, or none at all; its name as JSON can hold it."""
    stem = rng.choice([b"plain", b"\xff\xfe", "é🙂".encode(), b"a b\n", b"x" * 200, b"-", b"#?%20", b".hidden"])
    path = os.fsencode(folder) + b"/%b%d.img" % (stem, number)
    width, height = rng.choice(SIZES)
    picture = draw_screen(number % 7, max(width, 64), max(height, 64)).crop((0, 0, width, height))
    data = encode(picture, rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")))
    kind = rng.randrange(12)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        os.mkdir(path)
    elif kind == 2:
        os.symlink(path, path)
    elif kind > 3:  # 3: nothing is there
        Path(os.fsdecode(path)).write_bytes(mutate_bytes(rng, data) if kind < 7 else data)
        if kind == 7:
            os.truncate(path, 1 << 40)
    return os.fsdecode(path.rpartition(b"/")[2])


def written_text(rng: random.Random) -> str:
    return "".join(rng.choice([*TEXTS, "word "]) for _ in range(rng.choice((1, 2, 5, 20, 300))))


def odd_row(rng: random.Random, folder: Path, number: int) -> dict:
    """A well-formed record whose images, texts and counts are anything."""
    num_images = rng.choice((0, 1, 1, 1, 2, 9))
    names = [image_name(rng, folder, 1000 * number + i) for i in range(num_images)]
    text = written_text(rng) if rng.random() < 0.4 else f"Question {number}"
    turns = chat_row(None, text, written_text(rng) if rng.random() < 0.2 else "yes")["messages"]
    turns[0]["content"] = [{"type": "image", "image": name} for name in names] + turns[0]["content"]
    more = rng.choice((0, 0, 0, 1, 4, 30))
    return {"messages": turns + chat_row(None, "more", "yes")["messages"] * more}


def write_parquet(rng: random.Random, path: Path, num: int) -> None:
    """Texts of any bytes, images of any bytes, times of any year: what writers other than pyarrow leave."""
    texts, images = [], []
    for i in range(num):
        text = f"<image>Question {i}".encode()
        texts.append(mutate_bytes(rng, text) if rng.random() < 0.4 else text)
        data = encode(Image.new("RGB", rng.choice(SIZES)), "PNG")
        images.append([{"bytes": mutate_bytes(rng, data) if rng.random() < 0.3 else data, "path": None}])
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    asked = pa.Array.from_buffers(pa.string(), num, [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(texts))])
    times = [rng.choice((0, 10**15, 10**18, -(10**18))) if rng.random() < 0.1 else 0 for _ in range(num)]
    answers = pa.array([rng.choice(("yes", "", None, "a" * 5000)) if rng.random() < 0.1 else "no" for _ in range(num)])
    columns = {"query": asked, "response": answers, "images": images, "timestamp": pa.array(times, pa.timestamp("us"))}
    pq.write_table(pa.table(columns), path)


def write_case(rng: random.Random, folder: Path, num: int) -> list[SourceSettings]:
    """`num` records, half of them in JSON lines and half in Parquet."""
    rows = [odd_row(rng, folder, i) for i in range(num - num // 2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_parquet(rng, folder / "table.parquet", num // 2)
    return [SourceSettings(str(folder / name)) for name in ("rows.jsonl", "table.parquet")]


def settings_for(model_folder: Path) -> PrepareSettings:
    resize = ResizeSettings(min_pixels=32 * 32, max_decoded_pixels=10**6)
    return PrepareSettings(str(model_folder), PruneSettings(), resize, limits=LIMITS)


def accounted(
    folder: Path, sources: list[SourceSettings], prepare: PrepareSettings, num: int, **options
) -> tuple[Index, Counter[str]]:
    """Index the records and load them once: each is trained on or quarantined, and the counts add up. Returns the index
    and how many records were refused for which reason."""
    index = build_index(sources, prepare, **({"num_workers": 0, "show_progress": False} | options))
    index = index.checked(DataSettings(max_quarantined_share=0.99, pack_tokens=2000), folder / "quarantine.jsonl")
    quarantined = read_quarantine(folder / "quarantine.jsonl")
    assert index.num_records == num
    assert len(index) + len(quarantined) == num
    assert all(entry.detail and entry.file for entry in quarantined)
    config = toy_config(build_tokenizer())
    plan = PlanSettings(samples_per_step=50, pack_tokens=2000, pack_patches=10_000)
    inputs = index.plan_input(CostModel.from_config(config))
    geometry = VisionGeometry.from_config(config)
    trained: Counter[str] = Counter()
    num_supervised = num_planned = 0
    with contextlib.closing(iter(PackLoader(index, inputs, plan, prepare, geometry, LoaderSettings()))) as batches:
        for batch in batches:
            trained.update(batch.record_ids)
            num_supervised += batch.pack.num_supervised
            num_planned += batch.num_supervised if batch.is_boundary else 0
    del trained["dummy"]
    assert set(trained.values()) <= {1}
    assert set(trained) == {index.record_id(i) for i in range(len(index))}
    assert not set(trained) & {entry.record for entry in quarantined}
    assert num_supervised == num_planned
    return index, Counter(entry.reason for entry in quarantined)
