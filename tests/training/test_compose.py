"""Composition: text behaves as the language checkpoint, images as the vision checkpoint, and misfits are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from training import compose
from training.compose import EMBEDDING, HEAD, plan_composition, write_composition, write_random
from training.errors import UserError
from training.tensor_files import TensorFiles, write_shards

VISION_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


def write_language(folder: Path, tokenizer, *, tied: bool, seed: int = 7, **sizes) -> Path:
    """A text-only Qwen3 checkpoint whose embedding fits the tokenizer."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    } | sizes
    torch.manual_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def parts(request, toy_folder, toy_tokenizer, tmp_path_factory):
    """(vision folder, language folder, composed folder)."""
    folder = tmp_path_factory.mktemp("compose")
    language = write_language(folder / "language", toy_tokenizer, tied=request.param)
    out = write_composition(plan_composition(toy_folder, language), toy_folder, language, folder / "out")
    return toy_folder, language, out


@torch.no_grad()
def test_on_text_the_composed_model_is_the_language_model(parts, toy_tokenizer):
    _, language, out = parts
    ids = torch.tensor([toy_tokenizer("Open the menu and confirm with OK (512, 87).")["input_ids"]])
    composed = AutoModelForImageTextToText.from_pretrained(out).eval()
    text_only = Qwen3ForCausalLM.from_pretrained(language).eval()
    logits, expected = composed(input_ids=ids).logits, text_only(input_ids=ids).logits
    # Vision tokens have other embeddings, and with a tied head other logits.
    is_text = torch.ones(expected.shape[-1], dtype=torch.bool)
    is_text[toy_tokenizer.convert_tokens_to_ids(VISION_TOKENS)] = False
    torch.testing.assert_close(logits[..., is_text], expected[..., is_text], rtol=1e-5, atol=1e-5)
    with_old_theta = AutoModelForImageTextToText.from_pretrained(out)
    assert with_old_theta.config.text_config.rope_parameters["rope_theta"] == 1e6


@torch.no_grad()
def test_image_features_are_those_of_the_vision_checkpoint(parts):
    vision, _, out = parts
    arguments = {"pixel_values": torch.randn(16, 1536), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    features = [
        AutoModelForImageTextToText.from_pretrained(folder).eval().model.get_image_features(**arguments)
        for folder in (vision, out)
    ]
    assert torch.equal(features[0].pooler_output[0], features[1].pooler_output[0])
    layers = [torch.cat([part for layer in one.deepstack_features for part in layer]) for one in features]
    assert layers[0].abs().sum() > 0
    assert torch.equal(*layers)


def test_every_tensor_is_where_it_should_come_from(parts, toy_tokenizer):
    vision, language, out = parts
    stored, ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, vision, language))
    rows = toy_tokenizer.convert_tokens_to_ids(VISION_TOKENS)
    for name, tensor in stored.items():
        if name.startswith("model.visual."):
            assert torch.equal(tensor, ours[name]), name
        elif name in (EMBEDDING, HEAD):
            source = "model.embed_tokens.weight" if name == EMBEDDING else HEAD
            expected = theirs[source].clone()
            expected[rows] = ours[EMBEDDING][rows]
            assert torch.equal(tensor, expected), name
        else:
            assert torch.equal(tensor, theirs[name.replace("model.language_model.", "model.")]), name
    assert (HEAD in stored) == (HEAD in theirs)
    assert AutoTokenizer.from_pretrained(out).chat_template == toy_tokenizer.chat_template
    card = (out / "README.md").read_text()
    assert str(language) in card
    assert "<|image_pad|>" in card
    assert "1e+06" in card


def test_the_composed_folder_loads_without_missing_or_unknown_weights(parts):
    _, _, out = parts
    _, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


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
    "head_dim": ({"head_dim": 64}, r"mrope_section \[6, 5, 5\] sums to 16, expected head_dim / 2 = 32"),
    "rope": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        "rope_type 'linear' cannot be carried over",
    ),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_do_not_fit_are_refused(case, toy_folder, toy_tokenizer, tmp_path):
    sizes, message = BAD_PARTS[case]
    language = write_language(tmp_path / "language", toy_tokenizer, tied=True, **sizes)
    with pytest.raises(UserError, match=message):
        plan_composition(toy_folder, language)


def test_tokenizers_with_other_ids_are_refused(toy_folder, toy_tokenizer, tmp_path):
    from training.toy_model import build_tokenizer

    other = build_tokenizer(["zebras jump over quiet hedges " * 3])
    language = write_language(tmp_path / "language", other, tied=True)
    with pytest.raises(UserError, match="the tokenizers disagree"):
        plan_composition(toy_folder, language)


def test_the_command_line_writes_a_model_and_refuses_in_one_line(toy_folder, toy_tokenizer, tmp_path, capsys):
    language = write_language(tmp_path / "language", toy_tokenizer, tied=True)
    command = ["--vision", str(toy_folder), "--language", str(language), "--out", str(tmp_path / "out")]
    assert compose.main([*command, "--dtype", "bfloat16"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")[EMBEDDING].dtype == torch.bfloat16
    assert compose.main(command) == 2
    assert "exists; name a new folder" in capsys.readouterr().err
    assert compose.main(["--vision", str(language), "--language", str(language), "--out", str(tmp_path / "b")]) == 2
    assert "expected a qwen3_vl checkpoint, got qwen3" in " ".join(capsys.readouterr().err.split())
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
