"""Streaming: however the ids are cut, the text is that of all of them."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxopt_llm.text import Detokenizer, StopStrings

TEXT = "Once upon a time, 日本語 👩‍👩‍👧 naïve — the end. "


@st.composite
def cut(draw, items):
    """`items` in pieces, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(items)), max_size=8)))
    return [items[a:b] for a, b in zip([0, *cuts], [*cuts, len(items)], strict=True)]


def run(stream, pieces) -> list[str]:
    return [*(stream.add(piece) for piece in pieces), stream.flush()]


@given(st.data())
def test_any_ids_cut_anywhere(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    skip = data.draw(st.booleans())
    parts = run(Detokenizer(tokenizer, skip_special=skip), data.draw(cut(ids)))
    assert "".join(parts) == tokenizer.decode(ids, skip_special=skip)


@given(st.data())
def test_no_broken_characters_while_more_may_come(tokenizer, data):
    text = data.draw(st.text()).replace("\ufffd", "")
    ids = tokenizer.encode(text)
    assume(tokenizer.decode(ids) == text)  # SmolLM2 has no token for some bytes
    stream = Detokenizer(tokenizer)
    parts = [stream.add(piece) for piece in data.draw(cut(ids))]
    assert "\ufffd" not in "".join(parts)
    assert stream.flush() == ""


def test_a_character_over_several_tokens_is_held_back(stories):
    ids = stories.encode("日", add_special=False)
    stream = Detokenizer(stories)
    assert [stream.add([index]) for index in ids] == ["", "", "", "日"]  # the space in front is dropped
    assert stream.add(ids[1:3]) == ""
    assert stream.flush() == "\ufffd"


def test_what_continues_a_prompt_keeps_its_space(stories):
    prompt = stories.encode("Once upon")
    answer = stories.encode("a time", add_special=False)
    assert Detokenizer(stories, prompt=prompt).add(answer) == " a time"
    assert Detokenizer(stories).add(answer) == "a time"
    assert Detokenizer(stories, prompt=[stories.bos_id]).add(answer) == "a time"


@given(st.data())
def test_text_stops_where_the_first_stop_string_is_complete(data):
    text = data.draw(st.text("ab.", max_size=30))
    stops = data.draw(st.lists(st.text("ab.", min_size=1, max_size=5), max_size=4))
    stream = StopStrings(stops)
    parts = run(stream, data.draw(cut(text)))
    ends = [(i, stop) for i in range(len(text) + 1) for stop in stops if text[:i].endswith(stop)]
    if ends:
        end = min(end for end, _ in ends)
        longest = max((stop for i, stop in ends if i == end), key=len)
        assert (stream.matched, "".join(parts)) == (longest, text[: end - len(longest)])
    else:
        assert (stream.matched, "".join(parts)) == (None, text)


def test_only_what_may_become_a_stop_string_is_held_back():
    stream = StopStrings(["</answer>", "\n\n"])
    assert stream.add("so </ans") == "so "
    assert stream.add("e\n") == "</anse"
    assert stream.add("x") == "\nx"
    assert stream.add("y</answer>z") == "y"
    assert (stream.matched, stream.add("more"), stream.flush()) == ("</answer>", "", "")


def test_stop_strings_in_a_stream_of_tokens(tokenizer):
    ids = tokenizer.encode(TEXT, add_special=False)
    stream = Detokenizer(tokenizer, stop=["👧 na", "the"])
    assert "".join(run(stream, [[index] for index in ids])) == TEXT.split("👧 na")[0]
    assert stream.stopped == "👧 na"


def test_cost_is_linear(tokenizer):
    """A window that grew with the answer would decode 200 million tokens here."""
    ids = tokenizer.encode(TEXT * 1000, add_special=False)[:20_000]
    stream = Detokenizer(tokenizer, stop=["never said"])
    assert "".join(run(stream, [[index] for index in ids])) == tokenizer.decode(ids)


@pytest.mark.parametrize("stop", [[""], ["a", ""], "stop"])
def test_bad_stop_strings(stop):
    with pytest.raises(ValueError, match="must be a list of strings that are not empty"):
        StopStrings(stop)
