"""The CPU product against float64 NumPy, on every instruction set that this machine can run."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.kernels import QArray, grouped_linear, linear, pack, round_symmetric
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
    "int8_16": (8, 16, "float32", False, (8, 32)),  # GGUF's Q6_K
    "int8_16_float": (8, 16, "float32", False, None),
    "int8_48": (8, 48, "float16", True, (8, 32)),
    "int4_16": (4, 16, "float16", True, (8, 32)),
    "int4_16_float": (4, 16, "float32", False, None),
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
    for inputs, outputs, all_rows in ((192, 1, (1, 7)), (576, 200, ROWS), (1536, 35, (2, 130))):
        w = weight(form, outputs, inputs)
        p = pack([w])
        assert isinstance(p.parts[0], Panels)
        for rows in all_rows:
            x = activations(rows, inputs)
            assert_close(linear(jnp.asarray(x), p), rounded(x, w.act), values(w))


def test_a_single_block(isa):
    """Half as many inputs as rounded activations share a scale for."""
    w, x = weight("int8_16_float", 20, 16), activations(5, 16)
    assert_close(linear(jnp.asarray(x), pack([w])), rounded(x, None), values(w))


@pytest.mark.parametrize(
    "form",
    [
        "int8_block",
        "int8",
        "int4",
        "int8_minimum",
        "int4_float",
        "int4_symmetric_float",
        "int8_16",
        "int8_16_float",
        "int4_16",
    ],
)
def test_a_row_does_not_see_its_neighbours(form, isa):
    p = pack([weight(form, 100, 576)], norm=(jnp.ones(576), 1e-5))
    x = jnp.asarray(activations(130, 576))
    alone = np.concatenate([linear(x[i : i + 1], p) for i in range(33)])
    for rows in ROWS:
        y = np.asarray(linear(x[:rows], p))
        np.testing.assert_array_equal(y[:33], alone[:rows])


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_do_not_change_bits(threads, isa):
    before = library.load().jaxopt_threads()
    p = pack([weight("int8_block", 1000, 576)])
    x = jnp.asarray(activations(130, 576))
    expected = np.asarray(linear(x, p))
    library.configure(threads=threads)
    try:
        for rows in (1, 13, 130):
            np.testing.assert_array_equal(linear(x[:rows], p), expected[:rows])
    finally:
        library.configure(threads=before)


def test_activations_are_rounded_as_round_symmetric_does(isa):
    """The identity shows each rounded value, times 1."""
    x = activations(40, 256)
    x[3], x[4, :32], x[5, 7] = 0, np.arange(32) - 0.5, 1e30
    w = QArray(jnp.eye(256, dtype=jnp.int8), jnp.ones((256, 8)), act=(8, 32))
    codes, scale = round_symmetric(x, bits=8, group=32)
    expected = codes.astype(np.float32) * np.repeat(scale, 32, axis=1)
    np.testing.assert_array_equal(linear(jnp.asarray(x), pack([w])), expected)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {  # float64
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("gate", ACTIVATIONS)
@pytest.mark.parametrize("outputs", [32, 40])
def test_norm_gate_and_bias(gate, outputs, isa):
    """Float activations: where they are rounded, the norm's last bit can move a code."""
    ups = [weight("int8", outputs, 576, seed) for seed in (0, 1)]
    gain, bias = activations(1, 576, 2)[0], activations(1, 2 * outputs, 3)[0]
    p = pack(ups, norm=(jnp.asarray(gain), 1e-3), gate=gate, bias=jnp.asarray(bias))
    assert p.shape == (outputs, 576)
    x = activations(21, 576) * 0.3
    wide = x.astype(np.float64)
    normal = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * gain
    a, b = (normal @ values(w).T + part for w, part in zip(ups, np.split(bias, 2), strict=True))
    np.testing.assert_allclose(linear(jnp.asarray(x), p), ACTIVATIONS[gate](a) * b, rtol=2e-4, atol=2e-4)


MIXED = [("int8_16", "int4"), ("int4", "int8_16"), ("int8_16", "float"), ("float", "int4")]


def weight_or_floats(form, outputs, inputs, seed):
    if form == "float":
        return jnp.asarray(activations(outputs, inputs, seed)) * 0.1
    return weight(form, outputs, inputs, seed)


@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("forms", MIXED)
def test_parts_of_several_forms(forms, gate, isa):
    """Each in its own kernel, floats in XLA; one after another they are what the parts give alone."""
    parts = [weight_or_floats(form, 40, 576, seed) for seed, form in enumerate(forms)]
    norm, bias = (jnp.asarray(activations(1, 576, 2)[0]), 1e-3), jnp.asarray(activations(1, 80, 3)[0])
    p = pack(parts, norm=norm, bias=bias, gate=gate)
    assert p.shape == (80 if gate is None else 40, 576)
    assert [isinstance(part, Panels) for part in p.parts] == [form != "float" for form in forms]
    x = jnp.asarray(activations(21, 576))
    alone = [
        linear(x, pack([part], norm=norm, bias=own))
        for part, own in zip(parts, (bias[:40], bias[40:]), strict=True)
    ]
    expected = jnp.concatenate(alone, -1) if gate is None else jax.nn.silu(alone[0]) * alone[1]
    np.testing.assert_array_equal(linear(x, p), expected)


def test_neighbours_of_one_form_are_one_part(isa):
    parts = [weight(form, 40, 576, seed) for seed, form in enumerate(("int4", "int4", "int8_16", "int4"))]
    p = pack(parts)
    assert [part.rows for part in p.parts] == [80, 40, 40]
    x = jnp.asarray(activations(21, 576))
    alone = np.concatenate([linear(x, pack([part])) for part in parts], axis=-1)
    for rows in (1, 2, 21):
        np.testing.assert_array_equal(linear(x[:rows], p), alone[:rows])


def test_norm_before_rounding(isa):
    """At most a code of a block in a hundred lies so near to a half that the norm's last bit moves it."""
    w = QArray(jnp.eye(576, dtype=jnp.int8), jnp.ones((576, 18)), act=(8, 32))
    x, gain = activations(64, 576), activations(1, 576, 2)[0]
    normal = (x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * gain).astype(
        np.float32
    )
    codes, scale = round_symmetric(normal, bits=8, group=32)
    step = np.repeat(scale, 32, axis=1)
    found = np.asarray(linear(jnp.asarray(x), pack([w], norm=(jnp.asarray(gain), 1e-5)))) / step
    np.testing.assert_allclose(found, codes, atol=1.001)
    assert (np.abs(found - codes) > 1e-3).mean() < 1e-3


@pytest.mark.parametrize("gate", ACTIVATIONS)
def test_far_from_zero_gates_are_exact(gate, isa):
    """No overflow where a gate's exponential is 0 or infinite."""
    eye = QArray(jnp.eye(32, dtype=jnp.int8), jnp.ones((32, 1)))
    x = np.linspace(-300, 300, 32, dtype=np.float32)[None]
    y = linear(jnp.asarray(x), pack([eye, eye], gate=gate))
    with np.errstate(over="ignore"):
        expected = ACTIVATIONS[gate](x.astype(np.float64)) * x
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def relative_error(y, x, w):
    exact = x.astype(np.float64) @ values(w).T
    return np.linalg.norm(np.asarray(y) - exact, axis=1) / np.linalg.norm(exact, axis=1)


@pytest.mark.parametrize(
    "form", ["int8", "int8_minimum", "int4_float", "int4_symmetric_float", "int8_16_float"]
)
@pytest.mark.parametrize("inputs", [64, 2048, 8192])
def test_float_activations_are_as_exact_as_in_xla(form, inputs, isa):
    w = weight(form, 200, inputs)
    x = activations(33, inputs)
    product = jax.jit(linear)
    assert relative_error(linear(jnp.asarray(x), pack([w])), x, w).max() < max(
        2 * relative_error(product(jnp.asarray(x), w), x, w).max(), 3e-7
    )


@pytest.mark.parametrize("form", ["int8", "int8_minimum", "int4_float"])
def test_float_activations_of_any_magnitude(form, isa):
    """Runs of digits share one step: one value may be far larger than the others, or all of them tiny or huge."""
    w = weight(form, 40, 2048)
    p = pack([w])
    x = activations(6, 2048)
    x[1, 77] = 1e3
    x[2] *= 1e-25
    x[3] *= 1e30
    x[4] = 0
    y = np.asarray(linear(jnp.asarray(x), p))
    assert relative_error(np.delete(y, 4, 0), np.delete(x, 4, 0), w).max() < 1e-5
    assert not y[4].any()
    x[5] = 1e-40  # subnormal, which XLA takes for 0
    assert np.abs(linear(jnp.asarray(x), p)[5]).max() < 1e-35


@pytest.mark.parametrize("form", ["int8", "int8_16_float", "int4_symmetric_float"])
@pytest.mark.parametrize("inputs", [576, 2048])
def test_an_outlier_costs_digits_of_its_run_alone(form, inputs, isa):
    """A run has 512 inputs at most, and half a step of 23 bits below its largest is all that is lost of each."""
    codes = weight(form, 40, inputs)
    width = codes.bits * inputs // 8
    x = activations(9, inputs)
    x[:, 77] = 1e5
    for zeros in (slice(512 * width // inputs), slice(77 * width // inputs, 77 * width // inputs + 1)):
        w = dataclasses.replace(codes, data=codes.data.at[:, zeros].set(0))
        exact = np.abs(np.asarray(linear(jnp.asarray(x), pack([w]))) - x.astype(np.float64) @ values(w).T)
        run = np.abs(values(w))[:, :512].sum(1)
        lost = 0.5 * 1e5 / (127 * 254**2) * run
        assert (exact <= 3e-6 * (np.abs(x) @ np.abs(values(w)).T) + lost).all()


@pytest.mark.parametrize("form", ["int8", "int8_block", "int8_minimum", "int4", "int4_float"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(form, bad, isa):
    p = pack([weight(form, 40, 64)])
    x = activations(5, 64)
    good = np.asarray(linear(jnp.asarray(x), p))
    x[2, 17] = bad
    y = np.asarray(linear(jnp.asarray(x), p))
    assert not np.isfinite(y[2]).any()
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(good, 2, 0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_result_has_the_activations_dtype(dtype):
    w = weight("int8_block", 40, 64)
    x = jnp.asarray(activations(3, 64)).astype(dtype)
    y = linear(x, pack([w]))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, linear(x.astype(jnp.float32), pack([w])).astype(dtype))


def test_leading_dimensions_and_no_rows():
    p = pack([weight("int8_block", 40, 64)])
    x = jnp.asarray(activations(6, 64))
    np.testing.assert_array_equal(linear(x.reshape(2, 3, 64), p).reshape(6, 40), linear(x, p))
    assert linear(x[0], p).shape == (40,)
    assert linear(x[:0], p).shape == (0, 40)


SIZES = [(3, 0, 30, 1, 0), (1, 0, 0, 0, 0), (0, 0, 0, 40, 0), (0, 0, 0, 0, 0), (7, 64, 2, 13, 5)]


def experts(form, count, outputs, inputs):
    """One weight an expert, and all of them as one."""
    each = [weight(form, outputs, inputs, seed) for seed in range(count)]
    return each, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


@pytest.mark.parametrize("form", FORMS)
def test_experts_give_the_bits_of_their_own_weights(form, isa):
    each, w = experts(form, 5, 40, 96 if FORMS[form][1] in (16, 32, 48) else 64)
    own, together = [pack([one]) for one in each], pack([w])
    assert together.shape == w.shape
    assert isinstance(together.parts[0], Panels)
    for sizes in SIZES:
        x = jnp.asarray(activations(sum(sizes), w.shape[-1]))
        expert = np.repeat(np.arange(5), sizes)
        expected = np.zeros((len(x), 40), np.float32)
        for e in set(expert):
            expected[expert == e] = linear(x[expert == e], own[e])
        np.testing.assert_array_equal(grouped_linear(x, together, jnp.asarray(sizes)), expected)


def test_experts_with_gate_norm_and_bias(isa):
    (gates, gate), (ups, up) = (experts("int8_block", 5, outputs, 576) for outputs in (200, 200))
    up = jax.tree.map(lambda leaf: leaf[::-1], up)
    bias, norm = jnp.asarray(activations(5, 400, 3)), (jnp.asarray(activations(1, 576, 2)[0]), 1e-5)
    together = pack([gate, up], bias=bias, norm=norm, gate="silu")
    assert together.shape == (5, 200, 576)
    sizes = SIZES[-1]
    x = jnp.asarray(activations(sum(sizes), 576))
    y = grouped_linear(x, together, jnp.asarray(sizes))
    ends = np.cumsum(sizes)
    for e, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        own = pack([gates[e], ups[4 - e]], bias=bias[e], norm=norm, gate="silu")
        np.testing.assert_array_equal(y[end - size : end], linear(x[end - size : end], own))


@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("forms", MIXED)
def test_experts_of_several_forms(forms, gate):
    stack = lambda form, seed: jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[weight_or_floats(form, 40, 64, 5 * seed + e) for e in range(5)]
    )
    parts, bias = [stack(form, seed) for seed, form in enumerate(forms)], jnp.asarray(activations(5, 80, 3))
    together = pack(parts, bias=bias, gate=gate)
    x, sizes = jnp.asarray(activations(91, 64)), jnp.asarray(SIZES[-1])
    y = grouped_linear(x, together, sizes)
    ends = np.cumsum(sizes)
    for e, (size, end) in enumerate(zip(SIZES[-1], ends, strict=True)):
        own = pack([part[e] for part in parts], bias=bias[e], gate=gate)
        expected = linear(x[end - size : end], own)
        np.testing.assert_allclose(y[end - size : end], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_do_not_change_the_bits_of_experts(threads):
    before = library.load().jaxopt_threads()
    p = pack([experts("int4", 5, 1000, 576)[1]])
    x, sizes = jnp.asarray(activations(91, 576)), jnp.asarray(SIZES[-1])
    expected = np.asarray(grouped_linear(x, p, sizes))
    library.configure(threads=threads)
    try:
        np.testing.assert_array_equal(grouped_linear(x, p, sizes), expected)
    finally:
        library.configure(threads=before)


def test_sizes_that_do_not_fit_touch_no_other_memory():
    """More rows than there are, or fewer than none: a caller's mistake, which must not read or write elsewhere."""
    p = pack([experts("int8_block", 3, 40, 64)[1]])
    x = jnp.asarray(activations(6, 64))
    good = grouped_linear(x, p, jnp.asarray([2, 4, 0]))
    np.testing.assert_array_equal(grouped_linear(x, p, jnp.asarray([2, 2**30, 5])), good)
    np.testing.assert_array_equal(grouped_linear(x, p, jnp.asarray([2, 4, -7])), good)


def test_experts_need_sizes_and_others_have_none():
    x, sizes = jnp.zeros((2, 64)), jnp.asarray([2, 0, 0])
    with pytest.raises(ValueError, match=r"shape \(3, 40, 64\) without sizes"):
        linear(x, pack([experts("int8_block", 3, 40, 64)[1]]))
    with pytest.raises(ValueError, match=r"shape \(40, 64\) with sizes"):
        grouped_linear(x, pack([weight("int8_block", 40, 64)]), sizes)
