"""The repeated layers of both towers through torch.compile, one program per kind of layer.

All layers of a tower have one forward, whose weights are inputs of the compiled program: it is compiled once for all
of them, with symbolic lengths, and again only where something else differs (a row of one token, a mask or none). How
often at most is a setting, and reaching it is said in the log: later cases then run uncompiled.

Recomputation stays outside: the checkpoint calls the compiled layer, forward and again in backward. Evaluation and
generation are not compiled: key-value caches would make a version per layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

logger = logging.getLogger(__name__)


def compile_layers(model: Any, max_recompiles: int, *, backend: str = "inductor") -> None:
    """Compile every layer of this model's vision tower and language model, for training. Other models are untouched.

    max_recompiles: versions of one piece of code; torch's limit for the whole process is set to it.
    """
    torch._dynamo.config.recompile_limit = max_recompiles
    # The limit over all layers together has no meaning of its own here: they share their versions.
    torch._dynamo.config.accumulated_recompile_limit = max(256, 16 * max_recompiles)
    _notice_the_limit()
    programs: dict[Callable, Callable] = {}
    for tower in (model.model.visual, model.model.language_model):
        for layer in tower.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                _compile_layer(layer, programs, backend)
    logger.info(
        "compile: %d kinds of layers, at most %d versions of each (model.compile_max_recompiles); the first steps wait "
        "for their compilation, minutes on a GPU",
        len(programs),
        max_recompiles,
    )


def _compile_layer(layer: nn.Module, programs: dict[Callable, Callable], backend: str) -> None:
    # transformers wraps a layer's forward for checkpointing; what it wraps is compiled.
    plain = type(layer).forward.__wrapped__  # type: ignore[attr-defined]
    compiled = programs.get(plain)
    if compiled is None:
        # Without graph breaks on CUDA with a flash-style attention; sdpa breaks at its loop over images.
        compiled = programs[plain] = torch.compile(plain, dynamic=True, backend=backend)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return plain(layer, *args, **kwargs)
        if layer.gradient_checkpointing:
            return layer._gradient_checkpointing_func(partial(compiled, layer, **kwargs), *args)
        return compiled(layer, *args, **kwargs)

    layer.forward = forward  # type: ignore[method-assign]


class _LimitNotice(logging.Handler):
    """Turns torch's notice that a limit was reached into one that names the setting."""

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, str) and "hit config." in record.msg and record.args:
            limit, number, function, reason, *_ = record.args
            logger.warning(
                "compile: %s has its %s versions (%s); further cases run uncompiled. Raise "
                "model.compile_max_recompiles or leave it; last reason: %s",
                function,
                number,
                limit,
                str(reason).strip().splitlines()[-1:],
            )


def _notice_the_limit() -> None:
    dynamo = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(handler, _LimitNotice) for handler in dynamo.handlers):
        dynamo.addHandler(_LimitNotice(level=logging.WARNING))
