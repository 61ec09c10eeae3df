"""A preprocessed data set of a few digits."""

import pytest
import tiny

from repae_core.artifacts import Artifact, Store
from repae_core.data import ImageShards, open_source, preprocess_images


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> ImageShards:
    folder = tiny.write_images(tmp_path_factory.mktemp("images") / "digits")
    made = Artifact(Store(str(tmp_path_factory.mktemp("store"))), "preprocess", "test")
    preprocess_images(open_source(str(folder)), made, resolution=32, images_per_shard=16, seed=0)
    return ImageShards(made)
