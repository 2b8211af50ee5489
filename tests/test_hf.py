"""Our models in transformers and back. Every answer is compared with transformers' own."""

import copy
import json
import os
import stat
import sys

import pytest
import torch

import kha
import sample
from data.figures import knock_movement
from data.hf import export_hf, import_hf
from data.tokens import load_tokenizer
from kha import Config, Transformer
from sample import generate, write_samples
from tests.reference import HEADS, logits, relative_error, scramble, theirs
from tests.runs import limit_files, names
from tests.test_sample import save

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

ROPE = {"rope_theta": 500.0}  # transformers 5 makes rope_parameters of it
MIXTURE = dict(n_expert=6, top_k=2)
KINDS = {
    "linear": dict(knock_q="linear", knock_k="linear", knock_v="linear"),
    "mlp": dict(knock_v="mlp"),
    "gate": dict(knock_v="gate"),
    "all": dict(knock_q="mlp", knock_k="gate", knock_v="mlp"),
    "mixed": dict(knock_q="linear", knock_k="mlp", knock_v="linear", tie_embeddings=False),
}


@pytest.fixture
def byte():
    return load_tokenizer("byte")


def config_of_ours(heads="wide", **overrides):
    shape = dict(zip(("n_head", "n_kv_head", "head_dim"), HEADS[heads], strict=True))
    base = dict(vocab_size=320, block_size=128, n_layer=2, n_embd=24, d_ff=40, rope_base=500.0)
    return Config(**{**base, "knock_v": "none", **shape, **overrides})


def ours(heads="wide", **overrides):
    """A random model of ours. Its balancing biases decide which experts are chosen."""
    model = scramble(Transformer(config_of_ours(heads, **overrides))).eval()
    for moe in model.moes():
        moe.bias.copy_(torch.linspace(-0.3, 0.3, moe.n_expert))
    return model


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **options
    )


def random_tokens(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0))


def assert_same(a, b, shapes=((1, 1), (1, 9), (3, 100))):
    for shape in shapes:
        tokens = random_tokens(*shape)
        assert relative_error(logits(a, tokens), logits(b, tokens)) < 1e-5


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "removed"}))


# --- out ---


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("experts,stock", [({}, "Qwen3"), (MIXTURE, "Glm4Moe")])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_what_we_exported(kind, heads, experts, stock, byte, tmp_path):
    model = ours(heads, **KINDS[kind], **experts)
    before = copy.deepcopy(model)
    export_hf(model, tmp_path / "hf", byte)
    assert_same(model, before)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    code = [] if kind == "linear" else ["modeling_kha.py"]
    assert names(tmp_path / "hf") == sorted(files + code)
    assert names(tmp_path) == ["hf"]

    loaded, report = load(tmp_path / "hf", output_loading_info=True)
    prefix = "KHA" if code else ""
    assert type(loaded).__name__ == f"{prefix}{stock}ForCausalLM"
    assert loaded.config.eos_token_id == loaded.config.bos_token_id == 256
    assert loaded.config.tie_word_embeddings == model.config.tie_embeddings
    assert not any(report.values())
    with safetensors.safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers 4 asks for it
    assert_same(loaded, model)
    if experts:
        for moe in model.moes():
            moe.bias.zero_()
        with pytest.raises(AssertionError):  # the bias did decide
            assert_same(loaded, model)


@pytest.mark.parametrize("experts", [{}, MIXTURE])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_greedy_text_is_the_same_token_by_token(kind, experts, byte, tmp_path):
    model = ours(**KINDS[kind], **experts)
    export_hf(model, tmp_path / "hf", byte)
    loaded = load(tmp_path / "hf")
    seen = set()
    for prompt in ([7], [7, 1, 42], list(range(50))):
        text = [new[0] for new in generate(model, prompt, max_new_tokens=64, temperature=0)]
        out = loaded.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=64,
            do_sample=False, eos_token_id=None, return_dict_in_generate=True,
        )
        assert out.sequences[0, len(prompt) :].tolist() == text and len(text) == 64
        seen |= set(text)
    assert len(seen) > 5  # not one word over and over
    for layer in out.past_key_values.layers:  # the cache is as large as without knocks
        assert layer.keys.shape == layer.values.shape == (1, 2, 50 + 63, 8)


@pytest.mark.parametrize("kind,experts", [("linear", {}), ("mlp", MIXTURE)])
def test_the_pipeline_writes_what_we_write(kind, experts, byte, tmp_path, capfd):
    model = ours(**KINDS[kind], **experts, vocab_size=257)  # no ids outside the tokenizer
    export_hf(model, tmp_path / "hf", byte)
    folder = str(tmp_path / "hf")
    pipeline = transformers.pipeline("text-generation", folder, trust_remote_code=True)
    for prompt in ("naïve", "two\n  lines"):
        (written,) = pipeline(prompt, max_new_tokens=30, do_sample=False)
        capfd.readouterr()
        write_samples(model, byte, prompt, max_new_tokens=30, temperature=0)
        assert written["generated_text"] == capfd.readouterr().out.removesuffix("\n")
        assert len(written["generated_text"]) > len(prompt) + 5


def test_the_base_model_and_a_second_saving_have_the_knocks(byte, tmp_path):
    model, tokens = ours(**KINDS["mlp"], **MIXTURE), random_tokens(2, 9)
    export_hf(model, tmp_path / "hf", byte)
    base = transformers.AutoModel.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    with torch.no_grad():
        hidden = base(tokens).last_hidden_state
        assert relative_error(hidden @ model.embed.weight.T, model(tokens)) < 1e-5
    load(tmp_path / "hf").save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), model)


def test_without_trust_nothing_is_computed_wrongly(byte, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0)
    export_hf(ours(**KINDS["mlp"]), tmp_path / "hf", byte)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_export_keeps_the_dtype(byte, tmp_path):
    export_hf(ours(n_expert=4, top_k=2, knock_v="mlp").bfloat16(), tmp_path / "hf", byte)
    assert load(tmp_path / "hf", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "overrides,message",
    [
        (dict(attention="gta"), "cannot export attention=gta"),
        (dict(attention="mla", kv_rank=16), "cannot export attention=mla"),
        (dict(n_expert=1, top_k=1), "needs 2 or more"),
    ],
)
def test_what_transformers_has_not_is_refused(overrides, message, byte, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        export_hf(ours(**overrides), tmp_path / "hf", byte)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_kind_of_knock_of_ones_own_is_not_exported(byte, tmp_path, monkeypatch):
    monkeypatch.setitem(kha.KNOCKS, "relu", ())
    with pytest.raises(ValueError, match="cannot export a knock of kind relu"):
        export_hf(ours(knock_v="relu"), tmp_path / "hf", byte)


def test_export_overwrites_nothing(byte, tmp_path, strict_disk):
    model = ours()
    (tmp_path / "note").write_text("mine")
    for there in (tmp_path, tmp_path / "note"):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            export_hf(model, there, byte)
    (tmp_path / "empty").mkdir()
    export_hf(model, tmp_path / "empty", byte)
    export_hf(model, f"{tmp_path}/new/folder/", byte)
    assert names(tmp_path) == ["empty", "new", "note"]
    assert names(tmp_path / "new") == ["folder"]


def test_of_two_exports_at_once_one_stands(byte, tmp_path, monkeypatch):
    files, model = pytest.importorskip("safetensors.torch"), ours()
    save_file = files.save_file

    def be_late(*args, **how):  # another process exports to the same folder meanwhile
        monkeypatch.setattr(files, "save_file", save_file)
        export_hf(model, tmp_path / "hf", byte)
        save_file(*args, **how)

    monkeypatch.setattr(files, "save_file", be_late)
    with pytest.raises(OSError, match="cannot write"):
        export_hf(ours(**KINDS["mlp"]), tmp_path / "hf", byte)
    assert names(tmp_path) == ["hf"]
    assert_same(load(tmp_path / "hf"), model)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, run_here):
    (tmp_path / "run").mkdir()
    save(ours(), tmp_path / "run")
    words = ["--checkpoint", tmp_path / "run", "--device", "cpu", "--export_hf", tmp_path / "hf"]
    with limit_files(50_000):
        done = run_here(sample.main, *words)
    *_, line = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("sample.py: error: cannot write")
    assert names(tmp_path) == ["run"]


def test_exported_files_are_readable_as_the_umask_says(byte, tmp_path):
    before = os.umask(0o027)
    try:
        export_hf(ours(**KINDS["mlp"]), tmp_path / "hf", byte)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "hf").iterdir()}
    assert modes == {0o640} and stat.S_IMODE((tmp_path / "hf").stat().st_mode) == 0o750


# --- in ---


def model_of(folder, **changes):
    """The model that a run starts with after `--init folder`."""
    config, weights = import_hf(folder, **changes)
    model = Transformer(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(".knock." in name for name in missing)
    return model


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["none", "linear", "mlp"])
@pytest.mark.parametrize("shards", ["5GB", "8KB"])
def test_we_compute_what_we_imported(heads, kind, shards, tmp_path):
    model = theirs(heads=heads, **ROPE, rms_norm_eps=1e-4)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "8KB")
    imported = model_of(tmp_path, knock_q="linear", knock_v=kind)
    expected = config_of_ours(heads, knock_q="linear", knock_v=kind, norm_eps=1e-4)
    assert imported.config == expected
    assert_same(imported, model)


@pytest.mark.parametrize("base", [500, "removed"])
def test_import_reads_older_configs_and_other_dtypes(base, tmp_path):
    theirs(**ROPE).bfloat16().save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters="removed", rope_theta=base, rope_scaling=None)
    imported = model_of(tmp_path, block_size=64)
    assert imported.config.block_size == 64
    assert {weight.dtype for weight in import_hf(tmp_path)[1].values()} == {torch.float32}
    assert_same(imported, load(tmp_path, dtype=torch.float32), shapes=[(2, 40)])


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_imported_trained_and_exported_again(kind, byte, tmp_path):
    theirs(**ROPE).save_pretrained(tmp_path / "in")
    model = model_of(tmp_path / "in", **KINDS[kind])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    tokens = random_tokens(4, 20)
    losses = []
    for _ in range(5):
        losses.append(model(tokens[:, :-1], tokens[:, 1:]))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(abs(diagonal - 1) + rest > 0.1 for diagonal, rest in knock_movement(model).values())
    export_hf(model, tmp_path / "out", byte)
    assert_same(load(tmp_path / "out"), model)
    if kind == "linear":
        assert_same(model_of(tmp_path / "out"), model)
    else:
        with pytest.raises(ValueError, match="a model of type 'kha_qwen3', not qwen3"):
            import_hf(tmp_path / "out")


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(model_type="llama"), "has a model of type 'llama', not qwen3"),
        (dict(attention_bias=True), "has biases"),
        (dict(use_sliding_window=True), "has sliding windows"),
        (dict(hidden_act="gelu"), "has the activation gelu, not silu"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), "scaled"),
        (dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "scaled RoPE"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "scaled RoPE"),
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


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(n_layer=3), "--n_layer 3 does not fit .*, which has 2: leave it out"),
        (dict(n_layer=1), "--n_layer 1 does not fit"),
        (dict(vocab_size=384), "--vocab_size 384 does not fit .*, which has 320"),
        (dict(attention="gta"), "--attention gta does not fit .*, which has gqa"),
        (MIXTURE, "--n_expert 6 does not fit"),
    ],
)
def test_changes_that_the_weights_do_not_fit_are_refused(changes, message, tmp_path):
    theirs().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        import_hf(tmp_path, **changes)
    assert import_hf(tmp_path, n_layer=2, norm_eps=1e-5)[0].norm_eps == 1e-5


def test_an_output_with_a_weight_of_its_own_comes_in_and_goes_out(byte, tmp_path):
    """As Qwen3 has it from 8B on."""
    model = theirs(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "in")
    imported = model_of(tmp_path / "in", knock_v="linear")
    assert not imported.config.tie_embeddings
    assert_same(imported, model)
    export_hf(imported, tmp_path / "out", byte)
    assert_same(load(tmp_path / "out"), model)


def test_a_config_that_is_wrong_about_the_output_is_refused(tmp_path):
    theirs(tie_word_embeddings=False).save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.weight is not its embedding, as its config.json"):
        import_hf(tmp_path)

    theirs().save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings="removed")  # by default Qwen3 is not tied
    with pytest.raises(ValueError, match="damaged .*lm_head.weight"):
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
    for damaged in ("{", "[]", '{"model_type": "qwen3", "rope_scaling": 3}'):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match="is damaged or not a Qwen3 model"):
            import_hf(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is damaged or not a Qwen3 model"):
        import_hf(tmp_path)


def test_of_two_sets_of_weights_that_of_transformers_comes_in(tmp_path):
    theirs().save_pretrained(tmp_path, max_shard_size="8KB")
    newer = theirs()
    newer.model.embed_tokens.weight.data *= 2
    newer.save_pretrained(tmp_path / "newer")
    (tmp_path / "newer" / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert_same(model_of(tmp_path), load(tmp_path))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = theirs()
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not all numbers in norm.weight are finite"):
        import_hf(tmp_path)


def test_without_safetensors_the_way_out_is_named(byte, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"pip install '.\[hf\]'"):
        import_hf(tmp_path)
    with pytest.raises(ValueError, match=r"pip install '.\[hf\]'"):
        export_hf(ours(), tmp_path / "hf", byte)
