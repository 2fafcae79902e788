"""The wheel: the library alone, used from another folder by an interpreter that sees the base dependencies only."""

from __future__ import annotations

import email
import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import pixelprune
from pixelprune.extras import require_extra
from tests.ranks import ROOT

PROGRAM = """
import json, sys
sys.path += [{wheel!r}, {dependencies!r}]
import numpy as np
import pixelprune
assert pixelprune.__file__.startswith({wheel!r})
import pixelprune.hf, pixelprune.conversation, pixelprune.answers, pixelprune.codec
from pixelprune.records.collator import PixelPruneCollator
from pixelprune.settings import ResizeSettings

image = np.zeros((64, 96, 3), np.uint8)
resize = ResizeSettings(min_pixels=32 * 32)
collator = PixelPruneCollator.from_pretrained({model!r}, resize=resize, root={root!r})
row = collator(json.loads({records!r}))
missing = []
for name in ("training", "launch", "data_tools", "deepspeed", "omegaconf", "wandb", "pyarrow"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        missing.append(name)
print(json.dumps({{
    "version": pixelprune.__version__,
    "kept": pixelprune.select(image).num_kept,
    "ids": row["input_ids"][0].tolist(),
    "missing": missing,
}}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the tracked files, without a network."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if name.endswith((".py", ".toml", ".typed", "README.md", "LICENSE", ".js")) and (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "-w", str(out), str(tree)], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def base_dependencies(wheel: Path, folder: Path) -> Path:
    """Links to what the wheel's base dependencies need of this interpreter's site-packages, and to nothing else."""
    with zipfile.ZipFile(wheel) as file:
        metadata = next(file.read(name).decode() for name in file.namelist() if name.endswith("/METADATA"))
    needed = email.message_from_string(metadata).get_all("Requires-Dist") or []
    pending = [Requirement(text) for text in needed]
    seen: set[str] = set()
    while pending:
        requirement = pending.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
        pending += [Requirement(text) for text in found.requires or []]
    return folder


def test_the_wheel_holds_the_library_alone(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        entry_points = next(file.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {name.split("/")[0] for name in names} == {"pixelprune", f"pixelprune-{pixelprune.__version__}.dist-info"}
    assert "pixelprune/py.typed" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pixelprune").rglob("*.py")}
    assert modules <= set(names)
    assert "pixelprune = pixelprune.__main__:main" in entry_points
    assert "[lmms_eval.models]\npixelprune = pixelprune.lmms.plugin:register" in entry_points


def test_it_works_elsewhere_with_the_base_dependencies(wheel, model_folder, screens, tmp_path):
    installed = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    (tmp_path / "dependencies").mkdir()
    records = [json.loads(line) for line in (screens / "train.jsonl").read_text().splitlines()[:3]]
    program = PROGRAM.format(
        wheel=str(installed),
        dependencies=str(base_dependencies(wheel, tmp_path / "dependencies")),
        model=str(model_folder),
        root=str(screens),
        records=json.dumps(records),
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["missing"] == ["training", "launch", "data_tools", "deepspeed", "omegaconf", "wandb", "pyarrow"]
    assert (seen["version"], seen["kept"]) == (pixelprune.__version__, 1)

    from pixelprune.records.collator import PixelPruneCollator
    from pixelprune.settings import ResizeSettings

    here = PixelPruneCollator.from_pretrained(str(model_folder), resize=ResizeSettings(min_pixels=1024), root=screens)
    assert seen["ids"] == here(records)["input_ids"][0].tolist()


def test_what_is_not_installed_is_one_line_with_the_command():
    require_extra("something", "train", ("numpy",))
    with pytest.raises(ModuleNotFoundError) as caught:
        require_extra("training", "train", ("numpy", "no_such_module", "nor_this"))
    assert str(caught.value) == (
        "training needs no_such_module, nor_this: pip install 'pixelprune[train]' "
        "(in the checkout: `make install`, then `source .venv/bin/activate`)"
    )


def test_training_without_its_extra_says_so():
    code = "import sys; sys.modules['deepspeed'] = None; import training.train"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: training needs deepspeed: pip install")


def test_public_names_exist():
    for path in sorted((ROOT / "pixelprune").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        # vLLM and lmms-eval are installed apart from everything else: tests/vllm and tests/lmms import these.
        plugins = {"pixelprune.vllm.": "vllm", "pixelprune.lmms.": "lmms_eval"}
        is_elsewhere = any(name.startswith(prefix) and find_spec(host) is None for prefix, host in plugins.items())
        if name != "pixelprune.__main__" and not is_elsewhere:
            module = __import__(name, fromlist=["x"])
            assert all(hasattr(module, public) for public in getattr(module, "__all__", [])), name
