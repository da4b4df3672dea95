"""Ctrl-C waits for a moment that suits, once."""

import signal
import threading

import pytest

from jaxopt_llm.engine import interrupts

press = lambda: signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handler():
    """Python's own, and there again after each test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def interrupted(*actions):
    """How many of them were done, and what came of it."""
    done = []
    try:
        with interrupts.deferred():
            for action in actions:
                action()
                done.append(action)
    except BaseException as error:
        return len(done), type(error)
    return len(done), None


def test_it_comes_at_the_end():
    assert interrupted(press) == (1, KeyboardInterrupt)


def test_nothing_comes_of_itself():
    assert interrupted(lambda: None) == (1, None)
    assert interrupted(lambda: 1 / 0) == (0, ZeroDivisionError)


def test_the_second_comes_at_once():
    assert interrupted(press, press, press) == (1, KeyboardInterrupt)


def test_it_comes_beside_an_error():
    assert interrupted(press, lambda: 1 / 0, press) == (1, KeyboardInterrupt)


def test_one_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert interrupted(press, press) == (2, None)
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.SIG_IGN


def test_other_threads_leave_it_alone():
    seen = []
    look = lambda: seen.append(signal.getsignal(signal.SIGINT))
    thread = threading.Thread(target=interrupted, args=(look,))
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
