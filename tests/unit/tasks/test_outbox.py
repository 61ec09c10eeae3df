import threading

import pytest

import tasks.outbox
from tasks.outbox import Outbox


class Service:
    """Takes batches; `failing` errors are raised first, and while `stuck` it does not answer."""

    def __init__(self, *failing: Exception) -> None:
        self.failing = list(failing)
        self.got: list[int] = []
        self.calls = 0
        self.open = threading.Event()
        self.open.set()

    def send(self, batch: list[int]) -> None:
        self.calls += 1
        self.open.wait(30)
        if self.failing:
            raise self.failing.pop(0)
        self.got += batch


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(tasks.outbox, "_FIRST_PAUSE", 0.01)


def outbox(service: Service, **settings) -> Outbox[int]:
    return Outbox("numbers", "the service", service.send, **{"room": 100, "batch": 10, **settings})


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_in_order_and_in_batches():
    service = Service()
    box = outbox(service)
    assert all(box.put(number) for number in range(95))
    assert box.close(30) == 0
    assert service.got == list(range(95))
    assert 10 <= service.calls <= 95


def test_a_service_that_is_away_is_two_lines(caplog):
    service = Service(*[ConnectionError("no route")] * 4)
    box = outbox(service)
    for number in range(20):
        box.put(number)
    assert box.flush(30)
    assert service.got == list(range(20))
    assert warnings(caplog) == [
        "the service takes no numbers (no route); trying again",
        "the service takes numbers again",
    ]
    assert box.close(30) == 0


def test_put_does_not_wait_for_a_stuck_service_and_memory_is_bounded(caplog):
    """The service holds the first batch; the queue takes what it has room for and then no more."""
    service = Service()
    service.open.clear()
    box = outbox(service, room=25)
    taken = [box.put(number) for number in range(1000)]
    assert sum(taken) == 25
    assert taken[:25] == [True] * 25
    assert box.close(0.05) == 25
    assert warnings(caplog) == ["25 numbers did not arrive at the service"]
    assert not box.put(1)
    service.open.set()


def test_room_is_free_again_once_the_service_is_back():
    service = Service()
    service.open.clear()
    box = outbox(service, room=5)
    assert [box.put(number) for number in range(6)] == [True] * 5 + [False]
    service.open.set()
    assert box.flush(30)
    assert box.put(5)
    assert box.close(30) == 0
    assert service.got == list(range(6))


def test_what_is_refused_does_not_hold_up_the_rest(caplog):
    service = Service(ValueError("no such run"))
    box = outbox(service, batch=1, refused=lambda error: isinstance(error, ValueError))
    for number in range(3):
        box.put(number)
    assert box.close(30) == 1
    assert service.got == [1, 2]
    assert warnings(caplog) == [
        "the service refused numbers: no such run", "1 numbers did not arrive at the service"
    ]  # fmt: skip


def test_a_programming_error_surfaces_once_at_the_end():
    service = Service(KeyError("metrics"))
    box = outbox(service, batch=1)
    for number in range(3):
        box.put(number)
    assert box.flush(30)
    assert service.got == [1, 2]
    with pytest.raises(KeyError, match="metrics"):
        box.close(30)
    assert box.close(30) == 1


def test_nothing_to_send_starts_no_thread():
    service = Service()
    before = threading.active_count()
    assert outbox(service).close(30) == 0
    assert threading.active_count() == before
    assert service.calls == 0


def test_the_thread_ends_with_the_outbox():
    service = Service()
    box = outbox(service)
    box.put(1)
    assert box.close(30) == 0
    for thread in threading.enumerate():
        if thread.name == "outbox-numbers":
            thread.join(30)
            assert not thread.is_alive()
