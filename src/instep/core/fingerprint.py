"""Short digests of a network's weights."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn


def weights_fingerprint(network: nn.Module) -> str:
    """Of a network's parameters: a few numbers of every tensor, 16 hexadecimal digits. Folders of the same name may hold other weights."""
    digest = hashlib.sha256()
    for name, p in network.named_parameters():
        some = _spread(p, 16).float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def network_fingerprint(network: nn.Module) -> str:
    """Of a network's parameters and buffers: name, shape, dtype and up to 64 values of every tensor, 32 hexadecimal digits.

    A network that was trained further differs in nearly all values. A change of a few single values may go unnoticed.
    """
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        some = _spread(value, 64).cpu().double()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:32]


def _spread(x: Tensor, n: int) -> Tensor:
    """Up to n values of a tensor, evenly spaced."""
    return x.detach().flatten()[:: max(1, x.numel() // n)][:n]
