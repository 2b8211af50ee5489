"""The claims of README.md and BENCHMARKS.md that a machine can check."""

import re
from pathlib import Path

import pytest
import torch

from data.figures import count_params, memory_per_gpu
from kha import CONFIGS, Config, Transformer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "tests" / "BENCHMARKS.md").read_text()


@pytest.mark.parametrize("name,file", re.findall(r"`(\w+)` ([\w/]+\.py)", README))
def test_the_reading_guide_names_what_is_there(name, file):
    assert re.search(rf"^\s*(class |def )?{name}\b", (ROOT / file).read_text(), re.MULTILINE)


def test_the_differences_in_the_table_are_those_of_the_study():
    difference = r"[+−]\d\.\d+ ± \d\.\d+"
    results = (ROOT / "tests" / "results" / "README.md").read_text()
    sizes, tokens, kv_heads, types = (
        results.split(f"<!-- study {name} -->")[1].split("<!-- end -->")[0]
        for name in ("sizes", "tokens", "kv_heads", "types")
    )
    groups = {r"(\d+M of \d+M|\d+M, dense)": sizes, r"runs of (\w+) bytes": tokens,
              r"(\d+) of 12": kv_heads}  # fmt: skip
    for group, table in groups.items():
        row = rf"^\| (\w[^|]*) \| mlp on v(?:, no decay)? \| .* ({difference}) \|"
        rows = re.findall(row, table, re.M)
        assert sorted(re.findall(rf"{group}: ({difference})", README)) == sorted(rows)
    shown = re.findall(rf"((?:mlp|gate|linear) on [^:;|]+): ({difference})", README)
    shown.append(("mlp on v", re.search(rf"250M bytes: ({difference})", README)[1]))
    rows = re.findall(rf"^\| (\w+ on .+?) \| .* ({difference}) \| \d+ \|$", types, re.M)
    assert sorted(shown) == sorted(rows)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_memory_table_is_what_the_function_says(name):
    config, gib = Config(**CONFIGS[name]), []
    for how in ({}, {"n_shard": 8}, {"n_shard": 64}, {"recompute": True},
                {"n_shard": 64, "recompute": True}):  # fmt: skip
        gib.append(f"{memory_per_gpu(config, 1, **how)['total'] / 2**30:.1f}")
    pattern = rf"^\| `{re.escape(name)}` \| (\d+) \| (.*) \|$"
    (row,) = re.findall(pattern, BENCHMARKS, re.MULTILINE)
    assert row == (str(config.block_size), " | ".join(gib))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_of_configs_is_what_they_are(name):
    c = Config(**CONFIGS[name])
    with torch.device("meta"):
        counts = count_params(Transformer(c))
    sizes = [f"{n / 1e9:.3f}B" if n > 1e9 else f"{n / 1e6:.1f}M" for n in counts]
    heads = f"{c.n_head}/{c.n_kv_head} × {c.head_dim}"
    ffn = f"{c.top_k} of {c.n_expert}, {c.d_ff} wide" if c.n_expert else f"dense, {c.d_ff} wide"
    columns = [f"`{name}`", *sizes, str(c.n_layer), str(c.n_embd), heads, ffn]
    assert f"| {' | '.join(columns)} |\n" in README
