"""The mixture of experts against a loop over tokens and experts, and its balancing."""

import pytest
import torch

from moe import MoE

E, K, C, F_ = 6, 2, 16, 24


def make_moe():
    torch.manual_seed(0)
    moe = MoE(C, F_, E, K)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=0.3)
    return moe


def reference(moe, weights, x):
    """Float64: each token takes the top_k experts of score + bias, weighted by the scores alone."""
    out = []
    for token in x:
        scores = torch.sigmoid(weights["router"] @ token)
        ranking = sorted(range(E), key=lambda e: (scores[e] + moe.bias[e]).item(), reverse=True)
        chosen = ranking[: moe.top_k]
        y = 0
        for e in chosen:
            gate, up = (token @ weights["experts_up"][e]).chunk(2)
            expert = (gate * torch.sigmoid(gate) * up) @ weights["experts_down"][e]
            y = y + scores[e] / sum(scores[chosen]) * expert
        out.append(y)
    return torch.stack(out)


def skew(moe, kind):
    """Biases that change some choices, leave experts empty, or send every token's first choice to
    one expert."""
    if kind == "some bias":
        moe.bias.normal_(std=0.3)
    if kind == "two empty experts":
        moe.bias[:2] = -100
    if kind == "all on expert 3":
        moe.bias[3] = 100
    if kind == "all on experts 0 and 5":
        moe.bias[0] = moe.bias[5] = 100


@pytest.mark.parametrize(
    "kind",
    ["as it comes", "some bias", "two empty experts", "all on expert 3", "all on experts 0 and 5"],
)
@pytest.mark.parametrize("n_token", [1, 2, 3, 33])
def test_moe_is_the_loop_forward_and_backward(kind, n_token):
    moe = make_moe()
    skew(moe, kind)
    x = torch.randn(n_token, C, requires_grad=True)
    out_grad = torch.randn(n_token, C, dtype=torch.float64)
    y = moe(x)
    y.backward(out_grad.float())

    exact = {name: p.detach().double().requires_grad_() for name, p in moe.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    exact_y = reference(moe, exact, exact_x)
    exact_y.backward(out_grad)
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-4)
    for name, p in moe.named_parameters():
        torch.testing.assert_close(p.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-4)
    assert moe.load.sum() == n_token * K and moe.load.max() <= n_token
    # Outside of training, few tokens go another way.
    torch.testing.assert_close(moe.eval()(x).double(), exact_y, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_and_any_leading_shape_works():
    moe = make_moe()
    x = torch.randn(3, 5, C)
    y = moe(x)
    assert y.shape == x.shape
    torch.testing.assert_close(moe(x.view(15, C)).view(3, 5, C), y)
    low = moe(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=0.1, atol=0.1)


def test_the_router_is_exact_where_activations_are_bfloat16():
    moe, x = make_moe(), torch.randn(50, C).bfloat16()
    for low, exact in zip(moe.route(x), moe.route(x.float()), strict=True):
        assert low.dtype == exact.dtype and torch.equal(low, exact)


def test_experts_may_be_more_than_16_bits_hold():
    torch.manual_seed(0)
    moe = MoE(8, 8, 40_000, 2)
    for p in moe.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(200, 8)
    y = moe(x)
    chosen, _ = moe.route(x)
    assert torch.equal(moe.load, chosen.flatten().bincount(minlength=40_000).float())
    torch.testing.assert_close(y, moe.eval()(x), rtol=1e-4, atol=1e-4)  # another way there


def test_load_counts_training_tokens_until_the_next_balance():
    moe = make_moe()
    moe.bias[3] = 100
    moe(torch.randn(10, C)), moe(torch.randn(7, C))
    assert moe.load[3] == 17 and moe.load.sum() == 34
    moe.eval()(torch.randn(5, C))
    assert moe.load.sum() == 34  # what is evaluated does not count
    moe.balance(1e-3, "rms")
    assert moe.load.sum() == 0


@pytest.mark.parametrize("rule", ["rms", "sign"])
def test_balance_is_the_published_rule(rule):
    moe = make_moe()
    moe.load.copy_(torch.tensor([8.0, 4, 4, 4, 4, 0]))
    moe.balance(0.01, rule)
    error = torch.tensor([8.0, 4, 4, 4, 4, 0]) / 24 - 1 / 6
    step = error.sign() if rule == "sign" else error / error.square().mean().sqrt()
    torch.testing.assert_close(moe.bias, -0.01 * step)
    assert moe.bias[0] < 0 < moe.bias[5]
    before = moe.bias.clone()
    for even in (0, 7):  # nothing seen, or a perfectly even load: no step, and no 0/0
        moe.load.fill_(even)
        moe.balance(0.01, "rms")
        torch.testing.assert_close(moe.bias, before, rtol=0, atol=1e-6 if even else 0)


@pytest.mark.parametrize("rule", ["rms", "sign"])
def test_balancing_evens_out_a_skewed_router(rule):
    moe = make_moe()
    with torch.no_grad():
        moe.router[0] += 1.0  # inputs have a positive mean, so expert 0 is everybody's favourite
    x = torch.randn(2000, C) + 0.3
    moe(x)
    assert moe.load.max() / moe.load.mean() > 2
    for _ in range(300):
        moe.load.zero_()
        moe(x)
        moe.balance(5e-3, rule)
    moe(x)
    assert moe.load.max() / moe.load.mean() < 1.1
