"""Models out to and in from Hugging Face transformers, as folders of config.json and safetensors.

Out: python sample.py --checkpoint out/small --export_hf folder. A model whose knocks are linear (or none) becomes a stock
model, Qwen3ForCausalLM or with experts Glm4MoeForCausalLM, which any server that knows these can serve. In: python
train.py --import_hf folder trains a dense Qwen3 model on, with knocks that start at the identity. Needs the optional
package safetensors, and never transformers itself.
"""

import json
import os
import types

import torch
from torch import nn

from data.figures import knocks_of
from kha import Config, Transformer, absorb, init_weights

HF_SIZES = {  # field of Config -> key of config.json
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim", "d_ff": "intermediate_size", "norm_eps": "rms_norm_eps",
}


def hf_names(config: Config) -> dict[str, list[str]]:
    """Our name of each weight -> theirs. Several of theirs are the rows of ours, one below the other; an expert's
    weight is transposed first."""
    names = {"embed.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    for i in range(config.n_layer):
        mlps = [f"mlp.experts.{e}" for e in range(config.n_expert)] or ["mlp"]
        layer = {
            "attn_norm.weight": ["input_layernorm.weight"],
            "ffn_norm.weight": ["post_attention_layernorm.weight"],
            **{f"attn.w{part}.weight": [f"self_attn.{part}_proj.weight"] for part in "qkvo"},
            **{f"attn.{part}_norm.weight": [f"self_attn.{part}_norm.weight"] for part in "qk"},
            "ffn.experts_up" if config.n_expert else "ffn.w_up":
                [f"{mlp}.{part}_proj.weight" for mlp in mlps for part in ("gate", "up")],
            "ffn.experts_down" if config.n_expert else "ffn.w_down": [f"{mlp}.down_proj.weight" for mlp in mlps],
        }
        if config.n_expert:
            layer |= {"ffn.router": ["mlp.gate.weight"], "ffn.bias": ["mlp.gate.e_score_correction_bias"]}
        for our, theirs in layer.items():
            names[f"blocks.{i}.{our}"] = [f"model.layers.{i}.{name}" for name in theirs]
    return names


def import_safetensors() -> types.ModuleType:
    """The package safetensors. Raises ValueError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError("this needs the package safetensors: pip install '.[hf]'") from error
    return safetensors


@torch.no_grad()
def export_hf(model: Transformer, folder: str, eot: int | None = None) -> None:
    """Write a model as a folder that transformers loads as a stock model, Qwen3ForCausalLM or, with experts,
    Glm4MoeForCausalLM: config.json and model.safetensors, in the dtype of the weights. Linear knocks are absorbed
    (eq. 8). `eot` is the token that ends a document; the tokenizer is not exported. The folder appears whole.

    Raises ValueError for a model that no stock model computes, or a folder that is there and not empty.
    """
    c = model.config
    if c.attention != "gqa":
        raise ValueError(f"cannot export attention={c.attention}: stock models in transformers have gqa")
    kinds = {f"knock_{part}": getattr(c, f"knock_{part}") for part in "qkv"}
    for place, kind in kinds.items():
        if kind not in ("none", "linear"):
            raise ValueError(
                f"cannot export {place}={kind}: it is not linear, so no weight of a stock model can absorb it; train"
                f" with --{place} linear for that"
            )
    if c.n_expert == 1:
        raise ValueError("Glm4MoeForCausalLM needs at least 2 experts: train a dense model instead of one with 1")
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ValueError(f"{folder} exists and is not an empty folder: name another")
    safetensors = import_safetensors()

    ours, weights = model.state_dict(), {}
    for place, knock in knocks_of(model).items():
        projection = f"{place.removesuffix('.knock')}.weight"
        ours[projection] = absorb(ours[projection].double(), knock.t.double()).to(ours[projection])
    for our, theirs in hf_names(c).items():
        weight = ours[our]
        rows = weight.mT.flatten(0, 1) if weight.dim() == 3 else weight  # experts: (E, in, out) -> (E * out, in)
        weights |= zip(theirs, rows.contiguous().chunk(len(theirs)))
    for i in range(c.n_layer if c.n_expert else 0):  # Glm4Moe's shared expert has width 0, and is missed if left out
        for part, shape in (("gate", (0, c.n_embd)), ("up", (0, c.n_embd)), ("down", (c.n_embd, 0))):
            weights[f"model.layers.{i}.mlp.shared_experts.{part}_proj.weight"] = model.embed.weight.new_empty(shape)
    config = {
        **{theirs: getattr(c, our) for our, theirs in HF_SIZES.items()},
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False,
        "tie_word_embeddings": True, "torch_dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "rope_theta": c.rope_base, "bos_token_id": eot, "eos_token_id": eot,
    }
    if c.n_expert:
        config |= {
            "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "moe_intermediate_size": c.d_ff,
            "n_routed_experts": c.n_expert, "num_experts_per_tok": c.top_k, "n_shared_experts": 0,
            "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
            "routed_scaling_factor": 1.0, "use_qk_norm": True, "partial_rotary_factor": 1.0,
            "num_nextn_predict_layers": 0,
        }
    temporary = f"{os.path.normpath(folder)}.tmp"
    os.makedirs(temporary, exist_ok=True)
    safetensors.torch.save_file(weights, os.path.join(temporary, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(temporary, "config.json"), "w") as file:
        json.dump(config, file, indent=2)
    os.replace(temporary, folder)


def import_hf(folder: str, **changes) -> Transformer:
    """The Qwen3 dense model in a folder of transformers (config.json, safetensors) as a model of ours, in float32, to
    train on. `changes` replace fields of its Config: knock_q, knock_k, knock_v, which start at the identity and so
    change nothing (default: mlp on v), and block_size (default: the model's longest context).

    Raises ValueError for a model that is not Qwen3, has what ours has not, or is damaged; OSError for a missing file.
    """
    safetensors = import_safetensors()
    try:
        with open(os.path.join(folder, "config.json")) as file:
            hf = json.load(file)
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        refused = {
            f"a model of type {hf.get('model_type')!r}, not qwen3": hf.get("model_type") != "qwen3",
            "an output projection of its own (tie_word_embeddings is not true)": not hf.get("tie_word_embeddings"),
            "biases (attention_bias)": hf.get("attention_bias"),
            "sliding windows (use_sliding_window)": hf.get("use_sliding_window"),
            f"the activation {hf.get('hidden_act')}, not silu": hf.get("hidden_act", "silu") != "silu",
            "scaled RoPE": rope.get("rope_type", rope.get("type", "default")) != "default",
        }
        for what, there in refused.items():
            if there:
                raise ValueError(f"cannot import {folder}, which has {what}")
        fields = {our: hf[theirs] for our, theirs in HF_SIZES.items()}
        fields["rope_base"] = float(rope.get("rope_theta") or hf.get("rope_theta", 10000.0))
        config = Config(**{**fields, **changes})

        files, index = {"model.safetensors"}, os.path.join(folder, "model.safetensors.index.json")
        if os.path.exists(index):
            with open(index) as file:
                files = set(json.load(file)["weight_map"].values())
        theirs = {}
        for file in files:
            theirs |= safetensors.torch.load_file(os.path.join(folder, file))
        head = theirs.pop("lm_head.weight", None)  # some files have the tied weight twice
        if head is not None and not torch.equal(head, theirs["model.embed_tokens.weight"]):
            raise ValueError(f"cannot import {folder}, whose output projection is not its embedding")
        weights = {our: torch.cat([theirs.pop(n) for n in names]).float() for our, names in hf_names(config).items()}
        if theirs:
            raise ValueError(f"cannot import {folder}: ours has no place for {min(theirs)}")
        with torch.device("meta"):
            model = Transformer(config)
        knocks = {place: knock.to_empty(device="cpu") for place, knock in knocks_of(model).items()}
        model.load_state_dict(weights, strict=False, assign=True)  # all but the knocks
    except (KeyError, RuntimeError, json.JSONDecodeError, safetensors.SafetensorError) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(f"{folder} is damaged or not a Qwen3 model ({reason})") from error
    for knock in knocks.values():
        init_weights(nn.ModuleDict({"knock": knock}), config)
    return model
