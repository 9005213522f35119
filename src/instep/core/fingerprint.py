"""A short digest of a network's weights."""

from __future__ import annotations

import hashlib

from torch import nn


def weights_fingerprint(network: nn.Module) -> str:
    """Of a network's parameters: a few numbers of every tensor, 16 hexadecimal digits. Folders of the same name may hold other weights."""
    digest = hashlib.sha256()
    for name, p in network.named_parameters():
        some = p.detach().flatten()[:: max(1, p.numel() // 16)][:16].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
