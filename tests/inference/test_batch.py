"""Many requests, a window of them known to the engine."""

from collections.abc import Callable

from nemotron_h.inference.batch import answers
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.request import Request
from nemotron_h.model.hybrid import Hybrid
from tests.inference.serving import check_alone
from tests.inference.test_engine import SMALL


def test_a_long_answer_does_not_keep_others_from_running(build: Callable[..., Hybrid]) -> None:
    engine = Engine(build(), config=SMALL)
    requests = [Request(ids=[7, 8, 9], max_tokens=60), *[Request(ids=[5, n], max_tokens=4) for n in range(40)]]
    ended = list(answers(engine, requests))
    assert [answer.request for answer in ended] == requests
    assert engine.counts.passes < 70  # they ran beside it
    check_alone(engine.model, *ended[:5])
