"""Export to and import from Hugging Face transformers: folders of config.json and safetensors.

Export: python sample.py --checkpoint out/small --export_hf FOLDER. A model with linear knocks or
none becomes a stock model, Qwen3ForCausalLM or with experts Glm4MoeForCausalLM. Other knocks leave
a gate, which stock models do not have: modeling_kha.py goes along, and the folder is loaded with
trust_remote_code=True. The tokenizer goes along, too. Import: python train.py --init FOLDER
trains a dense Qwen3 model further, with new knocks.

This needs the optional package safetensors, and never transformers itself.
"""

import copy
import json
import os
import shutil
from pathlib import Path

import torch

from data.script import import_optional, is_taken, new_folder
from data.tokenizer_json import END, Tokenizer, to_json
from data.tokens import TOKENIZER_FILE
from kha import Config, Transformer, fold

HF_SIZES = {  # field of Config -> key of config.json
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
# What one may change of an imported model: its weights fit all the same.
MAY_CHANGE = ("block_size", "knock_q", "knock_k", "knock_v", "knock_init", "rope_base", "norm_eps")


def gated_knocks(config: Config) -> dict[str, str]:
    """The projections with a knock that has a gate, which stays after folding, and the kind of that
    knock: v_proj -> mlp."""
    kinds = {f"{part}_proj": getattr(config, f"knock_{part}") for part in "qkv"}
    return {name: kind for name, kind in kinds.items() if kind in ("mlp", "gate")}


def hf_names(config: Config) -> dict[str, list[str]]:
    """Our name of each weight of a folded model -> theirs. Several of theirs are the rows of ours,
    one below the other; an expert's weight is transposed first."""
    names = {"embed.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not config.tie_embeddings:
        names["head.weight"] = ["lm_head.weight"]
    layer = {
        "attn_norm.weight": ["input_layernorm.weight"],
        "ffn_norm.weight": ["post_attention_layernorm.weight"],
        "attn.q_norm.weight": ["self_attn.q_norm.weight"],
        "attn.k_norm.weight": ["self_attn.k_norm.weight"],
    }
    gated = gated_knocks(config)
    for part in "qkvo":
        name = f"{part}_proj"
        halves = [f"{name}.up", f"{name}.gate"] if name in gated else [name]
        layer[f"attn.w{part}.weight"] = [f"self_attn.{half}.weight" for half in halves]
        if gated.get(name) == "mlp" and part != "v":
            layer[f"attn.w{part}.knock.down"] = [f"self_attn.{name}.down"]
    if config.n_expert:
        layer["ffn.router"] = ["mlp.gate.weight"]
        layer["ffn.bias"] = ["mlp.gate.e_score_correction_bias"]
    up, down = ("experts_up", "experts_down") if config.n_expert else ("w_up", "w_down")
    mlps = [f"mlp.experts.{e}" for e in range(config.n_expert)] or ["mlp"]
    layer[f"ffn.{up}"] = [f"{mlp}.{half}_proj.weight" for mlp in mlps for half in ("gate", "up")]
    layer[f"ffn.{down}"] = [f"{mlp}.down_proj.weight" for mlp in mlps]
    for i in range(config.n_layer):
        for our, theirs in layer.items():
            names[f"blocks.{i}.{our}"] = [f"model.layers.{i}.{name}" for name in theirs]
    return names


# --------------------------------------------------------------------------------------------------
# Export


def export_hf(model: Transformer, folder: str, tokenizer: Tokenizer) -> None:
    """Write a model, and its tokenizer, as a folder that transformers loads. The weights keep their
    dtype. The model stays as it is; what is written is folded. The folder appears whole or not at
    all.

    Raises ValueError for a model that cannot be exported, or a folder that is there and not empty;
    OSError if it cannot be written.
    """
    c = model.config
    if c.attention != "gqa":
        raise ValueError(f"cannot export attention={c.attention}: only gqa can be exported")
    if own := {c.knock_q, c.knock_k, c.knock_v} - {"none", "linear", "mlp", "gate"}:
        raise ValueError(f"cannot export a knock of kind {own.pop()}: modeling_kha.py has none")
    if c.n_expert == 1:
        raise ValueError("cannot export a mixture of 1 expert: Glm4MoeForCausalLM needs 2 or more")
    if is_taken(folder):
        raise ValueError(f"{folder} exists and is not an empty folder: name another")
    safetensors = import_optional("safetensors.torch", "the export", extra="hf")
    weights, texts = export_weights(model), export_texts(model, tokenizer)
    try:
        with new_folder(folder) as new:
            for name, text in texts.items():
                (new / name).write_text(text, encoding="utf-8")
            file = new / "model.safetensors"
            safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
            shutil.copymode(new / "config.json", file)  # safetensors makes it private
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"cannot write {folder}: {error}") from error


def export_weights(model: Transformer) -> dict[str, torch.Tensor]:
    """The weights of the folded model by their names in transformers."""
    kept = {id(p): p for name, p in model.named_parameters() if ".attn." not in name}
    ours, weights = fold(copy.deepcopy(model, kept)).state_dict(), {}  # only attention is copied
    for our, theirs in hf_names(model.config).items():
        weight = ours[our]
        # experts: (E, in, out) -> (E * out, in)
        rows = weight.mT.flatten(0, 1) if weight.dim() == 3 else weight
        weights |= zip(theirs, rows.contiguous().chunk(len(theirs)), strict=True)
    # Glm4Moe has a shared expert in each layer. Width 0 makes llama.cpp compute something else.
    shapes = {"gate": (model.config.d_ff, model.config.n_embd)}
    shapes |= {"up": shapes["gate"], "down": shapes["gate"][::-1]}
    for i in range(len(model.moes())):
        for part, shape in shapes.items():
            name = f"model.layers.{i}.mlp.shared_experts.{part}_proj.weight"
            weights[name] = model.embed.weight.new_zeros(shape)
    return weights


def export_texts(model: Transformer, tokenizer: Tokenizer) -> dict[str, str]:
    """The files beside the weights: name -> content."""
    c, gated = model.config, gated_knocks(model.config)
    config = {
        **{theirs: getattr(c, our) for our, theirs in HF_SIZES.items()},
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "rope_theta": c.rope_base,
        "bos_token_id": tokenizer.eot_token,
        "eos_token_id": tokenizer.eot_token,
    }
    if c.n_expert:
        config |= {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "moe_intermediate_size": c.d_ff,
            "n_routed_experts": c.n_expert,
            "num_experts_per_tok": c.top_k,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "use_qk_norm": True,
            "partial_rotary_factor": 1.0,
            "num_nextn_predict_layers": 0,
        }
    texts = {}
    if gated:
        stem = "KHAGlm4Moe" if c.n_expert else "KHAQwen3"
        classes = {"AutoConfig": "Config", "AutoModel": "Model",
                   "AutoModelForCausalLM": "ForCausalLM"}
        config |= {
            "architectures": [f"{stem}ForCausalLM"],
            "model_type": f"kha_{config['model_type']}",
            "auto_map": {auto: f"modeling_kha.{stem}{end}" for auto, end in classes.items()},
            "knocks": gated,
        }
        texts["modeling_kha.py"] = Path(__file__).with_name("modeling_kha.py").read_text()
    # Without this class transformers takes that of Qwen3's own tokenizer, which has other ids.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END,
                "model_max_length": c.block_size, "clean_up_tokenization_spaces": False}
    texts["config.json"] = json.dumps(config, indent=2) + "\n"
    texts[TOKENIZER_FILE] = to_json(tokenizer)
    texts["tokenizer_config.json"] = json.dumps(settings, indent=2) + "\n"
    return texts


# --------------------------------------------------------------------------------------------------
# Import


def import_hf(folder: str, **changes) -> tuple[Config, dict[str, torch.Tensor]]:
    """The Config and the weights of the dense Qwen3 model in a folder of transformers (config.json,
    safetensors): in float32, by our names and without knocks. `changes` replace fields of the
    Config, those in MAY_CHANGE. By default it has mlp on v, and the model's longest context.

    Raises ValueError for a model that is not Qwen3, has what ours has not, or is damaged, and for
    changes that its weights do not fit; OSError for a missing file.
    """
    safetensors = import_optional("safetensors.torch", f"the model in {folder}", extra="hf")
    try:
        hf = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # as transformers does
        for there, what in [
            (hf.get("model_type") != "qwen3",
             f"a model of type {hf.get('model_type')!r}, not qwen3 (of a run of train.py, name the"
             " run's own folder, not what it exported)"),
            (hf.get("attention_bias"), "biases (attention_bias)"),
            (hf.get("use_sliding_window"), "sliding windows (use_sliding_window)"),
            (hf.get("hidden_act", "silu") != "silu",
             f"the activation {hf.get('hidden_act')}, not silu"),
            (rope.get("rope_type", rope.get("type", "default")) != "default", "scaled RoPE"),
        ]:
            if there:
                raise ValueError(f"cannot import {folder}, which has {what}")
        fields = {our: hf[theirs] for our, theirs in HF_SIZES.items()}
        fields["tie_embeddings"] = hf.get("tie_word_embeddings", False)
        fields["rope_base"] = float(rope.get("rope_theta") or hf.get("rope_theta", 10000.0))
        config, own = Config(**{**fields, **changes}), Config(**fields, knock_v="none")
        for field, value in changes.items():
            if field not in MAY_CHANGE and value != getattr(own, field):
                raise ValueError(f"--{field} {value} does not fit {folder}, which has"
                                 f" {getattr(own, field)}: leave it out")

        files, index = {"model.safetensors"}, Path(folder, "model.safetensors.index.json")
        if not Path(folder, "model.safetensors").exists() and index.exists():
            files = set(json.loads(index.read_text())["weight_map"].values())
        theirs = {}
        for file in files:
            theirs |= safetensors.torch.load_file(os.path.join(folder, file))
        if config.tie_embeddings:
            embedding = theirs["model.embed_tokens.weight"]
            if not torch.equal(theirs.pop("lm_head.weight", embedding), embedding):
                raise ValueError(f"cannot import {folder}: its lm_head.weight is not its embedding,"
                                 " as its config.json says: set tie_word_embeddings there to false")
        weights = {
            our: torch.cat([theirs.pop(name) for name in names]).float()
            for our, names in hf_names(own).items()
        }
        if theirs:
            raise ValueError(f"cannot import {folder}: ours has no place for {min(theirs)}")
        if bad := [name for name, weight in weights.items() if not weight.isfinite().all()]:
            raise ValueError(f"cannot import {folder}: not all numbers in {bad[0]} are finite")
        with torch.device("meta"):
            model = Transformer(own)
        model.load_state_dict(weights, assign=True)  # raises for a wrong shape
    except (
        json.JSONDecodeError, UnicodeError, safetensors.SafetensorError, RuntimeError, KeyError,
        TypeError, AttributeError,
    ) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(f"{folder} is damaged or not a Qwen3 model ({reason})") from error
    return config, weights


def start_from_hf(folder: str, changes: dict) -> tuple[Config, dict]:
    """The Config of a new run and the checkpoint that it starts from, with the weights and the
    tokenizer of a Qwen3 folder; knocks are left to their start. Raises what import_hf raises."""
    tokenizer = os.path.join(folder, TOKENIZER_FILE)
    if not os.path.isfile(tokenizer):
        raise FileNotFoundError(f"{tokenizer} is missing: put the model's own there")
    config, weights = import_hf(folder, **changes)
    return config, {"model": weights, "step": 0, "tokenizer": tokenizer}
