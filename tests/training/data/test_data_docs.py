"""The examples in docs/data_path.md run as they stand there."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

DOCUMENT = Path(__file__).parents[3] / "docs" / "data_path.md"


def test_collator_example_trains(toy_folder, screens, tmp_path, monkeypatch):
    code, with_blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    records = [json.loads(line) for line in (screens / "train.jsonl").read_text().splitlines()]
    code = code.replace('"data/screens"', "SCREENS").replace("max_steps=20", "max_steps=2, use_cpu=True")
    names = {"MODEL": str(toy_folder), "OUT": str(tmp_path), "SCREENS": str(screens), "records": records}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    assert isinstance(names["trainer"], transformers.Trainer)
    assert names["trainer"].state.global_step == 2
    assert names["trainer"].state.log_history[-1]["train_loss"] > 0
    exec(compile(with_blocks.replace('"data/screens"', "SCREENS"), str(DOCUMENT), "exec"), names)
    row = names["collator"](records[:2])
    assert row["pixel_values"].dtype == torch.uint8
    assert names["model"](**row).loss > 0


@pytest.mark.parametrize("name", ["data.paired", "data.max_quarantined_share", "data.last_turn_only"])
def test_settings_named_in_the_document_exist(name):
    from training.data.settings import DataSettings

    assert name in DOCUMENT.read_text()
    assert hasattr(DataSettings(), name.removeprefix("data."))
