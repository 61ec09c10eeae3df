"""Images and latents: sources, shards, readers, and the data order.

Names are imported on first use, so that listing a source (for a fingerprint) does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repae_core.data.crop import center_crop, to_rgb
    from repae_core.data.image_shards import ImageShards
    from repae_core.data.latent_shards import LatentShards
    from repae_core.data.latent_statistics import LatentStatistics
    from repae_core.data.latent_writer import LatentWriter
    from repae_core.data.loader import Selection, load_batches
    from repae_core.data.preprocess import preprocess_images
    from repae_core.data.sampler import DataOrder, batch_indices, rank_slice, work_share
    from repae_core.data.shard_cache import ShardCache, open_shard_cache
    from repae_core.data.sources import ImageSource, SourceItem, open_source

_HOME = {
    "center_crop": "crop",
    "to_rgb": "crop",
    "ImageShards": "image_shards",
    "LatentShards": "latent_shards",
    "LatentStatistics": "latent_statistics",
    "LatentWriter": "latent_writer",
    "preprocess_images": "preprocess",
    "DataOrder": "sampler",
    "batch_indices": "sampler",
    "Selection": "loader",
    "ShardCache": "shard_cache",
    "open_shard_cache": "shard_cache",
    "load_batches": "loader",
    "rank_slice": "sampler",
    "work_share": "sampler",
    "ImageSource": "sources",
    "SourceItem": "sources",
    "open_source": "sources",
}

__all__ = [
    "DataOrder",
    "ImageShards",
    "ImageSource",
    "LatentShards",
    "LatentStatistics",
    "LatentWriter",
    "Selection",
    "ShardCache",
    "SourceItem",
    "batch_indices",
    "center_crop",
    "load_batches",
    "open_shard_cache",
    "open_source",
    "preprocess_images",
    "rank_slice",
    "to_rgb",
    "work_share",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
