"""Sizes, costs and memory of models, against the paper's figures and measurements."""

import dataclasses

import pytest
import torch

from data.figures import count_params, flops_per_token, memory_per_gpu
from kha import CONFIGS, Config, Transformer


def build(name, **overrides):
    with torch.device("meta"):
        return Transformer(Config(**{**CONFIGS[name], **overrides}))


@pytest.mark.parametrize(
    "name,total,active",
    [
        ("moe-0.4b-2.3b", "2.3", "0.44"),
        ("moe-0.8b-6.6b", "6.6", "0.8"),
        ("moe-1.6b-14.6b", "14.6", "1.6"),
        ("dense-0.6b", "0.61", "0.61"),
        ("dense-1.7b", "1.68", "1.68"),
        ("dense-3.9b", "3.94", "3.94"),
        ("moe-1b-6.1b", "6.1", "1.01"),
        ("small", "0.12", "0.025"),
        ("gpt2", "0.124", "0.124"),
    ],
)
def test_sizes_of_the_named_configs(name, total, active):
    """Billions. Table 5 and section 4 round some and cut off others: one off in the last digit."""
    for size, printed in zip(count_params(build(name)), (total, active), strict=True):
        assert abs(size / 1e9 - float(printed)) < 10.0 ** -len(printed.split(".")[1])


@pytest.mark.parametrize(
    "shape,active",
    [
        (dict(n_head=32, n_kv_head=1), 859),
        (dict(n_head=16, n_kv_head=8), 795),
        (dict(n_head=32, n_kv_head=4), 880),
        (dict(n_head=16, n_kv_head=16), 852),
        (dict(n_head=32, n_kv_head=4, attention="gta"), 868),
        # The paper prints 970 and no ranks; the round numbers nearest to it give 972.
        (dict(n_head=32, n_kv_head=1, attention="mla", kv_rank=512, q_rank=1024), 972),
    ],
    ids=["MQA", "GQA-8", "GQA-4", "MHA", "GTA", "MLA"],
)
def test_active_sizes_of_table_3(shape, active):
    model = build("moe-0.8b-6.6b", **shape, knock_v="none")
    assert round(count_params(model)[1] / 1e6) == active


@pytest.mark.parametrize(
    "name,shape,micro_batch,how,measured",
    [
        ("gpt2", dict(knock_v="none"), 32, dict(accumulates=False), 13.7),
        ("gpt2", {}, 32, dict(accumulates=False), 14.3),
        ("gpt2", {}, 32, dict(n_shard=2), 13.7),
        ("moe-0.4b-2.3b", dict(vocab_size=50304, knock_v="none"), 8, {}, 64.2),
        ("moe-0.4b-2.3b", dict(vocab_size=50304), 8, {}, 64.7),
        ("moe-0.4b-2.3b", dict(vocab_size=50304), 1, {}, 41.7),
        ("moe-0.4b-2.3b", dict(vocab_size=50304), 4, dict(accumulates=False), 43.7),
        ("moe-0.4b-2.3b", dict(vocab_size=50304), 4, dict(accumulates=False, recompute=True), 34.6),
        ("moe-0.4b-2.3b", dict(vocab_size=50304), 8, dict(n_shard=2), 44.4),
        ("moe-1b-6.1b", dict(block_size=4096), 1, {}, 112.8),
        ("moe-1b-6.1b", dict(block_size=4096), 1, dict(n_shard=2), 57.1),
        ("moe-1b-6.1b", dict(block_size=4096), 2, dict(n_shard=2), 64.2),
    ],
)
def test_memory_is_within_15_percent_of_what_a_gpu_needed(name, shape, micro_batch, how, measured):
    """measured: torch.cuda.max_memory_allocated over updates, GiB; torch 2.11, compiled. 112.8 is
    from an H200, all others from H100s."""
    config = Config(**{**CONFIGS[name], **shape})
    gib = memory_per_gpu(config, micro_batch, **how)["total"] / 2**30
    assert gib == pytest.approx(measured, rel=0.15)


def test_memory_falls_where_it_should():
    config = Config(**CONFIGS["moe-0.8b-6.6b"])
    alone, spread = memory_per_gpu(config, 1), memory_per_gpu(config, 1, n_shard=8)
    for part in ("weights", "adam", "gradients"):
        assert spread[part] == alone[part] / 8
    twice = memory_per_gpu(config, 2)
    assert spread["activations"] == alone["activations"] == twice["activations"] / 2
    assert memory_per_gpu(config, 1, recompute=True)["activations"] < alone["activations"] / 5
    one = dataclasses.replace(config, n_layer=1)  # its layer is whole in the backward pass anyway
    assert memory_per_gpu(one, 1, recompute=True)["total"] > memory_per_gpu(one, 1)["total"]
    assert sum(alone.values()) == pytest.approx(2 * alone["total"])


def test_costs_are_the_papers():
    """Eq. 10-12, forward FLOPs of a layer on a sequence. Training costs three times that."""
    L, d, n = 2048, 1024, 32
    mha, ffn, kha = 8 * L * d**2 + 4 * L**2 * d, 18 * L * d**2, 6 * L * d**2 / n
    assert f"{kha / (mha + ffn):.2%} {kha / mha:.2%}" == "0.55% 1.17%"  # as the paper says
    shape = dict(n_layer=1, n_embd=d, n_head=n, n_kv_head=n, head_dim=d // n, d_ff=3 * d)
    with_knock, without = (
        flops_per_token(build("gpt2", **shape, knock_v=kind), L) for kind in ("mlp", "none")
    )
    assert with_knock - without == 3 * kha / L
    head = 6 * d * 50304
    assert abs(without - head - 3 * (mha + ffn) / L) < 1e-3 * without  # the rest: norms


@pytest.mark.parametrize(
    "shape,width",
    [({}, 2 * 64), (dict(attention="mla", kv_rank=96, knock_v="linear"), 2.5 * 64)],
    ids=["gqa", "mla"],  # MLA's queries and keys have half a head more, which RoPE turns
)
def test_the_cost_of_attention_grows_with_the_length(shape, width):
    model = build("gpt2", **shape)
    more = flops_per_token(model, 2048) - flops_per_token(model, 1024)
    assert more == 3 * 2 * 12 * 12 * width * 1024  # 12 layers of 12 heads, forward and backward
