"""What says how a server prunes: the file beside the weights, the server's flags, a request. And when nothing does."""

from __future__ import annotations

import shutil

import pytest

from pixelprune.settings import PruneSettings, ResizeSettings
from tests.vllm.conftest import write_settings
from tests.vllm.engine import (
    Answer,
    EngineError,
    ask_hugging_face,
    ask_vllm,
    assert_same,
    needs_vllm,
    start_engine,
)

pytestmark = needs_vllm
STOCK = "vllm.model_executor.models.qwen3_vl.Qwen3VLForConditionalGeneration"
OURS = "pixelprune.vllm.models.Qwen3VLForConditionalGeneration"
WITHOUT_RESIZE = ("wide", "tall", "large", "two images", "swapped", "text")
"""Conversations whose images the stock image processor takes at their own size."""


@pytest.fixture
def copy_of(served_folder, tmp_path):
    """copy_of(prune, resize): the checkpoint beside these settings, or beside none."""

    def make(prune: PruneSettings | None = None, resize: ResizeSettings | None = None):
        folder = tmp_path / f"copy_{prune.strategy if prune else 'without'}"
        shutil.copytree(served_folder(), folder)
        (folder / "pixelprune.json").unlink()
        if prune:
            write_settings(folder, prune, resize or ResizeSettings())
        return folder

    return make


def served(made: dict) -> list[Answer]:
    return [Answer(**answer) for answer in made["rounds"][0]]


def test_a_checkpoint_without_settings_is_the_stock_class_and_keep_all_gives_its_bits(copy_of, conversations, tmp_path):
    asked = [conversations[name] for name in WITHOUT_RESIZE]
    without = start_engine(copy_of(), asked, tmp_path)
    assert without["served_by"] == [STOCK]
    assert "is served unpruned" in without["log"]
    without_plugin = start_engine(copy_of_path(tmp_path), asked, tmp_path, environment={"VLLM_PLUGINS": ""})
    assert without["rounds"] == without_plugin["rounds"]
    kept_all = start_engine(copy_of(PruneSettings(strategy="none")), asked, tmp_path)
    assert kept_all["served_by"] == [OURS]
    assert kept_all["rounds"] == without["rounds"]


def copy_of_path(tmp_path):
    return tmp_path / "copy_without"


def test_the_log_says_what_is_pruned_and_a_request_may_say_otherwise(
    served_folder, stock_model, conversations, tmp_path
):
    """With the prefix cache on: one image under three settings in turn must not find another's features or keys."""
    folder = served_folder()
    names = ["tall", "tall", "tall", "tall", "text", "tall"]
    prunes = [None, "none", "raster", None, "raster", "none"]
    asked = [conversations[name] for name in names]
    options = [None if prune is None else {"pixelprune": prune} for prune in prunes]
    made = start_engine(folder, asked, tmp_path, options=options, engine={"block_size": 32})
    assert (
        f"{folder} is served pruned by pred2d; images of 1024 to 262144 pixels (from {folder}/pixelprune.json)"
        in made["log"]
    )
    reference = ask_hugging_face(stock_model(folder), folder, asked, prunes)
    assert len({answer.prompt_tokens for answer in reference}) == 4
    assert_same(served(made), reference)


def test_the_servers_flags_come_before_the_file(served_folder, stock_model, conversations, tmp_path):
    folder = served_folder()
    asked = [conversations["large"], conversations["odd"]]
    overrides = {"pixelprune": {"prune": {"strategy": "raster", "threshold": 0.02}}}
    (answers,) = ask_vllm(folder, asked, tmp_path, engine={"hf_overrides": overrides})
    rule = PruneSettings(strategy="raster", threshold=0.02)
    assert_same(answers, ask_hugging_face(stock_model(folder), folder, asked, [rule] * 2))


def test_a_server_may_serve_a_trained_checkpoint_as_the_stock_class(served_folder, conversations, tmp_path):
    made = start_engine(
        served_folder(), [conversations["text"]], tmp_path, engine={"hf_overrides": {"pixelprune": False}}
    )
    assert made["served_by"] == [STOCK]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"engine": {"mm_encoder_tp_mode": "data"}}, "--mm-encoder-tp-mode data"),
        ({"engine": {"limit_mm_per_prompt": {"video": 1}}}, "videos are not pruned"),
        ({"engine": {"hf_overrides": {"pixelprune": "pred3d"}}}, "expected one of none, pred2d"),
        ({"pretend_version": "0.99.0"}, "tested with vLLM 0.32, 0.33 and not with 0.99.0"),
    ],
    ids=["data", "video", "strategy", "version"],
)
def test_a_server_that_would_serve_something_else_does_not_start(task, reason, served_folder, conversations, tmp_path):
    with pytest.raises(EngineError, match=reason):
        start_engine(served_folder(), [conversations["text"]], tmp_path, **task)


def test_an_untested_version_still_serves_what_nobody_asked_to_prune(copy_of, conversations, tmp_path):
    made = start_engine(copy_of(), [conversations["large"]], tmp_path, pretend_version="0.99.0")
    assert made["served_by"] == [STOCK]
