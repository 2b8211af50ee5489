"""Knocks on other people's models stay right under what people do with such models."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune, spectral_norm

from kha import add_knocks, fold
from tests.reference import scramble


class Values(nn.Module):
    """As much of an attention layer as it takes."""

    def __init__(self):
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(24, 16), nn.Linear(16, 24)

    def forward(self, x):
        return self.o_proj(self.v_proj(x))


def qwen2():
    """A small random Qwen2 of transformers. Its projections to q, k and v have biases."""
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return scramble(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, **heads)))


TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


# --- torch.compile ---


@pytest.mark.parametrize("called", [False, True], ids=["not yet called", "called before"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_model_that_is_compiled_already_knocks_and_learns(kind, called):
    model, x = Values(), torch.randn(2, 5, 24)
    compiled = torch.compile(model, backend="aot_eager")
    before = compiled(x) if called else model(x)
    knock = add_knocks(model, kind, "v_proj", 8)["v_proj"]
    torch.testing.assert_close(compiled(x), before)
    scramble(knock)
    assert not torch.allclose(compiled(x), before, rtol=0.1)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad.any() for p in knock.parameters())


# --- the Trainer; test_hf.py has more of it, saving and LoRA ---


@pytest.mark.parametrize("how", [dict(bf16=True), dict(gradient_checkpointing=True)], ids=str)
def test_the_trainer_trains_and_saves_knocks(how, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = qwen2()
    knocks = add_knocks(model, "linear", "*.[qv]_proj", 6)
    settings = dict(max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    Trainer(model, TrainingArguments(str(tmp_path), **settings, **how), train_dataset=rows).train()
    assert all(not torch.equal(knock.t, torch.eye(6)) for knock in knocks.values())
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()


# --- folding ---


def test_a_fold_that_fails_changes_nothing():
    model, x = Values(), torch.randn(2, 5, 24)
    scramble(add_knocks(model, "linear", "v_proj", 8, slice(0, 8))["v_proj"])
    scramble(add_knocks(model, "mlp", "v_proj", 8, slice(8, 16))["v_proj"])
    before = model(x)
    with pytest.raises(ValueError, match="cannot fold the MLP knock of v_proj"):
        fold(model, value="v_proj", output="o_proj")
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_hooks_of_a_projection_stay_when_it_is_knocked_and_folded(kind, compiles):
    model, x, seen = Values(), torch.randn(2, 5, 24, requires_grad=True), []
    model.v_proj.bias = None
    model.v_proj.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.v_proj.register_forward_hook(lambda *_: seen.append("forward"))
    model.v_proj.register_full_backward_hook(lambda *_: seen.append("backward"))
    module = torch.compile(model, backend="eager") if compiles else model
    module(x)
    scramble(add_knocks(model, kind, "v_proj", 8)["v_proj"])
    knocked = module(x)
    for _ in range(2):
        seen.clear()
        model(x).sum().backward()
        assert seen == ["before", "forward", "backward"]
        fold(model, "v_proj", "o_proj")
        torch.testing.assert_close(module(x), knocked)


def test_whoever_holds_a_projection_holds_the_knocked_one_and_the_folded_one():
    model, x = Values(), torch.randn(2, 5, 24)
    held = model.v_proj
    scramble(add_knocks(model, "linear", "v_proj", 8)["v_proj"])
    knocked = model.v_proj(x)
    assert held is model.v_proj and not torch.allclose(knocked, nn.Linear.forward(held, x))
    fold(model)
    assert held is model.v_proj and type(held) is nn.Linear
    torch.testing.assert_close(held(x), knocked)


def test_knocks_in_float32_on_a_bfloat16_model_fold():
    for kind in ("linear", "mlp"):
        model, x = Values().bfloat16(), torch.randn(2, 5, 24).bfloat16()
        model.v_proj.bias = None
        scramble(add_knocks(model, kind, "v_proj", 8)["v_proj"].float())
        before = model(x)
        fold(model, "v_proj", "o_proj")
        torch.testing.assert_close(model(x), before, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("name", ["v_proj", "o_proj"])
@pytest.mark.parametrize("compute", [
    lambda part: prune.l1_unstructured(part, "weight", 0.3),
    spectral_norm,  # a hook makes the weight in every forward pass
    parametrizations.weight_norm,  # the weight is a property
], ids=["pruned", "spectral_norm", "weight_norm"])  # fmt: skip
def test_a_weight_that_is_computed_is_not_folded_into(compute, name, kind):
    model, x = Values().eval(), torch.randn(2, 5, 24)
    model.v_proj.bias = None
    scramble(add_knocks(model, kind, "v_proj", 8)["v_proj"])
    compute(getattr(model, name))
    before = model(x)
    if kind == "mlp" or name == "v_proj":  # W^O takes a part of an MLP knock only
        with pytest.raises(ValueError, match="computed|no neighbour o_proj, a plain nn.Linear"):
            fold(model, "v_proj", "o_proj")
    else:
        fold(model)
    torch.testing.assert_close(model(x), before)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_knocks_come_before_fsdp_and_folding_after_it(one_process):
    model, x = Values(), torch.randn(2, 5, 24)
    add_knocks(model, "linear", "v_proj", 8)
    fully_shard(model)
    before = model(x)  # FSDP keeps the weights of the outermost module whole after this
    with pytest.raises(ValueError, match="sharded"):
        fold(model)
    model.reshard()
    torch.testing.assert_close(model(x), before)
    model = Values()
    fully_shard(model)
    with pytest.raises(ValueError, match="v_proj is sharded"):
        add_knocks(model, "linear", "v_proj", 8)
    assert type(model.v_proj) is nn.Linear


def test_folding_inside_autocast_keeps_the_output():
    model, x = Values(), torch.randn(2, 5, 24)
    scramble(add_knocks(model, "linear", "v_proj", 8)["v_proj"])
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        fold(model)
        torch.testing.assert_close(model(x), before, rtol=0.05, atol=0.05)


# --- what cannot take a knock ---


def test_a_forward_of_its_own_would_go_round_the_knock_so_it_is_refused():
    model = Values()
    model.v_proj.forward = lambda x: x  # as accelerate does it
    with pytest.raises(ValueError, match="v_proj is sharded or has a forward of its own: add"):
        add_knocks(model, "mlp", "v_proj", 8)
    assert type(model.v_proj) is nn.Linear


def test_a_projection_with_two_names_knocks_once():
    model = Values()
    model.again = model.v_proj
    (knock,) = add_knocks(model, "linear", "[va]*", 8).values()
    assert model.again is model.v_proj and list(model.v_proj.knocks) == [knock]
