"""Tokenizers and chat templates against transformers, live."""

import json
import lzma
from pathlib import Path

import pytest

from jaxopt_llm.checkpoints import gguf
from jaxopt_llm.text import Tokenizer

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]
TEXT = "Once upon a time,  naïve 日本語 👩‍👩‍👧 <s> cafe\u0301\t\n\n\n  1234 it's <|im_start|>user\n\u00a0x"
# transformers has a tokenizer class for each, and must not take it: rebuilt by one, a tokenizer becomes another.
MODEL_TYPES = (None, "llama", "mistral", "qwen3", "gemma3_text", "olmo2", "gpt_oss")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather — now.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <ZH>"}}}
CHATS = {
    "question": [{"role": "user", "content": "Why is the sky “blue”? <b>"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello.\n"},
        {"role": "user", "content": "Bye"},
    ],
    "tool call": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
    ],
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["smollm2", "stories"])
def tokenizer(request, data_dir) -> Tokenizer:
    if request.param == "smollm2":
        packed = (ROOT / "tests" / "data" / "smollm2_tokenizer.json.xz").read_bytes()
        return Tokenizer.from_gguf(json.loads(lzma.decompress(packed)))
    with gguf.open_file(data_dir / "stories260K.gguf") as file:
        return Tokenizer.from_gguf(file.metadata)


def assert_same(ours: Tokenizer, theirs) -> None:
    for add_special in (True, False):
        ids = ours.encode(TEXT, add_special=add_special, parse_special=True)
        assert theirs(TEXT, add_special_tokens=add_special)["input_ids"] == ids
        for skip in (True, False):
            assert theirs.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip_special=skip)
    assert (theirs.bos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.pad_id)
    assert set(theirs.all_special_ids) <= ours.special_ids


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_we_save_transformers_loads(tokenizer, model_type, tmp_path, transformers):
    tokenizer.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same(tokenizer, theirs)
    theirs.save_pretrained(tmp_path / "again")
    assert_same(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "again"))
    assert_same(Tokenizer.from_directory(tmp_path / "again"), theirs)
    ends = transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert set(ends) == tokenizer.eos_ids


def test_what_we_save_for_qwen2(shared, tmp_path, transformers):
    """The one model type for which transformers takes its own class, whatever the file says."""
    tokenizer = Tokenizer.from_directory(shared / "tokenizers" / "qwen2.5")
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert_same(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["deepseek-v4", "qwen2.5"])
def test_published_directories(name, shared, transformers):
    directory = shared / "tokenizers" / name
    assert_same(Tokenizer.from_directory(directory), transformers.AutoTokenizer.from_pretrained(directory))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("name", ["qwen2.5", "smollm2-135m-instruct"])
def test_chats(name, chat, tools, generate, shared, transformers):
    directory = shared / "tokenizers" / name
    ours, theirs = Tokenizer.from_directory(directory), transformers.AutoTokenizer.from_pretrained(directory)
    options = {"tools": tools, "add_generation_prompt": generate}
    text = theirs.apply_chat_template(CHATS[chat], tokenize=False, **options)
    assert ours.apply_chat_template(CHATS[chat], **options) == text
    ids = theirs.apply_chat_template(CHATS[chat], return_dict=False, **options)
    assert ours.encode_chat(CHATS[chat], **options) == ids
