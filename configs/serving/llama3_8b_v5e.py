"""hf:meta-llama/Llama-3.1-8B on v5e 1x1 (data=1): what `jaxopt-llm size` ranks first.

    jaxopt-llm bench engine --config=llama3_8b_v5e --prompt_tokens=1024 --output_tokens=256

Sized for prompts of 1,024 tokens and 256 of output on average, 16 at once; weights int8, keys and values
bf16. Expect, by a model of the chip and not by a measurement, the first token after 185 ms (95 %: 420), then
23.9 ms a token (95 %: 24.1): 649 tokens/s, $0.51 a million.

Made by

    jaxopt-llm size --model=hf:meta-llama/Llama-3.1-8B --chip=v5e --concurrency=16 --tpot_ms=30.0 \\
      --weights=bf16,int8 --write=configs/serving/llama3_8b_v5e.py
"""

from jaxopt_llm.engine import EngineConfig, ServingConfig


def config() -> ServingConfig:
    return ServingConfig(
        model="hf:meta-llama/Llama-3.1-8B",
        quantize="int8",
        engine=EngineConfig(
            max_slots=16,
            max_seq_len=1280,
            cache_tokens=20480,
        ),
    )
