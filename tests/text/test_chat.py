"""Chat templates: the helpers that published ones use, and what must not get through."""

import re
from datetime import datetime

import pytest

from jaxopt_llm.text import Tokenizer, chat

USER = {"role": "user", "content": "Why <is> the sky “blue”?"}

CHATML = (
    "{% for message in messages %}\n"
    "    {% if loop.first and message['role'] != 'system' %}\n"
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "    {% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "<|im_start|>assistant\n"
    "{% endif %}\n"
)


def render(template: str, *messages, **options) -> str:
    return chat.render({"default": template}, messages or [USER], **options)


def test_blocks_leave_no_lines_behind():
    expected = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{USER['content']}<|im_end|>\n"
    assert render(CHATML, add_generation_prompt=False) == expected
    assert render(CHATML) == expected + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Why <is> the sky “blue”?"}'),
        ("{{ [1, 'é'] | tojson(indent=2, ensure_ascii=True) }}", '[\n  1,\n  "\\u00e9"\n]'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}", '{"a":2,"b":1}'),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% set x = 1 %}{% generation %}{{ x }}{% set x = 2 %}{% endgeneration %}{{ x }}", "11"),
        (
            "{% set ns = namespace(n=0) %}{% for i in 'ab' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "2",
        ),
        ("{{ tools is none }} {{ documents is none }} {{ nothing is defined }}", "True True False"),
        ("{{ bos_token }}{{ enable_thinking }}", "<s>False"),
    ],
)
def test_helpers(template, expected):
    assert render(template, bos_token="<s>", enable_thinking=False) == expected


def test_tools_pick_their_template():
    templates = {"default": "plain", "tool_use": "{{ tools[0].name }}"}
    assert chat.render(templates, [USER], tools=[{"name": "clock"}]) == "clock"
    assert chat.render(templates, [USER]) == "plain"
    assert render("{{ tools | length }}", tools=[{"name": "clock"}]) == "1"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content.nothing.more }}", "no attribute 'nothing'"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ tools.clear() }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "too big"),
    ],
)
def test_failures_are_one_clear_error(template, message):
    with pytest.raises(ValueError, match=f"the chat template failed: .*({message})"):
        chat.render({"default": template}, [USER], tools=[{"name": "clock"}])


def test_bad_messages():
    with pytest.raises(ValueError, match="at least one message"):
        chat.render({"default": CHATML}, [])
    with pytest.raises(ValueError, match=re.escape("a mapping with a 'role', not {'content': 'x'}")):
        render(CHATML, {"content": "x"})


def test_no_template(stories):
    with pytest.raises(ValueError, match=r"no default chat template.*pass the prompt as a string"):
        stories.apply_chat_template([USER])


def test_smollm2(smollm2: Tokenizer):
    text = smollm2.apply_chat_template([USER])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.encode_chat([USER])
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)
    assert smollm2.decode(ids, skip_special=False) == text
