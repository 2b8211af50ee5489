"""Knocking heads (arXiv 2510.23052) for transformers: Qwen3 and Glm4Moe with knocks that have a
gate, folded. This file goes along with the weights; load them with trust_remote_code=True."""

import torch
import transformers
from torch import nn

try:  # transformers 5 has all experts of a layer in one weight, unlike the file
    from transformers import conversion_mapping as mapping

    experts = mapping.get_checkpoint_conversion_mapping("glm4_moe")
    mapping.register_checkpoint_conversion_mapping("kha_glm4_moe", experts, overwrite=True)
except ImportError:
    pass


class KnockedHeads(nn.Module):
    """A projection W and its knock on x W, 2 (x W W^up * sigmoid(x W W^gate)) W^down (eq. 9).

    W W^up is one weight, and so is W W^gate. W^down is here on queries and keys only: on values it
    is in W^O, and the kind "gate" has none. This is no nn.Linear, or vLLM would replace it by one.
    """

    def __init__(self, plain: nn.Linear, head_dim: int, has_down: bool):
        super().__init__()
        self.up = nn.Linear(plain.in_features, plain.out_features, bias=False)
        self.gate = nn.Linear(plain.in_features, plain.out_features, bias=False)
        self.down = nn.Parameter(torch.eye(head_dim)) if has_down else None

    def forward(self, x):
        heads = 2 * self.up(x) * torch.sigmoid(self.gate(x))  # (B, T, H * D)
        if self.down is None:
            return heads
        return (heads.unflatten(-1, (-1, len(self.down))) @ self.down).flatten(-2)


class Knocked:
    """A model with KnockedHeads where config.knocks says so: {"v_proj": "mlp"}."""

    def __init__(self, config):
        super().__init__(config)
        for layer in getattr(self, "model", self).layers:
            for name, kind in config.knocks.items():
                plain, has_down = getattr(layer.self_attn, name), kind == "mlp" and name != "v_proj"
                setattr(layer.self_attn, name, KnockedHeads(plain, config.head_dim, has_down))


class KHAQwen3Config(transformers.Qwen3Config):
    """Qwen3's, and the field `knocks`."""

    model_type = "kha_qwen3"


class KHAQwen3Model(Knocked, transformers.Qwen3Model):
    """Qwen3 with knocks, without its output projection."""

    config_class = KHAQwen3Config


class KHAQwen3ForCausalLM(Knocked, transformers.Qwen3ForCausalLM):
    """Qwen3 with knocks."""

    config_class = KHAQwen3Config


class KHAGlm4MoeConfig(transformers.Glm4MoeConfig):
    """Glm4Moe's, and the field `knocks`."""

    model_type = "kha_glm4_moe"


class KHAGlm4MoeModel(Knocked, transformers.Glm4MoeModel):
    """Glm4Moe with knocks, without its output projection."""

    config_class = KHAGlm4MoeConfig


class KHAGlm4MoeForCausalLM(Knocked, transformers.Glm4MoeForCausalLM):
    """Glm4Moe with knocks."""

    config_class = KHAGlm4MoeConfig


# `transformers serve` looks for a model's class in the package transformers. That may be loaded as
# two modules, which have one class in common: each finds there what it lacks itself.
for cls in (KHAQwen3ForCausalLM, KHAGlm4MoeForCausalLM):
    setattr(type(transformers), cls.__name__, cls)
