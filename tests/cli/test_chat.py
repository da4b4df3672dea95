"""`chat`: a conversation by pipe, its commands, its end, and what happens when it outgrows the context."""

import io
import sys

import pytest

import jaxopt_llm as jo
from jaxopt_llm.cli import chat
from jaxopt_llm.engine import Engine, SamplingParams, Stream

TOKENS = 16


@pytest.fixture
def talk(run_cli, storyteller, monkeypatch):
    def run(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run_cli("chat", f"--model={storyteller}", f"--max_tokens={TOKENS}", *options)

    return run


@pytest.fixture(scope="module")
def engine(storyteller):
    return Engine(*jo.load(storyteller))


def answers(engine, *messages):
    """What the model says when it sees everything said before."""
    history, said = [], []
    for message in messages:
        history.append({"role": "user", "content": message})
        (result,) = engine.generate([history], SamplingParams(max_tokens=TOKENS))
        history.append({"role": "assistant", "content": result.text})
        said.append(result.text + (" ..." if result.finish_reason == "length" else ""))
    return said


def test_history_is_kept_until_reset(talk, engine):
    done = talk("Lily", "a dog", "/reset", "a dog")
    assert done.code == 0
    expected = answers(engine, "Lily", "a dog") + answers(engine, "a dog")
    assert done.stdout == "".join(f"{text}\n" for text in expected)
    assert "(the conversation is forgotten)" in done.stderr


def test_commands(talk, engine):
    done = talk("", "/help", "Lily", "/exit", "never read")
    assert done.stdout == "".join(f"{text}\n" for text in answers(engine, "Lily"))
    assert "(no command /help; /reset forgets the conversation" in done.stderr


def test_no_line_at_all_and_a_last_one_without_end(talk, engine, monkeypatch):
    assert talk().stdout == ""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Lily"))
    conversation = chat.Conversation(engine, SamplingParams(max_tokens=TOKENS))
    assert (chat._read(), chat._read(), conversation.messages) == ("Lily", None, [])


def test_a_conversation_that_outgrows_the_context_forgets_its_oldest_turns(engine, capsys):
    conversation = chat.Conversation(engine, SamplingParams(max_tokens=TOKENS))
    for turn in range(5):
        conversation.answer(f"{turn} {'dog ' * 75}")
    kept = [message["content"].split()[0] for message in conversation.messages if message["role"] == "user"]
    assert kept == [str(turn) for turn in range(5 - len(kept), 5)]
    assert 0 < len(kept) < 5
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * len(kept)
    notice = "(the conversation outgrew 512 tokens of context: its oldest turn is forgotten)"
    assert capsys.readouterr().err.count(notice) == 5 - len(kept)


def test_a_message_longer_than_the_context_is_refused(engine, capsys):
    conversation = chat.Conversation(engine, SamplingParams(max_tokens=TOKENS))
    conversation.answer("dog " * 600)
    assert conversation.messages == []
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no room for an answer in 512 tokens of context; shorten it" in captured.err


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(engine, capsys, monkeypatch):
    first = Stream.__next__

    def interrupted(stream):
        if stream in started:
            raise KeyboardInterrupt
        started.append(stream)
        return first(stream)

    started = []
    conversation = chat.Conversation(engine, SamplingParams(max_tokens=TOKENS))
    monkeypatch.setattr(Stream, "__next__", interrupted)
    conversation.answer("Lily")
    assert engine.metrics().running == 0
    printed = capsys.readouterr().out
    assert printed.endswith(" (stopped)\n")
    assert conversation.messages[-1] == {"role": "assistant", "content": printed.removesuffix(" (stopped)\n")}


def test_a_model_without_a_template_cannot_chat(run_cli, data_dir):
    done = run_cli("chat", f"--model={data_dir / 'stories260K.gguf'}")
    assert done.code == 2
    assert "no default chat template" in done.stderr.splitlines()[-1]


def test_json_is_not_for_conversations(talk):
    assert "chat has no flag --json" in talk(options=["--json"]).stderr
