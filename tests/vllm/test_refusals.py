"""Every server option that does not go with pruning is refused by name, before anything is served."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pixelprune.settings import PruneSettings, ResizeSettings
from pixelprune.vllm.settings import ServedSettings
from tests.vllm.engine import needs_vllm

pytestmark = needs_vllm


def server(**changes):
    options = {
        "mm_encoder_tp_mode": "weights",
        "is_multimodal_pruning_enabled": lambda: False,
        "limit_per_prompt": {"image": 4},
        "get_limit_per_prompt": lambda modality: 1,
        "enable_mm_embeds": False,
        "mm_processor_kwargs": {"pixelprune": "raster"},
    }
    vision = SimpleNamespace(patch_size=changes.pop("patch_size", 16), spatial_merge_size=2)
    graphs = SimpleNamespace(cudagraph_mm_encoder=changes.pop("cudagraph_mm_encoder", False))
    assert set(changes) <= set(options)
    model_config = SimpleNamespace(
        model="folder",
        hf_config=SimpleNamespace(vision_config=vision),
        multimodal_config=SimpleNamespace(**options | changes),
    )
    return SimpleNamespace(model_config=model_config, compilation_config=graphs)


def settings(strategy: str = "pred2d") -> ServedSettings:
    return ServedSettings(PruneSettings(strategy=strategy), ResizeSettings(), "folder/pixelprune.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mm_encoder_tp_mode": "data"}, "--mm-encoder-tp-mode data"),
        ({"is_multimodal_pruning_enabled": lambda: True}, "--video-pruning-rate"),
        ({"limit_per_prompt": {"video": 1}}, "--limit-mm-per-prompt"),
        ({"enable_mm_embeds": True}, "--enable-mm-embeds"),
        ({"mm_processor_kwargs": {"max_pixels": 1}}, "--mm-processor-kwargs max_pixels"),
        ({"cudagraph_mm_encoder": True}, "cudagraph_mm_encoder"),
        ({"patch_size": 14}, "patches of 14"),
    ],
)
def test_an_option_that_does_not_go_with_pruning_is_named(changes, reason):
    from pixelprune.vllm.refusals import check_server

    with pytest.raises(ValueError, match=f"folder is to be served pruned .by folder/pixelprune.json.: .*{reason}"):
        check_server(server(**changes), settings())


def test_an_unknown_strategy_and_another_front_end_are_named(monkeypatch):
    import vllm.envs

    from pixelprune.vllm.refusals import check_server

    check_server(server(), settings())
    with pytest.raises(ValueError, match="strategy 'pred4d'; expected one of none, pred2d"):
        check_server(server(), settings("pred4d"))
    with pytest.raises(ValueError, match="'pred3d' prunes the screenshots of a conversation together"):
        check_server(server(), settings("pred3d"))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    if hasattr(vllm.envs.__getattr__, "cache_clear"):
        vllm.envs.__getattr__.cache_clear()
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND"):
        check_server(server(), settings())
