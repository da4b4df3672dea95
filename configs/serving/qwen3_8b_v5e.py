"""hf:Qwen/Qwen3-8B on v5e 2x2 (tensor=4): what `jaxopt-llm size` ranks first.

    jaxopt-llm bench engine --config=qwen3_8b_v5e --prompt_tokens=1024 --output_tokens=256

Sized for prompts of 1,024 tokens and 256 of output on average, 32 at once; weights bf16, keys and values
bf16. Expect, by a model of the chip and not by a measurement, the first token after 137 ms (95 %: 978), then
15.9 ms a token (95 %: 15.9): 1,932 tokens/s, $0.69 a million.

Made by

    jaxopt-llm size --model=hf:Qwen/Qwen3-8B --chip=v5e --concurrency=32 --tpot_ms=20.0 \\
      --write=configs/serving/qwen3_8b_v5e.py
"""

from jaxopt_llm.engine import EngineConfig, ServingConfig


def config() -> ServingConfig:
    return ServingConfig(
        model="hf:Qwen/Qwen3-8B",
        mesh="tensor=4",
        engine=EngineConfig(
            max_slots=32,
            max_seq_len=1280,
            cache_tokens=40960,
        ),
    )
