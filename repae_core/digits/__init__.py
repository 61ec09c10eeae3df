"""The quick start's data (5,000 handwritten digits) and three small networks trained on it.

The three networks have separate duties: `vit` is the frozen encoder the alignment loss compares with,
`perceptual` is the network of the VAE's perceptual loss, and `features` is the metric's: it is in no loss, so
that the Fréchet distance it gives is not optimised directly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repae_core.digits.data import load_digits

if TYPE_CHECKING:
    from repae_core.digits.networks import DigitCNN, load_digit_features, load_digit_perceptual

__all__ = ["DigitCNN", "load_digit_features", "load_digit_perceptual", "load_digits"]


def __getattr__(name: str) -> Any:
    # The data alone must not import torch: fingerprinting the quick start's source only needs the pixels.
    if name in __all__:
        from repae_core.digits import networks

        return getattr(networks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
