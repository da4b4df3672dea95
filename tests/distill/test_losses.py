"""The losses against their closed forms in float64 NumPy, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.distill import losses
from jaxopt_llm.distill.blocks import summed
from jaxopt_llm.distill.losses import Loss

rng = np.random.default_rng(0)
TEACHER, STUDENT = 3 * rng.standard_normal((2, 5, 11))
TARGETS = rng.integers(11, size=5)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def jsd(t, s, beta):
    p, q = softmax(t), softmax(s)
    m = beta * p + (1 - beta) * q
    return {0: kl(p, q), 1: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))


def skewed(t, s, alpha):
    p, q = softmax(t), softmax(s)
    return kl(p, alpha * p + (1 - alpha) * q)


def top_k(t, s, k=3):
    p, q = softmax(t), softmax(s)
    kept = np.argsort(-p, axis=-1)[:, :k]
    p, q = np.take_along_axis(p, kept, -1), np.take_along_axis(q, kept, -1)
    rest = 1 - p.sum(-1), 1 - q.sum(-1)
    return kl(p, q) + rest[0] * np.log(rest[0] / rest[1])


CASES = {
    "forward": (lambda t, s: losses.jsd(t, s, 0.0), lambda t, s: jsd(t, s, 0)),
    "half": (lambda t, s: losses.jsd(t, s, 0.5), lambda t, s: jsd(t, s, 0.5)),
    "tenth": (lambda t, s: losses.jsd(t, s, 0.1), lambda t, s: jsd(t, s, 0.1)),
    "reverse": (lambda t, s: losses.jsd(t, s, 1.0), lambda t, s: jsd(t, s, 1)),
    "skewed": (lambda t, s: losses.skewed_kl(t, s, 0.1), lambda t, s: skewed(t, s, 0.1)),
    "top_k": (lambda t, s: losses.top_k_kl(losses.top_k(t, 3), s), top_k),
    "cross_entropy": (
        lambda t, s: losses.cross_entropy(s, jnp.asarray(TARGETS)),
        lambda t, s: -np.log(softmax(s))[np.arange(5), TARGETS],
    ),
    "warm": (
        lambda t, s: Loss(divergence="jsd", beta=0.3, temperature=2.0).distance(t, s),
        lambda t, s: 4 * jsd(t / 2, s / 2, 0.3),
    ),
    "warm reverse": (
        lambda t, s: Loss(divergence="reverse_kl", temperature=2.0).distance(t, s),
        lambda t, s: 4 * jsd(t / 2, s / 2, 1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_formula(name):
    ours, formula = CASES[name]
    teacher, student = jnp.asarray(TEACHER), jnp.asarray(STUDENT)
    np.testing.assert_allclose(ours(teacher, student), formula(TEACHER, STUDENT), rtol=1e-10)
    gradient = jax.grad(lambda s: ours(teacher, s).sum())(student)
    eps, numeric = 1e-5, np.zeros_like(STUDENT)
    for place in np.ndindex(STUDENT.shape):
        step = np.zeros_like(STUDENT)
        step[place] = eps
        high, low = (formula(TEACHER, STUDENT + sign * step).sum() for sign in (1, -1))
        numeric[place] = (high - low) / (2 * eps)
    np.testing.assert_allclose(gradient, numeric, atol=1e-8)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_gradient_of_jsd_in_closed_form(beta):
    """d/ds sum_v f = Q * (g - sum(Q * g)), with g the derivative by Q's probabilities."""
    p, q = softmax(TEACHER), softmax(STUDENT)
    m = beta * p + (1 - beta) * q
    by_q = {0.0: -p / q, 1.0: np.log(q / p) + 1}.get(
        beta, (1 - beta) * np.log(q / m) if 0 < beta < 1 else None
    )
    expected = q * (by_q - (q * by_q).sum(-1, keepdims=True))
    ours = jax.grad(lambda s: losses.jsd(jnp.asarray(TEACHER), s, beta).sum())(jnp.asarray(STUDENT))
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_a_slope_at_its_ends():
    t, s = jnp.asarray(TEACHER), jnp.asarray(STUDENT)
    np.testing.assert_allclose(losses.jsd(t, s, 1e-7) / 1e-7, losses.jsd(t, s, 0.0), rtol=1e-4)
    np.testing.assert_allclose(losses.jsd(t, s, 1 - 1e-7) / 1e-7, losses.jsd(t, s, 1.0), rtol=1e-4)


def test_top_k_of_a_teacher_that_is_sure_keeps_a_tail():
    sure = jnp.asarray([[60.0, 0.0, 0.0, 0.0]], jnp.float32)
    kept = losses.top_k(sure, 1)
    np.testing.assert_allclose(kept.tail, [np.log(3) - 60], rtol=1e-6)
    assert float(losses.top_k_kl(kept, -sure)[0]) == pytest.approx(60 + np.log(3), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 5, 64])
def test_blocks_give_the_whole(rows):
    hidden, width = rng.standard_normal((13, 3)), rng.standard_normal((13, 3))
    head, target = jnp.asarray(rng.standard_normal((7, 3))), jnp.asarray(rng.integers(7, size=13))
    weight = jnp.asarray(rng.uniform(size=13))

    def loss(head, x, given, teacher_head):
        teacher, targets, weight = given
        student = x @ head["w"].T
        own = losses.cross_entropy(student, targets)
        far = losses.jsd(teacher @ teacher_head.T, student, 0.5)
        return jnp.sum(weight * (own + far)), {"far": jnp.sum(weight * far)}

    arguments = {"w": head}, jnp.asarray(hidden), (jnp.asarray(width), target, weight), 2 * head
    over_blocks = lambda *args: summed(loss, rows, *args)
    ours = jax.jit(jax.value_and_grad(over_blocks, argnums=(0, 1), has_aux=True))(*arguments)
    whole = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), ours, whole)
    np.testing.assert_allclose(over_blocks(*arguments)[0], whole[0][0], rtol=1e-10)
    scaled = jax.grad(lambda *args: 3 * over_blocks(*args)[0], argnums=1)(*arguments)
    np.testing.assert_allclose(scaled, 3 * whole[1][1], rtol=1e-10)


def test_no_block_is_larger_than_told():
    """The compiled program holds no array of all tokens by all of the vocabulary."""
    tokens, vocab = 96, 1009
    loss = lambda head, x, given, _: (jnp.sum(losses.cross_entropy(x @ head.T, given)), None)
    function = jax.jit(jax.grad(lambda head, x, t: summed(loss, 8, head, x, t, None)[0], argnums=(0, 1)))
    shapes = (vocab, 16), (tokens, 16)
    arguments = *(jnp.zeros(shape, jnp.float32) for shape in shapes), jnp.zeros(tokens, jnp.int32)
    memory = function.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * tokens * vocab


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "kl"}, "must be one of forward_kl"),
        ({"beta": 1.5}, "beta=1.5 must be from 0 to 1"),
        ({"cross_entropy": -0.1}, "cross_entropy=-0.1 must be from 0 to 1"),
        ({"alpha": 1.0}, "nothing is left of the student"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"hidden": float("nan")}, "hidden=nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Loss(**settings)
