"""Served equals trained: vLLM's greedy answers against `pixelprune.hf.generate` on the same checkpoint."""

from __future__ import annotations

import pytest
import torch

from tests.vllm.engine import ask_hugging_face, ask_vllm, assert_as_good, assert_same, needs_vllm

pytestmark = needs_vllm


def test_every_kind_of_prompt_sent_together_and_again_from_the_prefix_cache(
    served_folder, stock_model, conversations, tmp_path
):
    folder = served_folder()
    reference = ask_hugging_face(stock_model(folder), folder, list(conversations.values()))
    assert len(reference) >= 18
    first, again = ask_vllm(folder, list(conversations.values()), tmp_path, rounds=2, engine={"block_size": 32})
    assert_same(first, reference)
    assert_same(again, reference)
    assert sum(answer.cached for answer in again) > sum(answer.prompt_tokens for answer in again) / 2


def test_chunked_prefill_cuts_inside_images_without_prefix_cache(served_folder, stock_model, conversations, tmp_path):
    folder = served_folder()
    reference = ask_hugging_face(stock_model(folder), folder, list(conversations.values()))
    chunked = {"enable_prefix_caching": False, "max_num_batched_tokens": 48, "max_num_seqs": 2}
    (served,) = ask_vllm(folder, list(conversations.values()), tmp_path, engine=chunked)
    assert max(answer.prompt_tokens for answer in reference) > 2 * chunked["max_num_batched_tokens"]
    assert_same(served, reference)


def test_pictures_in_other_modes(served_folder, stock_model, unusual, tmp_path):
    """16-bit grey, palettes, transparency, CMYK, EXIF: converted as in training, not as vLLM would."""
    folder = served_folder()
    reference = ask_hugging_face(stock_model(folder), folder, list(unusual.values()))
    (served,) = ask_vllm(folder, list(unusual.values()), tmp_path)
    assert_same(served, reference)


def test_wrong_positions_are_seen(served_folder, stock_model, conversations, tmp_path):
    """The comparison bites: without our positions, answers to images are others, those to text the same."""
    folder = served_folder()
    reference = ask_hugging_face(stock_model(folder), folder, list(conversations.values()))
    (served,) = ask_vllm(folder, list(conversations.values()), tmp_path, mutate=True)
    with pytest.raises(AssertionError):
        assert_same(served, reference)
    same = [one.token_ids == other.token_ids for one, other in zip(served, reference, strict=True)]
    by_name = dict(zip(conversations, same, strict=True))
    assert by_name["text"]
    assert not by_name["wide"]


def test_two_tensor_parallel_ranks(served_folder, stock_model, conversations, tmp_path):
    folder = served_folder()
    reference = ask_hugging_face(stock_model(folder), folder, list(conversations.values()))
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    (served,) = ask_vllm(
        folder,
        list(conversations.values()),
        tmp_path,
        engine=ranks,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    assert_same(served, reference)


def test_a_mixture_of_experts(served_folder, stock_model, conversations, tmp_path):
    folder = served_folder("qwen3_vl_moe")
    reference = ask_hugging_face(stock_model(folder), folder, list(conversations.values()))
    (served,) = ask_vllm(folder, list(conversations.values()), tmp_path)
    assert_same(served, reference)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_delta_nets_in_bfloat16(family, served_folder, stock_model, conversations, tmp_path):
    """vLLM's kernels for delta nets on a CPU compute in bfloat16 alone: equally good tokens may be chosen otherwise."""
    folder = served_folder(family)
    asked = list(conversations.values())
    reference = ask_hugging_face(stock_model(folder, torch.bfloat16), folder, asked)
    (served,) = ask_vllm(folder, asked, tmp_path, engine={"dtype": "bfloat16"})
    assert_as_good(served, reference)
    if family == "qwen3_5":
        (mutated,) = ask_vllm(folder, asked, tmp_path, engine={"dtype": "bfloat16"}, mutate=True)
        with pytest.raises(AssertionError):
            assert_as_good(mutated, reference)
