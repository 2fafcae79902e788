"""Qwen3.5 through the trainer: the module that the engine runs, its optimizer groups, and a run on two ranks."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from launch.local import find_deepspeed
from launch.ports import free_port
from pixelprune.pack import VisionGeometry, model_inputs, pack_samples
from tests.conftest import screen
from tests.pixelprune.reference import make_sample
from tests.ranks import ROOT
from training.config import ModelSettings, OptimSettings
from training.loss import LossSettings
from training.model import SupervisedModel, enable_recomputation, load_model, load_model_files
from training.parameters import PARTS, parameter_groups, part_of
from training.toy_model import build_toy_model, texts_of_records

FAMILIES = ["qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"]
SAMPLES = ROOT / "data_tools" / "samples"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    return {name: str(build_toy_model(root / name, family=name)) for name in FAMILIES}


def load(folder: str):
    """The model as a run loads it, with delta nets that remember over a whole sample."""
    settings = ModelSettings(path=folder, dtype="float32")
    model = load_model(settings, attention="sdpa", device=torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(math.log(0.05))
    return settings, model, load_model_files(settings)


def uneven_samples(tokenizer) -> list:
    """Uneven lengths, image counts and supervised counts; the last one makes a padded batch of its own."""
    parts = [
        ([screen(3, 5)], "Where is Save?", "(512, 87)"),
        ([], "?", "1"),
        ([screen(4, 3, 1), screen(2, 7, 2)], "Compare them.", "The second is wider, and that took long to find. " * 9),
    ]
    return [make_sample(tokenizer, *part, name=str(number)) for number, part in enumerate(parts)]


def stock_loss_apart(model, samples, geometry: VisionGeometry) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Every sample in a plain stock call: mean cross-entropy over all supervised tokens, its gradients, the logits."""
    num_supervised = sum(sample.num_supervised for sample in samples)
    total, rows = torch.zeros(()), []
    model.zero_grad(set_to_none=True)
    for sample in samples:
        pack = pack_samples([sample], geometry)
        inputs = model_inputs(pack, geometry, torch.float32)
        plain = {n: v for n, v in inputs.items() if n != "seq_idx" and not n.startswith(("cu_seq", "max_length"))}
        logits = model(**plain).logits[0, pack.logit_index]
        loss = F.cross_entropy(logits, pack.labels, reduction="sum") / num_supervised
        loss.backward()
        total += loss.detach()
        rows.append(logits.detach())
    return total, gradients_of(model), torch.cat(rows)


def gradients_of(model) -> list[torch.Tensor]:
    gradients = [p.grad for p in model.parameters()]
    return [torch.zeros_like(p) if g is None else g.clone() for p, g in zip(model.parameters(), gradients, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [0, 1], ids=["kept", "recomputed"])
def test_the_engines_module_equals_samples_apart(family, recompute, folders):
    """Logits, loss and gradients of a pack in training mode, as the engine sees them."""
    settings, model, files = load(folders[family])
    model.train()
    settings.recompute_vit = settings.recompute_llm = recompute
    enable_recomputation(model, settings)
    samples = uneven_samples(files.tokenizer)
    loss_apart, gradients_apart, logits_apart = stock_loss_apart(model, samples, files.geometry)
    module = SupervisedModel(model, files.geometry, LossSettings())
    pack = pack_samples(samples, files.geometry)
    model.zero_grad(set_to_none=True)
    sums = module(pack)
    loss = sums.total / pack.num_supervised
    loss.backward()
    with torch.no_grad():
        logits = model.lm_head(module.hidden_at_supervised(pack))
    torch.testing.assert_close(logits, logits_apart, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.detach(), loss_apart, atol=1e-6, rtol=1e-6)
    names = [name for name, _ in model.named_parameters()]
    for name, got, expected in zip(names, gradients_of(model), gradients_apart, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert expected.any() or "pos_embed" in name, f"{name} is not trained, so nothing was compared"


def test_groups_and_decay_of_the_hybrid_family(folders):
    """What Qwen3.5 adds is grouped by name and shape: vectors are not decayed, the convolution's filter is."""
    _, model, files = load(folders["qwen3_5_moe"])
    module = SupervisedModel(model, files.geometry, LossSettings())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = {group["name"]: group for group in parameter_groups(module, OptimSettings())}
    assert {group["part"] for group in groups.values()} == set(PARTS)
    members = {group: {names[id(p)] for p in entry["params"]} for group, entry in groups.items()}
    assert sum(map(len, members.values())) == len(names), "every parameter in exactly one group"
    for group, inside in members.items():
        assert {part_of(name) for name in inside} == {groups[group]["part"]}

    def ending(suffix: str) -> set[str]:
        found = {name for name in names.values() if name.endswith(suffix)}
        assert found
        return found

    undecayed = ["A_log", "dt_bias", "linear_attn.norm.weight", "input_layernorm.weight", "q_norm.weight"]
    for suffix in [*undecayed, "language_model.norm.weight", "embed_tokens.weight"]:
        assert ending(suffix) <= members["llm_no_decay"]
    for suffix in ["conv1d.weight", "in_proj_qkv.weight", "in_proj_b.weight", "mlp.gate.weight", "experts.down_proj"]:
        assert ending(suffix) <= members["llm"]
    assert ending("visual.merger.linear_fc1.weight") <= members["merger"]
    assert ending("visual.merger.norm.weight") <= members["merger_no_decay"]
    assert ending("visual.patch_embed.proj.weight") <= members["vit"]
    assert ending("visual.pos_embed.weight") <= members["vit_no_decay"]
    assert groups["llm_no_decay"]["weight_decay"] == 0 < groups["llm"]["weight_decay"]


def train(folder: Path, name: str, model: str, num_ranks: int, *overrides: str) -> tuple[list[dict], str]:
    """Rows of metrics.jsonl and the log of a run of the debug recipe through the trainer's entry point."""
    command = [
        find_deepspeed(), "--num_accelerators", str(num_ranks), "--master_port", str(free_port()),
        "--module", "training.train", "configs/debug_qwen3_5.yaml", f"model.path={model}", f"run.folder={folder}",
        f"run.name={name}", f"data.index_dir={folder / 'index'}", *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return rows, done.stdout + done.stderr


@pytest.mark.ranks
def test_two_ranks_train_the_debug_recipe(tmp_path):
    """One launch: it learns, says once per rank how rows are packed, and exports a model that loads."""
    texts = texts_of_records(SAMPLES / "train.jsonl")
    model = build_toy_model(tmp_path / "toy", texts, family="qwen3_5")
    rows, log = train(tmp_path, "two", str(model), 2)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.1
    assert log.count("unpacked into padded batches") == 2
    exported = load_model(
        ModelSettings(path=str(tmp_path / "two" / "export")), attention="sdpa", device=torch.device("cpu")
    )
    assert exported.config.model_type == "qwen3_5"
