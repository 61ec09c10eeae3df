import threading
import time

from repae_core.training import watchdog as module
from repae_core.training.watchdog import StepWatchdog


def test_a_hanging_step_is_noticed():
    hung = threading.Event()
    with StepWatchdog(0.2, hung.set) as watchdog:
        watchdog.beat()
        assert hung.wait(20)


def test_the_first_step_may_take_its_time():
    hung = threading.Event()
    with StepWatchdog(0.05, hung.set):
        time.sleep(0.4)
    assert not hung.is_set()


def test_a_first_step_that_hangs_is_noticed_too(monkeypatch):
    monkeypatch.setattr(module, "FIRST_STEP_SECONDS", 0.4)
    hung = threading.Event()
    with StepWatchdog(0.05, hung.set):
        assert not hung.wait(0.2)
        assert hung.wait(20)


def test_slow_steps_have_a_longer_limit():
    watchdog = StepWatchdog(on_hang=lambda: None)
    assert watchdog.limit == 600
    watchdog.beat()
    assert watchdog.limit == 120
    watchdog._durations.extend([30.0, 40.0, 50.0])
    assert watchdog.limit == 400


def test_a_store_that_is_waited_for_lengthens_the_limit():
    watchdogs = [StepWatchdog(timeout, minimum=minimum) for timeout, minimum in ((None, 240), (None, 60), (5, 240))]
    for watchdog in watchdogs:
        watchdog.beat()
    assert [watchdog.limit for watchdog in watchdogs] == [240, 120, 5]


def test_long_work_inside_a_step_can_say_that_it_goes_on():
    hung = threading.Event()
    with StepWatchdog(0.4, hung.set) as watchdog:
        watchdog.beat()
        for _ in range(20):
            time.sleep(0.05)
            watchdog.alive()
        assert not hung.is_set()
        assert hung.wait(20)
