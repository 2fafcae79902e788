"""Pruning inside the tower: its ends are what they must be bit for bit, its middle is a loop over the layers."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from pixelprune.flops import CostModel
from pixelprune.hf import encode_images, generate, prepare
from pixelprune.pack import VisionGeometry, pack_samples, vision_inputs
from pixelprune.prompter import Prompter
from pixelprune.settings import PruneSettings
from tests.conftest import screen
from tests.pixelprune.generation_reference import SMALL, user
from training.data.settings import SourceSettings
from training.evaluation.answering import AnswerSettings, predict, prepare_task, read_tasks
from training.evaluation.depth_pruning import DepthPruning, encode_pruned_after

CONVERSATIONS = [user("Compare them.", screen(4, 5, 1), screen(2, 7, 2)), user("Open the menu.", screen(5, 3, 3))]


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_5"])
def asked(request, toy_folder, tmp_path_factory):
    """(model, pruned inputs, full inputs) of a family."""
    from training.composition.toy import build_toy_model

    folder = toy_folder
    if request.param != "qwen3_vl":
        folder = build_toy_model(tmp_path_factory.mktemp("toy") / "model", family=request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    prompter = Prompter.load(str(folder), resize=SMALL)
    full = dataclasses.replace(prompter, prune=PruneSettings("none"))
    pruned, whole = prepare(prompter, CONVERSATIONS), prepare(full, CONVERSATIONS)
    assert pruned.num_kept_blocks < pruned.num_blocks
    return model, pruned, whole


def features_of(arguments: dict) -> list[torch.Tensor]:
    """Every feature of every image: the merger's, and DeepStack's where the family has them."""
    output = arguments["mm_encoder_outputs"]["image"]
    return [
        *output.pooler_output,
        *(part for layer in getattr(output, "deepstack_features", None) or [] for part in layer),
    ]


def keeps(pruned) -> list[torch.Tensor]:
    images = [image for sample in pruned.samples for image in sample.images]
    return [torch.from_numpy(image.selection.keep.reshape(-1)) for image in images]


def test_minus_one_is_pruning_before_the_tower(asked):
    model, pruned, whole = asked
    expected = features_of(encode_images(model, pruned.samples, pruned.prompter))
    got = features_of(encode_pruned_after(model, -1, pruned, whole))
    assert len(got) == len(expected) > 0
    assert all(map(torch.equal, got, expected))


def test_the_last_layer_gathers_the_full_features(asked):
    model, pruned, whole = asked
    full, masks = features_of(encode_images(model, whole.samples, whole.prompter)), keeps(pruned)
    last = len(model.model.visual.blocks) - 1
    got = features_of(encode_pruned_after(model, last, pruned, whole))
    expected = [feature[masks[number % len(masks)]] for number, feature in enumerate(full)]
    assert len(got) == len(expected)
    assert all(map(torch.equal, got, expected))


@torch.no_grad()
def test_between_them_it_is_a_loop_over_the_layers(asked):
    """Layers 0 to k on all patches, the rest on the kept ones, written out on the stock layers."""
    model, pruned, whole = asked
    visual, k = model.model.visual, 0
    geometry = VisionGeometry.from_config(model.config)
    arguments = vision_inputs(pack_samples(whole.samples, geometry), geometry, visual.dtype)
    pruning = DepthPruning.of([image for sample in pruned.samples for image in sample.images], "cpu")
    rows, lengths = pruning.rows, [4 * int(keep.sum()) for keep in keeps(pruned)]
    hidden = visual.patch_embed(arguments["pixel_values"])
    places = visual.pos_embed(arguments["image_interp_indices"]) * arguments["image_interp_weights"][:, :, None]
    hidden = hidden + places.sum(1)
    cos, sin = visual.rotary_pos_emb(hidden, arguments["image_position_ids"])
    borders, longest = arguments["image_cu_seqlens"], arguments["image_max_seqlen"]
    deepstack, layers = [], list(getattr(visual, "deepstack_visual_indexes", ()))
    for number, layer in enumerate(visual.blocks):
        if number == k + 1:
            hidden, cos, sin = hidden[rows], cos[rows], sin[rows]
            borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
            longest = max(lengths)
        hidden = layer(hidden, cu_seqlens=borders, max_seqlen=longest, position_embeddings=(cos, sin))
        if number in layers:
            kept = hidden if number > k else hidden[rows]
            deepstack.append(visual.deepstack_merger_list[layers.index(number)](kept))
    blocks = [length // 4 for length in lengths]
    expected = [part for merged in (visual.merger(hidden), *deepstack) for part in merged.split(blocks)]
    got = features_of(encode_pruned_after(model, k, pruned, whole))
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)  # matrices of other shapes round differently
    before = features_of(encode_pruned_after(model, -1, pruned, whole))
    assert not torch.allclose(got[0], before[0], atol=1e-5), "the depth matters"


def test_flops_are_those_that_torch_counts_in_the_tower(asked):
    model, pruned, whole = asked
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")  # whose products the counter sees
    costs = CostModel.from_config(model.config)
    kept = [int(mask.sum()) for mask in keeps(pruned)]
    full = [mask.numel() for mask in keeps(pruned)]
    num_layers = len(model.model.visual.blocks)
    text = costs.breakdown(kept_blocks=kept, text_tokens=9, supervised_tokens=1, training=False)
    behind = sum(flops for part, flops in text.items() if part.startswith("llm") or part == "head")
    found = []
    for k in range(-1, num_layers):
        with FlopCounterMode(display=False) as counter:
            encode_pruned_after(model, k, pruned, whole)
        arguments = {"kept_blocks": kept, "text_tokens": 9, "full_blocks": full}
        found.append(costs.prefill_flops(**arguments, tower_share=(k + 1) / num_layers) - behind)
        if k == -1:  # PixelPrune embeds kept patches alone; the hooks embed all and drop the others behind
            found[-1] += costs.patch_embed * 4 * (sum(full) - sum(kept))
        assert found[-1] == pytest.approx(counter.get_total_flops(), rel=1e-9), k
    assert found == sorted(set(found)), "deeper is dearer"


def test_answers_are_generated_at_every_depth_and_the_hooks_are_gone(asked):
    model, pruned, whole = asked
    expected = generate(model, pruned, max_new_tokens=3, do_sample=False)
    for k in range(-1, len(model.model.visual.blocks)):
        features = encode_pruned_after(model, k, pruned, whole)
        answers = generate(model, pruned, max_new_tokens=3, do_sample=False, features=features)
        if k == -1:
            assert answers.token_ids == expected.token_ids
    assert generate(model, pruned, max_new_tokens=3, do_sample=False).token_ids == expected.token_ids
    with pytest.raises(ValueError, match="depth: expected a layer from -1"):
        encode_pruned_after(model, 99, pruned, whole)
    with pytest.raises(ValueError, match="the same conversations"):
        encode_pruned_after(model, 0, pruned, prepare(whole.prompter, CONVERSATIONS[0]))


def test_evaluation_asks_at_that_depth(toy_folder, tmp_path):
    """A pass at -1 answers as PixelPrune does; one behind the last layer has the features of the full image."""
    Image.fromarray(screen(4, 5, seed=1)).save(tmp_path / "a.png")
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": content}], "metadata": {"scorer": "predictions"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    tasks, _ = read_tasks([SourceSettings(str(tmp_path / "a.jsonl"))])
    model = AutoModelForImageTextToText.from_pretrained(toy_folder).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(3)  # so that answers depend on the picture
    prompter = Prompter.load(str(toy_folder), resize=SMALL)
    found = {}
    for depth in (None, -1, 1):
        settings = AnswerSettings(max_new_tokens=6, depth=depth)
        found[depth] = next(one for batch in predict(model, prompter, tasks, settings) for one in batch)
    assert found[None].text == found[-1].text
    assert found[1].error == ""
    assert found[1].kept_blocks == found[-1].kept_blocks < found[1].full_blocks
    inputs = prepare_task(tasks[0], prompter, {"enable_thinking": False})
    full = dataclasses.replace(prompter, prune=PruneSettings("none"))
    whole = prepare_task(tasks[0], full, {"enable_thinking": False})
    features = encode_pruned_after(model, 1, inputs, whole)
    assert found[1].text == generate(model, inputs, max_new_tokens=6, do_sample=False, features=features).text
