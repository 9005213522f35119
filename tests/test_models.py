"""Loading models: what is wrong with a folder is said before anything else happens."""

from __future__ import annotations

import json

import pytest
from tiny import FRAMES, HEIGHT, WIDTH, tiny_wan_pipeline

from instep.bundled import load
from instep.core.size import Size

SIZE = Size(HEIGHT, WIDTH, FRAMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "wan"
    tiny_wan_pipeline().save_pretrained(path)
    return path


def test_a_folder_loads_as_its_family(folder):
    family = load(str(folder), SIZE)
    assert family.name == "wan" and family.latent_shape == (16, 3, 6, 6) and family.shift == 3.0
    assert family.source == str(folder)


def test_no_folder_passes_for_a_bundled_model(folder, tmp_path):
    """Classifiers and evaluation go by the name."""
    (tmp_path / "moving-digits").symlink_to(folder)
    assert load(str(tmp_path / "moving-digits"), SIZE).name == str(tmp_path / "moving-digits")


def test_what_is_wrong_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="model: 'nowhere' is not a model folder"):
        load("nowhere")
    with pytest.raises(ValueError, match="lacks the part 'vae'"):
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "model_index.json").write_text((folder / "model_index.json").read_text())
        for part in ("transformer", "text_encoder", "tokenizer", "scheduler"):
            (broken / part).symlink_to(folder / part)
        load(str(broken), SIZE)
    with pytest.raises(ValueError, match="a LTXPipeline, which no family knows yet"):
        other = tmp_path / "other"
        other.mkdir()
        (other / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline"}))
        load(str(other), SIZE)
    with pytest.raises(ValueError, match="size: 50 x 48"):
        load(str(folder), Size(50, 48, 9))
