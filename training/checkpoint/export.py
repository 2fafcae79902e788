"""The trained model as a Hugging Face folder: from a model in training, or from a checkpoint without a GPU."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pixelprune.family import EXPERTS_INPUTS_FIRST, published_layout
from pixelprune.files import whole_folder
from pixelprune.model_folder import PRUNE_FILE, ModelFolder, TrainedWith, prune_file
from training.checkpoint.checkpointer import RunState
from training.checkpoint.side_files import model_card, write_processor_files
from training.config.settings import Config
from training.errors import UserError
from training.model.fingerprint import hash_weights
from training.model.loading import load_model, load_model_files
from training.model.lora import adapter_weights, add_adapters, export_weights, trained_mergers
from training.tracking.metrics import METRICS, values_of
from training.tracking.tracker import read_metrics


def export_model(folder: Path, model: PreTrainedModel, files: ModelFolder, config: Config, facts: dict) -> Path:
    """Write weights, tokenizer, processor files, prune and resize settings and a model card; complete or not at all.

    The folder is written beside its final place and renamed when it is whole. With lora.merge_on_export off it holds
    the adapters (and a trained merger) only, as peft loads them onto config.model.path.
    Raises UserError when something else than an earlier export is there.
    """
    folder = folder.absolute()
    _refuse_to_replace(folder)
    with whole_folder(folder, replace=True) as partial:
        _write_weights(partial, model, config)
        files.tokenizer.save_pretrained(partial)  # type: ignore[attr-defined]
        write_processor_files(partial, files, config.resize)
        trained = TrainedWith(config.pruning, config.resize, config.data.grounding_tokens)
        (partial / PRUNE_FILE).write_text(prune_file(trained))
        (partial / "README.md").write_text(model_card(config, files, facts))
    return folder


def _write_weights(folder: Path, model: PreTrainedModel, config: Config) -> None:
    if config.lora.rank and not config.lora.merge_on_export:
        adapters = {name: tensor.contiguous().cpu() for name, tensor in adapter_weights(model).items()}
        save_file(adapters, folder / "adapter_model.safetensors")
        peft_config = copy.copy(model.peft_config["default"])  # type: ignore[attr-defined,index]
        peft_config.base_model_name_or_path = config.model.path
        peft_config.modules_to_save = trained_mergers(model) or None
        peft_config.save_pretrained(folder)
    else:
        model_type = model.config.model_type
        weights = published_layout(model_type, _in_host_memory(export_weights(model)))
        model.save_pretrained(folder, state_dict=weights, save_original_format=model_type not in EXPERTS_INPUTS_FIRST)


def _in_host_memory(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights on the CPU, tied ones still one tensor.

    transformers would copy every view of ZeRO's flat buffers on the device: a second model beside the training.
    """
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    return {
        name: copies.setdefault((tensor.data_ptr(), tensor.shape), tensor.cpu()) for name, tensor in weights.items()
    }


def _refuse_to_replace(folder: Path) -> None:
    """UserError unless the place is free, or holds an earlier export."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / PRUNE_FILE).is_file() or (folder / "checkpoints").exists():
        raise UserError(f"--out: {folder} exists and is not an export; name a new folder")


def export_checkpoint(path: Path, out: Path, *, trust_remote_code: bool = False) -> Path:
    """Export a checkpoint, or the newest complete one of a run's folder, on the CPU, from its own recipe.

    trust_remote_code: a checkpoint alone, which may come from anywhere, does not get to run a model folder's code.
    Raises UserError when there is none, when the model it was trained from is gone, or when `out` is something else.
    """
    import torch

    from training.checkpoint.files import MARKER, FragmentReader, complete_checkpoints
    from training.checkpoint.proof import what_is_broken
    from training.config.recipe import config_from_dict

    if (path / "checkpoints").is_dir():
        path = (complete_checkpoints(path / "checkpoints") or [path])[-1]
    if not (path / MARKER).exists():
        raise UserError(f"{path}: expected a complete checkpoint or a run's folder that holds one")
    if problems := what_is_broken(path):
        raise UserError(f"{path}: {'; '.join(problems)}; give another checkpoint of the run")
    _refuse_to_replace(out)
    config = config_from_dict(yaml.safe_load((path / "config.yaml").read_text()))
    if config.model.trust_remote_code and not trust_remote_code:
        raise UserError(
            f"{path}: its recipe has model.trust_remote_code=true; read the code in {config.model.path}, then give "
            "--trust-remote-code"
        )
    files = load_model_files(config.model)
    state = RunState.from_json(json.loads((path / "state.json").read_text()))
    if state.base and state.base != (found := hash_weights(config.model.path)):
        raise UserError(
            f"{path}: the weights in {config.model.path} are not those that it was trained from (xxh3-128 {found}, "
            f"expected {state.base}); put that model back"
        )
    model = load_model(config.model, attention="sdpa", device=torch.device("cpu"))
    add_adapters(model, config.lora)
    reader = FragmentReader(path)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in reader.shapes:
            # The engine's module holds the stock model as `model`.
            parameters[name.removeprefix("model.")].copy_(reader.read(name, "weight").view(reader.shapes[name]))
    return export_model(out, model, files, config, run_facts(path.parent.parent, state))


def run_facts(run: Path, state: RunState) -> dict[str, str]:
    """What the model card says of a run in `state`, with the newest figures of its metrics.jsonl."""
    step, totals = state.step, state.totals
    ratio = totals.kept_blocks / totals.full_blocks if totals.full_blocks else 1.0
    facts = {"optimizer steps": str(step), "samples seen": f"{totals.num_samples:,}", "retain ratio": f"{ratio:.4f}"}
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    for metric in METRICS:
        if metric.in_card and (values := values_of(metric.name, rows)):
            facts[metric.words] = f"{values[-1]:.4f}"
    if state.changes:
        facts["changed on the way"] = "; ".join(state.changes)
    return facts
