"""Knocks on other people's models: what they compute, and that they stay right under all that
people do with such models."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune, spectral_norm

from kha import Config, Knock, Transformer, add_knocks, fold
from tests import reference
from tests.reference import HEADS, SMALL, logits, relative_error, scramble, theirs

RANDOM = torch.Generator().manual_seed(0)
TOKENS = torch.randint(320, (8, 9), generator=RANDOM)
X = torch.randn(2, 5, 24, generator=RANDOM)
BOTH_KINDS = pytest.mark.parametrize("kind", ["linear", "mlp"])


class Values(nn.Module):
    """As much of an attention layer as it takes: two heads of 8 values, and the output."""

    def __init__(self, bias=False):
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(24, 16, bias), nn.Linear(16, 24)
        scramble(self)

    def forward(self, x):
        return self.o_proj(self.v_proj(x))


def fused(bias=True):
    """nanoGPT's c_attn: one nn.Linear makes the queries, keys and values of 3 heads of 8."""
    return scramble(nn.Sequential(nn.Linear(24, 3 * 24, bias)))


def add_random(model, kind, pattern="*v_proj", head_dim=8, rows=slice(None)):
    """add_knocks, with random weights in the knocks, which it returns."""
    knocks = add_knocks(model, kind, pattern, head_dim, rows)
    for i, knock in enumerate(knocks.values()):
        scramble(knock, i)
    return knocks


def equation(knock, y):
    """Eq. 7 or eq. 9 of the reference on all heads in y (B, T, H * D)."""
    heads = y.unflatten(-1, (-1, knock.head_dim))
    return reference.knock(knock.kind, dict(knock.named_parameters()), heads).flatten(-2)


# --- what adding does, and the equation ---


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "kind,pattern", [("linear", "*.[qkv]_proj"), ("mlp", "*.v_proj"), ("mlp", "*.k_proj")]
)
def test_added_knocks_change_nothing_then_are_the_equation_then_fold(name, heads, kind, pattern):
    model = theirs(name, heads)
    before, plain = logits(model, TOKENS), copy.deepcopy(model)
    knocks = add_knocks(model, kind, pattern, HEADS[heads][2])
    assert len(knocks) == 2 * (3 if kind == "linear" else 1)
    assert torch.equal(logits(model, TOKENS), before)

    logits(model, TOKENS).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for knock in knocks.values() for p in knock.parameters())

    for i, (place, knock) in enumerate(knocks.items()):
        scramble(knock, i)
        plain.get_submodule(place).register_forward_hook(
            lambda _, __, y, knock=knock: equation(knock, y)
        )
    knocked = logits(model, TOKENS)
    assert relative_error(knocked, before) > 1e-2
    assert relative_error(knocked, logits(plain, TOKENS)) < 1e-5

    assert fold(model) is model
    assert any(isinstance(part, Knock) for part in model.modules()) == (kind == "mlp")
    assert relative_error(logits(model, TOKENS), knocked) < 1e-5


def test_a_fused_projection_knocks_where_it_is_told():
    model = fused()
    before, knocks = model(X), {}
    rows = {"v": slice(48, 72), "q": slice(24), "k": slice(24, 48)}
    for part, kind in {"v": "mlp", "q": "linear", "k": "linear"}.items():
        (knocks[part],) = add_knocks(model, kind, "0", 8, rows[part]).values()
    assert torch.equal(model(X), before)
    for i, knock in enumerate(knocks.values()):
        scramble(knock, i)
    expected = [equation(knocks[part], before[..., rows[part]]) for part in "qkv"]
    torch.testing.assert_close(model(X), torch.cat(expected, -1))


@pytest.mark.parametrize("pattern,name", [("[va]*", "v_proj"), ("again", "again")])
def test_a_projection_with_two_names_knocks_once(pattern, name):
    model = Values()
    model.again = model.v_proj
    knocks = add_knocks(model, "linear", pattern, 8)
    assert model.again is model.v_proj and list(knocks) == [name]
    assert list(model.v_proj.knocks) == [knocks[name]]


@BOTH_KINDS
@pytest.mark.parametrize(
    "of_model,of_knocks",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_added_knocks_are_at_least_float32(kind, of_model, of_knocks):
    (knock,) = add_knocks(Values().to(of_model), kind, "v_proj", 8).values()
    assert {p.dtype for p in knock.parameters()} == {of_knocks}


@BOTH_KINDS
def test_knocks_on_a_bfloat16_model_learn_small_steps(kind):
    model = Values().bfloat16()
    before = model(X.bfloat16())
    (knock,) = add_knocks(model, kind, "v_proj", 8).values()
    torch.testing.assert_close(model(X.bfloat16()), before, rtol=0, atol=0)
    optimizer = torch.optim.AdamW(knock.parameters(), lr=1e-4, weight_decay=0)
    for _ in range(5):
        optimizer.zero_grad()
        model(X.bfloat16()).square().mean().backward()
        optimizer.step()
    for p in knock.parameters():
        assert (p - p.bfloat16()).any() and not torch.equal(p.diagonal(), p.new_ones(len(p)))


@BOTH_KINDS
def test_a_copy_of_a_model_with_added_knocks_is_its_own(kind):
    model = Values(bias=kind == "linear")
    add_random(model, kind)
    knocked, twin = model(X), copy.deepcopy(model)
    assert torch.equal(twin(X), knocked)
    scramble(twin, seed=1)
    assert torch.equal(model(X), knocked) and not torch.equal(twin(X), knocked)
    fold(twin)
    assert torch.equal(model(X), knocked)


def test_whoever_holds_a_projection_holds_the_knocked_one_and_the_folded_one():
    model = Values(bias=True)
    held, names = model.v_proj, set(model.state_dict())
    add_random(model, "linear")
    knocked = model.v_proj(X)
    assert held is model.v_proj and not torch.allclose(knocked, nn.Linear.forward(held, X))
    fold(model)
    assert held is model.v_proj and type(held) is nn.Linear and set(model.state_dict()) == names
    assert relative_error(held(X), knocked) < 1e-5


@pytest.mark.parametrize("compiles", [False, True])
@BOTH_KINDS
def test_hooks_of_a_projection_stay_when_it_is_knocked_and_folded(kind, compiles):
    model, seen = Values(), []
    model.v_proj.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.v_proj.register_forward_hook(lambda *_: seen.append("forward"))
    model.v_proj.register_full_backward_hook(lambda *_: seen.append("backward"))
    module = torch.compile(model, backend="eager") if compiles else model
    module(X)
    add_random(model, kind)
    knocked = module(X)
    for _ in range(2):
        seen.clear()
        model(X.clone().requires_grad_()).sum().backward()
        assert seen == ["before", "forward", "backward"]
        fold(model)
        assert relative_error(module(X), knocked) < 1e-5


# --- saving, training, compiling ---


@BOTH_KINDS
def test_added_knocks_are_saved_and_loaded(kind, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, loaded = theirs("Qwen2"), theirs("Qwen2")  # it has biases on q, k and v
    add_random(model, kind)
    add_knocks(loaded, kind, "*v_proj", 8)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    model.save_pretrained(tmp_path)
    scramble(loaded, seed=1).load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(logits(loaded, TOKENS), logits(model, TOKENS))
    safetensors.load_model(scramble(loaded, seed=1), tmp_path / "model.safetensors")
    assert torch.equal(logits(loaded, TOKENS), logits(model, TOKENS))


@pytest.mark.parametrize("how", [{}, dict(bf16=True)], ids=str)
@BOTH_KINDS
def test_a_trainer_of_transformers_trains_and_saves_knocks_and_goes_on(kind, how, tmp_path):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=4, save_steps=2, learning_rate=0.01, use_cpu=True, report_to=[],
        per_device_train_batch_size=2, disable_tqdm=True, lr_scheduler_type="constant", **how,
    )
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    outputs = []
    for checkpoint in None, tmp_path / "checkpoint-2":
        model = theirs("Qwen2")
        knocks = add_knocks(model, kind, "*.[qv]_proj", 8)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=checkpoint)
        outputs.append(logits(model, TOKENS))
        for knock in knocks.values():
            start = Knock(kind, 8).state_dict()
            assert all((p - start[n]).abs().max() > 0.01 for n, p in knock.named_parameters())
    assert relative_error(outputs[1], outputs[0]) < 1e-5


@BOTH_KINDS
def test_added_knocks_train_with_gradient_checkpointing(kind):
    model = theirs().train()
    (knock, *_) = add_knocks(model, kind, "*.v_proj", 8).values()

    def gradients():
        model.zero_grad()
        model(TOKENS, use_cache=False).logits.square().mean().backward()
        return [p.grad.clone() for p in knock.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for a, b in zip(plain, gradients(), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make,x", [(Values, X), (theirs, TOKENS)], ids=["plain", "transformers"])
@pytest.mark.parametrize("first", ["compile", "call", "knock"])
@BOTH_KINDS
def test_a_compiled_model_knocks_and_learns(kind, first, make, x):
    model = make()
    before = logits(model, x)
    if first != "knock":
        compiled = torch.compile(model, backend="aot_eager")
    if first == "call":
        logits(compiled, x)  # compiled here, without knocks
    knocks = add_knocks(model, kind, "*v_proj", 8).values()
    if first == "knock":
        compiled = torch.compile(model, backend="aot_eager")
    assert relative_error(logits(compiled, x), before) < 1e-5
    for knock in knocks:
        scramble(knock)
    knocked = logits(compiled, x)
    assert relative_error(knocked, before) > 1e-2
    assert relative_error(knocked, logits(model, x)) < 1e-6
    knocked.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for knock in knocks for p in knock.parameters())


@pytest.mark.parametrize("projection", ["q_proj", "v_proj"])
def test_lora_is_merged_after_folding(projection):
    peft = pytest.importorskip("peft")
    model = theirs()
    add_random(model, "linear", f"*.{projection}")
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[projection]))
    for name, p in lora.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.3)
    before = logits(lora.eval(), TOKENS)
    merged = fold(lora).merge_and_unload()
    assert not any(isinstance(part, Knock) for part in merged.modules())
    assert relative_error(logits(merged, TOKENS), before) < 1e-5


def test_lora_on_our_output_is_merged_before_folding():
    """Folding puts W^down into W^O, and LoRA beside W^O would miss it."""
    peft = pytest.importorskip("peft")
    model = scramble(Transformer(Config(**SMALL | dict(knock_v="mlp")))).eval()
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["wo"]))
    scramble(lora)
    tokens = TOKENS % model.config.vocab_size
    before = lora(tokens)
    with pytest.raises(ValueError, match="wo is shared.*: fold first, or merge LoRA"):
        fold(lora)
    assert torch.equal(lora(tokens), before)
    assert relative_error(fold(lora.merge_and_unload())(tokens), before) < 1e-5


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_knocks_come_before_fsdp_and_folding_after_it(one_process):
    model = Values()
    add_knocks(model, "linear", "v_proj", 8)
    fully_shard(model)
    before = model(X)  # FSDP keeps the weights of the outermost module whole after this
    with pytest.raises(ValueError, match="sharded"):
        fold(model)
    model.reshard()
    assert relative_error(model(X), before) < 1e-5
    model = Values()
    fully_shard(model)
    with pytest.raises(ValueError, match="v_proj is sharded"):
        add_knocks(model, "linear", "v_proj", 8)
    assert type(model.v_proj) is nn.Linear


# --- folding ---


@pytest.mark.parametrize("rows", [slice(None), slice(48, 72)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_projection_folds_linear_knocks_only(bias, rows):
    model, linear = fused(bias), fused(bias)
    add_random(model, "mlp", "0", 8, rows)
    with pytest.raises(ValueError, match="has a knock on some of these outputs already"):
        add_knocks(model, "mlp", "0", 8, slice(48, 56))
    before = model(X)
    assert torch.equal(fold(model)(X), before)
    add_random(linear, "linear", "0", 8, rows)
    knocked = linear(X)
    assert type(fold(linear)[0]) is nn.Linear
    assert relative_error(linear(X), knocked) < 1e-5


def test_a_linear_knock_beside_an_mlp_knock_stays():
    model = Values()
    add_random(model, "linear", rows=slice(0, 8))
    add_random(model, "mlp", rows=slice(8, 16))
    before = model(X)
    assert torch.equal(fold(model)(X), before)


def test_knocks_in_float32_on_a_bfloat16_model_fold():
    model, x = Values().bfloat16(), X.bfloat16()
    add_random(model, "linear")
    before = model(x)
    assert relative_error(fold(model)(x), before) < 0.02


def test_folding_inside_autocast_keeps_the_output():
    model = Values(bias=True)
    add_random(model, "linear")
    with torch.autocast("cpu", torch.bfloat16):
        before = model(X)
        fold(model)
        assert relative_error(model(X), before) < 0.02


def test_folding_inside_autocast_does_not_round_the_weights():
    other = Values(bias=True)
    add_random(other, "linear")
    for model in (other, scramble(Transformer(Config(**SMALL | dict(knock_q="linear"))))):
        outside = fold(copy.deepcopy(model)).state_dict()
        with torch.autocast("cpu", torch.bfloat16):
            fold(model)
        torch.testing.assert_close(model.state_dict(), outside, rtol=0, atol=0)


def test_a_layer_that_is_used_twice_as_a_whole_folds():
    layer = Values()
    model = nn.Sequential(layer, layer)
    add_random(model, "linear")
    knocked = model(X)
    assert relative_error(fold(model)(X), knocked) < 1e-5


@pytest.mark.parametrize("what", ["module", "weight", "bias"])
def test_what_layers_share_is_not_folded(what):
    """It would be folded twice, or in one of its places only."""
    first, second = model = nn.Sequential(Values(bias=True), Values(bias=True))
    if what == "module":
        second.v_proj = first.v_proj
    add_random(model, "linear")
    if what != "module":
        setattr(second.v_proj, what, getattr(first.v_proj, what))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="0.v_proj is shared, sharded or computed"):
        fold(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["v_proj", "o_proj"])
@pytest.mark.parametrize("compute", [
    lambda part: prune.l1_unstructured(part, "weight", 0.3),
    spectral_norm,  # a hook makes the weight in every forward pass
    parametrizations.weight_norm,  # the weight is a property
], ids=["pruned", "spectral_norm", "weight_norm"])
def test_a_weight_that_is_computed_is_not_folded_into(compute, name):
    model = Values().eval()
    add_random(model, "linear")
    compute(getattr(model, name))
    before = model(X)
    if name == "v_proj":
        with pytest.raises(ValueError, match="v_proj is shared, sharded or computed"):
            fold(model)
    else:
        fold(model)
    assert relative_error(model(X), before) < 1e-5


@pytest.mark.parametrize("of", ["theirs", "ours"])
def test_a_projection_with_a_forward_of_its_own_is_not_folded(of):
    """accelerate puts such a forward there. It may hold the weight elsewhere until it is called."""
    if of == "theirs":
        model, x = Values(), X
        add_random(model, "linear")
        part = model.v_proj
    else:
        model = scramble(Transformer(Config(**SMALL | dict(knock_v="mlp"))))
        part, x = model.blocks[0].attn.wo, TOKENS % 50
    part.forward = part.forward
    before = model(x)
    with pytest.raises(ValueError, match="shared, sharded or computed"):
        fold(model)
    assert torch.equal(model(x), before)


# --- what cannot take a knock ---


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("lin", "*.v_proj", 8), "kind must be linear or mlp, not 'lin'"),
        (("mlp", "*.value", 8), "no module's full name matches '\\*.value'"),
        (("mlp", "?", 8), "0 is a Values, not an nn.Linear"),
        (("mlp", "*", 8), "the model is a Sequential, not an nn.Linear"),
        (("mlp", "*.v_proj", 7), "outputs 0:16:1 of 0.v_proj are not heads of 7"),
        (("mlp", "*.v_proj", None), "head_dim must be an int, not None"),
        (("mlp", "*.v_proj", 16 / 2), "head_dim must be an int, not 8.0"),
        (("mlp", "*.v_proj", 0), "are not heads of 0"),
        (("mlp", "*.v_proj", -8), "are not heads of -8"),
        (("linear", "*.v_proj", 8, slice(16, 24)), "outputs 16:16:1 of"),
        (("linear", "*.v_proj", 8, slice(0, 16, 2)), "outputs 0:16:2 of .* are not heads of 8"),
        (("linear", "*.o_proj", 8), "0.o_proj has a knock on some of these outputs already"),
        (("linear", "*.v_proj", 8), "1.v_proj has a knock on some of these outputs already"),
    ],
)
def test_knocks_that_cannot_be_added_leave_the_model_alone(arguments, message):
    model = nn.Sequential(Values(), Values())
    add_knocks(model, "linear", "*.o_proj", 8)
    add_knocks(model, "mlp", "1.v_proj", 8)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        add_knocks(model, *arguments)
    assert "\n" not in str(error.value) and set(model.state_dict()) == before


def wrap_in_lora(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["v_proj"]), model)


def quantise(model):
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def parametrise(model):
    parametrizations.weight_norm(model.v_proj)


def set_forward(model):
    model.v_proj.forward = lambda x: x  # as accelerate does it; it would go round the knock


WRAPPED = "not an nn.Linear: .*before they are quantised or wrapped"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "change,message",
    [
        (wrap_in_lora, f"v_proj is a Linear, {WRAPPED}"),
        (quantise, f"v_proj is a Linear, {WRAPPED}"),
        (parametrise, f"v_proj is a ParametrizedLinear, {WRAPPED}"),
        (set_forward, "v_proj is sharded or has a forward of its own: add"),
    ],
)
def test_projections_that_are_changed_already_are_refused(change, message):
    model = Values()
    change(model)
    before = type(model.v_proj), set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_knocks(model, "linear", "v_proj", 8)
    assert (type(model.v_proj), set(model.state_dict())) == before


def test_our_own_models_have_their_knocks_by_config():
    with pytest.raises(ValueError, match="set knock_q"):
        add_knocks(Transformer(Config(**SMALL, knock_q="linear")), "mlp", "*.wq", 8)
