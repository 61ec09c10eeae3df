"""REPA-E as a plain library: models, losses, samplers, data and artifacts; no orchestrator inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repae_core.generation.load import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    # On first use only: the command line imports this package without torch.
    if name == "load_model":
        from repae_core.generation.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
