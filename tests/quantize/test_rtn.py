"""Rounding to nearest: bytes, error bounds, and GGUF's Q8_0 by the `gguf` package."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxopt_llm as jo
from jaxopt_llm.kernels import FORMATS, QArray
from jaxopt_llm.models import ModelConfig, Rope, Transformer, num_bytes, num_params, weights


@pytest.fixture(scope="module")
def stories(data_dir):
    return jo.load(data_dir / "stories260K.gguf")


@pytest.fixture(scope="module")
def wide():
    """A model whose widths are multiples of 32, embedding and head apart."""
    config = ModelConfig(
        family="llama",
        vocab_size=100,
        d_model=64,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_seq_len=64,
        windows=(None, None),
        rope=Rope(),
    )
    return Transformer(config, rngs=nnx.Rngs(0))


def matrices(model):
    return {name: value for name, value in weights(model).items() if isinstance(value, QArray)}


@pytest.mark.parametrize("name", FORMATS)
def test_every_matrix_is_rounded_and_nothing_else(wide, name):
    rounded = jo.quantize(wide, name)
    vectors = {key for key, value in weights(wide).items() if value.ndim == 1}
    assert matrices(rounded).keys() == weights(wide).keys() - vectors
    assert {"embed.weight", "head.weight"} <= matrices(rounded).keys()
    for vector in vectors:
        assert weights(rounded)[vector] is weights(wide)[vector]
    assert not matrices(wide), "the original stays as it is"


def test_bytes_are_those_of_codes_and_scales(wide):
    sizes = [value.shape for value in weights(wide).values() if value.ndim == 2]
    numbers, rows = sum(o * i for o, i in sizes), sum(o for o, _ in sizes)
    vectors = 4 * (num_params(wide) - numbers)
    assert num_bytes(jo.quantize(wide, "int8")) == numbers + 4 * rows + vectors
    assert (
        num_bytes(jo.quantize(wide, "int8_block")) == numbers + numbers // 32 * 2 + vectors
    )  # 34 bytes for 32


FLOATS = st.floats(-100, 100, width=32)


@given(st.lists(FLOATS, min_size=64, max_size=64), st.sampled_from(["int8", "int8_block", "int4", "w8a8"]))
def test_no_value_is_off_by_more_than_half_a_step(values, name):
    w = np.array(values, np.float32).reshape(1, 64)
    q = FORMATS[name].quantize(jnp.asarray(w))
    step = np.repeat(np.asarray(q.scale, np.float64), q.group, axis=1)
    # Where float16 cannot hold a scale that small, all of its group is 0.
    bound = np.where(step == 0, 127 * 2.0**-25, step / 2) * (1 + 1e-5)
    if q.bias is not None:  # a minimum in float16, and a scale that may fall short of the largest value
        least = np.repeat(np.abs(np.asarray(q.bias, np.float64)), q.group, axis=1)
        bound = bound + (least + 15 * step) * 2.0**-11 + 15 * 2.0**-25
    assert (np.abs(np.asarray(q.dequantize(), np.float64) - w) <= bound).all()


@given(st.lists(FLOATS, min_size=32, max_size=32))
def test_rounding_again_changes_nothing(values):
    once = FORMATS["int8"].quantize(jnp.asarray([values], jnp.float32)).dequantize()
    np.testing.assert_allclose(FORMATS["int8"].quantize(once).dequantize(), once, rtol=1e-6)


def test_int8_block_is_q8_0():
    """The scales of the `gguf` package; codes as near or nearer, since they are rounded against the stored scale."""
    w = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    blocks = gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q8_0).reshape(64, 16, 34)
    scale, codes = blocks[..., :2].copy().view(np.float16)[..., 0], blocks[..., 2:].view(np.int8)
    q = FORMATS["int8_block"].quantize(jnp.asarray(w))
    np.testing.assert_array_equal(q.scale, scale)
    ours = np.asarray(q.data).reshape(codes.shape)
    different = ours != codes
    assert different.mean() < 0.01
    assert np.abs(ours.astype(int) - codes).max() <= 1
    step, exact = scale.astype(np.float64)[..., None], w.reshape(codes.shape).astype(np.float64)
    error = lambda code: np.abs(code * step - exact)
    assert (error(ours) <= error(codes) + 1e-9)[different].all()


def test_int4_is_q4_1():
    """The scales and minima of the `gguf` package, and an error no larger than its."""
    w = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    blocks = gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q4_1)
    q = FORMATS["int4"].quantize(jnp.asarray(w))
    stored = blocks.reshape(64, 16, 20)[..., :4].copy().view(np.float16)
    np.testing.assert_array_equal(q.scale, stored[..., 0])
    np.testing.assert_array_equal(q.bias, stored[..., 1])
    error = lambda values: np.square(np.asarray(values, np.float64) - w).mean()
    theirs = error(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1))
    assert error(q.dequantize()) <= theirs
    assert q.nbytes == blocks.nbytes


@pytest.mark.parametrize("name", FORMATS)
def test_predictions_stay_near(wide, name):
    tokens = jnp.arange(40)[None]
    exact, rounded = wide(tokens), jo.quantize(wide, name)(tokens)
    bound = 0.1 if name == "fp8" else {8: 0.03, 4: 0.3}[FORMATS[name].bits]
    assert float(jnp.abs(exact - rounded).max()) < bound * float(jnp.abs(exact).max())


def test_a_quantized_model_goes_on_generating(stories):
    model, tokenizer = stories
    small = jo.quantize(model, "int8")
    prompt = "Once upon a time, there was a little girl named Lily."
    ask = {"max_tokens": 8}
    assert (
        jo.generate(small, tokenizer, prompt, **ask)[0].text
        == jo.generate(model, tokenizer, prompt, **ask)[0].text
    )


def test_one_format_after_another(wide):
    """A quantized weight is rounded from what it stands for."""
    twice = matrices(jo.quantize(jo.quantize(wide, "int8_block"), "int8"))
    assert {value.group for value in twice.values()} == {value.shape[-1] for value in twice.values()}
    exact = weights(wide)["head.weight"]
    assert (
        float(jnp.abs(twice["head.weight"].dequantize() - exact).max()) <= float(jnp.abs(exact).max()) / 127
    )


def test_a_width_that_groups_do_not_divide_is_refused(stories):
    message = (
        r"layers\.0\.mlp\.down\.weight has 172 input features, which groups of 32 do not divide; use int8"
    )
    with pytest.raises(ValueError, match=message):
        jo.quantize(stories[0], "int8_block")


def test_an_unknown_format_is_refused(wide):
    with pytest.raises(ValueError, match="unknown quantization 'int7'; known are int8, int8_block, int4"):
        jo.quantize(wide, "int7")
