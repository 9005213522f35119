"""SiT in a VAE's latents: the published weights as diffusers' parts, and a student of them."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_image_vae
from torch import Tensor
from torch.nn import functional as F

from instep.cli.main import main
from instep.models.dit import DiTFamily
from instep.models.folder import family_in
from instep.models.sit_weights import network_of, time_features, time_map, write_sit
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training.options import RunOptions
from instep.training.run import train

WIDTH, HEADS, DEPTH, SIDE, CLASSES = 32, 2, 2, 8, 10


def positions(width: int, side: int) -> Tensor:
    """Sines and cosines of column and row, [side^2, width]."""
    omega = 1e4 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (grid.flatten()[:, None] * omega for grid in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], 1)


def published(seed: int = 0) -> dict[str, Tensor]:
    """A small SiT's random weights under the authors' names."""
    rng = torch.Generator().manual_seed(seed)
    layers = {"x_embedder.proj": (WIDTH, 4, 2, 2), "t_embedder.mlp.0": (WIDTH, 256), "t_embedder.mlp.2": (WIDTH, WIDTH)}
    layers |= {"final_layer.linear": (4 * 8, WIDTH), "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)}
    for i in range(DEPTH):
        sizes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
        layers |= {f"blocks.{i}.{name}": shape for name, shape in (sizes | {"adaLN_modulation.1": (6 * WIDTH, WIDTH)}).items()}
    found = {}
    for name, shape in layers.items():
        found[f"{name}.weight"] = torch.randn(shape, generator=rng) / math.sqrt(math.prod(shape[1:]))
        found[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=rng)
    found["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, WIDTH, generator=rng)
    return found | {"pos_embed": positions(WIDTH, SIDE // 2).float()[None]}


def velocity(w: dict[str, Tensor], x: Tensor, s: Tensor, label: Tensor) -> Tensor:
    """data - noise [B, 4, 8, 8] as SiT predicts it at its own time s, 1 for data."""

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(value, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    angles = s[:, None] * torch.exp(-math.log(1e4) * torch.arange(128) / 128)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(time + w["y_embedder.embedding_table.weight"][label])
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2) + w["pos_embed"]
    for i in range(DEPTH):
        shift, scale, gate, shift_2, scale_2, gate_2 = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, 1)
        qkv = linear(f"blocks.{i}.attn.qkv", modulated(h, shift, scale)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        h = h + gate[:, None] * linear(f"blocks.{i}.attn.proj", F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"blocks.{i}.mlp.fc1", modulated(h, shift_2, scale_2)), approximate="tanh")
        h = h + gate_2[:, None] * linear(f"blocks.{i}.mlp.fc2", inner)
    patches = linear("final_layer.linear", modulated(h, *linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)))
    return torch.einsum("nhwpqc->nchpwq", patches.unflatten(1, (4, 4)).unflatten(3, (2, 2, 8))).flatten(4).flatten(2, 3)[:, :4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pickle as published, converted by the command."""
    base = tmp_path_factory.mktemp("sit")
    torch.save(published(), base / "SiT.pt")
    tiny_image_vae(scaling_factor=0.18215).save_pretrained(base / "vae")
    assert main(["convert", str(base / "SiT.pt"), "--vae", str(base / "vae"), "--to", str(base / "sit"), "--heads", "2"]) == 0
    return base / "sit"


def test_a_folder_in_which_something_is_stays_and_no_weights_are_read(folder, monkeypatch, capsys):
    monkeypatch.setattr("instep.cli.convert.read_weights", lambda file: pytest.fail("read"))
    before = sorted(folder.rglob("*"))
    assert main(["convert", str(folder.parent / "SiT.pt"), "--vae", str(folder.parent / "vae"), "--to", str(folder)]) == 2
    assert f"to: {folder} exists; choose another name, nothing is overwritten unasked" in capsys.readouterr().err and sorted(folder.rglob("*")) == before
    with pytest.raises(ValueError, match="to: .*sit exists; choose another name"):
        write_sit(published(), folder.parent / "vae", folder)


def test_the_converted_network_predicts_the_published_velocity(folder):
    """Time reversed, sign turned, learned variances left out; the class beside the last one is no class."""
    family = family_in(folder).load(folder)
    x, label = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 9, 10, 10])
    t = torch.tensor([1.0, 0.937, 0.5, 0.1, 0.0])
    prompts = ["0", "3", "9", "", ""]
    assert family.encode(prompts).label.tolist() == label.tolist() and family.unconditional(["3"]).label.tolist() == [CLASSES]
    with torch.no_grad():
        ours, theirs = family.forward(family.pretrained, x, t, family.encode(prompts)), velocity(published(), x, 1 - t, label)
    assert (ours + theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_times_are_sums_of_the_slow_frequencies_of_diffusers():
    t = torch.rand(500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    theirs, stock = time_features(t)
    matrix, offset = time_map()
    assert (stock @ matrix + offset - theirs).abs().max() <= 1e-7
    assert matrix.abs().sum(0).max() < 3, "no large terms cancel, so that bfloat16 holds it"


def test_what_is_not_sit_is_refused(tmp_path):
    weights = published()
    with pytest.raises(ValueError, match="heads: None is not allowed for width 32"):
        network_of(weights)
    with pytest.raises(ValueError, match="it lacks 'pos_embed'"):
        network_of({name: value for name, value in weights.items() if name != "pos_embed"}, 2)
    with pytest.raises(ValueError, match=r"it holds 'projectors.0.weight', which SiT has not"):
        network_of(weights | {"projectors.0.weight": weights["pos_embed"]}, 2)
    with pytest.raises(ValueError, match="its positions are not SiT's"):
        network_of(weights | {"pos_embed": weights["pos_embed"] + 1}, 2)


def test_a_student_in_latents_is_trained_and_exported_with_its_vae(folder, tmp_path):
    family = DiTFamily.load(folder)
    common = Common(steps=1, batch=2, critic_updates=1, shift=1.0, guidance=1.5)
    run = train(dmd2(common, iterations=1), family, out=tmp_path / "run", prompts=["1", "2"], options=RunOptions(save_every=1, probe_every=50))
    student = DiTFamily.load(run.student)
    x = torch.randn(2, *student.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(student.decode(x), family.decode(x)) and student.decode(x).shape == (2, 3, 16, 16)
        assert student.encode_media(student.decode(x).clamp(0, 1)).shape == x.shape
    assert "[:, :4]" in (run.student / "README.md").read_text() and main(["plan", "dmd2", "--model", str(folder)]) == 0
