"""The CPU product against float64 NumPy, on every instruction set that this machine can run."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.kernels import QArray, linear, pack, round_symmetric
from jaxopt_llm.kernels.cpu import library
from jaxopt_llm.kernels.cpu.panels import Panels

pytestmark = pytest.mark.skipif(library.load() is None, reason="the library was not built: no C++ compiler")
ISAS = library.supported() if library.load() else []
ROWS = (1, 2, 3, 5, 7, 64, 130)
FORMS = {  # bits, inputs that share a scale, scale dtype, whether there is a minimum, activations
    "int8": (8, None, "float32", False, None),
    "int8_block": (8, 32, "float16", False, (8, 32)),
    "int8_channel_rounded": (8, None, "bfloat16", False, (8, 32)),
    "int8_wide_groups": (8, 64, "float32", False, (8, 32)),
    "int8_minimum": (8, 32, "float16", True, None),
    "int4": (4, 32, "float16", True, (8, 32)),
    "int4_float": (4, 32, "float16", True, None),
    "int4_symmetric": (4, 32, "bfloat16", False, (8, 32)),
    "int4_symmetric_float": (4, 64, "float32", False, None),
}


@pytest.fixture(params=ISAS)
def isa(request):
    library.configure(isa=request.param)
    yield request.param
    library.configure(isa=ISAS[0])


def weight(form, outputs, inputs, seed=0):
    """Random codes of every value there is, -128 among them."""
    bits, group, dtype, minimum, act = FORMS[form]
    rng = np.random.default_rng(seed)
    scales = (outputs, inputs // (group or inputs))
    if bits == 8:
        data = rng.integers(-128, 128, (outputs, inputs), np.int8)
    else:
        data = rng.integers(0, 256, (outputs, inputs // 2), np.uint8)
    scale = jnp.asarray(rng.uniform(0.002, 0.01, scales), dtype)
    bias = jnp.asarray(rng.normal(size=scales) * 0.1, dtype) if minimum else None
    return QArray(jnp.asarray(data), scale, bias, bits=bits, act=act)


def activations(rows, inputs, seed=1):
    return np.random.default_rng(seed).normal(size=(rows, inputs)).astype(np.float32)


def values(w):
    """Of a QArray, in float64: float32 rounds sums of product and minimum."""
    spread = lambda a: np.repeat(np.asarray(a, np.float64), w.group, axis=1)
    codes = np.asarray(w.codes(), np.float64) * spread(w.scale)
    return codes if w.bias is None else codes + spread(w.bias)


def rounded(x, act):
    """What the kernel makes of float32 activations, in float64."""
    if act is None:
        return x.astype(np.float64)
    codes, scale = round_symmetric(x, bits=act[0], group=act[1])
    return codes.astype(np.float64) * np.repeat(scale, act[1], axis=-1)


def assert_close(y, x, w):
    """To the error of float32 sums, which grows with the magnitudes that are summed."""
    w = np.asarray(w)
    np.testing.assert_array_less(np.abs(np.asarray(y) - x @ w.T), 3e-6 * (np.abs(x) @ np.abs(w).T) + 1e-30)


@pytest.mark.parametrize("form", FORMS)
def test_odd_shapes(form, isa):
    for inputs, outputs in ((64, 1), (576, 200), (1536, 35)):
        w = weight(form, outputs, inputs)
        p = pack([w])
        assert isinstance(p.weight, Panels)
        for rows in ROWS:
            x = activations(rows, inputs)
            assert_close(linear(jnp.asarray(x), p), rounded(x, w.act), values(w))


@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_see_its_neighbours(form, isa):
    p = pack([weight(form, 100, 576)], norm=(jnp.ones(576), 1e-5))
    x = jnp.asarray(activations(130, 576))
    alone = np.concatenate([linear(x[i : i + 1], p) for i in range(33)])
    for rows in ROWS:
        y = np.asarray(linear(x[:rows], p))
        np.testing.assert_array_equal(y[:33], alone[:rows])


def test_threads_do_not_change_bits(isa):
    p = pack([weight("int8_block", 1000, 576)])
    x = jnp.asarray(activations(130, 576))
    results = []
    for threads in (1, 2, 3, 8):
        library.configure(threads=threads)
        results += [np.asarray(linear(x, p)), np.asarray(linear(x[:1], p))]
    library.configure(threads=2)
    for many, one in zip(results[::2], results[1::2], strict=True):
        np.testing.assert_array_equal(many, results[0])
        np.testing.assert_array_equal(one, results[0][:1])
