import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny

from flows import cli
from repae_core.artifacts import RunRecord, Store
from repae_core.config import PipelineConfig


class Finished(NamedTuple):
    """A pipeline that has run: its config, store, images and record."""

    config: PipelineConfig
    store: Store
    images: Path
    record: RunRecord

    def run(self, *overrides: str, **settings) -> RunRecord:
        """Run again with other settings."""
        return tiny.run_pipeline(self.configure(*overrides), **settings)

    def configure(self, *overrides: str) -> PipelineConfig:
        return tiny.config(self.images, self.store.url, *overrides)

    def artifact(self, stage: str):
        from repae_core.artifacts import Artifact

        return Artifact(self.store, stage, self.record.stages[stage].fingerprint)


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Finished:
    """The tiny pipeline, run once."""
    root = tmp_path_factory.mktemp("finished")
    images = tiny.write_images(root / "images")
    before, os.environ["REPAE_HOME"] = os.environ["REPAE_HOME"], str(root / "home")
    try:
        config = tiny.config(images, root / "store")
        record = tiny.run_pipeline(config)
    finally:
        os.environ["REPAE_HOME"] = before
    return Finished(config, Store(str(root / "store")), images, record)


@pytest.fixture
def finished(original, tmp_path, home) -> Finished:
    """A copy of it that a test may change, in a home of its own."""
    shutil.copytree(original.store.url, tmp_path / "store")
    shutil.copytree(original.images, tmp_path / "images")
    config = tiny.config(tmp_path / "images", tmp_path / "store")
    return Finished(config, Store(str(tmp_path / "store")), tmp_path / "images", original.record)


@pytest.fixture
def call(monkeypatch, capsys, home):
    """Run `repae ...` here; (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["repae", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, output.err

    return run
