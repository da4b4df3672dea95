"""`generate`: text or JSON, every flag obeyed, times without compilation."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.cli import flags
from jaxopt_llm.engine import Engine, SamplingParams, encode
from jaxopt_llm.engine.drafting import Drafting
from tests import adapters

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def expected(storyteller):
    model, tokenizer = jo.load(storyteller)
    return jo.generate(model, tokenizer, PROMPT, max_tokens=24, logprobs=0)[0]


@pytest.fixture
def generate(run_cli, storyteller):
    def run(*arguments):
        common = (f"--model={storyteller}", f"--prompt={PROMPT}", "--max_tokens=24")
        done = run_cli("generate", *common, *arguments)
        assert done.code == 0, done.stderr
        return done

    return run


def answer(done):
    return json.loads(done.stdout.splitlines()[-1])


def test_text_goes_to_stdout_and_the_rest_to_stderr(generate, expected):
    done = generate()
    assert done.stdout == expected.text + "\n"
    assert "5 tokens in, 24 out (length); first after" in done.stderr
    assert "compiling" in done.stderr


def test_json(generate, expected):
    done = generate("--json")
    assert done.stdout.count("\n") == 1
    report = answer(done)
    assert report.pop("ttft_ms") > 0
    assert report.pop("tpot_ms") > 0
    assert report == {
        "text": expected.text,
        "prompt_tokens": expected.prompt_tokens,
        "output_tokens": 24,
        "token_ids": expected.token_ids,
        "finish_reason": "length",
    }


def test_logprobs(generate, expected):
    report = answer(generate("--json", "--logprobs"))
    assert report["logprobs"] == pytest.approx([entry.logprob for entry in expected.logprobs], abs=1e-5)
    table = generate("--logprobs").stdout
    assert table.startswith(expected.text)
    assert "| 'there' " in table


def test_chat_goes_through_the_template(generate, storyteller):
    model, tokenizer = jo.load(storyteller)
    messages = [{"role": "user", "content": PROMPT}]
    report = answer(generate("--chat", "--json"))
    assert report["prompt_tokens"] == len(tokenizer.encode_chat(messages))
    assert report["token_ids"] == jo.generate(model, tokenizer, [messages], max_tokens=24)[0].token_ids


def test_stop_and_seed(generate, expected):
    stop = expected.text[12:18]
    report = answer(generate("--json", f"--stop={stop}"))
    assert (report["text"], report["finish_reason"]) == (expected.text[: expected.text.index(stop)], "stop")
    sampled = ["--json", "--temperature=1.5", "--seed=7"]
    first, again = (answer(generate(*sampled))["token_ids"] for _ in range(2))
    assert first == again != expected.token_ids


def test_every_sampling_setting_has_a_flag():
    names = {holder.name for holder in flags.SAMPLING}
    settings = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names | {"logprobs", "logit_bias", "ignore_eos"} == settings


@pytest.mark.parametrize(
    "options", [["--dtype=native"], ["--quantize=int8", "--mesh=tensor=4"], ["--mesh=stage=3+2,tensor=2"]]
)
def test_the_same_tokens_however_it_is_loaded(generate, expected, options):
    assert answer(generate("--json", *options))["token_ids"][:16] == expected.token_ids[:16]


def test_an_adapter_is_merged_before_the_weights_are_rounded(generate, expected, storyteller, tmp_path):
    tensors = adapters.lora(np.random.default_rng(0), "model.layers.0.mlp.down_proj", 64, 172, 4)
    adapters.write(tmp_path, tensors, r=4, lora_alpha=40, target_modules=["layers.0.mlp.down_proj"])
    model, tokenizer = jo.load(storyteller, quantize="int8", adapter=tmp_path)
    (own,) = jo.generate(model, tokenizer, PROMPT, max_tokens=24)
    report = answer(generate("--json", "--quantize=int8", f"--adapter={tmp_path}"))
    assert report["token_ids"] == own.token_ids != expected.token_ids


def test_times_leave_out_compilation(storyteller):
    """What `warm_up` has run, `submit` need not compile, whatever the settings."""
    model, tokenizer = jo.load(storyteller)
    params = SamplingParams(max_tokens=60, temperature=0.5, repetition_penalty=1.1, seed=1)
    engine = Engine(model, tokenizer)
    engine.warm_up(prompt_tokens=len(encode(PROMPT, tokenizer, model.config)), rows=1, full=True)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    try:
        for _ in engine.submit(PROMPT, params):
            pass
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [event for event in compiled if "compile" in event]


@pytest.mark.parametrize("how", ["--prompt_lookup", "--draft_model"])
def test_the_same_text_with_drafts(generate, storyteller, expected, how, monkeypatch):
    """As many as there may be from the first round on: whether they pay is for the clock of the machine to say."""
    monkeypatch.setattr(Drafting, "level", lambda self, records, rows: self.levels[-1])
    done = generate(how if how == "--prompt_lookup" else f"{how}={storyteller}")
    assert done.stdout == expected.text + "\n"
    if how == "--draft_model":
        assert "drafts were right" in done.stderr


def test_a_draft_model_of_another_tokenizer_is_refused(run_cli, storyteller, tmp_path):
    model, other = jo.load(storyteller)
    other.backend.add_tokens(["one more"])
    jo.save(model, other, tmp_path / "draft")
    done = run_cli("generate", f"--model={storyteller}", "--prompt=a", f"--draft_model={tmp_path / 'draft'}")
    assert done.code == 2
    assert "has another tokenizer than the model; take one with the same" in done.stderr
