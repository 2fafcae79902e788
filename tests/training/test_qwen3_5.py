"""Qwen3.5 through the trainer: the module that the engine runs, its optimizer groups, and a run on two ranks."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from launch.local import find_deepspeed, free_port
from pixelprune.pack import Pack, VisionGeometry, model_inputs, pack_samples
from pixelprune.records.chat import ChatEncoder
from pixelprune.records.record import Message, Record
from tests.conftest import screen
from tests.kernels import needs_plain_layers
from tests.pixelprune.reference import make_sample
from tests.ranks import ROOT
from tests.training.debug_run import overrides, write_records
from training.composition.toy import build_toy_model
from training.config.settings import ModelSettings, OptimSettings
from training.data.distillation import with_full_rows
from training.loss.supervised import LossSettings
from training.model.loading import enable_recomputation, load_model, load_model_files
from training.model.parameters import PARTS, parameter_groups, part_of
from training.model.supervised import SupervisedModel
from training.teacher.teachers import OnlineTeacher
from training.tracking.tracker import read_metrics

FAMILIES = ["qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"]


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


def uneven_samples(tokenizer, strategy: str = "pred2d") -> list:
    """Uneven lengths, image counts and supervised counts; the last one makes a padded batch of its own."""
    parts = [
        ([screen(3, 5)], "Where is Save?", "(512, 87)"),
        ([], "?", "1"),
        ([screen(4, 3, 1), screen(2, 7, 2)], "Compare them.", "The second is wider, and that took long to find. " * 9),
    ]
    return [make_sample(tokenizer, *part, strategy, str(number)) for number, part in enumerate(parts)]


def plain_inputs(pack: Pack, geometry: VisionGeometry) -> dict:
    """A stock call without any borders: right for one sample."""
    inputs = model_inputs(pack, geometry, torch.float32)
    return {n: v for n, v in inputs.items() if n != "seq_idx" and not n.startswith(("cu_seq", "max_length"))}


def stock_loss_apart(model, samples, geometry: VisionGeometry) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Every sample in a plain stock call: mean cross-entropy over all supervised tokens, its gradients, the logits."""
    num_supervised = sum(sample.num_supervised for sample in samples)
    total, rows = torch.zeros(()), []
    model.zero_grad(set_to_none=True)
    for sample in samples:
        pack = pack_samples([sample], geometry)
        logits = model(**plain_inputs(pack, geometry)).logits[0, pack.logit_index]
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
    needs_plain_layers(family)
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


@pytest.mark.parametrize("decode", [True, False], ids=["decoded on the device", "pixels travel"])
@torch.no_grad()
def test_the_teacher_of_a_hybrid_student_sees_full_rows_apart(decode, folders):
    """Hidden states at supervised tokens are those of stock calls on every unpruned sample; at keep-all, KL is 0."""
    needs_plain_layers("qwen3_5")
    _, model, files = load(folders["qwen3_5"])
    samples = uneven_samples(files.tokenizer)
    full = uneven_samples(files.tokenizer, "none")
    assert any(len(one) < len(other) for one, other in zip(samples, full, strict=True))
    teacher = OnlineTeacher(model, model.lm_head, files.geometry)
    pack = with_full_rows(pack_samples(samples, files.geometry), samples, full, files.geometry, decode=decode)
    rows = []
    for sample in full:
        one = pack_samples([sample], files.geometry)
        rows.append(model(**plain_inputs(one, files.geometry)).logits[0, one.logit_index])
    logits = model.lm_head(teacher.hidden(pack.full_pack()))
    torch.testing.assert_close(logits, torch.cat(rows), atol=1e-5, rtol=1e-5)

    loss = LossSettings(ce_weight=0.0, kd_weight=1.0)
    module = SupervisedModel(model, files.geometry, loss, teacher).train()
    assert module(pack).total / pack.num_supervised > 1e-4, "pruning changes what the student says"
    same = with_full_rows(pack_samples(full, files.geometry), full, full, files.geometry, decode=decode)
    assert abs(module(same).total / pack.num_supervised) < 1e-6


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


# The form of the small published models' template: the newest answer stands behind an empty reasoning block, earlier
# answers without one, and the prompt ends in the block unless reasoning is asked for.
REASONING_TEMPLATE = """\
{%- set found = namespace(last=0) -%}
{%- for message in messages if message.role == 'user' -%}
{%- set found.last = messages.index(message) -%}
{%- endfor -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' and loop.index0 > found.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{{- message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' + ('' if enable_thinking else '\\n</think>\\n\\n') -}}
{%- endif -%}
"""


def test_answers_behind_an_empty_reasoning_block_are_what_is_supervised(folders):
    """The tokens in front of the last answer are the generation prompt's, so training and inference agree."""
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen3_5"])
    tokenizer.chat_template = REASONING_TEMPLATE
    turns = [("user", "Where is Save?"), ("assistant", "(5, 8)"), ("user", "And Open?"), ("assistant", "(3, 7)")]
    encoded = ChatEncoder(tokenizer).encode(Record(tuple(Message(role, (text,)) for role, text in turns)))
    spoken = tokenizer.decode(encoded.input_ids[encoded.supervised])
    assert spoken == "(5, 8)<|im_end|>(3, 7)<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns[:-1]], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<think>\n\n</think>\n\n")
    in_front = encoded.input_ids[
        : np.flatnonzero(encoded.supervised)[-1] + 1 - len(tokenizer("(3, 7)<|im_end|>").input_ids)
    ]
    assert in_front.tolist() == tokenizer(prompt, add_special_tokens=False).input_ids


def start(data: Path, model: Path, runs: Path, name: str) -> subprocess.Popen:
    """The debug recipe on two ranks through the trainer's entry point, in a process group of its own."""
    more = overrides(data, model, runs, f"run.name={name}", "schedule.max_steps=8", "checkpoint.every_steps=2")
    command = [
        find_deepspeed(), "--num_accelerators", "2", "--master_port", str(free_port()),
        "--module", "training.train", "configs/debug_qwen3_5.yaml", *more,
    ]  # fmt: skip
    log = (runs / f"{name}.log").open("a")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen, runs: Path, name: str) -> dict[int, float]:
    """Training loss by step, when the run has ended well."""
    code = process.wait(timeout=300)
    assert code == 0, (runs / f"{name}.log").read_text()[-6000:]
    return {row["step"]: row["loss"] for row in read_metrics(runs / name) if "loss" in row}


def kill_behind_a_checkpoint(process: subprocess.Popen, folder: Path) -> int:
    """SIGKILL to launcher and ranks once step 2 is saved and step 3 is trained; the last step it reported."""
    deadline = time.monotonic() + 300
    saved = folder / "checkpoints" / "step-00000002" / "COMPLETE"
    while time.monotonic() < deadline:
        steps = [row["step"] for row in read_metrics(folder) if "loss" in row] if saved.exists() else []
        if steps and max(steps) >= 3:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return max(steps)
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.1)
    raise AssertionError("no step 3 behind a checkpoint of step 2")


@pytest.mark.ranks
def test_two_ranks_learn_and_continue_bit_equal_after_a_kill(tmp_path):
    """Padded batches, linear-attention weights and their optimizer states come back as they were."""
    needs_plain_layers("qwen3_5")
    write_records(tmp_path, "train", 12)
    write_records(tmp_path, "eval", 2)
    model = build_toy_model(tmp_path / "toy", family="qwen3_5")
    whole = finish(start(tmp_path, model, tmp_path, "whole"), tmp_path, "whole")
    assert list(whole) == list(range(1, 9))
    assert whole[8] < whole[1] - 0.1
    # Rows are packed in padded batches on the CPU; either rank says so once.
    assert (tmp_path / "whole.log").read_text().count("unpacked into padded batches") == 2

    killed_at = kill_behind_a_checkpoint(start(tmp_path, model, tmp_path, "killed"), tmp_path / "killed")
    continued = finish(start(tmp_path, model, tmp_path, "killed"), tmp_path, "killed")
    assert killed_at < 8
    assert re.search(r"continuing\s+after\s+step\s+[246]", (tmp_path / "killed.log").read_text())
    assert continued == whole

    exported = load_model(
        ModelSettings(path=str(tmp_path / "killed" / "export")), attention="sdpa", device=torch.device("cpu")
    )
    assert exported.config.model_type == "qwen3_5"
