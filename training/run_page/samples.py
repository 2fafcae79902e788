"""A few records of each run as its model is given them: tokens with what is trained on, pictures with kept blocks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from pixelprune.command.page import embedded_picture, omitted_runs
from pixelprune.images.image import decode_image
from pixelprune.model_folder import is_hub_id
from pixelprune.records.images import read_image
from pixelprune.records.prepare import PreparedRecord, Preparer
from pixelprune.records.record import RecordError
from training.config.recipe import config_from_dict
from training.config.settings import Config
from training.data.files.address import is_remote
from training.data.inspection import describe_image, runs, spread
from training.data.sources import Source, open_sources
from training.loop.feed import prepare_settings
from training.model.loading import load_model_files
from training.run_page.run_folder import cut

logger = logging.getLogger(__name__)

MAX_PICTURES = 3
"""Of one record."""


def sample_groups(recipes: Mapping[str, dict[str, Any]], num: int) -> list[dict[str, Any]]:
    """Up to `num` records of every training source, once for runs that see them alike. recipes: run -> resolved recipe.

    What cannot be shown (data or model gone, a recipe of another version) is said in its place.
    """
    groups: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        data = {key: value for key, value in recipe.get("data", {}).items() if key not in ("samples_per_step", "seed")}
        seen = [data, recipe.get("prune"), recipe.get("resize"), recipe.get("model", {}).get("path")]
        groups.setdefault(json.dumps(seen, sort_keys=True, default=str), []).append(name)
    return [{"runs": names, **_group(recipes[names[0]], num)} for names in groups.values()]


def _group(recipe: dict[str, Any], num: int) -> dict[str, Any]:
    if not recipe:
        return {"note": "no config.yaml, so the data is not known", "records": []}
    try:
        config = config_from_dict(recipe)
        if is_hub_id(config.model.path):
            return {"note": f"{config.model.path} is a model of the hub, which is not asked here", "records": []}
        if any(is_remote(source.path) for source in config.data.sources):
            return {"note": "data of the hub or of a remote file system is not read here", "records": []}
        sources, preparer = _opened(config)
    except (ValueError, OSError) as error:
        return {"note": f"no records: {cut(str(error).splitlines()[0])}", "records": []}
    records = [_shown(source, row, preparer) for source in sources for row in spread(len(source), num)]
    return {"note": "", "records": records}


def _opened(config: Config) -> tuple[list[Source], Preparer]:
    preparer = prepare_settings(config, load_model_files(config.model)).build()
    return open_sources(config.data.sources, config.data.index_dir), preparer


def _shown(source: Source, row: int, preparer: Preparer) -> dict[str, Any]:
    name = f"{source.record_id(row)} ({source.rows.where(row)})"
    try:
        prepared = source.prepared(row, preparer)
        pictures = [
            {
                "source": embedded_picture(picture := decode_image(read_image(ref, source.root), preparer.resize)),
                "size": picture.size,
                "mask": omitted_runs(image.selection.keep),
                "words": describe_image(image),
            }
            for ref, image in list(zip(prepared.record.images, prepared.sample.images, strict=True))[:MAX_PICTURES]
        ]
    except RecordError as error:
        note = f"left out: {error.reason}: {cut(error)}"
        return {"name": name, "note": note, "tokens": [], "pictures": []}
    num_images = len(prepared.sample.images)
    note = f"{len(pictures)} of {num_images} images shown" if num_images > len(pictures) else ""
    return {"name": name, "note": note, "tokens": _tokens(prepared, preparer), "pictures": pictures}


def _tokens(prepared: PreparedRecord, preparer: Preparer) -> list[tuple[str, str]]:
    """(kind, text) of the row's stretches: image, supervised or plain."""
    sample = prepared.sample
    parts, num_images = [], 0
    for ids, is_supervised in runs(sample.input_ids, sample.supervised, preparer.image_token_id):
        if ids[0] == preparer.image_token_id:
            num_images += 1
            parts.append(("image", f"[image {num_images}: {len(ids)} tokens]"))
        else:
            parts.append(("supervised" if is_supervised else "plain", cut(preparer.chat.tokenizer.decode(ids))))
    return parts
