"""What a vLLM server prunes: the file beside the weights, its flags, a request. No vLLM is needed to say so."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from pixelprune.settings import PruneSettings, ResizeSettings
from pixelprune.vllm.plugin import is_tested
from pixelprune.vllm.settings import of_request, served_settings

FILE = {"prune": {"strategy": "pred2d", "threshold": 0.01}, "resize": {"min_pixels": 1024, "max_pixels": 65536}}


@pytest.fixture
def trained(tmp_path):
    (tmp_path / "pixelprune.json").write_text(json.dumps(FILE))
    return tmp_path


def model_config(folder, overrides=None, processor=None):
    hf_config = SimpleNamespace() if overrides is None else SimpleNamespace(pixelprune=overrides)
    multimodal = SimpleNamespace(mm_processor_kwargs=processor)
    return SimpleNamespace(model=str(folder), revision=None, hf_config=hf_config, multimodal_config=multimodal)


def test_the_file_beside_the_weights_is_all_it_takes(trained):
    settings = served_settings(model_config(trained))
    assert settings.prune == PruneSettings(threshold=0.01)
    assert settings.resize == ResizeSettings(min_pixels=1024, max_pixels=65536)
    assert settings.said_by == f"{trained}/pixelprune.json"
    assert settings.describe().startswith("pred2d at max <= 0.01; images of 1024 to 65536 pixels")


def test_nothing_that_asks_for_pruning_means_the_stock_class(tmp_path, trained):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert served_settings(model_config(empty)) is None
    assert served_settings(model_config(trained, overrides=False)) is None


def test_overrides_replace_single_settings_and_processor_arguments_come_last(trained):
    said = {"prune": {"threshold": 0.0}, "resize": {"max_pixels": 4096}}
    settings = served_settings(model_config(trained, said, {"pixelprune": "raster"}))
    assert settings.prune == PruneSettings(strategy="raster")
    assert settings.resize == ResizeSettings(min_pixels=1024, max_pixels=4096)


def test_overrides_of_a_model_without_settings_size_images_as_its_processor_does(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 99999}}))
    settings = served_settings(model_config(tmp_path, "pred2d"))
    assert settings.prune == PruneSettings()
    assert settings.resize == ResizeSettings(max_pixels=99999)


def test_a_base_model_takes_the_settings_of_its_adapter(tmp_path, trained):
    base = tmp_path / "base"
    base.mkdir()
    settings = served_settings(model_config(base, str(trained)))
    assert settings.prune == PruneSettings(threshold=0.01)
    with pytest.raises(ValueError, match=r"base has no pixelprune\.json"):
        served_settings(model_config(trained, str(base)))


def test_every_setting_is_part_of_the_cache_identity(trained):
    settings = served_settings(model_config(trained))
    others = [
        {"strategy": "raster"},
        {"metric": "mae"},
        {"threshold": 0.02},
        {"seed": 1},
    ]
    identities = {of_request(settings, {"prune": other}).identity() for other in others}
    identities.add(settings.identity())
    identities.add(served_settings(model_config(trained, {"resize": {"max_pixels": 4096}})).identity())
    assert len(identities) == 6


@pytest.mark.parametrize(
    ("overrides", "processor", "message"),
    [
        ({"prune": {"treshold": 0.1}}, None, "--hf-overrides pixelprune: .*treshold"),
        ({"prune": {"threshold": "much"}}, None, "--hf-overrides pixelprune: "),
        ({"prune": {"threshold": 2.0}}, None, "expected 0..1"),
        ({"strategy": "pred2d"}, None, "an object with 'prune' and 'resize'"),
        (3, None, "got 3"),
        (None, {"pixelprune": {"resize": {"max_pixels": 1}}}, "'resize' is a setting of the server"),
        (None, {"pixelprune": "pred3d"}, "'pred3d' prunes the screenshots of a conversation together"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(overrides, processor, message, trained):
    with pytest.raises(ValueError, match=message):
        served_settings(model_config(trained, overrides, processor))


def test_processor_arguments_alone_do_not_ask_for_pruning(tmp_path):
    with pytest.raises(ValueError, match="ask for pruning with --hf-overrides"):
        served_settings(model_config(tmp_path, processor={"pixelprune": "pred2d"}))


def test_tested_versions_are_told_by_release():
    assert is_tested("0.32.0")
    assert is_tested("0.33.1+cu130")
    assert not is_tested("0.3.0")
    assert not is_tested("0.34.0rc1")
