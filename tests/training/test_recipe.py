"""Recipes: strict, typed, and every mistake is one line that names the field."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from training.config.recipe import config_from_dict, config_to_dict, load_recipe, show
from training.config.settings import Config, ConfigError

MINIMAL = "model: {path: some/model}\ndata: {sources: [{path: a.jsonl}]}\n"
RECIPES = sorted(Path("configs").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_strictly_and_is_short(path):
    load_recipe(path)
    assert len(path.read_text().splitlines()) <= 40


def test_there_are_recipes():
    assert RECIPES


def test_overrides_win_over_the_recipe_and_reach_into_lists(recipe):
    config = load_recipe(
        recipe, ["optim.lr=2e-5", "data.sources.0.weight=3", "prune.threshold=0.02", "tracking.tags=[a, b]"]
    )
    assert config.optim.lr == 2e-5
    assert config.data.sources[0].weight == 3
    assert config.prune.threshold == 0.02
    assert config.tracking.tags == ["a", "b"]


def test_a_recipe_states_only_what_differs_from_its_base(recipe, tmp_path):
    twin = tmp_path / "twin.yaml"
    twin.write_text("base: recipe.yaml\nprune: {strategy: none}\n")
    config, base = load_recipe(twin), load_recipe(recipe)
    assert config.prune.strategy == "none"
    assert config == dataclasses.replace(base, prune=config.prune)


def leaves(kind, prefix=""):
    for item in dataclasses.fields(kind):
        inner = item.default_factory if dataclasses.is_dataclass(item.default_factory) else None
        yield from leaves(inner, f"{prefix}{item.name}.") if inner else [f"{prefix}{item.name}"]


def test_every_field_is_reachable_from_yaml(recipe):
    """Writing the resolved tree out and reading it back names every field and gives the same config."""
    config = load_recipe(recipe)
    shown = yaml.safe_load(show(config))
    for dotted in leaves(Config):
        node = shown
        for part in dotted.split("."):
            assert part in node, dotted
            node = node[part]
    recipe.write_text(show(config))
    assert load_recipe(recipe) == config
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optm.lr=3", "unknown key 'optm'; did you mean 'optim'"),
        ("optim.vitt.lr=3", "did you mean 'optim.vit'"),
        ("prune.treshold=1", "did you mean 'prune.threshold'"),
        ("lr=3", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("model_name_or_path=x", "did you mean 'model.path' or 'kd.path'?"),
        ("optim.lr=abc", "optim.lr: expected a number, got 'abc'"),
        ("data.num_workers=1.5", "data.num_workers: expected a whole number, got '1.5'"),
        ("data.shuffle=maybe", "data.shuffle: expected true or false, got 'maybe'"),
        ("data.sources.x.weight=3", "expected a list index, got 'x'"),
        ("data.sources.7.weight=3", "data.sources has 1 entry, counted from 0; to add one, .*give the whole list"),
        ("model.path=${oc.env:HOME}", "interpolation .* is refused"),
        ("model.dtype=fp16", "model.dtype: expected one of bfloat16, float32, got 'fp16'"),
        ("loss.ce_weight=-1", "ce_weight"),
        ("optim={vit: {freeze: true}, llm: {freeze: true}, merger: {freeze: true}}", "nothing is left to train"),
        ("schedule={max_steps: 0, epochs: 0}", "expected max_steps > 0 or epochs > 0"),
        ("lr", "expected key=value"),
        ("optim.lr.x=1", "optim.lr has no fields"),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_field(recipe, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "optim: {learning_rate: 1}\n", "unknown key 'optim.learning_rate'"),
        (MINIMAL + "optim: {lr: [1]}\n", "optim.lr"),
        (MINIMAL + "run: {name: '${oc.env:HOME}'}\n", "interpolation"),
        ("- a\n- b\n", "expected sections"),
        ("model: [", "not valid YAML"),
        ("data: {sources: [{path: a, wieght: 2}]}\n", "did you mean 'data.sources.0.weight'"),
        ("base: recipe.yaml\n", "in a circle"),
        ("base: missing.yaml\n", "no such recipe"),
        ("optim: {lr: 1}\nmodel: {path: a}\noptim: {eps: 1}\n", "key 'optim' stands twice, in lines 1 and 3"),
        ("optim:\n  lr: 1\n  eps: 1\n  lr: 2\n", "key 'lr' stands twice, in lines 2 and 4"),
        ("run: &r {name: a}\nmodel: *r\n", r"alias \*r"),
        ("run: {name: 2026-99-99}\n", "not valid YAML"),
        ("base: 5\n", r"base: expected another recipe's file name, relative to this one, got 5 \(int\)"),
        ("base: ''\n", "base: expected another recipe's file name"),
        ("base: [a.yaml, b.yaml]\n", "base: expected another recipe's file name"),
        (f"base: {'x' * 300}.yaml\n", "cannot be read as a recipe: File name too long"),
        (MINIMAL + f"run: {{name: {'x' * 300}}}\n", "run.name: expected a folder name of at most 200 bytes"),
        (MINIMAL + "optim: {learning_rte: 1}\n", "did you mean 'optim.lr'"),
        (MINIMAL + "run: {output_dir: a}\n", "did you mean 'run.folder'"),
        ("[" * 2000, "not valid YAML"),
        (
            MINIMAL + "prune: {direction: back}\n",
            "prune.direction: expected one of auto, backward, forward, got 'back'",
        ),
        (MINIMAL + "prune: {direction: forward}\n", "prune.direction=forward: belongs to prune.strategy=pred3d"),
        (MINIMAL + "prune: {keep_replaced: false}\n", "prune.keep_replaced=false: belongs to prune.strategy=pred3d"),
        (MINIMAL + "prune: {budget: pred3d}\n", "prune.budget=pred3d: belongs to random, conncomp"),
        ("data: {sources: [{path: a}]}\n", "model.path: expected a Hugging Face model folder"),
        ("model: {path: a}\n", "data.sources: expected at least one"),
    ],
)
def test_a_bad_recipe_is_one_line_that_names_the_field(recipe, text, message):
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_a_recipe_that_is_not_utf8_is_one_line(recipe, encoding):
    recipe.write_bytes("run: {name: é}\n".encode(encoding))
    with pytest.raises(ConfigError, match=r"recipe\.yaml: (expected UTF-8 text|not valid YAML)") as caught:
        load_recipe(recipe)
    assert "\n" not in str(caught.value)
    assert ("save it as UTF-8" in str(caught.value)) == (encoding == "utf-16")


def test_an_editors_byte_order_mark_is_no_text(recipe):
    recipe.write_text("\ufeff" + MINIMAL, encoding="utf-8")
    assert load_recipe(recipe).model.path


def test_numbers_in_scientific_notation_are_numbers(recipe):
    recipe.write_text(MINIMAL + "optim: {lr: 1e-5}\n")
    assert load_recipe(recipe).optim.lr == 1e-5


def test_off_is_a_word_where_a_field_has_it(recipe):
    """YAML reads it as false."""
    recipe.write_text(MINIMAL.replace("{sources", "{share_prefix: off, sources"))
    assert load_recipe(recipe).data.share_prefix == "off"
    for word in ("off", "step", "group"):
        assert load_recipe(recipe, [f"data.share_prefix={word}"]).data.share_prefix == word
        assert load_recipe(recipe, [f"data={{share_prefix: {word}}}"]).data.share_prefix == word
    with pytest.raises(ConfigError, match="expected one of off, step, group"):
        load_recipe(recipe, ["data.share_prefix=false_friend"])


def test_kd_recovery_and_its_debug_twin_learn_alike():
    paper, debug = load_recipe("configs/kd_recovery.yaml"), load_recipe("configs/kd_recovery_debug.yaml")
    assert (paper.loss, paper.kd, paper.prune) == (debug.loss, debug.kd, debug.prune)
    assert paper.loss.kd_weight > 0
    assert (paper.data.samples_per_step, paper.schedule.max_steps) == (32 * 36, 2000)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kd.source=disk", "kd.source: expected one of online, cached, got 'disk'"),
        ("kd.sharding=zero2", "kd.sharding: expected one of replica, zero3"),
        ("kd.top_k=-1", "kd.top_k: expected at least 0"),
        ("loss.teacher_temperature=-1", "teacher_temperature must be a finite number >= 0"),
        ("kd.dtype=fp8", "kd.dtype: expected one of"),
        ("kd.cache_dtype=int8", "kd.cache_dtype: expected one of"),
        ("kd.cache_records=0", "kd.cache_records: expected at least 1"),
        ("kd.temperature=2", "unknown key 'kd.temperature'"),
    ],
)
def test_a_bad_teacher_setting_names_the_field(recipe, override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, [override])


def test_what_cannot_be_shared_together_is_refused(recipe):
    for word in ("off", "step", "group"):
        assert load_recipe(recipe, [f"data.share_vision={word}"]).data.share_vision == word
    with pytest.raises(ConfigError, match=r"data\.share_vision: group orders records by their picture.*to step"):
        load_recipe(recipe, ["data.share_vision=group", "data.share_prefix=group"])
    sharded = ["data.share_vision=step", "kd.sharding=zero3"]
    load_recipe(recipe, sharded)
    with pytest.raises(ConfigError, match=r"data\.share_vision=step: .*set kd\.sharding=replica, or"):
        load_recipe(recipe, [*sharded, "loss.kd_weight=1"])


def test_whole_lists_and_sections_can_be_overridden(recipe):
    config = load_recipe(
        recipe, ["data.sources=[{path: a.jsonl, weight: 2}]", "data.sources.0.weight=3", "optim={lr: 0.5}"]
    )
    assert [(source.path, source.weight) for source in config.data.sources] == [("a.jsonl", 3.0)]
    assert config.optim.lr == 0.5
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.wieght.*did you mean"):
        load_recipe(recipe, ["data.sources=[{path: a.jsonl, wieght: 2}]"])


@pytest.mark.parametrize(
    "override",
    [
        "tracking.log_every=0",
        "optim.beta1=1.5",
        "optim.beta2=-0.1",
        "optim.lr=.nan",
        "optim.vit.lr=-1",
        "optim.weight_decay=-1",
        "lora.rank=-3",
        "lora.dropout=1",
        "run.name=..",
        "run.name=.",
        "run.name=a/b",
        "distributed.timeout_minutes=-1",
        "schedule.warmup_steps=-3",
        "schedule.max_steps=-5",
        "data.samples_per_step=0",
        "data.num_workers=-1",
        "checkpoint.keep_last=-5",
        "checkpoint.every_steps=-3",
        "eval.grounding_batch_size=0",
    ],
)
def test_a_value_out_of_range_names_field_and_range(recipe, override):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [override])
    assert str(caught.value).startswith(f"{override.partition('=')[0]}: expected ")
    assert "\n" not in str(caught.value)


ALL_FROZEN = ["optim.vit.freeze=true", "optim.merger.freeze=true", "optim.llm.freeze=true"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.max_steps=10", "schedule.warmup_steps=100"], "warmup_steps: expected at most .*=10, got 100"),
        (["distributed.zero_stage=1"], "set distributed.zero_stage=2, or model.dtype=float32"),
        (["lora.rank=4", "lora.llm=false"], "neither lora.llm nor lora.vit"),
        (["lora.rank=4", "lora.train_merger=true", "optim.merger.freeze=true"], "contradicts optim.merger.freeze"),
        (["distributed.deepspeed={fp16: {enabled: true}}"], r"distributed\.deepspeed\.fp16: may change"),
        (ALL_FROZEN, "nothing is left to train"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, overrides)


@pytest.mark.parametrize(
    "overrides", [["lora.rank=4", *ALL_FROZEN], ["distributed.zero_stage=1", "model.dtype=float32"]]
)
def test_fields_that_go_together_are_allowed(recipe, overrides):
    load_recipe(recipe, overrides)
