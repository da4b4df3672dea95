"""Flags that commands share, each defined once.

They live in `SHARED`, apart from absl's global flags: a program takes the ones it names and refuses the rest.
A command names a flag by importing it (`main` gives a command the flags that its module holds):

    from jaxopt_llm.cli.flags import JSON, MODEL

One's own absl program says so at module level, and absl parses them with its own:

    from jaxopt_llm.cli import flags as jo_flags
    jo_flags.use(jo_flags.MODEL, jo_flags.MESH)
    app.run(main)
"""

import sys
from typing import Any

from absl import flags

SHARED = flags.FlagValues()


def use(*holders: flags.FlagHolder[Any]) -> None:
    """Adds these shared flags to one's own absl program, whose `app.run(main)` then parses them."""
    for holder in holders:
        flags.FLAGS[holder.name] = SHARED[holder.name]
        # absl calls the main module `sys.argv[0]`, and --help prints its flags
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], SHARED[holder.name])
    SHARED.mark_as_parsed()  # by `app.run`: the `Flag` objects are the same


class FlagGroup(tuple[flags.FlagHolder[Any], ...]):
    """Flags that are passed on together."""

    @property
    def value(self) -> dict[str, Any]:
        """The flags that were given, by name: the library's own defaults hold for the others."""
        return {holder.name: holder.value for holder in self if holder.value is not None}


MODEL = flags.DEFINE_string(
    "model",
    "smollm2-135m-instruct",
    "Model: a directory, a .gguf file, hf:org/name[@revision], or a known name such as gemma3-270m.",
    flag_values=SHARED,
)
DTYPE = flags.DEFINE_string(
    "dtype",
    None,
    "Type to load floats in: bfloat16, float16, float32, or native to keep GGUF blocks as they are. "
    "Unset: what the chip computes best.",
    flag_values=SHARED,
)
QUANTIZE = flags.DEFINE_string(
    "quantize",
    None,
    "Round the weights while they are read: int8, int8_block, int4, w8a8, fp8, or such as int4_g64_zero.",
    flag_values=SHARED,
)
MESH = flags.DEFINE_string(
    "mesh",
    None,
    "Devices to spread the model over, such as tensor=4; auto for as many as divide it.",
    flag_values=SHARED,
)
ADAPTER = flags.DEFINE_string(
    "adapter",
    None,
    "LoRA adapter in PEFT's format to merge into the weights: a directory, or hf:org/name.",
    flag_values=SHARED,
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Run in several processes, each started with this flag: host:port of process 0, or auto on Cloud TPU, GKE and "
    "Slurm, where --num_processes and --process_id are found too. Process 0 alone reads stdin and prints.",
    flag_values=SHARED,
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes there are.", flag_values=SHARED
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=SHARED)
JOIN_S = flags.DEFINE_integer(
    "join_s", None, "Seconds in which all processes must be there. Unset: 300.", flag_values=SHARED
)
HOSTS = FlagGroup((COORDINATOR, NUM_PROCESSES, PROCESS_ID, JOIN_S))
LOADING = FlagGroup((DTYPE, QUANTIZE, MESH, ADAPTER))
PROMPT_LOOKUP = flags.DEFINE_boolean(
    "prompt_lookup",
    False,
    "Draft tokens from where the latest ones stood before: the same text, sooner where it repeats itself.",
    flag_values=SHARED,
)
DRAFT_MODEL = flags.DEFINE_string(
    "draft_model",
    None,
    "A smaller model with the same tokenizer, named as --model is, to draft tokens with: the same text, sooner.",
    flag_values=SHARED,
)
CONFIG = flags.DEFINE_string(
    "config", None, "Config: a packaged name, or one's own file.py.", required=True, flag_values=SHARED
)
SET = flags.DEFINE_multi_string(
    "set", [], "Override of one field of the config, a.b=value", flag_values=SHARED
)
TEXT = flags.DEFINE_string("text", None, "UTF-8 file to measure on.", flag_values=SHARED)
REFERENCE = flags.DEFINE_string(
    "reference", None, "Model to compare with, of the same vocabulary.", flag_values=SHARED
)
WINDOW = flags.DEFINE_integer("window", 1024, "Tokens read at once.", flag_values=SHARED)
WINDOWS = flags.DEFINE_integer("windows", None, "Read only the first so many windows.", flag_values=SHARED)
BOS = flags.DEFINE_boolean(
    "bos",
    False,
    "Put a BOS in place of each window's first token. Gemma predicts badly without.",
    flag_values=SHARED,
)
OUT = flags.DEFINE_string("out", None, "Where to write the result.", required=True, flag_values=SHARED)
JSON = flags.DEFINE_boolean(
    "json", False, "Print one JSON object as the last line of stdout.", flag_values=SHARED
)
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.", required=True, flag_values=SHARED)
CHAT = flags.DEFINE_boolean(
    "chat", False, "Take the prompt as a user's message to a chat model.", flag_values=SHARED
)
LOGPROBS = flags.DEFINE_boolean(
    "logprobs", False, "Give the log-probability of each generated token.", flag_values=SHARED
)
CHIP = flags.DEFINE_string(
    "chip",
    None,
    "Chip, such as v5e, that need not be there. inspect --step compiles for it, or for here, the default. size "
    "considers several, v5e,v5p,v6e,a100,h100 unless named; this measures the machine at hand.",
    flag_values=SHARED,
)
CONCURRENCY = flags.DEFINE_integer(
    "concurrency", None, "Sequences that run together. Unset: 1; for size 16.", flag_values=SHARED
)
OUTPUT_TOKENS = flags.DEFINE_integer(
    "output_tokens",
    None,
    "Tokens that each sequence generates. Unset: 128; for size 256.",
    flag_values=SHARED,
)

MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Generate at most so many tokens.", flag_values=SHARED)
TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Divides the logits; 0 takes the likeliest token.", flag_values=SHARED
)
TOP_P = flags.DEFINE_float(
    "top_p", None, "Sample among the likeliest tokens of this total probability.", flag_values=SHARED
)
TOP_K = flags.DEFINE_integer("top_k", None, "Sample among this many likeliest tokens.", flag_values=SHARED)
MIN_P = flags.DEFINE_float(
    "min_p", None, "Sample among tokens at least this likely, relative to the likeliest.", flag_values=SHARED
)
REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", None, "Divides the logits of tokens seen so far.", flag_values=SHARED
)
PRESENCE_PENALTY = flags.DEFINE_float(
    "presence_penalty", None, "Subtracted from the logits of tokens generated so far.", flag_values=SHARED
)
FREQUENCY_PENALTY = flags.DEFINE_float(
    "frequency_penalty", None, "Subtracted once for each time a token was generated.", flag_values=SHARED
)
SEED = flags.DEFINE_integer("seed", None, "Seed of the random numbers.", flag_values=SHARED)
STOP = flags.DEFINE_multi_string("stop", None, "Text that ends the generation", flag_values=SHARED)

SAMPLING = FlagGroup(
    (
        MAX_TOKENS,
        TEMPERATURE,
        TOP_P,
        TOP_K,
        MIN_P,
        REPETITION_PENALTY,
        PRESENCE_PENALTY,
        FREQUENCY_PENALTY,
        SEED,
        STOP,
    )
)
