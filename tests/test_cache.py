"""The teacher's samples: made once, found again, refused for another run, and the same whether interrupted or not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tiny import FRAMES, HEIGHT, WIDTH, tiny_wan_pipeline

from instep.core.size import Size
from instep.data.prompt import texts_of
from instep.diffusion.prediction import Prediction
from instep.diffusion.sampling import sample_ode
from instep.models.backbone import Backbone
from instep.models.role import Role
from instep.models.wan import WanFamily
from instep.training.teacher_samples import FILE, PARTS, teacher_samples

PROMPTS = ("a seven moving left fast", "a digit", "three", "a two going up and then down", "nine")
SETTINGS = {"n": 7, "steps": 3, "guidance": 2.0, "shift": 3.0, "seed": 4, "batch": 3}


class Killed(BaseException):
    """What no handler of ours may swallow."""


@dataclass
class Teacher:
    """Counts its calls, and dies in one of them if told to."""

    family: WanFamily
    dies_at: int | None = None
    calls: int = 0
    role: Role = field(init=False)

    def __post_init__(self) -> None:
        self.role = Role("teacher", Backbone(self.family, self.family.pretrained))

    def __call__(self, x_t, t, cond) -> Prediction:
        if self.calls == self.dies_at:
            raise Killed
        self.calls += 1
        return self.role(x_t, t, cond)


def make(folder: Path, teacher: Teacher | None = None, prompts=PROMPTS, **other):
    teacher = teacher or Teacher(WanFamily(tiny_wan_pipeline(), Size(HEIGHT, WIDTH, FRAMES)))
    return teacher_samples(folder, teacher.family, teacher, prompts, **{**SETTINGS, **other}), teacher


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *make(folder)


def test_what_is_kept_is_what_the_teacher_makes_of_the_noise(whole):
    folder, samples, teacher = whole
    family = teacher.family
    assert len(samples.prompts) == 7 and samples.noise.shape == samples.latents.shape == (7, *family.latent_shape)
    assert set(texts_of(samples.prompts[:5])) == set(PROMPTS) and texts_of(samples.prompts[:5]) != list(PROMPTS), "all of them before any again, shuffled"
    assert teacher.calls == 3 * 3, "three batches of three steps, conditional and unconditional in one call"
    row = slice(4, 6)  # across the border of two batches
    cond, null = family.encode(samples.prompts[row]), family.unconditional(samples.prompts[row])
    again = sample_ode(teacher.role, cond, null, samples.noise[row], steps=3, path=family.path, shift=3.0, guidance=2.0)
    torch.testing.assert_close(samples.latents[row], again, rtol=1e-4, atol=1e-5)
    assert samples.noise.std() == pytest.approx(1, abs=0.05)
    first = torch.randn(7, *family.latent_shape, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(samples.noise, first), "not the noise that a run with this seed trains on"
    assert [path.name for path in folder.iterdir()] == [FILE]


def test_it_is_made_once(whole):
    folder, samples, _ = whole
    found, teacher = make(folder, batch=2)
    assert teacher.calls == 0
    assert found.prompts == samples.prompts and torch.equal(found.noise, samples.noise) and torch.equal(found.latents, samples.latents)


@pytest.mark.parametrize("dies_at", [0, 2, 3, 8])
def test_an_interrupted_call_goes_on_to_the_same_samples(whole, tmp_path, dies_at):
    _, samples, _ = whole
    with pytest.raises(Killed):
        make(tmp_path, Teacher(WanFamily(tiny_wan_pipeline(), Size(HEIGHT, WIDTH, FRAMES)), dies_at))
    assert not (tmp_path / FILE).exists()
    resumed, teacher = make(tmp_path)
    assert teacher.calls == 9 - dies_at // 3 * 3, "only the batch in progress is lost"
    assert resumed.prompts == samples.prompts and torch.equal(resumed.noise, samples.noise) and torch.equal(resumed.latents, samples.latents)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_an_interrupted_call_may_go_on_with_smaller_batches(whole, tmp_path):
    _, samples, _ = whole
    with pytest.raises(Killed):
        make(tmp_path, Teacher(WanFamily(tiny_wan_pipeline(), Size(HEIGHT, WIDTH, FRAMES)), 3))
    resumed, teacher = make(tmp_path, batch=2)
    assert teacher.calls == 2 * 3
    assert resumed.prompts == samples.prompts and torch.equal(resumed.noise, samples.noise)
    torch.testing.assert_close(resumed.latents, samples.latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("field", "value"), [("n", 8), ("steps", 4), ("guidance", 1.0), ("shift", 1.0), ("seed", 5), ("prompts", PROMPTS[:4])])
def test_samples_of_other_settings_are_refused(whole, field, value):
    folder, samples, teacher = whole
    before, calls = (folder / FILE).read_bytes(), teacher.calls
    with pytest.raises(ValueError, match=f"^{field}: .*{FILE}.*remove"):
        make(folder, teacher, **{field: value})
    assert (folder / FILE).read_bytes() == before and teacher.calls == calls


def test_parts_of_other_settings_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(Killed):
        make(tmp_path, Teacher(WanFamily(tiny_wan_pipeline(), Size(HEIGHT, WIDTH, FRAMES)), 5))
    with pytest.raises(ValueError, match=f"^seed: 5 does not fit 4, .*remove .*{PARTS} "):
        make(tmp_path, seed=5)
    (tmp_path / FILE).write_bytes(b"something else")
    with pytest.raises(ValueError, match="^folder: .* does not hold samples of a teacher"):
        make(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("n", 0), ("steps", 0), ("batch", 0), ("guidance", float("nan")), ("shift", 0.0), ("prompts", ())])
def test_impossible_settings_are_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        make(tmp_path, **{field: value})


def test_weights_that_overflow_are_not_kept(tmp_path):
    family = WanFamily(tiny_wan_pipeline(), Size(HEIGHT, WIDTH, FRAMES))
    with torch.no_grad():
        family.pretrained.proj_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="^teacher: .*not finite"):
        make(tmp_path, Teacher(family))
    assert not list(tmp_path.iterdir())
