"""Requests: drawn, and read from files in the forms that are published."""

import json
import math

import pytest

from jaxopt_llm.size.traffic import Asked, prompt_tokens, traffic

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:05.9799600,31,8
"""
LENGTHS = "num_prefill_tokens,num_decode_tokens\n3772,54\n2015,156\n"
MOONCAKE = "".join(
    json.dumps({"timestamp": at, "input_length": 700, "output_length": 5, "hash_ids": [0, at]}) + "\n"
    for at in (0, 3000)
)


def written(tmp_path, text):
    path = tmp_path / "trace"
    path.write_text(text)
    return path


def test_a_rate():
    asked = traffic(rate=20, requests=4000, prompt=(10, 30))
    assert asked.rate == pytest.approx(20, rel=0.05)
    assert asked.prompt == pytest.approx(20, rel=0.02)
    assert {one.output for one in asked.asked} == {256}
    gaps = [b.at - a.at for a, b in zip(asked.asked, asked.asked[1:], strict=False)]
    assert sum(gap > 1 / 20 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), rel=0.1)


def test_azure(tmp_path):
    asked = traffic(trace=written(tmp_path, AZURE))
    assert asked.asked == (Asked(0.0, 4808, 10), Asked(pytest.approx(2.0), 31, 8))
    assert traffic(trace=written(tmp_path, AZURE), rate=10).asked[1].at == pytest.approx(0.1)
    assert traffic(trace=written(tmp_path, AZURE), concurrency=3).rate is None


def test_mooncake(tmp_path):
    asked = traffic(trace=written(tmp_path, MOONCAKE))
    assert asked.asked[1] == Asked(3.0, 700, 5, (0, 3000))
    first, second = (prompt_tokens(one, number) for number, one in enumerate(asked.asked))
    assert len(first) == 700
    assert first[:512] == second[:512]
    assert first[512] != second[512]


def test_lengths_alone(tmp_path):
    path = written(tmp_path, LENGTHS)
    assert [one.prompt for one in traffic(trace=path, rate=1).asked] == [3772, 2015]
    with pytest.raises(ValueError, match="give a rate or a concurrency"):
        traffic(trace=path)


def test_the_traces_that_are_there(shared):
    for path in (shared / "data" / "traces").iterdir():
        asked = traffic(trace=path, concurrency=4, requests=100)
        assert len(asked.asked) == 100
        assert asked.longest > 1


def test_parts_of_data_shards():
    timed = traffic(rate=8, requests=1600)
    assert timed.part(4).rate == pytest.approx(2, rel=0.1)
    assert traffic(concurrency=16).part(4).concurrency == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1, "concurrency": 1}, "exclude each other"),
        ({}, "nothing tells when"),
        ({"rate": 0}, "rate=0 must be more than 0"),
        ({"rate": math.nan}, "rate=nan must be more than 0"),
        ({"concurrency": 1, "prompt": (0, 0)}, "input_tokens=0-0 must be at least 1"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        traffic(**arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no trace: it begins with 'a,b', not with TIMESTAMP,"),
        ("", "no trace: it begins with ''"),
        (LENGTHS.splitlines()[0], "no requests"),
        (LENGTHS + "x,2\n", "request 3 is damaged"),
        ('{"timestamp": 0}\n', "request 1 is damaged: KeyError"),
        ("{broken\n", "damaged"),
    ],
)
def test_files_that_are_no_traces(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        traffic(trace=written(tmp_path, text), concurrency=1)
