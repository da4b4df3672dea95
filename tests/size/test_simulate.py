"""The simulation: against closed forms of queues."""

import numpy as np
import pytest

from jaxopt_llm.engine.scheduler import SchedulerConfig
from jaxopt_llm.size.simulate import simulate
from jaxopt_llm.size.traffic import Asked, Traffic, traffic

pytestmark = pytest.mark.usefixtures("unchecked")  # thousands of plans


def sizes(slots, **changes):
    given = {
        "max_slots": slots,
        "page_size": 16,
        "num_pages": (slots * 64,),
        "windows": (None,),
        "max_tokens_per_step": 512,
        "max_seq_len": 1024,
    }
    return SchedulerConfig(**(given | changes))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_a_server_of_equal_steps_is_an_m_d_1_queue(load):
    """Pollaczek and Khinchine: the mean wait is load / (2 (1 - load)) services."""
    asked = traffic(prompt=(1, 1), output=(1, 1), rate=load, requests=5_000)
    served = simulate(asked, sizes(1), lambda plan: 1.0)
    assert (served.ttft_s - 1).mean() == pytest.approx(load / (2 * (1 - load)), rel=0.12)
    assert (served.ttft_s == served.latency_s).all()


def test_little_s_law_at_a_fixed_concurrency():
    """Requests inside are those that come in a second times how long each stays."""
    asked = traffic(prompt=(10, 60), output=(5, 50), concurrency=12, requests=1200)
    served = simulate(asked, sizes(8), lambda plan: 0.01 + 0.001 * len(plan.pieces))
    span = served.last.max() - served.asked.min()
    assert len(asked.asked) / span * served.latency_s.mean() == pytest.approx(12, rel=0.02)


def test_one_request_takes_its_steps():
    """Two chunks of the prompt, the second of which gives the first token, and a step for each other token."""
    asked = Traffic(asked=(Asked(3.0, 600, 10),))
    for steps in (1, 8):
        served = simulate(asked, sizes(1, decode_steps=steps), lambda plan: float(plan.steps))
        assert served.asked[0] == 3.0
        assert served.ttft_s[0] == pytest.approx(2.0)
        assert served.latency_s[0] == pytest.approx(2.0 + 9.0, abs=steps - 1)
    assert simulate(asked, sizes(1), lambda plan: 1.0).tpot_s[0] == pytest.approx(1.0)


def test_a_full_batch_is_as_fast_as_its_steps():
    asked = traffic(prompt=(16, 16), output=(64, 64), concurrency=8, requests=64)
    served = simulate(asked, sizes(8), lambda plan: 1.0)
    assert served.tokens_per_s == pytest.approx(8 * 64 / (64 + 1), rel=0.05)
    assert served.tpot_s.max() <= 1.05


def test_too_little_memory_makes_requests_leave():
    asked = traffic(prompt=(64, 64), output=(128, 128), concurrency=8, requests=16)
    roomy = simulate(asked, sizes(8), lambda plan: 1.0)
    tight = simulate(asked, sizes(8, num_pages=(24,)), lambda plan: 1.0)
    assert (roomy.preemptions, tight.preemptions > 0) == (0, True)
    assert tight.tokens_per_s < roomy.tokens_per_s
    assert np.isfinite(tight.last).all()


def test_prompts_that_share_blocks_are_read_once():
    same = tuple(Asked(1000.0 * n, 1024, 2, (7, n + 10)) for n in range(4))
    served = simulate(Traffic(asked=same), sizes(4, max_seq_len=2048, num_pages=(512,)), lambda plan: 1.0)
    assert served.cached_tokens == 3 * 512
    assert list(served.ttft_s) == [2.0, 1.0, 1.0, 1.0]
