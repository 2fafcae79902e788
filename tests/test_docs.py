"""Documents against the code: links, files, modules, imports and settings they name exist."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import pixelprune
from tests.ranks import ROOT
from training.__main__ import commands
from training.config.recipe import _check_path
from training.config.reference import markdown, sections
from training.config.settings import Config

DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FILES = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
OURS = "pixelprune|training|data_tools|launch|benchmarks"
SECTIONS = "|".join(Config.__dataclass_fields__)
WRITTEN_BY_RUNS = ("config.yaml",)
NOT_SETTINGS = ("model.generate",)
OF_OTHERS = (
    "data/dset_aitw.py",
    "data/dset_shared_navigation.py",
    "data/format_converter.py",
    "src/aguvis/dataset.py",
    "src/aguvis/constants.py",
    "src/gui_actor/dataset.py",
    "trl/data_utils.py",
    "src/llamafactory/v1/core/rendering/format.py",
    "methods/conncomp.py",
    "run_api.py",
    "image_base.py",
    "OCRBench/example.py",
    "eval/grounding/eval_uivision.py",
    "olmocr/bench/benchmark.py",
    "olmocr/bench/prompts.py",
    "olmocr/bench/tests.py",
    "pix2struct/preprocessing/convert_docvqa.py",
    "lmms_eval/tasks/chartqa/utils.py",
    "lmms_eval/tasks/docvqa/utils.py",
    "infovqa/utils.py",
    "lmms_eval/tasks/mmbench/en_utils.py",
    "hrbench/utils.py",
    "lmms_eval/tasks/ocrbench/utils.py",
    "lmms_eval/tasks/osworld_g/utils.py",
    "lmms_eval/tasks/vstar_bench/utils.py",
    "evaluation/holo_osworld_g.py",
    "eval_screenspot_pro.py",
    "models/qwen3vl.py",
    "cookbooks/utils/agent_function_call.py",
    "pretrain/screenspot_test.py",
    "vlmeval/dataset/GUI/screenspot_v2.py",
    "vlmeval/dataset/image_mcq.py",
    "vlmeval/dataset/utils/multiple_choice.py",
)
"""Files of published code that docstrings cite."""


def prose(path: Path) -> str:
    """Docstrings, those of fields among them, and comments of a file."""
    text = path.read_text()
    strings = [
        node.value.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join([*strings, *comments])


@functools.cache
def names_of(module: str) -> set[str]:
    """Everything that a file of this name defines, or none if there is no such file."""
    stem = module.replace(".", "/")
    path = next((ROOT / name for name in (f"{stem}.py", f"{stem}/__init__.py") if (ROOT / name).exists()), None)
    return {"", *re.findall(r"\w+", path.read_text())} if path else set()


@pytest.fixture(params=DOCS, ids=lambda path: path.name)
def doc(request):
    return request.param


def test_there_are_documents():
    assert len(DOCS) >= 10


def test_links_lead_somewhere(doc):
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", doc.read_text()):
        if not target.startswith("http"):
            name, _, section = target.partition("#")
            other = doc.parent / name if name else doc
            assert other.exists(), f"{doc.name}: {target}"
            assert not section or section in anchors(other), f"{doc.name}: {target}"


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page in links."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_page_has_a_place_in_the_order_of_pages():
    for order in (ROOT / "README.md", ROOT / "docs" / "README.md"):
        text = order.read_text()
        linked = {(order.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+\.md)", text)}
        missing = {page.name for page in DOCS if page not in linked and page.name != "README.md"}
        assert not missing, f"{order}: {missing}"


def test_the_reference_of_settings_is_the_codes():
    remedy = "write it anew: python -m training --settings > docs/settings.md"
    assert (ROOT / "docs" / "settings.md").read_text() == markdown(), remedy


def test_every_setting_says_what_it_means():
    assert [setting.key for section in sections() for setting in section.settings if not setting.meaning] == []


def test_every_section_of_a_recipe_is_in_a_guide():
    guides = "".join(page.read_text() for page in DOCS if page.name != "settings.md")
    keys = {section.key for section in sections()} - {"run"}
    assert {key for key in keys if f"{key.replace('.N', '')}" not in guides} == set()
    assert "lora.rank" in guides


def test_the_table_of_commands_is_complete():
    """Every file that can be run behind `python -m`, but what a run starts by itself and what `make` does."""
    inner = {"launch.guard", "launch.prebuild", "launch.demo", "training", "pixelprune.vllm.answers"}
    inner |= {"pixelprune.vllm.torchvision_operators"}
    files = [name for name in FILES if re.match(r"(pixelprune|training|launch|data_tools)/.*\.py$", name)]
    found = {name for name in files if 'if __name__ == "__main__"' in (ROOT / name).read_text()}
    modules = {name.removesuffix(".py").replace("/", ".").removesuffix(".__main__") for name in found} - inner
    assert modules == set(commands())
    readme = (ROOT / "README.md").read_text()
    assert {module for module in modules if f"`python -m {module}" not in readme} == set()
    assert all(len(what) > 10 for what in commands().values())


def test_the_changelog_has_the_version():
    assert f"\n## {pixelprune.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_files_it_names_exist(doc):
    for name in re.findall(r"`((?:[\w./]+/)?\w+\.(?:py|yaml))`", doc.read_text()):
        assert name in WRITTEN_BY_RUNS or any(file == name or file.endswith(f"/{name}") for file in FILES), (
            f"{doc.name}: {name}"
        )


@pytest.mark.parametrize("package", [*OURS.split("|"), "tests"])
def test_files_and_modules_that_the_code_speaks_of_exist(package):
    for source in sorted((ROOT / package).rglob("*.py")):
        text, where = prose(source), source.relative_to(ROOT)
        for name in re.findall(r"(?<![\w./-])((?:\w+/)*\w+\.py)\b", text):
            known = name in OF_OTHERS or any(file == name or file.endswith(f"/{name}") for file in FILES)
            assert known, f"{where}: {name}"
        for dotted in re.findall(rf"`((?:{OURS})(?:\.\w+)+)`", text):
            module, _, name = dotted.rpartition(".")
            assert "" in names_of(dotted) or name in names_of(module), f"{where}: {dotted}"


def test_modules_it_runs_exist(doc):
    for module in re.findall(rf"python -m ((?:{OURS})[\w.]*)", doc.read_text()):
        if not module.endswith(".NAME"):
            assert importlib.util.find_spec(module.rstrip(".")), f"{doc.name}: {module}"


def test_code_blocks_compile_and_import_what_exists(doc):
    for block in re.findall(r"```python\n(.*?)```", doc.read_text(), re.DOTALL):
        compile(block, doc.name, "exec")
        for module, names in re.findall(rf"from ((?:{OURS})[\w.]*) import ([\w, ]+)", block):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), f"{doc.name}: {module}.{name}"


def test_settings_it_names_exist(doc):
    tree = OmegaConf.structured(Config)
    for name in re.findall(rf"`((?:{SECTIONS})(?:\.[a-z_]+)+)(?:=[^`]*)?`", doc.read_text()):
        if name not in NOT_SETTINGS and not name.endswith((".json", ".jsonl", ".md", ".py", ".yaml", ".lock")):
            _check_path(name, tree)
