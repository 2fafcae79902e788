"""The teacher against the stock pipeline on all tokens; what of it a run may and may not touch."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from pixelprune.images.image import prune_pixels
from pixelprune.pack import Pack, pack_samples
from pixelprune.records.collator import dummy_sample
from pixelprune.sample import build_sample
from pixelprune.settings import PruneSettings
from tests.conftest import screen
from tests.pixelprune.reference import chat_of, stock_inputs
from training.config.settings import Config, ConfigError, ModelSettings
from training.data.distillation import DistillationPack, with_full_rows
from training.data.targets import TargetReader
from training.distributed.ranks import Ranks
from training.errors import UserError
from training.loop.feed import _require_targets, prepare_settings
from training.loop.teacher_cache import target_bytes, target_values
from training.loss.supervised import LossSettings
from training.model.fingerprint import hash_weights
from training.model.loading import load_model_files
from training.model.parameters import freeze_parts
from training.model.supervised import SupervisedModel
from training.teacher.files import (
    FORMAT_VERSION,
    describe_targets,
    load_head,
    load_teacher_files,
    outdated_caches,
)
from training.teacher.teachers import CachedTeacher, OnlineTeacher
from training.teacher.top_k import TopK

RECORDS = [("Where is Save?", "(512, 87)", 1), ("And the menu?", "At (3, 4), left of Open.", 2), ("Thanks.", "no", 0)]
ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def pictures(number: int, num_images: int) -> list[np.ndarray]:
    return [screen(3 + number, 4, 10 * number + i) for i in range(num_images)]


def make_pack(tokenizer, geometry, strategy: str = "pred2d") -> DistillationPack:
    """Three records of uneven length, with one, two and no images, beside their full rows."""
    samples, fulls = [], []
    for number, (question, answer, num_images) in enumerate(RECORDS):
        chat = chat_of(tokenizer, question, answer, num_images)
        for images, name in ((samples, strategy), (fulls, "none")):
            pruned = [prune_pixels(p, PruneSettings(strategy=name), p.shape[:2]) for p in pictures(number, num_images)]
            images.append(build_sample(chat, pruned, image_token_id=geometry.image_token_id, record_id=f"r{number}"))
    return with_full_rows(pack_samples(samples, geometry), samples, fulls, geometry, decode=True)


@pytest.fixture(scope="module")
def pack(toy_tokenizer, geometry) -> DistillationPack:
    return make_pack(toy_tokenizer, geometry)


@pytest.fixture
def config(toy_folder) -> Config:
    return Config(model=ModelSettings(path=str(toy_folder), dtype="float32"), loss=LossSettings(kd_weight=1.0))


@pytest.fixture
def student(toy_folder):
    return AutoModelForImageTextToText.from_pretrained(toy_folder).train()


@pytest.fixture
def teacher(toy_folder, geometry) -> OnlineTeacher:
    model = AutoModelForImageTextToText.from_pretrained(toy_folder).eval().requires_grad_(False)
    return OnlineTeacher(model, model.lm_head, geometry)


@torch.no_grad()
def stock_logits(model, tokenizer) -> torch.Tensor:
    """The stock pipeline on every record apart, all tokens: logits that predict the supervised tokens."""
    rows = []
    for number, (question, answer, num_images) in enumerate(RECORDS):
        inputs = stock_inputs(tokenizer, pictures(number, num_images), question, answer)
        num_supervised = int(chat_of(tokenizer, question, answer, num_images).supervised.sum())
        rows.append(model(**inputs).logits[0, -num_supervised - 1 : -1])
    return torch.cat(rows)


def test_the_teacher_says_what_the_stock_pipeline_says_of_all_tokens(pack, teacher, toy_model, toy_tokenizer):
    hidden = teacher.hidden(pack.full_pack())
    torch.testing.assert_close(
        teacher.head(hidden), stock_logits(toy_model, toy_tokenizer), atol=1e-5, rtol=1e-5
    )  # fmt: skip
    assert not hidden.requires_grad


@pytest.mark.parametrize(("divergence", "temperature"), [("forward_kl", 1.0), ("reverse_kl", 2.0), ("jsd", 0.5)])
def test_the_distillation_term_is_the_divergence_from_the_stock_pipeline(
    divergence, temperature, pack, student, teacher, toy_model, toy_tokenizer
):
    """Against float64 softmaxes over the stock teacher's logits and the pruned student's."""
    settings = LossSettings(ce_weight=0.5, kd_weight=2.0, temperature=temperature, divergence=divergence)
    with torch.no_grad():
        for parameter in student.parameters():  # a student that is not the teacher
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.01)
    module = SupervisedModel(student, teacher.geometry, settings, teacher)
    sums = module(pack)
    with torch.no_grad():
        logits = student.lm_head(module.hidden_at_supervised(pack)).double()
    log_p = (stock_logits(toy_model, toy_tokenizer).double() / temperature).log_softmax(-1)
    log_q = (logits / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    middle = (0.5 * p + 0.5 * q).log()
    value = {
        "forward_kl": (p * (log_p - log_q)).sum(),
        "reverse_kl": (q * (log_q - log_p)).sum(),
        "jsd": 0.5 * (p * (log_p - middle)).sum() + 0.5 * (q * (log_q - middle)).sum(),
    }[divergence]
    ce = -logits.log_softmax(-1).gather(-1, pack.labels[:, None]).sum()
    assert value > 0.01, "a distance that could be wrong"
    torch.testing.assert_close(sums.kl.double(), value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums.total.double(), 0.5 * ce + 2 * temperature**2 * value, rtol=1e-4, atol=1e-6)


def test_the_weights_of_a_pack_reach_both_terms(pack, student, teacher):
    """Two packs that differ in weights alone: what one leaves out the other has, so they add up to the whole."""
    settings = LossSettings(ce_weight=0.5, kd_weight=2.0)
    module = SupervisedModel(student.eval(), teacher.geometry, settings, teacher)
    first = (torch.arange(pack.num_supervised) % 3 == 0).float()
    parts = [module(dataclasses.replace(pack, weights=weights, is_weighted=True)) for weights in (first, 1 - first)]
    whole = module(pack)
    for name in ("total", "ce", "kl"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
    assert 0 < parts[0].ce < whole.ce
    assert parts[0].num_agree == whole.num_agree, "counts stay counts"


def test_without_pruning_a_student_is_its_own_teacher(toy_tokenizer, geometry, student, teacher):
    pack = make_pack(toy_tokenizer, geometry, strategy="none")
    module = SupervisedModel(student, geometry, LossSettings(ce_weight=0.0, kd_weight=1.0), teacher)
    sums = module(pack)
    sums.total.backward()
    assert abs(float(sums.kl)) <= 1e-6 * pack.num_supervised
    assert float(sums.num_agree) == pack.num_supervised
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-5


def test_pruning_makes_a_difference_for_the_student(pack, student, teacher):
    sums = SupervisedModel(student, teacher.geometry, LossSettings(kd_weight=1.0), teacher)(pack)
    assert float(sums.kl) > 1e-3
    assert float(sums.teacher_entropy) > 0


@pytest.mark.parametrize("frozen", [("vit",), ("llm",), ("vit", "merger"), ("vit", "llm"), "lora"])
def test_only_what_is_trained_gets_gradients_and_the_teacher_keeps_its_weights(frozen, pack, student, teacher):
    optim = Config().optim
    if frozen == "lora":
        adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv"], lora_dropout=0.1)
        student = inject_adapter_in_model(adapters, student)
    else:
        freeze_parts(
            student,
            dataclasses.replace(
                optim, **{part: dataclasses.replace(getattr(optim, part), freeze=True) for part in frozen}
            ),
        )
    module = SupervisedModel(student, teacher.geometry, LossSettings(kd_weight=1.0), teacher)
    before = copy.deepcopy(teacher.model.state_dict())
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if frozen == "lora":
        assert all("lora_" in name for name in trained)
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = module(pack).total
        optimizer.zero_grad()
        loss.backward()
        assert {name for name, p in module.named_parameters() if p.grad is not None} == trained
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, start[name])}
    assert changed <= trained
    assert changed
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_the_teacher_is_no_part_of_the_trained_module(student, teacher):
    module = SupervisedModel(student, teacher.geometry, LossSettings(kd_weight=1.0), teacher)
    alone = SupervisedModel(student, teacher.geometry, LossSettings())
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in alone.named_parameters()]
    assert module.state_dict().keys() == alone.state_dict().keys()
    mine = {parameter.data_ptr() for parameter in module.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in teacher.model.parameters()}
    with pytest.raises(AssertionError, match="trained and saved"):
        SupervisedModel(student, teacher.geometry, LossSettings(kd_weight=1.0), teacher.model)


def test_a_plain_pack_is_for_validation_only(pack, student, teacher):
    plain = Pack(**{field.name: getattr(pack, field.name) for field in dataclasses.fields(Pack)})
    module = SupervisedModel(student, teacher.geometry, LossSettings(ce_weight=0.0, kd_weight=1.0), teacher)
    with pytest.raises(AssertionError, match="teacher's side"):
        module(plain)
    module.eval()
    reference = SupervisedModel(student, teacher.geometry, LossSettings())
    assert torch.equal(module(plain).total, reference(plain).total)
    assert float(module(plain).kl) == 0.0


def test_a_rank_without_work_still_reaches_every_parameter(toy_tokenizer, geometry, student, teacher):
    dummy = [dummy_sample(geometry.image_token_id)]
    pack = with_full_rows(pack_samples(dummy, geometry), dummy, dummy, geometry, decode=True)
    sums = SupervisedModel(student, geometry, LossSettings(kd_weight=1.0), teacher)(pack)
    sums.total.backward()
    assert float(sums.total.detach()) == 0.0
    assert all(parameter.grad is not None for parameter in student.parameters())


# --- cached targets ---


def cached_pack(pack: DistillationPack, values: dict[str, torch.Tensor]) -> DistillationPack:
    return dataclasses.replace(pack, full=None, **{f"teacher_{name}": value for name, value in values.items()})


def test_a_float32_cache_gives_the_online_loss_and_gradients_bit_for_bit(pack, student, teacher, config):
    values = target_values(pack.full_pack(), teacher, config)
    head = load_head(load_model_files(config.model), torch.float32, torch.device("cpu"))
    results = []
    for side, one in ((teacher, pack), (CachedTeacher(head), cached_pack(pack, values))):
        student.zero_grad(set_to_none=True)
        sums = SupervisedModel(student, teacher.geometry, config.loss, side)(one)
        sums.total.backward()
        results.append((sums, [parameter.grad.clone() for parameter in student.parameters()]))
    (online, online_grads), (cached, cached_grads) = results
    assert all(torch.equal(a, b) for a, b in zip(online, cached, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(online_grads, cached_grads, strict=True))


def test_a_bfloat16_cache_is_near(pack, student, teacher, config):
    config.kd.cache_dtype = "bfloat16"
    values = target_values(pack.full_pack(), teacher, config)
    assert values["hidden"].dtype == torch.bfloat16
    assert target_bytes(config, load_model_files(config.model), pack.num_supervised) == values["hidden"].nbytes
    online = SupervisedModel(student, teacher.geometry, config.loss, teacher)(pack)
    side = CachedTeacher(teacher.head)
    cached = SupervisedModel(student, teacher.geometry, config.loss, side)(cached_pack(pack, values))
    torch.testing.assert_close(cached.kl, online.kl, rtol=0.02, atol=1e-3)
    assert not torch.equal(cached.kl, online.kl)


def test_top_k_targets_are_the_stock_pipelines_most_probable_tokens(
    pack, student, teacher, config, toy_model, toy_tokenizer
):
    config.kd.source, config.kd.top_k = "cached", 8
    # 2 of the teacher's own: what is stored is at its temperature, whatever the student's is.
    config.loss = LossSettings(kd_weight=1.0, temperature=1.5, teacher_temperature=2.0, chunk_size=5)
    values = target_values(pack.full_pack(), teacher, config)
    log_p = (stock_logits(toy_model, toy_tokenizer).double() / 2.0).log_softmax(-1)
    expected = log_p.sort(descending=True, dim=-1).values[:, :8]
    torch.testing.assert_close(values["log_probs"].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_p.gather(-1, values["ids"].long()), expected, atol=1e-5, rtol=1e-5)
    num_bytes = sum(value.nbytes for value in values.values())
    assert target_bytes(config, load_model_files(config.model), pack.num_supervised) == num_bytes
    side = CachedTeacher(None)
    cached = SupervisedModel(student, teacher.geometry, config.loss, side)(cached_pack(pack, values))
    online = SupervisedModel(student, teacher.geometry, config.loss, teacher)(pack)
    assert 0 < float(cached.kl.detach()) <= float(online.kl.detach()), "a lower bound"
    teacher.top_k = TopK(8, config.loss)
    online = SupervisedModel(student, teacher.geometry, config.loss, teacher)(pack)
    assert all(torch.equal(a, b) for a, b in zip(online, cached, strict=True)), "as a cache says it"


def test_more_log_probabilities_than_the_vocabulary_has_are_refused(pack, teacher):
    teacher.top_k = TopK(10**6, LossSettings(kd_weight=1.0))
    with pytest.raises(UserError, match=r"kd\.top_k: expected fewer than the vocabulary's"):
        teacher.targets(pack)


# --- files ---


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_head_alone_is_the_stock_models_head(is_tied, toy_folder, tmp_path):
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(toy_folder)
    if not is_tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    model.save_pretrained(folder, max_shard_size="4MB")  # several files, as large models have
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / "model.safetensors").unlink()
    files = load_model_files(ModelSettings(path=str(folder)))
    stock = AutoModelForImageTextToText.from_pretrained(folder)
    head = load_head(files, torch.float32, torch.device("cpu"))
    assert torch.equal(head.weight, stock.lm_head.weight)
    assert torch.equal(head.weight, stock.get_input_embeddings().weight) == is_tied
    assert not head.weight.requires_grad


def test_the_head_is_of_the_files_that_the_stock_model_reads(toy_folder, tmp_path):
    """Shards of an earlier save beside one file; and a head of its own under a config that ties it."""
    folder = shutil.copytree(toy_folder, tmp_path / "folder")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    whole = load_file(folder / "model.safetensors")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(folder, max_shard_size="4MB")
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    for tensors in (whole, whole | {"lm_head.weight": torch.randn(model.lm_head.weight.shape)}):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        stock = AutoModelForImageTextToText.from_pretrained(folder)
        head = load_head(load_model_files(ModelSettings(path=str(folder))), torch.float32, torch.device("cpu"))
        assert torch.equal(head.weight, stock.lm_head.weight)


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "kd.path: no such model folder"),
        (lambda folder: edit_json(folder / "preprocessor_config.json", image_mean=[0.4] * 3), "another vision input"),
        (
            lambda folder: (folder / "tokenizer.json").write_text(
                (folder / "tokenizer.json").read_text().replace('"!"', '"!!"')
            ),
            "another tokenizer",
        ),
    ],
)
def test_a_teacher_that_reads_ids_or_pixels_otherwise_is_refused(change, message, config, toy_folder, tmp_path):
    folder = shutil.copytree(toy_folder, tmp_path / "teacher")
    student = load_model_files(config.model)
    config.kd.path = str(folder)
    assert load_teacher_files(config.kd, config.model, student).path == str(folder), "a fitting one is taken"
    change(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load_teacher_files(config.kd, config.model, student)
    assert "\n" not in str(caught.value)


def test_another_output_vocabulary_is_refused(config, toy_folder, tmp_path):
    folder = shutil.copytree(toy_folder, tmp_path / "teacher")
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["vocab_size"] += 8
    (folder / "config.json").write_text(json.dumps(content))
    config.kd.path = str(folder)
    with pytest.raises(ConfigError, match="another output vocabulary than the student"):
        load_teacher_files(config.kd, config.model, load_model_files(config.model))


def test_the_fingerprint_knows_the_teacher_and_ignores_pruning(config, toy_folder, tmp_path):
    student = load_model_files(config.model)

    def fingerprint() -> dict:
        teacher = load_teacher_files(config.kd, config.model, student)
        prepare = prepare_settings(config, student)
        return describe_targets(config.kd, config.model, config.loss, prepare, teacher, student)

    first = fingerprint()
    config.prune = PruneSettings(strategy="raster", threshold=0.1)
    config.optim.lr = 3.0
    assert fingerprint() == first
    config.resize = dataclasses.replace(config.resize, max_pixels=65536)
    assert fingerprint() != first
    config.resize = Config().resize
    config.data.last_turn_only = True
    assert fingerprint() != first
    config.data.last_turn_only = False
    config.kd.dtype = "bfloat16"
    assert fingerprint() != first
    config.kd.dtype = ""
    config.kd.top_k = 8
    assert fingerprint() != first
    with_top_k = fingerprint()
    config.loss.temperature = 2.0
    assert fingerprint() != with_top_k
    config.loss.teacher_temperature = 1.0
    assert fingerprint() == with_top_k, "the teacher's temperature is the one before"
    config.loss.teacher_temperature = 0.5
    config.kd.top_k = 0
    assert fingerprint() == first, "hidden states know no temperature"


def test_fine_tuned_weights_of_the_same_sizes_are_another_teacher(toy_folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(toy_folder)
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        model.lm_head.weight[5, 5] += 1e-3
    model.save_pretrained(tmp_path / "two")
    assert hash_weights(str(tmp_path / "one")) != hash_weights(str(tmp_path / "two"))


def test_a_cache_of_an_older_version_is_named_where_its_targets_are_missed(tmp_path):
    for name, version, shard in (("old", 1, True), ("own", FORMAT_VERSION, True), ("new", 1, False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "teacher.json").write_text(json.dumps({"version": version}))
        if shard:
            (tmp_path / name / "shard-1.safetensors").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "teacher.json").write_text("[")
    assert outdated_caches(tmp_path / "new") == [f"{tmp_path / 'old'} (format 1, expected {FORMAT_VERSION})"]

    class OneRecord(list):
        content_hash = np.array([7])
        record_id = staticmethod("train:{}".format)

    with pytest.raises(UserError, match=r"no teacher targets.*kd.source=online; not read: .*old .format 1, expected 2"):
        _require_targets(OneRecord([0]), TargetReader(tmp_path / "new"))
