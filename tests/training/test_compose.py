"""Composition: text behaves as the language checkpoint, images as the vision checkpoint, and misfits are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from training import compose
from training.composition import write
from training.composition.plan import EMBEDDING, HEAD, LANGUAGE, plan_composition
from training.composition.toy import build_tokenizer, build_toy_model
from training.composition.write import write_composition, write_random
from training.errors import UserError
from training.model.tensor_files import TensorFiles, write_shards

VISION_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


CONFIGS = {"qwen3_vl": Qwen3Config, "qwen3_5": Qwen3_5TextConfig}
TEXT_MODELS = {"qwen3_vl": Qwen3ForCausalLM, "qwen3_5": Qwen3_5ForCausalLM}
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
OWN = {
    "qwen3_vl": {"max_position_embeddings": 4096, "rope_parameters": ROPE},
    # Other layers and another rope than the toy's.
    "qwen3_5": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2]},
    },
}


def write_language(folder: Path, tokenizer, family: str = "qwen3_vl", *, tied: bool, **sizes) -> Path:
    """A text-only checkpoint for a family's vision tower, whose embedding fits the tokenizer."""
    settings = {"vocab_size": len(tokenizer), "tie_word_embeddings": tied} | SIZES | OWN[family] | sizes
    torch.manual_seed(7)
    TEXT_MODELS[family](CONFIGS[family](**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Parts:
    vision: Path
    language: Path
    out: Path
    family: str

    def stored(self) -> tuple[dict, dict, dict]:
        """Tensors of (composed, vision, language), the last under their names in a multimodal model."""
        out, ours, theirs = (load_file(one / "model.safetensors") for one in (self.out, self.vision, self.language))
        if not any(name.startswith(LANGUAGE) for name in theirs):
            theirs = {name.replace("model.", LANGUAGE, 1): tensor for name, tensor in theirs.items()}
        return out, ours, theirs


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Vision checkpoints of both families."""
    return {family: build_toy_model(tmp_path_factory.mktemp(family) / "toy", family=family) for family in CONFIGS}


@pytest.fixture(scope="module", params=[(f, t) for f in CONFIGS for t in (True, False)], ids=str)
def parts(request, toys, toy_tokenizer, tmp_path_factory):
    """A vision checkpoint, a text-only one, and what was composed of them."""
    family, tied = request.param
    folder = tmp_path_factory.mktemp("compose")
    language = write_language(folder / "language", toy_tokenizer, family, tied=tied)
    out = write_composition(plan_composition(toys[family], language), toys[family], language, folder / "out")
    return Parts(toys[family], language, out, family)


@torch.no_grad()
def test_on_text_the_composed_model_is_the_language_model(parts, toy_tokenizer):
    ids = torch.tensor([toy_tokenizer("Open the menu and confirm with OK (512, 87).")["input_ids"]])
    composed = AutoModelForImageTextToText.from_pretrained(parts.out).eval()
    text_only = TEXT_MODELS[parts.family].from_pretrained(parts.language).eval()
    logits, expected = composed(input_ids=ids).logits, text_only(input_ids=ids).logits
    # Vision tokens have other embeddings, and with a tied head other logits.
    is_text = torch.ones(expected.shape[-1], dtype=torch.bool)
    is_text[toy_tokenizer.convert_tokens_to_ids(VISION_TOKENS)] = False
    torch.testing.assert_close(logits[..., is_text], expected[..., is_text], rtol=1e-5, atol=1e-5)
    assert composed.config.text_config.rope_parameters["rope_theta"] == 1e6
    # The comparison sees theta: with the vision checkpoint's, the logits are others.
    config = AutoConfig.from_pretrained(parts.out)
    config.text_config.rope_parameters["rope_theta"] = 5e2
    other = AutoModelForImageTextToText.from_pretrained(parts.out, config=config).eval()(input_ids=ids).logits
    assert (other - expected)[..., is_text].abs().max() > 1e-3


@torch.no_grad()
def test_image_features_are_those_of_the_vision_checkpoint(parts):
    arguments = {"pixel_values": torch.randn(16, 1536), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    features = [
        AutoModelForImageTextToText.from_pretrained(folder).eval().model.get_image_features(**arguments)
        for folder in (parts.vision, parts.out)
    ]
    assert features[0].pooler_output[0].abs().sum() > 0
    assert torch.equal(features[0].pooler_output[0], features[1].pooler_output[0])
    if parts.family == "qwen3_vl":
        layers = [torch.cat([part for layer in one.deepstack_features for part in layer]) for one in features]
        assert layers[0].abs().sum() > 0
        assert torch.equal(*layers)


def test_every_tensor_is_where_it_should_come_from(parts, toy_tokenizer):
    stored, ours, theirs = parts.stored()
    rows = toy_tokenizer.convert_tokens_to_ids(VISION_TOKENS)
    for name, tensor in stored.items():
        if name.startswith("model.visual."):
            assert torch.equal(tensor, ours[name]), name
        elif name in (EMBEDDING, HEAD):
            expected = theirs[name].clone()
            expected[rows] = ours[EMBEDDING][rows]
            assert torch.equal(tensor, expected), name
        else:
            assert torch.equal(tensor, theirs[name]), name
    assert (HEAD in stored) == (HEAD in theirs)
    assert AutoTokenizer.from_pretrained(parts.out).chat_template == toy_tokenizer.chat_template
    card = (parts.out / "README.md").read_text()
    assert str(parts.language) in card
    assert "<|image_pad|>" in card
    assert "1e+06" in card
    assert ("DeepStack" in card) == (parts.family == "qwen3_vl")
    assert ("2 linear attention, 1 full attention" in card) == (parts.family == "qwen3_5")


def test_the_composed_folder_loads_without_missing_or_unknown_weights(parts):
    _, report = AutoModelForImageTextToText.from_pretrained(parts.out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_the_language_model_of_another_multimodal_checkpoint(family, toys, toy_tokenizer, tmp_path):
    """All of it: its layers, its rope and its own rows of the vision tokens; its vision tower and its layers for
    multi-token prediction stay out and are counted."""
    language = build_toy_model(tmp_path / "language", family=family, seed=7)
    tensors = load_file(language / "model.safetensors")
    save_file(tensors | {"mtp.norm.weight": torch.ones(192)}, language / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((language / "config.json").read_text())
    content["text_config"]["rope_parameters"]["rope_theta"] = 1e4
    (language / "config.json").write_text(json.dumps(content))
    composition = plan_composition(toys[family], language)
    num_vision = sum(name.startswith("model.visual.") for name in tensors)
    facts = composition.facts["left out of the language checkpoint"]
    assert facts == f"multi-token prediction (1 tensors), vision tower ({num_vision} tensors)"
    out = write_composition(composition, toys[family], language, tmp_path / "out")
    stored, ours = load_file(out / "model.safetensors"), load_file(toys[family] / "model.safetensors")
    assert stored.keys() == ours.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, (ours if name.startswith("model.visual.") else tensors)[name]), name
    ids = torch.tensor([toy_tokenizer("Open the menu and confirm with OK (512, 87).")["input_ids"]])
    logits = [AutoModelForImageTextToText.from_pretrained(one).eval()(input_ids=ids).logits for one in (out, language)]
    assert torch.equal(*logits)


def test_a_text_model_cut_out_of_a_multimodal_checkpoint(toys, tmp_path, toy_tokenizer):
    """It keeps the multimodal names of its tensors under a text-only config."""
    source = build_toy_model(tmp_path / "source", family="qwen3_5", seed=7)
    language = tmp_path / "language"
    Qwen3_5ForCausalLM.from_pretrained(source).save_pretrained(language)
    toy_tokenizer.save_pretrained(language)
    assert EMBEDDING in load_file(language / "model.safetensors")
    out = write_composition(plan_composition(toys["qwen3_5"], language), toys["qwen3_5"], language, tmp_path / "out")
    layer = "model.language_model.layers.2.linear_attn.A_log"
    assert torch.equal(load_file(out / "model.safetensors")[layer], load_file(source / "model.safetensors")[layer])


def test_language_tensors_keep_their_precision_unless_one_is_asked_for(toys, toy_tokenizer, tmp_path):
    """A delta net's decay may be stored in float32 among bfloat16; rounding it in silence would change the model."""
    language = write_language(tmp_path / "language", toy_tokenizer, "qwen3_5", tied=True)
    tensors = load_file(language / "model.safetensors")
    mixed = {name: tensor if name.endswith("A_log") else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(mixed, language / "model.safetensors", metadata={"format": "pt"})
    composition = plan_composition(toys["qwen3_5"], language)
    stored = load_file(write_composition(composition, toys["qwen3_5"], language, tmp_path / "a") / "model.safetensors")
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name.endswith("A_log") else torch.bfloat16), name
    name = "model.language_model.layers.0.linear_attn.A_log"
    assert torch.equal(stored[name], tensors["model.layers.0.linear_attn.A_log"])
    assert composition.facts["precision"] == "bfloat16; 2 tensors float32, as the language model has them"
    asked = write_composition(composition, toys["qwen3_5"], language, tmp_path / "b", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(asked / "model.safetensors").values()} == {torch.bfloat16}


def test_a_tied_config_with_another_head_in_its_files_is_refused(toy_folder, toy_tokenizer, tmp_path):
    language = write_language(tmp_path / "language", toy_tokenizer, tied=True)
    tensors = load_file(language / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {HEAD: embedding.clone()}, language / "model.safetensors", metadata={"format": "pt"})
    assert HEAD not in plan_composition(toy_folder, language).sources
    save_file(tensors | {HEAD: embedding + 1}, language / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="ties the output head to the embedding, its files hold another head"):
        plan_composition(toy_folder, language)


def test_a_longer_vision_vocabulary_brings_its_rows(toy_folder, toy_tokenizer, tmp_path):
    """A language checkpoint from before the vision tokens: same ids for what it has, fewer rows."""
    num_rows = len(toy_tokenizer) - 20
    language = write_language(tmp_path / "language", toy_tokenizer, tied=True, vocab_size=num_rows)
    path = language / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: number for token, number in vocab.items() if number < num_rows}
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    out = write_composition(plan_composition(toy_folder, language), toy_folder, language, tmp_path / "out")
    embedding = load_file(out / "model.safetensors")[EMBEDDING]
    ours = load_file(toy_folder / "model.safetensors")[EMBEDDING]
    theirs = load_file(language / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding[num_rows:], ours[num_rows:])
    assert torch.equal(embedding[8:num_rows], theirs[8:])


def test_another_width_is_refused_unless_the_merger_may_start_anew(toy_folder, toy_tokenizer, tmp_path):
    language = write_language(tmp_path / "language", toy_tokenizer, tied=True, hidden_size=128)
    with pytest.raises(
        UserError, match=r"width 192 \(out_hidden_size\), the language model 128.*--reinit-merger-output"
    ):
        plan_composition(toy_folder, language)
    composition = plan_composition(toy_folder, language, reinit_merger_output=True)
    assert sorted(composition.new) == sorted(
        f"model.visual.{part}.linear_fc2.{kind}"
        for part in ("merger", *(f"deepstack_merger_list.{i}" for i in range(3)))
        for kind in ("weight", "bias")
    )
    out = write_composition(composition, toy_folder, language, tmp_path / "out")
    model, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    weight = model.model.visual.merger.linear_fc2.weight
    assert weight.shape[0] == 128
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)


BAD_PARTS = {
    "too few layers": ({"num_hidden_layers": 2}, "DeepStack feeds the first 3 layers, the language model has 2"),
    "head_dim": ({"head_dim": 64}, r"mrope_section \[6, 5, 5\] sums to 16, expected .* = 32"),
    "rope": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        "rope_type 'linear' cannot be carried over",
    ),
}


BAD_FAMILIES = {
    ("qwen3_vl", "qwen3_5"): "expected a qwen3 or qwen3_vl checkpoint for a qwen3_vl vision tower, got qwen3_5_text",
    ("qwen3_5", "qwen3_vl"): "expected a qwen3_5_text or qwen3_5 checkpoint for a qwen3_5 vision tower, got qwen3",
}


@pytest.mark.parametrize("families", BAD_FAMILIES, ids=" and ".join)
def test_a_language_model_of_the_other_family_is_refused(families, toys, toy_tokenizer, tmp_path):
    vision, text = families
    language = write_language(tmp_path / "language", toy_tokenizer, text, tied=True)
    with pytest.raises(UserError, match=BAD_FAMILIES[families]):
        plan_composition(toys[vision], language)


def test_experts_are_refused_by_name(toy_folder, toy_tokenizer, tmp_path):
    experts = build_toy_model(tmp_path / "experts", family="qwen3_vl_moe")
    with pytest.raises(UserError, match="--vision: expected a qwen3_vl or qwen3_5 checkpoint, got qwen3_vl_moe"):
        plan_composition(experts, toy_folder)


def test_mrope_sections_must_fill_the_rotated_part_of_a_head(toys, toy_tokenizer, tmp_path):
    """A text-only config may leave the sections out; those of the vision checkpoint, [3, 3, 2], must fit then."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    language = write_language(tmp_path / "a", toy_tokenizer, "qwen3_5", tied=True, rope_parameters=rope)
    composition = plan_composition(toys["qwen3_5"], language)
    assert composition.config.text_config.rope_parameters["mrope_section"] == [3, 3, 2]
    assert composition.facts["mrope_section"] == "[3, 3, 2], of the vision checkpoint"
    rope["partial_rotary_factor"] = 0.25
    language = write_language(tmp_path / "b", toy_tokenizer, "qwen3_5", tied=True, rope_parameters=rope)
    with pytest.raises(UserError, match=r"\[3, 3, 2\] sums to 8, expected head_dim \* partial_rotary_factor / 2 = 4"):
        plan_composition(toys["qwen3_5"], language)


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_do_not_fit_are_refused(case, toy_folder, toy_tokenizer, tmp_path):
    sizes, message = BAD_PARTS[case]
    language = write_language(tmp_path / "language", toy_tokenizer, tied=True, **sizes)
    with pytest.raises(UserError, match=message):
        plan_composition(toy_folder, language)


def test_tokenizers_with_other_ids_are_refused(toy_folder, toy_tokenizer, tmp_path):
    other = build_tokenizer(["zebras jump over quiet hedges " * 3])
    language = write_language(tmp_path / "language", other, tied=True)
    with pytest.raises(UserError, match="the tokenizers disagree"):
        plan_composition(toy_folder, language)


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("side", ["vision", "language"])
def test_a_folder_without_a_tokenizer_is_refused(side, toys, tmp_path, toy_tokenizer):
    """transformers makes a tokenizer of one token out of it; all other rows would come from the vision checkpoint."""
    folders = {"vision": shutil.copytree(toys["qwen3_5"], tmp_path / "vision")}
    folders["language"] = write_language(tmp_path / "language", toy_tokenizer, "qwen3_5", tied=True)
    for path in folders[side].glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=f"--{side}: .* holds no tokenizer"):
        plan_composition(folders["vision"], folders["language"])


def test_the_vision_checkpoint_does_not_scale_the_language_models_rope(toys, toy_tokenizer, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    rope = {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2]}
    language = write_language(tmp_path / "language", toy_tokenizer, "qwen3_5", tied=True, rope_parameters=rope | yarn)
    vision = shutil.copytree(toys["qwen3_5"], tmp_path / "vision")
    scaled = yarn | {"attention_factor": 2.0, "beta_fast": 8.0}
    edit_json(vision / "config.json", lambda c: c["text_config"]["rope_parameters"].update(scaled))
    composition = plan_composition(vision, language)
    assert composition.config.text_config.rope_parameters == rope | yarn | {"mrope_interleaved": True}


def test_rows_of_an_mrope_that_nobody_states_are_not_guessed(toys, toy_tokenizer, tmp_path):
    vision = shutil.copytree(toys["qwen3_5"], tmp_path / "vision")
    edit_json(vision / "config.json", lambda c: c["text_config"]["rope_parameters"].pop("mrope_section"))
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    language = write_language(tmp_path / "language", toy_tokenizer, "qwen3_5", tied=True, rope_parameters=rope)
    with pytest.raises(UserError, match="--vision: expected rope_parameters with mrope_section"):
        plan_composition(vision, language)


@pytest.mark.parametrize("side", ["vision", "language"])
def test_quantised_checkpoints_are_refused(side, toys, tmp_path):
    folders = {name: shutil.copytree(toys["qwen3_5"], tmp_path / name) for name in ("vision", "language")}
    edit_json(folders[side] / "config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(UserError, match=f"--{side}: .* holds quantised weights"):
        plan_composition(folders["vision"], folders["language"])


def test_the_config_names_nothing_that_is_not_there(toys, toy_tokenizer, tmp_path):
    vision = shutil.copytree(toys["qwen3_5"], tmp_path / "vision")
    edit_json(vision / "config.json", lambda c: c["text_config"].update(mtp_num_hidden_layers=1))
    language = write_language(tmp_path / "language", toy_tokenizer, "qwen3_5", tied=True)
    edit_json(language / "config.json", lambda c: c.update(mtp_num_hidden_layers=1))
    out = write_composition(plan_composition(vision, language), vision, language, tmp_path / "out")
    text = (out / "config.json").read_text()
    assert json.loads(text)["text_config"]["mtp_num_hidden_layers"] == 0
    assert str(tmp_path) not in text
    assert "ForCausalLM" not in text


def test_the_files_that_from_pretrained_reads_are_the_ones_taken(toys, tmp_path):
    """One file before shards: saving in another number of files leaves the old ones."""
    language = build_toy_model(tmp_path / "language", family="qwen3_5", seed=7)
    other = AutoModelForImageTextToText.from_pretrained(build_toy_model(tmp_path / "x", family="qwen3_5", seed=8))
    whole = (language / "model.safetensors").read_bytes()
    other.save_pretrained(language, max_shard_size="2MB")
    (language / "model.safetensors").write_bytes(whole)
    expected = AutoModelForImageTextToText.from_pretrained(language).state_dict()[EMBEDDING]
    out = write_composition(plan_composition(toys["qwen3_5"], language), toys["qwen3_5"], language, tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")[EMBEDDING], expected)
    # The shards themselves, and what an index is for.
    (language / "model.safetensors").unlink()
    out = write_composition(plan_composition(toys["qwen3_5"], language), toys["qwen3_5"], language, tmp_path / "out2")
    assert torch.equal(load_file(out / "model.safetensors")[EMBEDDING], other.state_dict()[EMBEDDING])


BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no usable config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "has no usable config.json"),
    "half a download": (
        lambda folder: os.truncate(folder / "model.safetensors", 1000), "its weights cannot be read",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "expected weights in model.safetensors"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_cost_one_line(name, toys, tmp_path, capsys):
    damage, message = BROKEN[name]
    language = shutil.copytree(toys["qwen3_5"], tmp_path / "language")
    damage(language)
    arguments = ["--vision", str(toys["qwen3_5"]), "--language", str(language), "--out", str(tmp_path / "out")]
    assert compose.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert sum(line.startswith("error: ") for line in said) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["language"]


def test_a_failed_composition_leaves_nothing_and_others_folders_alone(toys, toy_tokenizer, tmp_path, monkeypatch):
    language = write_language(tmp_path / "language", toy_tokenizer, "qwen3_5", tied=True)
    theirs = tmp_path / "out.partial"
    theirs.mkdir()
    (theirs / "mine.txt").write_text("x")
    composition = plan_composition(toys["qwen3_5"], language)
    with monkeypatch.context() as patch:
        patch.setattr(write, "_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_composition(composition, toys["qwen3_5"], language, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["language", "out.partial"]
    write_composition(composition, toys["qwen3_5"], language, tmp_path / "out")
    assert (theirs / "mine.txt").exists()


def test_what_a_killed_composition_left_is_named(toys, tmp_path, caplog):
    left = tmp_path / ".out.1234.partial"
    left.mkdir()
    write_composition(
        plan_composition(toys["qwen3_5"], toys["qwen3_5"]), toys["qwen3_5"], toys["qwen3_5"], tmp_path / "out"
    )
    assert f"{left} is left of a writer that was killed" in caplog.text
    assert left.exists(), "it may still run, on another host"


def test_a_folder_that_cannot_be_written_costs_one_line(toys, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    arguments = ["--vision", str(toys["qwen3_5"]), "--language", str(toys["qwen3_5"])]
    assert compose.main([*arguments, "--out", str(tmp_path / "file" / "out")]) == 2
    assert re.search(r"^error: .*/file/out: Not a directory$", capsys.readouterr().err, re.MULTILINE)


def test_random_weights_need_an_image_text_configuration(toy_tokenizer, tmp_path):
    language = write_language(tmp_path / "language", toy_tokenizer, "qwen3_5", tied=True)
    with pytest.raises(UserError, match=r"--random: .* holds a qwen3_5_text config, expected one of an image-text"):
        write_random(language, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_the_command_line_writes_a_model_and_refuses_in_one_line(toy_folder, toy_tokenizer, tmp_path, capsys):
    language = write_language(tmp_path / "language", toy_tokenizer, tied=True)
    command = ["--vision", str(toy_folder), "--language", str(language), "--out", str(tmp_path / "out")]
    assert compose.main([*command, "--dtype", "bfloat16"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")[EMBEDDING].dtype == torch.bfloat16
    assert compose.main(command) == 2
    assert "exists; name a new folder" in capsys.readouterr().err
    assert compose.main(["--vision", str(language), "--language", str(language), "--out", str(tmp_path / "b")]) == 2
    assert "expected a qwen3_vl or qwen3_5 checkpoint, got qwen3" in " ".join(capsys.readouterr().err.split())
    assert compose.main(["--vision", "no/folder/here", "--language", str(language), "--out", str(tmp_path / "b")]) == 2


def test_random_weights_for_any_configuration(toy_folder, tmp_path):
    first, second, other = (
        load_file(write_random(toy_folder, tmp_path / name, seed=seed) / "model.safetensors")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.keys() == load_file(toy_folder / "model.safetensors").keys()
    assert torch.equal(first[EMBEDDING], second[EMBEDDING])
    assert not torch.equal(first[EMBEDDING], other[EMBEDDING])


def test_shards_hold_every_tensor_once(tmp_path):
    tensors = {f"t{i}": torch.randn(10, i + 1) for i in range(7)}
    total = write_shards(tmp_path, tensors.items(), max_shard_bytes=300)
    assert total == sum(t.numel() * 4 for t in tensors.values())
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with TensorFiles(tmp_path) as files:
        assert files.names == sorted(tensors)
        assert all(torch.equal(files.read(name), tensor) for name, tensor in tensors.items())
        assert torch.equal(files.rows("t6", [3, 9]), tensors["t6"][[3, 9]])
    next(tmp_path.glob("model-00001-*.safetensors")).rename(tmp_path / "gone")
    with pytest.raises(UserError, match="which is not there"):
        TensorFiles(tmp_path)
