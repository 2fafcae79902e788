"""Adapters: only they are trained, and both ways of exporting give the model that was trained."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pixelprune.model_call import final_hidden
from pixelprune.pack import model_inputs, pack_samples
from tests.conftest import screen
from tests.kernels import needs_plain_layers
from tests.pixelprune.reference import make_sample
from tests.training.debug_run import call, held_out_loss, overrides
from training.checkpoint.export import export_checkpoint, export_model
from training.composition.toy import build_toy_model
from training.config.settings import Config, GroupSettings, ModelSettings, OptimSettings
from training.errors import UserError
from training.loss.supervised import LossSettings
from training.model.loading import load_model, load_model_files
from training.model.lora import LoraSettings, add_adapters
from training.model.parameters import freeze_parts, trains_vision
from training.model.supervised import SupervisedModel
from training.tracking.tracker import read_metrics


@pytest.fixture(scope="module")
def lora_run(data, toy_folder, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    more = ["lora.rank=4", "lora.vit=true", "schedule.max_steps=3", "optim.lr=1e-2", "eval.at_start=false"]
    done = call("launch", "configs/debug.yaml", *overrides(data, toy_folder, runs, *more), "--ranks", "1")
    assert done.returncode == 0, done.stderr[-4000:]
    return runs / "debug"


def test_only_adapted_weights_change(lora_run, toy_folder):
    before = load_file(toy_folder / "model.safetensors")
    after = load_file(lora_run / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    projections = ("_proj.weight", "qkv.weight", "proj.weight", "linear_fc1.weight", "linear_fc2.weight")
    assert all(name.endswith(projections) for name in changed), changed
    assert not any("merger" in name or "embed" in name for name in changed)
    assert any("visual.blocks" in name for name in changed)


def test_the_merged_export_has_the_reported_loss(lora_run, data):
    reported = [row["eval_loss"] for row in read_metrics(lora_run) if "eval_loss" in row][-1]
    assert held_out_loss(lora_run / "export", data) == pytest.approx(reported, rel=1e-4)


def test_a_resume_with_dropout_continues_bit_for_bit(data, toy_folder, tmp_path):
    settings = ["lora.rank=4", "lora.dropout=0.5", "schedule.max_steps=4", "checkpoint.every_steps=2", "optim.lr=1e-2"]
    settings += ["checkpoint.export_at_end=false"]
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    for runs in (undisturbed, resumed):
        if runs is resumed:
            shutil.copytree(undisturbed, resumed)
            shutil.rmtree(resumed / "debug" / "checkpoints" / "step-00000004")
        done = call("launch", "configs/debug.yaml", *overrides(data, toy_folder, runs, *settings), "--ranks", "1")
        assert done.returncode == 0, done.stderr[-4000:]
    losses = [[row["loss"] for row in read_metrics(runs / "debug") if "loss" in row] for runs in (undisturbed, resumed)]
    assert losses[0] == losses[1]
    last = "debug/checkpoints/step-00000004"
    theirs, ours = (load_file(runs / last / "fragments-000-of-001.safetensors") for runs in (undisturbed, resumed))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_exporting_the_checkpoint_gives_the_same_bits(lora_run, tmp_path):
    done = call("training.export", str(lora_run), "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    expected = load_file(lora_run / "export" / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert expected.keys() == exported.keys()
    assert all(torch.equal(expected[name], exported[name]) for name in expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| optimizer steps | 3 |" in card
    state = json.loads(next((lora_run / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["totals"]["num_samples"] == 18


def test_adapters_beside_the_base_bring_the_trained_merger(toy_folder, toy_tokenizer, geometry, tmp_path):
    """What peft loads onto the base has the logits of the model that was trained."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    config = Config(model=ModelSettings(path=str(toy_folder)))
    config.lora = LoraSettings(rank=4, vit=True, train_merger=True, merge_on_export=False)
    model = AutoModelForImageTextToText.from_pretrained(toy_folder).eval()
    add_adapters(model, config.lora)
    torch.manual_seed(0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("deepstack_merger_list" in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = export_model(tmp_path / "export", model, load_model_files(config.model), config, {})
    base = AutoModelForImageTextToText.from_pretrained(toy_folder)
    again = PeftModel.from_pretrained(base, folder).eval()
    pack = pack_samples([make_sample(toy_tokenizer, [screen(3, 5)], "Where?", "(5, 8)")], geometry)
    inputs = model_inputs(pack, geometry, torch.float32)
    with torch.no_grad():
        untrained = AutoModelForImageTextToText.from_pretrained(toy_folder).eval()(**inputs).logits
        expected = model(**inputs).logits
        assert torch.equal(again(**inputs).logits, expected)
    assert not torch.allclose(untrained, expected, atol=1e-2)


def test_only_an_earlier_export_is_replaced(lora_run, tmp_path):
    before = sorted(path.relative_to(lora_run) for path in lora_run.rglob("*"))
    for out in (lora_run, lora_run / "checkpoints"):
        with pytest.raises(UserError, match="exists and is not an export; name a new folder"):
            export_checkpoint(lora_run, out)
    assert sorted(path.relative_to(lora_run) for path in lora_run.rglob("*")) == before
    for kept in ("model.old", "model.partial"):
        (tmp_path / kept).mkdir()
        (tmp_path / kept / "mine").touch()
    for _ in range(2):
        export_checkpoint(lora_run, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.old", "model.partial"]
    assert (tmp_path / "model.old" / "mine").exists()


def test_a_checkpoint_alone_does_not_run_a_model_folders_code(lora_run, tmp_path):
    checkpoint = shutil.copytree(next((lora_run / "checkpoints").glob("step-*")), tmp_path / "step")
    text = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    (checkpoint / "COMPLETE").write_bytes(b"")  # whoever rewrites a recipe rewrites its hash as well
    with pytest.raises(UserError, match=r"trust_remote_code=true; read the code in .*--trust-remote-code"):
        export_checkpoint(checkpoint, tmp_path / "out")
    export_checkpoint(checkpoint, tmp_path / "out", trust_remote_code=True)


def test_adapters_on_the_vit_alone_need_an_image_in_every_pack(toy_folder):
    from transformers import AutoModelForImageTextToText

    frozen = GroupSettings(freeze=True)
    optim = OptimSettings(vit=frozen, merger=frozen, llm=frozen)
    for lora, expected in ((LoraSettings(rank=2), False), (LoraSettings(rank=2, llm=False, vit=True), True)):
        model = AutoModelForImageTextToText.from_pretrained(toy_folder)
        freeze_parts(model, optim)
        add_adapters(model, lora)
        assert trains_vision(model) == expected


def test_exporting_nothing_ends_with_one_line(tmp_path):
    done = call("training.export", str(tmp_path), "-o", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "expected a complete checkpoint" in done.stderr


def test_adapters_of_a_hybrid_model_are_trained_merged_and_exported(tmp_path):
    """Adapters sit on delta-net projections too; the exported folder has the logits of the adapted model."""
    needs_plain_layers("qwen3_5")
    settings = ModelSettings(path=str(build_toy_model(tmp_path / "toy", family="qwen3_5")), dtype="float32")
    files, cpu = load_model_files(settings), torch.device("cpu")
    model = load_model(settings, attention="sdpa", device=cpu)
    lora = LoraSettings(rank=4, vit=True)
    add_adapters(model, lora)
    pack = pack_samples([make_sample(files.tokenizer, [screen(3, 5)], "Where?", "(512, 87)")], files.geometry)

    @torch.no_grad()
    def logits(model) -> torch.Tensor:
        return model.lm_head(final_hidden(model.eval(), pack, files.geometry))

    before = logits(model)
    module = SupervisedModel(model, files.geometry, LossSettings()).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("linear_attn" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):  # in the first step one factor of each adapter is zero
        (module(pack).total / pack.num_supervised).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    adapted = logits(model)
    assert (adapted - before).abs().max() > 1e-2

    exported = export_model(tmp_path / "export", model, files, Config(model=settings, lora=lora), {})
    merged = load_file(exported / "model.safetensors")
    base = load_file(tmp_path / "toy" / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert any(name.endswith("linear_attn.in_proj_qkv.weight") for name in changed)
    plain = load_model(ModelSettings(path=str(exported), dtype="float32"), attention="sdpa", device=cpu)
    torch.testing.assert_close(logits(plain), adapted, atol=1e-4, rtol=1e-4)
