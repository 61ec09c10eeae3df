"""What the driver does with the workers' reports neither ends a training nor leaves one behind."""

import psutil
import pytest

from tasks.ray_launch import _Mailbox, launch
from tasks.ray_session import RaySession


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::RayTrainWorker" in "".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_an_error_in_the_driver_ends_the_workers_and_surfaces_once(home):
    """Not as failed workers, which would start again."""

    def endless_worker(payload, report):  # nested: pickled by value, Ray's workers cannot import the tests
        import time

        while True:
            report({"step": 1})
            time.sleep(0.1)

    at_work: list[list[psutil.Process]] = []

    def on_report(message):
        at_work.append(workers())
        raise KeyError("metrics")

    session = RaySession()
    try:
        with pytest.raises(KeyError, match="metrics"):
            launch(endless_worker, {}, session=session, workers=1, cpus_per_worker=1, max_failures=3,
                   on_report=on_report)  # fmt: skip
        assert session.address is None
    finally:
        session.close()
    assert len(at_work) == 1
    assert len(at_work[0]) == 1
    assert psutil.wait_procs(at_work[0], timeout=15)[1] == []


def test_a_mailbox_that_does_not_answer_is_no_failure_of_the_workers(home, monkeypatch):
    """Looks into it fail, some after they have read, the last ones too: no new start, every report arrives once."""

    class Flaky(_Mailbox):
        looks = late = 0

        def read(self, received):
            self.looks += 1
            if self.looks < 4:
                raise RuntimeError("busy")
            answer = super().read(received)
            self.late += any(message["step"] == 49 for message in answer[1])
            if self.late in (1, 2) or (self.looks % 3 == 0 and not self.late):
                raise RuntimeError("the answer is lost")
            return answer

    def slow_worker(payload, report):
        import time

        for step in range(50):
            time.sleep(0.1)
            report({"step": step})
        return {"steps": 50}

    monkeypatch.setattr("tasks.ray_launch._Mailbox", Flaky)
    seen = []
    session = RaySession()
    try:
        result = launch(slow_worker, {}, session=session, workers=1, cpus_per_worker=1, on_report=seen.append)
    finally:
        session.close()
    assert result == {"steps": 50}
    assert [message["step"] for message in seen] == list(range(50))
