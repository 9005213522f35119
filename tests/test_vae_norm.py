"""The quicker norm of VAEs against diffusers' own: values, gradients, what has no direction, what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from tiny import tiny_wan_pipeline

from instep.models.vae_norm import quicken_norms
from instep.models.wan import WanFamily


def pair(kind, channels: int, **options):
    """A norm as it is and quickened, with the same random gamma."""
    stock = kind(channels, **options)
    torch.nn.init.normal_(stock.gamma)
    if options.get("bias"):
        torch.nn.init.normal_(stock.bias)
    quick = copy.deepcopy(stock)
    quicken_norms(quick)
    return stock, quick


@pytest.mark.parametrize("kind", [WanRMS_norm, QwenImageRMS_norm])
@pytest.mark.parametrize(("shape", "options"), [((2, 8, 3, 5, 4), {"images": False}), ((2, 6, 5, 4), {}), ((1, 24, 4, 4), {"bias": True})])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_values_and_gradients_are_those_of_diffusers(kind, shape, options, dtype, tolerance):
    norms = [norm.to(dtype) for norm in pair(kind, shape[1], **options)]
    x, found = torch.randn(shape, dtype=dtype), []
    for norm in norms:
        given = x.clone().requires_grad_()
        out = norm(given)
        found.append((out, *torch.autograd.grad((out * out.detach().sin()).sum(), (given, norm.gamma))))
    for stock, quick in zip(*found, strict=True):
        torch.testing.assert_close(quick, stock, rtol=0, atol=tolerance * float(stock.detach().abs().max()))
    assert norms[0].forward.__func__ is kind.forward is not norms[1].forward.__func__


def test_what_has_no_direction_stays_zero_with_a_finite_gradient():
    x = torch.zeros(1, 4, 3, 3, requires_grad=True)
    for norm in pair(WanRMS_norm, 4):
        out = norm(x)
        assert out.abs().max() == 0 and torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_narrow_numbers_and_other_dimensions_are_left_to_diffusers():
    x = torch.randn(1, 8, 3, 3).bfloat16()
    stock, quick = (norm.bfloat16() for norm in pair(WanRMS_norm, 8))
    assert torch.equal(quick(x), stock(x))
    last = WanRMS_norm(8, channel_first=False)
    quicken_norms(last)
    assert last.forward.__func__ is WanRMS_norm.forward


def test_a_family_quickens_a_vae_of_its_own():
    """The user's pipeline and a copy of the family's VAE decode the same."""
    pipe = tiny_wan_pipeline()
    family = WanFamily(pipe, (48, 48, 9))
    norms = [[m for m in vae.modules() if isinstance(m, WanRMS_norm)] for vae in (pipe.vae, family.pipe.vae, copy.deepcopy(family.pipe.vae))]
    assert all("forward" not in vars(m) for m in norms[0]) and all(m.forward.__self__ is m and "forward" in vars(m) for m in norms[1] + norms[2])
    z = torch.randn(1, *family.latent_shape)
    with torch.no_grad():
        torch.testing.assert_close(family.pipe.vae.decode(z).sample, pipe.vae.decode(z).sample, rtol=0, atol=1e-5)
