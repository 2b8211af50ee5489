"""Knocks on Hugging Face models, and our models as theirs and back: every answer against transformers' own."""

import copy
import json
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.figures import knock_movement
from data.hf import export_hf, import_hf
from kha import Config, Knock, Transformer, add_knocks, fold
from sample import generate
from tests import reference
from tests.reference import scramble

transformers, safetensors = pytest.importorskip("transformers"), pytest.importorskip("safetensors")

HEADS = {"wide": (6, 2, 8), "odd": (3, 1, 32)}  # n_head, n_kv_head, head_dim; n_embd is 24
SIZES = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, max_position_embeddings=128)


def config_of_ours(heads="wide", **overrides):
    shape = dict(zip(("n_head", "n_kv_head", "head_dim"), HEADS[heads]))
    base = dict(vocab_size=50, block_size=128, n_layer=2, n_embd=24, d_ff=40, knock_v="none", rope_base=500.0)
    return Config(**{**base, **shape, **overrides})


def theirs(name="Qwen3", heads="wide", **overrides):
    """A small random Llama or Qwen3 of transformers."""
    shape = dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), HEADS[heads]))
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **shape, "tie_word_embeddings": True, **overrides})
    return scramble(getattr(transformers, f"{name}ForCausalLM")(config)).eval()


@torch.no_grad()
def logits(model, tokens):
    out = model(tokens)
    return getattr(out, "logits", out)


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def assert_same(a, b, shapes=((1, 1), (1, 9), (3, 100))):
    for shape in shapes:
        tokens = torch.randint(50, shape, generator=torch.Generator().manual_seed(0))
        assert relative_error(logits(a, tokens), logits(b, tokens)) < 1e-5


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "removed"}))


# --- knocks on models that are not ours ---


class Fused(nn.Module):
    """nanoGPT's attention, as far as it matters: queries, keys and values of one nn.Linear."""

    def __init__(self, bias=True):
        super().__init__()
        self.c_attn = nn.Linear(24, 3 * 24, bias=bias)
        self.c_proj = nn.Linear(24, 24)

    def forward(self, x):
        q, k, v = (z.unflatten(-1, (3, 8)).transpose(1, 2) for z in self.c_attn(x).split(24, dim=-1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind,pattern", [("linear", "*.[qkv]_proj"), ("mlp", "*.v_proj"), ("mlp", "*.k_proj")])
def test_added_knocks_change_nothing_then_are_the_equation_then_fold_away(name, heads, kind, pattern):
    model, tokens = theirs(name, heads), torch.randint(50, (2, 9))
    before, projections = logits(model, tokens), copy.deepcopy(model)
    knocks = add_knocks(model, kind, pattern, HEADS[heads][2])
    assert len(knocks) == 2 * (3 if kind == "linear" else 1)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-6, atol=1e-6)

    model(tokens).logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for knock in knocks.values() for p in knock.parameters())

    for i, knock in enumerate(knocks.values()):
        scramble(knock, i)
    for place, knock in knocks.items():  # eq. 7 or eq. 9 on the activations of the plain model
        def knock_activations(_, __, y, weights=dict(knock.named_parameters()), dim=HEADS[heads][2]):
            return reference.knock(kind, weights, y.unflatten(-1, (-1, dim))).flatten(-2)

        projections.get_submodule(place).register_forward_hook(knock_activations)
    knocked = logits(model, tokens)
    assert relative_error(knocked, before) > 1e-2
    assert relative_error(knocked, logits(projections, tokens)) < 1e-5

    folded = fold(model)
    assert folded is model and not any(isinstance(module, Knock) for module in model.modules())
    assert relative_error(logits(model, tokens), knocked) < 1e-5


def test_down_of_a_value_knock_vanishes_into_the_output_projection():
    model, tokens = theirs("Llama"), torch.randint(50, (2, 9))
    for i, knock in enumerate(add_knocks(model, "mlp", "*.[qv]_proj", 8).values()):
        scramble(knock, i)
    knocked, names = logits(model, tokens), set(model.state_dict())
    with pytest.raises(ValueError, match="has no neighbour wo"):
        fold(copy.deepcopy(model), "v_proj", "wo")
    fold(model, "v_proj", "o_proj")
    assert relative_error(logits(model, tokens), knocked) < 1e-5
    downs = {name for name in model.state_dict() if name.endswith("q_proj.knocks.0.down")}  # queries are not values
    assert len(downs) == 2 and {name for name in names if "knock" not in name} == set(model.state_dict()) - downs


def test_down_does_not_vanish_into_a_weight_that_is_made_anew_at_each_use():
    model = theirs("Llama")
    add_knocks(model, "mlp", "*.v_proj", 8)
    add_knocks(model, "linear", "*.o_proj", 8)
    with pytest.raises(ValueError, match="plain nn.Linear"):
        fold(model, "v_proj", "o_proj")


def test_a_fused_projection_knocks_where_it_is_told():
    x, plain = torch.randn(2, 9, 24), scramble(Fused())
    model = copy.deepcopy(plain)
    knocks = {
        "v": add_knocks(model, "mlp", "c_attn", 8, rows=slice(48, 72))["c_attn"],
        "q": add_knocks(model, "linear", "c_attn", 8, rows=slice(24))["c_attn"],
        "k": add_knocks(model, "linear", "c_attn", 8, rows=slice(24, 48))["c_attn"],
    }
    torch.testing.assert_close(model(x), plain(x))
    for i, knock in enumerate(knocks.values()):
        scramble(knock, i)

    def knock_activations(_, __, y):
        kinds, parts = dict(q="linear", k="linear", v="mlp"), zip("qkv", y.unflatten(-1, (9, 8)).split(3, dim=2))
        knocked = [reference.knock(kinds[name], dict(knocks[name].named_parameters()), part) for name, part in parts]
        return torch.cat(knocked, dim=2).flatten(2)

    plain.c_attn.register_forward_hook(knock_activations)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("bias,rows", [(True, slice(None)), (False, slice(48, 72))])
def test_a_fused_projection_folds_linear_knocks_and_says_that_it_does_not_fold_others(bias, rows):
    x, model = torch.randn(2, 9, 24), Fused(bias)
    add_knocks(model, "mlp", "c_attn", 8, rows)
    with pytest.raises(ValueError, match="knocks already"):
        add_knocks(model, "mlp", "c_attn", 8, rows=slice(48, 56))
    with pytest.raises(ValueError, match="cannot fold the MLP knock of c_attn"):
        fold(model)

    linear = scramble(Fused(bias))
    scramble(add_knocks(linear, "linear", "c_attn", 8, rows)["c_attn"])
    knocked = linear(x)
    assert type(fold(linear).c_attn) is nn.Linear
    torch.testing.assert_close(linear(x), knocked)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_copies_and_files_of_a_model_with_added_knocks_are_its_own(kind, tmp_path):
    model, tokens = theirs(attention_bias=True), torch.randint(50, (2, 9))
    base = model.state_dict()
    for knock in add_knocks(model, kind, "*.v_proj", 8).values():
        scramble(knock)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = theirs(attention_bias=True)
    add_knocks(loaded, kind, "*.v_proj", 8)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))

    knocked, twin = logits(model, tokens), copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens), knocked)
    scramble(twin, seed=1)
    assert torch.equal(logits(model, tokens), knocked) and not torch.equal(logits(twin, tokens), knocked)
    if kind == "linear":
        fold(copy.deepcopy(model))
        assert torch.equal(logits(model, tokens), knocked)
        assert set(fold(model).state_dict()) == set(base)
        assert relative_error(logits(model, tokens), knocked) < 1e-5
    else:
        assert set(base) <= set(model.state_dict())


def test_added_knocks_take_the_dtype_of_the_projection():
    model, tokens = theirs().bfloat16(), torch.randint(50, (2, 9))
    before = logits(model, tokens)
    knocks = add_knocks(model, "linear", "*.q_proj", 8) | add_knocks(model, "mlp", "*.v_proj", 8)
    assert {p.dtype for knock in knocks.values() for p in knock.parameters()} == {torch.bfloat16}
    assert relative_error(logits(model, tokens), before) < 0.02


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("lin", "*.v_proj", 8), "kind must be linear or mlp, not 'lin'"),
        (("mlp", "*.value", 8), "no module's name matches '\\*.value'"),
        (("mlp", "*.self_attn", 8), "model.layers.0.self_attn is a Qwen3Attention, not an nn.Linear"),
        (("mlp", "*.v_proj", 7), "outputs 0:16 of model.layers.0.self_attn.v_proj do not divide into heads"),
        (("linear", "*.v_proj", 8, slice(16, 24)), "outputs 16:16 of"),
        (("linear", "*.v_proj", 8, slice(0, 16, 2)), "do not divide"),
        (("linear", "*.q_proj", 8), "model.layers.0.self_attn.q_proj knocks already"),
        (("linear", "*.k_proj", 8), "model.layers.1.self_attn.k_proj knocks already"),
    ],
)
def test_knocks_that_cannot_be_added_leave_the_model_alone(arguments, message):
    model = theirs()
    add_knocks(model, "linear", "*.q_proj", 8)
    add_knocks(model, "mlp", "*.1.*.k_proj", 8)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        add_knocks(model, *arguments)
    assert "\n" not in str(error.value) and set(model.state_dict()) == before


def test_our_own_models_have_their_knocks_by_config():
    with pytest.raises(ValueError, match="set knock_q"):
        add_knocks(Transformer(config_of_ours(knock_q="linear")), "mlp", "*.wq", 8)


# --- out ---


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("experts,stock", [({}, "Qwen3"), (dict(n_expert=6, top_k=2), "Glm4Moe")])
def test_transformers_computes_what_we_exported(heads, experts, stock, tmp_path):
    linear = dict(knock_q="linear", knock_k="linear", knock_v="linear")
    model = scramble(Transformer(config_of_ours(heads, **linear, **experts))).eval()
    for moe in model.moes():
        moe.bias.copy_(torch.linspace(-0.3, 0.3, 6))
    export_hf(model, tmp_path / "hf", eot=3)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "hf", "model.safetensors"]

    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(loaded).__name__ == f"{stock}ForCausalLM" and loaded.config.eos_token_id == 3
    assert not any(report.values())
    with safetensors.safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers 4 asks for it
    assert_same(loaded, model)
    if experts:
        assert loaded.config.num_mtp_layers == 0
        for moe in model.moes():
            moe.bias.zero_()
        with pytest.raises(AssertionError):  # the bias did decide
            assert_same(loaded, model)


@pytest.mark.parametrize("experts", [{}, dict(n_expert=6, top_k=2)])
def test_greedy_text_is_the_same_token_by_token(experts, tmp_path):
    model = scramble(Transformer(config_of_ours(knock_v="linear", **experts))).eval()
    export_hf(model, tmp_path / "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    seen = set()
    for prompt in ([7], [7, 1, 42], list(range(50))):
        ours = [new[0] for new in generate(model, prompt, max_new_tokens=64, temperature=0)]
        ids = torch.tensor([prompt])
        out = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        assert out[0, len(prompt) :].tolist() == ours and len(ours) == 64
        seen |= set(ours)
    assert len(seen) > 5  # not one word over and over


def test_export_keeps_the_dtype(tmp_path):
    model = Transformer(config_of_ours(n_expert=4, top_k=2)).bfloat16()
    export_hf(model, tmp_path / "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "overrides,message",
    [
        (dict(knock_v="mlp"), "cannot export knock_v=mlp: it is not linear.*--knock_v linear"),
        (dict(knock_k="gate"), "cannot export knock_k=gate"),
        (dict(attention="gta"), "cannot export attention=gta"),
        (dict(n_expert=1, top_k=1), "at least 2 experts"),
    ],
)
def test_what_no_stock_model_computes_is_refused(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        export_hf(Transformer(config_of_ours(**overrides)), tmp_path / "hf")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_export_overwrites_nothing(tmp_path):
    model = Transformer(config_of_ours())
    (tmp_path / "note").write_text("mine")
    for there in (tmp_path, tmp_path / "note"):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            export_hf(model, there)
    (tmp_path / "empty").mkdir()
    export_hf(model, tmp_path / "empty")
    export_hf(model, f"{tmp_path}/new/folder/")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "new", "note"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["folder"]


def test_a_failed_export_leaves_no_folder(tmp_path, monkeypatch):
    import safetensors.torch

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        export_hf(Transformer(config_of_ours()), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


# --- in ---


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["none", "linear", "mlp"])
@pytest.mark.parametrize("shards", ["5GB", "8KB"])
def test_we_compute_what_we_imported(heads, kind, shards, tmp_path):
    model = theirs(heads=heads, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-4)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "8KB")
    ours = import_hf(tmp_path, knock_q="linear", knock_v=kind)
    assert ours.config == config_of_ours(heads, knock_q="linear", knock_v=kind, norm_eps=1e-4)
    assert_same(ours, model)
    fresh = Transformer(ours.config)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    fresh.load_state_dict(ours.state_dict())
    assert_same(fresh, model)


def test_import_reads_older_configs_and_other_dtypes(tmp_path):
    model = theirs(rope_parameters={"rope_type": "default", "rope_theta": 500.0}).bfloat16()
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters="removed", rope_theta=500, rope_scaling=None)
    ours = import_hf(tmp_path, block_size=64)
    assert ours.config.block_size == 64 and {p.dtype for p in ours.parameters()} == {torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(ours, model, shapes=[(2, 40)])


def test_imported_trained_and_exported_again(tmp_path):
    model = theirs(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    model.save_pretrained(tmp_path / "in")
    ours = import_hf(tmp_path / "in", knock_q="linear", knock_k="linear", knock_v="linear")
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.05)
    tokens = torch.randint(50, (4, 20))
    losses = []
    for _ in range(5):
        losses.append(ours(tokens[:, :-1], tokens[:, 1:]))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(abs(diagonal - 1) + rest > 0.1 for diagonal, rest in knock_movement(ours).values())
    export_hf(ours, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(loaded, ours)
    assert_same(import_hf(tmp_path / "out"), ours)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(model_type="llama"), "has a model of type 'llama', not qwen3"),
        (dict(tie_word_embeddings=False), "output projection of its own"),
        (dict(tie_word_embeddings="removed"), "output projection of its own"),  # Qwen3's own default
        (dict(attention_bias=True), "has biases"),
        (dict(use_sliding_window=True), "has sliding windows"),
        (dict(hidden_act="gelu"), "has the activation gelu, not silu"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), "has scaled RoPE"),
        (dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "has scaled RoPE"),
        (dict(hidden_size="removed"), "damaged or not a Qwen3 model .*hidden_size"),
        (dict(num_hidden_layers=3), "damaged or not a Qwen3 model .*model.layers.2"),
        (dict(num_hidden_layers=1), "no place for model.layers.1"),
        (dict(intermediate_size=39), "damaged or not a Qwen3 model .*ffn.w_"),
    ],
)
def test_what_is_not_ours_to_compute_is_refused(changes, message, tmp_path):
    theirs().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        import_hf(tmp_path)
    assert "\n" not in str(error.value)


def test_an_output_projection_in_the_file_must_be_the_embedding(tmp_path):
    from safetensors.torch import load_file, save_file

    model, file = theirs(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file)
    assert_same(import_hf(tmp_path), model)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(ValueError, match="whose output projection is not its embedding"):
        import_hf(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        import_hf(tmp_path / "nothing")
    theirs().save_pretrained(tmp_path, max_shard_size="8KB")
    shard = max(tmp_path.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="is damaged or not a Qwen3 model"):
        import_hf(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError):
        import_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged or not a Qwen3 model"):
        import_hf(tmp_path)


def test_without_safetensors_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: import_hf(tmp_path), lambda: export_hf(Transformer(config_of_ours()), tmp_path / "hf")):
        with pytest.raises(ValueError, match=r"pip install '.\[hf\]'"):
            call()
