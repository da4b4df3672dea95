"""What a walk observes is what the layers compute, and it goes on where it stopped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.calibrate import INPUTS, Wants, walk
from jaxopt_llm.calibrate.walk import _statistics
from jaxopt_llm.kernels import FORMATS
from jaxopt_llm.models import weights, with_weights

ALL = tuple(name for names in INPUTS for name in names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """Keeps what it sees, and multiplies some weights in one layer."""

    orders: tuple[Wants, ...] = (Wants(products=ALL, gram=True),)
    changes: tuple[str, ...] = ()
    layer: int = 0
    seen: list = dataclasses.field(default_factory=list, compare=False, repr=False)

    def wants(self, config, layer):
        return self.orders

    def apply(self, config, layer, weights, statistics):
        self.seen.append((layer, statistics))
        if layer != self.layer:
            return weights
        return {
            name: 3 * value for name, value in weights.items() if name.removesuffix(".weight") in self.changes
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """Rounds one product of each layer; fails at a layer."""

    fails: int | None = dataclasses.field(default=None, repr=False)
    format: str = "int8"
    calls: list = dataclasses.field(default_factory=list, compare=False, repr=False)

    def wants(self, config, layer):
        return (Wants(products=("mlp.down",)),)

    def apply(self, config, layer, weights, statistics):
        if layer == self.fails:
            raise KeyboardInterrupt
        self.calls.append(layer)
        scaled = weights["mlp.down.weight"] * statistics["mlp.down"].mean_abs[None]
        return {"mlp.down.weight": FORMATS[self.format].quantize(scaled)}


@pytest.fixture(scope="module")
def seen(model, ids):
    look = Look()
    walk(model, ids, [look])
    return look.seen


def near(ours, exact):
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())


def test_statistics_are_those_of_the_forward(model, ids, seen):
    names = [f"layers.*.{name}" for name in ("attention_norm", "mlp_norm", "mlp.gate", "mlp.up")]
    _, parts = jo.capture(model, *names)(jnp.asarray(ids))
    flat = lambda x: np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    assert [layer for layer, _ in seen] == [0, 1, 2]
    for layer, found in seen:
        part = lambda name, layer=layer: flat(parts[f"layers.{layer}.{name}"])
        gate, up = part("mlp.gate"), part("mlp.up")
        inputs = dict.fromkeys(("attention.q", "attention.k", "attention.v"), part("attention_norm"))
        inputs |= dict.fromkeys(("mlp.gate", "mlp.up"), part("mlp_norm"))
        inputs["mlp.down"] = gate / (1 + np.exp(-gate)) * up
        assert found.keys() == {*inputs, "attention.o"}
        for name, x in inputs.items():
            assert float(found[name].count) == ids.size
            near = lambda ours, exact: np.testing.assert_allclose(
                ours, exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max()
            )
            near(found[name].mean_abs, np.abs(x).mean(0))
            near(found[name].max_abs, np.abs(x).max(0))
            near(found[name].norm, np.linalg.norm(x, axis=0))
            near(found[name].gram, x.T @ x)


def test_the_input_of_o_gives_its_output(model, ids, seen):
    _, parts = jo.capture(model, "layers.*.attention.o")(jnp.asarray(ids))
    for layer, found in seen:
        y = np.asarray(parts[f"layers.{layer}.attention.o"], np.float64).reshape(-1, model.config.d_model)
        w = np.asarray(model.layers[layer].attention.o.weight.get_value(), np.float64)
        np.testing.assert_allclose(w @ np.asarray(found["attention.o"].gram) @ w.T, y.T @ y, atol=1e-8)


def test_later_layers_see_what_changed_ones_give(model, ids):
    changing, looking = Look(changes=("mlp.down", "attention_norm")), Look()
    changed = walk(model, ids, [changing])
    for name, value in weights(changed).items():
        factor = 3 if name in ("layers.0.mlp.down.weight", "layers.0.attention_norm.weight") else 1
        np.testing.assert_array_equal(value, factor * weights(model)[name])
    walk(changed, ids, [looking])
    for (layer, before), (_, alone) in zip(changing.seen[1:], looking.seen[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, before, alone), layer


def test_a_pass_sees_what_the_pass_before_changed(model, ids, seen):
    orders = (Wants(products=("attention.v",)), Wants(products=("attention.o",)))
    look = Look(orders=orders, changes=("attention.v",))
    walk(model, ids, [look])
    (_, first), (_, second), *_ = look.seen
    assert (first.keys(), second.keys()) == ({"attention.v"}, {"attention.o"})
    assert second["attention.o"].gram is None
    np.testing.assert_allclose(
        second["attention.o"].max_abs, 3 * seen[0][1]["attention.o"].max_abs, rtol=1e-5
    )


def test_layers_of_one_shape_share_a_program(model, ids):
    _statistics.clear_cache()
    walk(model, ids, [Look()])
    assert _statistics._cache_size() == 1


def test_an_interrupted_walk_goes_on(model, ids, tmp_path):
    whole = walk(model, ids, [Round()])
    with pytest.raises(KeyboardInterrupt):
        walk(model, ids, [Round(fails=2)], directory=tmp_path)
    rest, told = Round(), []
    resumed = walk(model, ids, [rest], directory=tmp_path, progress=lambda *parts: told.append(parts))
    assert rest.calls == [2]
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert jax.tree.structure(weights(resumed)) == jax.tree.structure(weights(whole))
    jax.tree.map(np.testing.assert_array_equal, weights(resumed), weights(whole))


def test_another_walk_is_not_continued(model, ids, tmp_path):
    walk(model, ids, [Round()], directory=tmp_path)
    other = with_weights(model, {"final_norm.weight": 2 * weights(model)["final_norm.weight"]})
    changes = {
        "model": (other, ids, [Round()]),
        "text": (model, ids[:2], [Round()]),
        "methods": (model, ids, [Round(format="int8_block")]),
    }
    for name, (its_model, its_ids, its_methods) in changes.items():
        with pytest.raises(ValueError, match=f"with another {name}; give the same"):
            walk(its_model, its_ids, its_methods, directory=tmp_path)


def test_statistics_that_are_no_numbers_name_the_product(model, ids):
    broken = jnp.full_like(weights(model)["layers.1.mlp.up.weight"], jnp.inf)
    with pytest.raises(ValueError, match=r"the input of layers\.1\.mlp\.down is not finite"):
        walk(with_weights(model, {"layers.1.mlp.up.weight": broken}), ids, [Look()])


def test_bad_input_is_refused(model, ids):
    with pytest.raises(ValueError, match="token id 50 lies outside the vocabulary of 50"):
        walk(model, np.where(ids == ids[0, 0], 50, ids), [Look()])
    with pytest.raises(ValueError, match="sequences of 65 tokens are longer than the model's context of 64"):
        walk(model, np.zeros((1, 65), np.int32), [Look()])
    with pytest.raises(ValueError, match=r"must name at least one of attention\.q, .*mlp\.down"):
        Wants(products=("mlp.router",))
