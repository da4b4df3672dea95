"""Write a model in another format: Orbax (our own), a Hugging Face directory, or a GGUF file.

Orbax keeps quantized weights as they are; a Hugging Face directory gets the floats that they stand for, or with
compressed-tensors the codes of the layers' products, which vLLM reads.
"""

from collections.abc import Sequence

from absl import flags

from jaxopt_llm import checkpoints
from jaxopt_llm.checkpoints import gguf_export, hf, orbax
from jaxopt_llm.cli import show
from jaxopt_llm.cli.flags import ADAPTER, DTYPE, JSON, MODEL, OUT, QUANTIZE
from jaxopt_llm.cli.loading import load
from jaxopt_llm.cli.writing import out_path

CODES = "compressed-tensors"
MARKERS = {"orbax": orbax.MARKER, "hf": hf.CONFIG, CODES: hf.CONFIG, "gguf": None}  # of directories
FORMAT = flags.DEFINE_enum("format", None, list(MARKERS), "Format to write.", required=True)
GGUF_TYPE = flags.DEFINE_enum(
    "gguf_type", None, ["F16", "Q8_0"], "How a GGUF file stores matrices; F16 if unset.", case_sensitive=False
)


def main(argv: Sequence[str]) -> None:
    if GGUF_TYPE.value and FORMAT.value != "gguf":
        raise ValueError(f"--gguf_type={GGUF_TYPE.value} is for --format=gguf, not {FORMAT.value}; drop it")
    out = out_path(OUT.value, marker=MARKERS[FORMAT.value])
    if FORMAT.value == "gguf":
        gguf_export.check_name(out)
    model, tokenizer = load(MODEL.value, dtype=DTYPE.value, quantize=QUANTIZE.value, adapter=ADAPTER.value)
    match FORMAT.value:
        case "orbax":
            checkpoints.save(model, tokenizer, out)
        case "hf" | "compressed-tensors" as kind:
            checkpoints.export_hf(model, tokenizer, out, codes=kind == CODES)
        case "gguf":
            checkpoints.export_gguf(model, tokenizer, out, dtype=GGUF_TYPE.value or "F16")
    report = {"out": out, "format": FORMAT.value, "bytes": checkpoints.file_bytes(out)}
    if JSON.value:
        show.json_line(report)
    else:
        show.fields(report)
