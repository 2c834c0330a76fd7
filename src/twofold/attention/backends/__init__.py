"""Attention kernels, by name."""

from twofold.attention.backends.sdpa import SDPABackend
from twofold.attention.op import AttentionBackend


def make_backend(name: str) -> AttentionBackend:
    """The backend that `RuntimeConfig.attention_backend` names."""
    return {"sdpa": SDPABackend}[name]()
