"""`python -m training`: every command, and every setting explained out of the typed tree."""

from __future__ import annotations

import dataclasses

import pytest

from training.__main__ import main
from training.config.recipe import config_to_dict
from training.config.reference import sections
from training.config.settings import Config


def leaves(content: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in content.items():
        is_section = isinstance(value, dict) and value
        found |= leaves(value, f"{prefix}{key}.") if is_section else {prefix + key}
    return found


def test_every_field_is_there_once():
    keys = [setting.key for section in sections() for setting in section.settings]
    assert len(keys) == len(set(keys))
    assert leaves(config_to_dict(Config())) == {key for key in keys if ".N." not in key}


def test_defaults_are_the_trees():
    said = {setting.key: setting.default for section in sections() for setting in section.settings}
    assert (said["optim.lr"], said["loss.divergence"], said["data.max_quarantined_share"]) == (
        "1e-05",
        "forward_kl",
        "0.01",
    )
    assert (said["data.sources.N.path"], said["kd.path"], said["optim.vit.lr"]) == ("", '""', "null")
    assert said["resize.max_pixels"] == str(dataclasses.asdict(Config())["resize"]["max_pixels"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optim.lr"], "default 1e-05; a number > 0"),
        (["data.sources.3.weight"], "How often every record is used per epoch"),
        (["model.dtype"], "bfloat16, float32"),
        (["lora"], "lora.merge_on_export"),
        ([], "training.evaluate"),
    ],
)
def test_what_is_asked_for_is_explained(arguments, said, capsys):
    assert main(arguments) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_key_that_is_none_is_answered_with_the_nearest(capsys):
    assert main(["optim.learning_rte"]) == 2
    assert "did you mean 'optim.lr'?" in capsys.readouterr().err
