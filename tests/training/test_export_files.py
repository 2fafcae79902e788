"""What lies beside an export's weights: a stock loader resizes as training did, nothing of the source is lost."""

import json
import shutil

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pixelprune.images.image import prune_image
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import draw_screen
from training.checkpoint.export import export_model
from training.checkpoint.side_files import model_card
from training.config.settings import Config, ModelSettings
from training.model.loading import load_model_files

RESIZE = ResizeSettings(min_pixels=4096, max_pixels=32 * 1024)


@pytest.fixture
def source(toy_folder, tmp_path):
    folder = tmp_path / "models--Some--Model-2B" / "snapshots" / "abc123"
    shutil.copytree(toy_folder, folder)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    preprocessor |= {"min_pixels": 3136, "max_pixels": 12845056}  # older files', which override `size`
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    processor = {"processor_class": "Qwen3VLProcessor", "image_processor": preprocessor, "video_processor": {"fps": 2}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "video_preprocessor_config.json").write_text('{"size": {"longest_edge": 7}}')
    (folder / "vocab.json").write_text("{}")
    (folder / "LICENSE").write_text("Do as you like – but say so.")
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: a-license\nlicense_link: LICENSE\n---\n# Model"
    )
    return folder


def export(source, toy_model, tmp_path):
    config = Config(prune=PruneSettings(), resize=RESIZE, model=ModelSettings(path=str(source)))
    return export_model(tmp_path / "export", toy_model, load_model_files(config.model), config, {"steps": "1"})


def test_stock_loaders_resize_as_training_did_and_read_all_files(source, toy_model, tmp_path):
    folder = export(source, toy_model, tmp_path)
    stock = Qwen2VLImageProcessorPil.from_pretrained(folder)
    for size in ((700, 500), (50, 30), (3000, 200)):
        screen = draw_screen(1, *size)
        (grid,) = stock(images=[screen], return_tensors="np")["image_grid_thw"]
        ours = prune_image(screen, PruneSettings(strategy="none"), RESIZE).selection.keep.shape
        assert tuple(np.array(grid)) == (1, 2 * ours[0], 2 * ours[1])
    processor = json.loads((folder / "processor_config.json").read_text())
    limits = {"shortest_edge": RESIZE.min_pixels, "longest_edge": RESIZE.max_pixels}
    assert processor["image_processor"]["size"] == limits
    assert "max_pixels" not in processor["image_processor"]
    assert processor["video_processor"] == {"fps": 2}
    names = {file.name for file in source.iterdir() if file.suffix != ".safetensors"}
    assert names <= {file.name for file in folder.iterdir()}
    for name in ("video_preprocessor_config.json", "LICENSE", "vocab.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()


def front_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_names_base_model_and_license(source, toy_model, toy_folder, tmp_path):
    card = (export(source, toy_model, tmp_path) / "README.md").read_text()
    front = front_of(card)
    assert front["base_model"] == "Some/Model-2B"
    assert [front[key] for key in ("license", "license_name", "license_link")] == ["other", "a-license", "LICENSE"]
    assert "License of the base model: a-license." in card
    assert str(tmp_path) not in card, "no path of the machine"
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    files = load_model_files(ModelSettings(path=str(source)))
    assert "license" not in front_of(model_card(Config(), files, {}))
    plain = model_card(Config(), load_model_files(ModelSettings(path=str(toy_folder))), {})
    assert "base_model" not in front_of(plain)
    assert f"Started from `{toy_folder.name}`" in plain
    assert "not stated in the folder" in plain
