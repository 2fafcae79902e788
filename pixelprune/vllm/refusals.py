"""What a server that prunes does not do. It refuses to start and says why, instead of serving something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pixelprune.settings import MERGE, PATCH
from pixelprune.vllm.settings import KEY, ServedSettings, untested


def check_server(vllm_config: Any, settings: ServedSettings) -> None:
    """Raises ValueError naming the option that does not go with pruning, and the way out."""
    for reason in _reasons(vllm_config, settings):
        raise ValueError(f"{vllm_config.model_config.model} is to be served pruned (by {settings.said_by}): {reason}")


def _reasons(vllm_config: Any, settings: ServedSettings) -> Iterator[str]:
    import vllm.envs

    from pixelprune.selection.registry import strategy_names  # numba may load now: the worker has started

    vision = vllm_config.model_config.hf_config.vision_config
    options = vllm_config.model_config.multimodal_config
    if settings.prune.strategy not in strategy_names():
        yield f"strategy {settings.prune.strategy!r}; expected one of {', '.join(strategy_names())}"
    yield from untested(settings.prune)
    if (vision.patch_size, vision.spatial_merge_size) != (PATCH, MERGE):
        yield f"its vision tower has patches of {vision.patch_size} merged by {vision.spatial_merge_size}, not 16 by 2"
    if options.mm_encoder_tp_mode == "data":
        yield "--mm-encoder-tp-mode data gives each rank whole images at full size; use weights"
    if options.is_multimodal_pruning_enabled():
        yield "--video-pruning-rate prunes behind the vision tower and computes other positions; leave it out"
    if int(_video_limit(options)) > 0:
        yield "videos are not pruned; leave video out of --limit-mm-per-prompt"
    if options.enable_mm_embeds:
        yield "--enable-mm-embeds takes features of all blocks; leave it out"
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        yield "cudagraph_mm_encoder captures graphs of full grids; leave it out of --compilation-config"
    if unknown := set(options.mm_processor_kwargs or {}) - {KEY}:
        yield (
            f"--mm-processor-kwargs {', '.join(sorted(unknown))}: images are sized as in training; give other limits "
            f'with --hf-overrides \'{{"{KEY}": {{"resize": {{...}}}}}}\''
        )
    if vllm.envs.VLLM_USE_RUST_FRONTEND:
        yield "VLLM_USE_RUST_FRONTEND prepares images without this plugin; unset it"


def _video_limit(options: Any) -> int:
    """Videos per prompt that the server was explicitly asked for."""
    return options.get_limit_per_prompt("video") if "video" in options.limit_per_prompt else 0
