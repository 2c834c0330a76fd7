"""Attention kernels, by name."""

from twofold.attention.backends.base import AttentionBackend
from twofold.attention.backends.native import NativeBackend
from twofold.attention.backends.sdpa import SDPABackend


def make_backend(name: str) -> AttentionBackend:
    """The backend that `RuntimeConfig.attention_backend` names."""
    if name == "flash_attn":  # what it needs is on GPU machines only
        from twofold.attention.backends.flash_attn import FlashAttnBackend

        return FlashAttnBackend()
    return {"sdpa": SDPABackend, "native": NativeBackend}[name]()
