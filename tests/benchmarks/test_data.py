"""The benchmark of the data path runs, and measures the same result on both sides."""

from benchmarks.data import SAMPLES, build, describe, measure_batch, one_record_per_image


def test_every_stage_of_a_batch_is_measured():
    files = [SAMPLES / "eval.jsonl"]
    stock, ours = build(files)
    batch = one_record_per_image(files)[:2]
    seconds = measure_batch(stock, ours, batch)  # ends by comparing the kept patches, bit for bit
    assert min(seconds[way] for way in ("stock", "ours", "collator blocks", "collator patches")) > 0
    numbers = dict.fromkeys(
        ("retain_ratio", "samples_per_second_stock", "samples_per_second_ours", "pixel_bytes_per_image_stock"), 1.0
    )
    rest = dict.fromkeys(("pixel_bytes_per_image_ours", "pixel_bytes_ratio", "pixel_bytes_target"), 1.0)
    table = describe(seconds, numbers | rest | {"num_screenshots": 2})
    assert "collator in another trainer, uint8 blocks" in table
