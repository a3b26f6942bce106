"""RoPE scaling against published values and the papers' own statements."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longctx import rope
from longctx.config import RopeConfig
from longctx.errors import UserError
from tests.helpers.ropes import BASE, DIM, EXAMPLES, NAMES, WINDOW, example, rope_of

NATIVE = {"rope_type": "default", "rope_theta": 10000.0}


# --- every scaling that is found in conf/rope -----------------------------------------------------


@pytest.mark.parametrize(
    "name", sorted({*NAMES, *rope.NAMES, *(p.stem for p in EXAMPLES.iterdir())})
)
def test_a_scaling_has_a_formula_a_yaml_and_an_example(name):
    assert name in rope.NAMES, f"longctx/rope.py has no formula of {name!r}"
    assert name in NAMES, f"conf/rope/{name}.yaml is missing"
    assert example(name).keys() >= {"numbers", "inv_freq", "attention_factor"}


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_gives_the_values_of_the_example(name):
    given = example(name)
    found, factor = rope.inv_freq(rope_of(name), BASE, WINDOW, DIM, given.get("length"))
    assert found.tolist() == pytest.approx(given["inv_freq"], rel=1e-8)
    assert factor == pytest.approx(given["attention_factor"], rel=1e-8)


@pytest.mark.parametrize("length", [WINDOW, 4 * WINDOW])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_makes_the_same_frequencies_of_the_parameters(name, length):
    """Each scaling stands twice: as parameters that a model is built with, and as a formula."""
    config = LlamaConfig(
        hidden_size=4 * DIM, num_attention_heads=4,
        max_position_embeddings=rope.extended_window(rope_of(name), WINDOW),
        rope_parameters=rope.rope_parameters(rope_of(name), NATIVE, WINDOW, DIM),
    )  # fmt: skip
    rotary = LlamaRotaryEmbedding(config)
    rotary(torch.zeros(1, 1, 4 * DIM), torch.arange(length)[None])
    expected, factor = rope.inv_freq(rope_of(name), BASE, WINDOW, DIM, length)
    torch.testing.assert_close(rotary.inv_freq.double(), expected, rtol=5e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_factor_one_is_the_identity(name):
    one = {"factor": 1.0} | ({"base": BASE} if rope_of(name).base else {})
    plain, _ = rope.inv_freq(RopeConfig(), BASE, 512, 64)
    scaled, attention_factor = rope.inv_freq(rope_of(name, **one), BASE, 512, 64)
    torch.testing.assert_close(scaled, plain, rtol=1e-14, atol=0)
    assert attention_factor == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_parameters_describe_their_own_scaling(name):
    """What a checkpoint records leads back to the same frequencies, so a reload can be asserted."""
    parameters = rope.rope_parameters(rope_of(name), NATIVE, 512, 64)
    again = rope.from_native(parameters)
    assert again is not None
    expected = rope.inv_freq(rope_of(name), BASE, 512, 64)
    read = rope.inv_freq(again, parameters["rope_theta"], 512, 64)
    assert torch.equal(read[0], expected[0])
    assert read[1] == expected[1]


# --- values of the papers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "base"), [(2, 20221.3), (4, 40889.9), (8, 82684.6), (16, 167198.7)]
)
def test_ntk_base_and_ends_of_the_spectrum(factor, base):
    parameters = rope.rope_parameters(RopeConfig("ntk", factor=factor), NATIVE, 4096, 128)
    assert parameters["rope_type"] == "default"
    assert parameters["rope_theta"] == pytest.approx(base, abs=0.05)
    scaled, _ = rope.inv_freq(RopeConfig("ntk", factor=factor), 1e4, 4096, 128)
    plain, _ = rope.inv_freq(RopeConfig(), 1e4, 4096, 128)
    assert scaled[0] == 1.0
    assert float(plain[-1] / scaled[-1]) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("factor", "length", "base"),
    [
        (1, 4096, 10000), (1, 100, 10000), (1, 8192, 20221), (1, 16384, 40890), (1, 32768, 82685),
        (2, 8192, 30528), (2, 16384, 72196), (2, 32768, 156588),
    ],
)  # fmt: skip
def test_dynamic_ntk_base_at_a_length(factor, length, base):
    scaled, _ = rope.inv_freq(RopeConfig("dynamic_ntk", factor=factor), 1e4, 4096, 128, length)
    assert float(scaled[1]) ** -64 == pytest.approx(base, abs=0.5)  # theta_1 = base^(-1/64)


def test_abf_is_rope_with_another_base():
    abf = RopeConfig("abf", factor=8, base=5e5)
    assert rope.rope_parameters(abf, NATIVE, 4096, 128) == {
        "rope_type": "default",
        "rope_theta": 5e5,
    }
    scaled, factor = rope.inv_freq(abf, 1e4, 4096, 128)
    assert scaled.tolist() == pytest.approx([5e5 ** (-k / 64) for k in range(64)], rel=1e-12)
    assert factor == 1.0
    assert rope.extended_window(abf, 4096) == 32768


@pytest.mark.parametrize("base", [None, 1.0, -5.0, math.inf, math.nan])
def test_abf_needs_a_base(base):
    with pytest.raises(UserError, match=r"rope\.base"):
        rope.rope_parameters(RopeConfig("abf", factor=8, base=base), NATIVE, 4096, 128)


def test_yarn_golden():
    yarn = RopeConfig("yarn", factor=16, beta_fast=32, beta_slow=1)
    scaled, attention_factor = rope.inv_freq(yarn, 1e4, 4096, 128)
    plain, _ = rope.inv_freq(RopeConfig(), 1e4, 4096, 128)
    dims = [0, 20, 30, 40, 46, 63]
    golden = [1.0, 5.623413e-02, 8.526844e-03, 8.817890e-04, 8.334509e-05, 7.217387e-06]
    unscaled = [1.0, 5.623413e-02, 1.333521e-02, 3.162278e-03, 1.333521e-03, 1.154782e-04]
    assert scaled[dims].tolist() == pytest.approx(golden, rel=1e-6)
    assert plain[dims].tolist() == pytest.approx(unscaled, rel=1e-6)
    assert attention_factor == pytest.approx(1.277, abs=5e-4)


@pytest.mark.parametrize(
    ("factor", "temperature"), [(2, 1.069), (4, 1.139), (8, 1.208), (32, 1.347)]
)
def test_yarn_temperature(factor, temperature):
    yarn = RopeConfig("yarn", factor=factor, beta_fast=32, beta_slow=1)
    assert rope.inv_freq(yarn, 1e4, 4096, 128)[1] == pytest.approx(temperature, abs=5e-4)


@pytest.mark.parametrize(
    ("base", "window", "low", "high"),
    [(1e4, 2048, 16, 41), (1e4, 4096, 20, 46), (1e4, 8192, 25, 50), (5e5, 8192, 18, 35)],
)
def test_yarn_ramp_limits(base, window, low, high):
    yarn = RopeConfig("yarn", factor=16, beta_fast=32, beta_slow=1)
    ratio = (
        rope.inv_freq(RopeConfig(), base, window, 128)[0]
        / rope.inv_freq(yarn, base, window, 128)[0]
    )
    untouched = (ratio - 1).abs() < 1e-9
    divided = (ratio - 16).abs() < 1e-9
    assert untouched.nonzero().max() == low
    assert divided.nonzero().min() == high


def test_pi_is_fractional_positions():
    scaled, _ = rope.inv_freq(RopeConfig("pi", factor=8), 1e4, 2048, 128)
    plain, _ = rope.inv_freq(RopeConfig(), 1e4, 2048, 128)
    position = torch.arange(16384, dtype=torch.float64)[:, None]
    assert torch.equal((position * scaled).cos(), (position / 8 * plain).cos())
    assert torch.equal((position * scaled).sin(), (position / 8 * plain).sin())


def test_interpolation_bound():
    """Theorem 2.1 of the PI paper: |a(d) - a_lin(d)| <= D max|h| (d-d1)(d2-d) / (8 ln c)."""
    assert 32 * math.log(1e4) == pytest.approx(294.73, abs=5e-3)
    generator = torch.Generator().manual_seed(0)
    theta, _ = rope.inv_freq(RopeConfig(), 1e4, 2048, 128)
    worst = 0.0
    for start in (0, 1, 10, 500, 4000):
        h = torch.randn(64, dtype=torch.complex128, generator=generator)
        fraction = torch.linspace(0, 1, 1002, dtype=torch.float64)[1:-1]

        def score(d, h=h):
            return (torch.exp(1j * d[..., None] * theta) @ h).real

        ends = score(torch.tensor([start, start + 1.0], dtype=torch.float64))
        linear = ends[0] * (1 - fraction) + ends[1] * fraction
        bound = 128 * h.abs().max() * fraction * (1 - fraction) / (8 * math.log(1e4))
        worst = max(worst, float(((score(start + fraction) - linear).abs() / bound).max()))
    assert 0.01 < worst <= 1


def test_extrapolation_bound_is_never_below_the_head_size():
    """B(d)/D >= 1 for d = 1..4095; the reference minimum is 1.116 at 3643, and 16.25 at 0."""
    theta, _ = rope.inv_freq(RopeConfig(), 1e4, 4096, 128)
    d = torch.arange(4096, dtype=torch.float64)[:, None]
    bound = torch.exp(1j * d * theta).cumsum(1).abs().sum(1) / 128
    assert float(bound[0]) == pytest.approx(16.25)
    assert int(bound.argmin()) == 3643
    assert float(bound.min()) == pytest.approx(1.116, abs=5e-4)


def test_resolve():
    assert rope.resolve(RopeConfig("pi", target=8192), 2048) == 4.0
    assert rope.resolve(RopeConfig("pi", target=8193), 2048) == 5.0  # ceil, as LongLoRA
    assert rope.resolve(RopeConfig("pi", factor=2.5, target=8192), 2048) == 2.5
    assert rope.resolve(RopeConfig(), 2048) == 1.0
    with pytest.raises(UserError, match=r"rope\.factor or rope\.target"):
        rope.resolve(RopeConfig("pi"), 2048)
    with pytest.raises(UserError, match="at least 1"):
        rope.resolve(RopeConfig("pi", factor=0.5), 2048)
    with pytest.raises(UserError, match=", ".join(rope.NAMES)):
        rope.resolve(RopeConfig("linear", factor=2), 2048)


def test_extended_window():
    assert rope.extended_window(RopeConfig("pi", factor=2.5), 2048) == 5120
    assert rope.extended_window(RopeConfig("ntk", target=8192), 2048) == 8192
    assert rope.extended_window(RopeConfig("dynamic_ntk", factor=4), 2048) == 2048
    assert rope.extended_window(RopeConfig(), 2048) == 2048


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear", "dynamic"])
def test_a_scaled_model_is_not_scaled_again(kind):
    native = {"rope_type": kind, "rope_theta": 5e5, "factor": 8.0}
    with pytest.raises(UserError, match=rf"\({kind}\).*rope\.name=pi"):
        rope.rope_parameters(RopeConfig("pi", factor=2), native, 8192, 128)
    assert rope.rope_parameters(RopeConfig(), native, 8192, 128) == native


def test_yarn_has_the_papers_thresholds_where_none_are_given():
    given = RopeConfig("yarn", factor=2, beta_fast=32, beta_slow=1)
    earlier = RopeConfig("yarn", factor=2, beta_fast=None, beta_slow=None)  # in a checkpoint
    assert RopeConfig("yarn", factor=2) == given == earlier


def test_faults_of_the_input():
    with pytest.raises(UserError, match="must be above"):
        rope.inv_freq(RopeConfig("yarn", factor=2, beta_fast=1, beta_slow=32), 1e4, 2048, 128)
    with pytest.raises(UserError, match="one rope_theta"):
        nested = {"full_attention": NATIVE}
        rope.rope_parameters(RopeConfig("pi", factor=2), nested, 2048, 128)


def test_foreign_scalings_are_left_to_transformers():
    assert rope.from_native({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}) is None
    assert rope.from_native({**NATIVE, "partial_rotary_factor": 0.5}) is None
