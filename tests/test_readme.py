"""The README's claims that a machine can check."""

import re
from pathlib import Path

import pytest
import torch

from data.figures import count_params, memory_per_gpu
from kha import CONFIGS, Config, Transformer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name,file", re.findall(r"`(\w+)` ([\w/]+\.py)", README))
def test_the_reading_guide_names_what_is_there(name, file):
    assert re.search(rf"^\s*(class |def )?{name}\b", (ROOT / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_memory_table_is_what_the_function_says(name):
    (row,) = re.findall(rf"^\| `{re.escape(name)}` \| (\d+) \| (.*) \|$", README, re.MULTILINE)
    needs = lambda **how: memory_per_gpu(Config(**CONFIGS[name]), 1, **how)["total"] / 2**30
    columns = [needs(), needs(n_shard=8), needs(n_shard=64), needs(recompute=True), needs(n_shard=64, recompute=True)]
    assert row == (str(CONFIGS[name].get("block_size", 1024)), " | ".join(f"{gib:.1f}" for gib in columns))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_of_configs_is_what_they_are(name):
    c = Config(**CONFIGS[name])
    with torch.device("meta"):
        sizes = [f"{n / 1e9:.3f}B" if n > 1e9 else f"{n / 1e6:.1f}M" for n in count_params(Transformer(c))]
    ffn = f"{c.top_k} of {c.n_expert}, {c.d_ff} wide" if c.n_expert else f"dense, {c.d_ff} wide"
    columns = [f"`{name}`", *sizes, str(c.n_layer), str(c.n_embd), f"{c.n_head}/{c.n_kv_head} × {c.head_dim}", ffn]
    assert f"| {' | '.join(columns)} |\n" in README
