"""Documents against the code: links, files, modules, imports and settings they name exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess

import pytest
from omegaconf import OmegaConf

from tests.ranks import ROOT
from training.config.recipe import _check_path
from training.config.settings import Config

DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FILES = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
OURS = "pixelprune|training|data_tools|launch|benchmarks"
SECTIONS = "|".join(Config.__dataclass_fields__)
WRITTEN_BY_RUNS = ("config.yaml",)
NOT_SETTINGS = ("model.generate",)


@pytest.fixture(params=DOCS, ids=lambda path: path.name)
def doc(request):
    return request.param


def test_there_are_documents():
    assert len(DOCS) >= 10


def test_links_lead_somewhere(doc):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", doc.read_text()):
        if not target.startswith("http"):
            assert (doc.parent / target).exists(), f"{doc.name}: {target}"


def test_files_it_names_exist(doc):
    for name in re.findall(r"`((?:[\w./]+/)?\w+\.(?:py|yaml))`", doc.read_text()):
        assert name in WRITTEN_BY_RUNS or any(file == name or file.endswith(f"/{name}") for file in FILES), (
            f"{doc.name}: {name}"
        )


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
