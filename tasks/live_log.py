"""What a stage logs while it works: curves and pictures, exactly once, without waiting for MLflow."""

from __future__ import annotations

import io
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from tasks.outbox import Outbox

_GATHER_SECONDS = 3.0  # metrics are sent that often
_BATCH = 1000  # MLflow's limit of metrics a call
_ROOM = 100_000  # waiting values, about 20 MB; 25 curves of 4,000 points
_PICTURES = 1_000  # waiting pictures: references, not bytes
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST"}


class _Value(NamedTuple):
    """A metric at its images seen (MLflow's step)."""

    name: str
    value: float
    milliseconds: int
    step: int


class _Picture(NamedTuple):
    """A PNG of a series over images seen, or (none) a single file."""

    png: Callable[[], bytes]
    name: str
    step: int | None


class LiveLog:
    """Metrics against images seen and pictures of one MLflow run, sent by outboxes.

    Every (name, images seen) is logged once in the life of the run: what this process took before is dropped at once;
    what an earlier one logged, or what a call that failed did send, is asked of MLflow before the next call.
    """

    def __init__(self, client: Any, run_id: str, where: str, metric: Callable[..., Any]) -> None:
        self.run_id = run_id
        self._client, self._metric = client, metric
        self._taken: dict[str, set[int]] = defaultdict(set)
        self._values_there: dict[str, set[int]] | None = None  # None: not known, ask
        self._pictures_there: set[tuple[str, int]] | None = None
        self._values = Outbox[_Value](
            "metrics", where, self._send_values,
            room=_ROOM, batch=_BATCH, refused=self._refused, gather=_GATHER_SECONDS,
        )  # fmt: skip
        self._pictures = Outbox[_Picture](
            "pictures", where, self._send_pictures, room=_PICTURES, batch=1, refused=self._refused
        )

    def log_metrics(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Leave them to be sent; never waits, and drops what was logged before."""
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            taken = self._taken[name]
            if images_seen not in taken and self._values.put(_Value(name, value, now, images_seen)):
                taken.add(images_seen)

    def log_picture(self, png: Callable[[], bytes], name: str, images_seen: int | None = None) -> None:
        """Leave a PNG to be sent, one of a series over images seen or a single file; `png` reads it when it is sent."""
        taken = self._taken[f"picture {name}"]
        step = -1 if images_seen is None else images_seen
        if step not in taken and self._pictures.put(_Picture(png, name, images_seen)):
            taken.add(step)

    def flush(self, seconds: float) -> bool:
        """Wait until metrics and pictures are sent; False if that takes longer."""
        until = time.monotonic() + seconds
        metrics = self._values.flush(seconds)
        return self._pictures.flush(max(until - time.monotonic(), 0.0)) and metrics

    def close(self, seconds: float) -> None:
        """Flush within about so long; a warning says what did not arrive.

        Raises:
            TypeError, LookupError, ...: a programming error in what was to be sent.
        """
        until = time.monotonic() + seconds
        try:
            self._values.close(seconds)
        finally:
            self._pictures.close(max(until - time.monotonic(), 1.0))

    def _send_values(self, batch: list[_Value]) -> None:
        if self._values_there is None:
            self._values_there = self._logged_values()
        there = self._values_there
        new = [self._metric(*value) for value in batch if value.step not in there.get(value.name, ())]
        if new:
            self._values_there = None  # if the call fails, some may have arrived all the same
            self._client.log_batch(self.run_id, metrics=new)
            self._values_there = there

    def _logged_values(self) -> dict[str, set[int]]:
        names = [n for n in self._client.get_run(self.run_id).data.metrics if not n.startswith("system/")]
        return {name: {m.step for m in self._client.get_metric_history(self.run_id, name)} for name in names}

    def _send_pictures(self, batch: list[_Picture]) -> None:
        if self._pictures_there is None:
            self._pictures_there = self._logged_pictures()
        there = self._pictures_there
        for picture in batch:
            if picture.step is not None and (picture.name, picture.step) in there:
                continue
            image = Image.open(io.BytesIO(picture.png())).convert("RGB")
            if picture.step is None:
                self._client.log_image(self.run_id, image, artifact_file=f"pictures/{picture.name}.png")
                continue
            self._pictures_there = None
            self._client.log_image(self.run_id, image, key=picture.name, step=picture.step, synchronous=True)
            self._pictures_there = there

    def _logged_pictures(self) -> set[tuple[str, int]]:
        """(name, images seen) of those that are there in both sizes, by MLflow's file names."""
        found: dict[tuple[str, int], set[str]] = defaultdict(set)
        for file in self._client.list_artifacts(self.run_id, "images"):
            path = PurePosixPath(file.path)
            name, _, rest = path.name.partition("+step+")
            step = rest.partition("+")[0]
            if step.isdigit():
                found[name, int(step)].add(path.suffix)
        return {picture for picture, suffixes in found.items() if suffixes >= {".png", ".webp"}}

    def _refused(self, error: Exception) -> bool:
        code = getattr(error, "error_code", None)
        return code in _REFUSALS or isinstance(error, (FileNotFoundError, UnidentifiedImageError))
