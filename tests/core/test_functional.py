"""The pure functions against identities, in float64 if an identity is exact."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from layerwise.core import functional as F

hypothesis.settings.register_profile("small", max_examples=40, deadline=None)
hypothesis.settings.load_profile("small")

vectors = st.integers(2, 8).flatmap(lambda k: st.tuples(*[st.lists(st.floats(-15, 15), min_size=k, max_size=k)] * 2))


def logs(pair):
    return (torch.tensor(v, dtype=torch.float64).log_softmax(-1) for v in pair)


@hypothesis.given(vectors)
def test_every_divergence_is_zero_between_equal_distributions(pair):
    log_p, _ = logs(pair)
    for divergence in (F.neg_log_bc, F.one_minus_bc, F.kl_divergence):
        assert abs(divergence(log_p, log_p)) < 1e-12
    assert F.hellinger(log_p, log_p) < 1e-3  # the floor under the square root


@hypothesis.given(vectors)
def test_bc_is_symmetric_and_at_most_one(pair):
    log_p, log_q = logs(pair)
    assert torch.allclose(F.log_bhattacharyya(log_p, log_q), F.log_bhattacharyya(log_q, log_p))
    assert F.log_bhattacharyya(log_p, log_q) <= 1e-12


@hypothesis.given(vectors)
def test_bc_is_the_sum_of_the_roots_of_the_products(pair):
    log_p, log_q = logs(pair)
    direct = (log_p.exp() * log_q.exp()).sqrt().sum()
    assert torch.allclose(F.log_bhattacharyya(log_p, log_q).exp(), direct)
    assert torch.allclose(F.neg_log_bc(log_p, log_q), -direct.log(), atol=1e-12)


@hypothesis.given(vectors)
def test_twice_the_bhattacharyya_distance_is_at_most_kl_in_both_directions(pair):
    log_p, log_q = logs(pair)
    twice = 2 * F.neg_log_bc(log_p, log_q)
    assert twice <= F.kl_divergence(log_p, log_q) + 1e-12
    assert twice <= F.kl_divergence(log_q, log_p) + 1e-12


@hypothesis.given(vectors)
def test_one_minus_bc_is_half_the_squared_distance_of_the_roots(pair):
    log_p, log_q = logs(pair)
    squared = 0.5 * (log_p.exp().sqrt() - log_q.exp().sqrt()).square().sum()
    assert torch.allclose(F.one_minus_bc(log_p, log_q), squared, atol=1e-12)
    assert torch.allclose(F.hellinger(log_p, log_q) ** 2, squared.clamp_min(1e-7), atol=1e-12)


@hypothesis.given(vectors)
def test_kl_is_the_textbook_sum(pair):
    log_p, log_q = logs(pair)
    textbook = sum(math.exp(p) * (p - q) for p, q in zip(log_p.tolist(), log_q.tolist(), strict=True))
    assert F.kl_divergence(log_p, log_q).item() == pytest.approx(textbook, abs=1e-12)


@hypothesis.given(vectors)
def test_gradient_on_the_logits_is_half_of_q_minus_r(pair):
    u, v = (torch.tensor(values, dtype=torch.float64) for values in pair)
    v.requires_grad_()
    log_p, log_q = u.log_softmax(-1), v.log_softmax(-1)
    p, q = log_p.exp(), log_q.detach().exp()
    bc = (p * q).sqrt().sum()
    expected = 0.5 * (q - (p * q).sqrt() / bc)
    (found,) = torch.autograd.grad(F.neg_log_bc(log_p, log_q), v, retain_graph=True)
    assert torch.allclose(found, expected, atol=1e-12)
    (found,) = torch.autograd.grad(F.one_minus_bc(log_p, log_q), v)
    assert torch.allclose(found, bc * expected, atol=1e-12)


@pytest.mark.parametrize("divergence", [F.neg_log_bc, F.one_minus_bc, F.hellinger, F.kl_divergence])
def test_values_and_gradients_stay_finite_for_extreme_logits(divergence):
    u = torch.tensor([[3e4, -3e4, 0.0], [0.0, 0.0, 0.0], [3e4, -3e4, 0.0]])
    v = torch.tensor([[-3e4, 3e4, 0.0], [3e4, -3e4, 0.0], [3e4, -3e4, 0.0]], requires_grad=True)
    out = divergence(u.log_softmax(-1), v.log_softmax(-1))
    out.sum().backward()
    assert out.shape == (3,)
    assert out.isfinite().all()
    assert v.grad.isfinite().all()


def test_distant_distributions_keep_their_distance():
    # BC underflows to 0 in float32 long before its logarithm does: -log BC is about 30000 here.
    u, v = torch.tensor([6e4, 0.0]), torch.tensor([0.0, 6e4])
    expected = 3e4 - math.log(2)
    assert F.neg_log_bc(u.log_softmax(-1), v.log_softmax(-1)).item() == pytest.approx(expected)


def test_hellinger_has_no_gradient_where_it_has_no_derivative():
    v = torch.zeros(3, requires_grad=True)
    F.hellinger(torch.zeros(3).log_softmax(-1), v.log_softmax(-1)).backward()
    assert torch.equal(v.grad, torch.zeros(3))


IMAGE = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
TOKENS = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
FLAT = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("h", "pool", "expected"),
    [
        (IMAGE, "mean", IMAGE.mean((2, 3))),
        (TOKENS, "mean", TOKENS.mean(1)),
        (FLAT, "mean", FLAT),
        (TOKENS, "cls", TOKENS[:, 0]),
        (FLAT, "cls", FLAT),
        (TOKENS, "none", TOKENS),
        (IMAGE, "flatten", IMAGE.reshape(2, 60)),
        (TOKENS, "flatten", TOKENS.reshape(2, 12)),
        (FLAT, "flatten", FLAT),
        (IMAGE[..., :4], "grid", IMAGE[..., :4].reshape(2, 48)),  # 48 numbers: nothing to average
        (torch.ones(1, 2000, 2, 2), "grid", torch.ones(1, 2000)),
        (TOKENS, "grid", TOKENS.mean(1)),
    ],
)
def test_pooling(h, pool, expected):
    assert torch.allclose(F.pool_features(h, pool), expected)


@hypothesis.given(st.lists(st.floats(-100, 100), min_size=2, max_size=9), st.floats(0.5, 4))
def test_layer_norm_gives_mean_zero_and_variance_one_whatever_the_scale(values, scale):
    h = torch.tensor(values, dtype=torch.float64)
    hypothesis.assume(h.std() > 1)
    out = F.normalise(h, "layer", eps=0.0)
    assert abs(out.mean()) < 1e-9
    assert out.var(correction=0).item() == pytest.approx(1)
    assert torch.allclose(F.normalise(scale * h + 3, "layer", eps=0.0), out)


def test_rms_norm_gives_mean_square_one_and_keeps_the_direction():
    h = torch.randn(5, 7, dtype=torch.float64)
    out = F.normalise(h, "rms", eps=0.0)
    assert torch.allclose(out.square().mean(-1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(torch.cosine_similarity(out, h), torch.ones(5, dtype=torch.float64))


def test_no_norm_is_the_identity():
    assert F.normalise(FLAT, "none") is FLAT
