import threading
import time

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


def test_slow_steps_have_a_longer_limit():
    watchdog = StepWatchdog(on_hang=lambda: None)
    assert watchdog.limit == 120
    watchdog._durations.extend([30.0, 40.0, 50.0])
    assert watchdog.limit == 400


def test_a_store_that_is_waited_for_lengthens_the_limit():
    assert StepWatchdog(on_hang=lambda: None, minimum=240).limit == 240
    assert StepWatchdog(on_hang=lambda: None, minimum=60).limit == 120
    assert StepWatchdog(5, on_hang=lambda: None, minimum=240).limit == 5


def test_long_work_inside_a_step_can_say_that_it_goes_on():
    hung = threading.Event()
    with StepWatchdog(0.4, hung.set) as watchdog:
        watchdog.beat()
        for _ in range(20):
            time.sleep(0.05)
            watchdog.alive()
        assert not hung.is_set()
        assert hung.wait(20)
