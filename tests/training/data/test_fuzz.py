"""1,000 mutated records and images: each is trained on or quarantined with its reason, and the counts add up."""

import json
import random
from collections import Counter

import pytest
from PIL import Image

from pixelprune.pack import VisionGeometry
from pixelprune.records.prepare import PrepareSettings
from pixelprune.records.reader import parse_record
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.pixelprune.records.test_bounded_work import not_for_ever
from tests.samples import chat_row, draw_screen, encode
from tests.training.data import mutants
from tests.training.data.mutants import mutate_bytes
from training.composition.toy import toy_config
from training.data.index_builder import build_index
from training.data.loader import LoaderSettings, PackLoader
from training.data.plan import PlanSettings
from training.data.quarantine import read_quarantine
from training.data.settings import DataSettings, SourceSettings

NUM_RECORDS = 1000
CODES = {
    "ok", "invalid_json", "not_an_object", "unknown_format", "empty_conversation", "unknown_role", "bad_content",
    "empty_turn", "image_count", "remote_image", "bad_image", "image_in_answer", "bad_box", "bad_weight",
    "two_systems", "unread_key",
    "special_token", "bad_text", "template", "no_supervised_token", "outside_root", "missing_file", "unreadable_file",
    "empty_file", "decompression_bomb", "truncated_image", "not_an_image", "unsupported_mode", "aspect_ratio",
    "over_long", "file_too_large", "too_large",
}  # fmt: skip
VALUES = [
    None, True, 0, -1, 3.5, float("nan"), float("inf"), "", "x", "<image>", "<img></img>", "<|im_end|>", "\ud800", "\0",
    [], {}, [[]], [None], {"type": "image"}, {"type": "text"}, "../a", "https://a.b/c.png",
    "data:image/png;base64,AAAA", "é🙂" * 50, "a" * 5000, 10**30, 10**400,
]  # fmt: skip


def mutate_tree(rng: random.Random, value):
    """Replace, drop, repeat or swap something somewhere in nested JSON."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = rng.choice(sorted(value))
        value = dict(value)
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = mutate_tree(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.93:
        i = rng.randrange(len(value))
        action = rng.random()
        if action < 0.15:
            return value[:i] + value[i + 1 :]
        if action < 0.3:
            return value[: i + 1] + value[i:]
        return [*value[:i], mutate_tree(rng, value[i]), *value[i + 1 :]]
    return rng.choice(VALUES)


def write_mutants(folder, seed: int) -> list[str]:
    """The lines of a data set: a third with a damaged tree, a third a damaged image, a third damaged text."""
    rng = random.Random(seed)
    screens = [draw_screen(i) for i in range(4)]
    encoded = [encode(s, f) for s in screens for f in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded += [encode(s, f, exif=exif.tobytes()) for s in screens for f in ("PNG", "WEBP", "JPEG")]
    # An EXIF that ends after its first four bytes.
    encoded += [encode(screens[0], f, exif=b"Exif\0\0II*\0") for f in ("PNG", "WEBP")]
    for number, data in enumerate(encoded):
        (folder / f"good_{number}.img").write_bytes(data)
    lines = []
    for i in range(NUM_RECORDS):
        row = chat_row(f"good_{i % len(encoded)}.img", f"Question {i}", f"Answer {i}")
        row["metadata"] = {"bbox": [1, 2, 3, 4]}
        if i % 4 == 1:
            row = {
                "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}],
                "images": [f"good_{i % len(encoded)}.img"],
            }
        kind = i % 3
        if kind == 0:
            for _ in range(rng.randint(1, 2)):
                row = mutate_tree(rng, row)
        elif kind == 1:
            name = f"mutant_{i}.img"
            (folder / name).write_bytes(mutate_bytes(rng, rng.choice(encoded)))
            row = json.loads(json.dumps(row).replace(f"good_{i % len(encoded)}.img", name))
        line = json.dumps(row)
        if kind == 2 and rng.random() < 0.5:
            line = mutate_bytes(rng, line.encode()).replace(b"\n", b" ").decode("latin-1")
        lines.append(line if line.strip() and len(line) > 2 else "{}")
    return lines


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged TIFF tags
def test_every_mutant_is_trained_on_or_accounted_for(tmp_path, model_folder, tokenizer, cost):
    lines = write_mutants(tmp_path, seed=20)
    (tmp_path / "train.jsonl").write_bytes("\n".join(lines).encode("latin-1", "replace"))
    prepare = PrepareSettings(
        str(model_folder), PruneSettings(), ResizeSettings(min_pixels=32 * 32, max_decoded_pixels=10**6)
    )
    index = build_index(
        [SourceSettings(str(tmp_path / "train.jsonl"), name="fuzz")], prepare, num_workers=0, show_progress=False
    )
    settings = DataSettings(max_quarantined_share=0.9, pack_tokens=1000)
    index = index.checked(settings, tmp_path / "quarantine.jsonl")
    quarantined = read_quarantine(tmp_path / "quarantine.jsonl")

    assert index.num_records == NUM_RECORDS
    assert len(index) + len(quarantined) == NUM_RECORDS
    reasons = Counter(entry.reason for entry in quarantined)
    assert set(reasons) <= CODES, "a reason nobody declared"
    assert len(reasons) >= 12, f"the mutations are too tame: {reasons}"
    assert all(entry.detail and entry.file for entry in quarantined)
    assert NUM_RECORDS * 0.2 < len(index) < NUM_RECORDS * 0.9

    plan = PlanSettings(samples_per_step=50, pack_tokens=1000, pack_patches=10_000)
    geometry = VisionGeometry.from_config(toy_config(tokenizer))
    loader = PackLoader(index, index.plan_input(cost), plan, prepare, geometry, LoaderSettings())
    trained = Counter()
    num_supervised = num_supervised_planned = 0
    for batch in loader:
        trained.update(batch.record_ids)
        num_supervised += batch.pack.num_supervised
        num_supervised_planned += batch.num_supervised if batch.is_boundary else 0
    del trained["dummy"]
    copies = index.plan_input(cost).copies
    weights = {index.record_id(i): copies[i] for i in range(len(index))}
    for record, times in trained.items():
        assert times in (int(weights[record]), int(weights[record]) + 1)
    used = {record for record, weight in weights.items() if weight >= 1}
    assert used <= set(trained)
    assert set(trained) | {entry.record for entry in quarantined} | {r for r in weights if weights[r] < 1} == {
        f"fuzz:{i}" for i in range(NUM_RECORDS)
    }
    assert num_supervised == num_supervised_planned


def test_unmutated_records_are_fine(tmp_path):
    """The seeds of the fuzz test are good records: without mutation nothing is refused."""
    assert parse_record(chat_row("a.img") | {"metadata": {"bbox": [1, 2, 3, 4]}}).images


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("template", mutants.TEMPLATES)
def test_names_sizes_tables_and_templates_are_dimensions_too(tmp_path, template):
    """The short form of `python -m benchmarks.fuzz`."""
    rng = random.Random(31)
    sources = mutants.write_case(rng, tmp_path, 120)
    prepare = mutants.settings_for(mutants.write_model_folder(tmp_path / "model", template))
    with not_for_ever(300):
        index, reasons = mutants.accounted(tmp_path, sources, prepare, 120)
    assert set(reasons) <= CODES | {"unexpected", "out_of_memory"}
    assert len(index) > 3, reasons
    assert len(reasons) >= 6, f"the mutations are too tame: {reasons}"
