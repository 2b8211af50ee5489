"""The README's claims that a machine can check."""

import re
from pathlib import Path

import pytest

from kha import CONFIGS, Config, memory_per_gpu

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name,file,line", re.findall(r"`(\w+)` (\w+\.py):(\d+)", README))
def test_the_reading_guide_points_to_the_right_lines(name, file, line):
    assert re.match(rf"\s*(class |def )?{name}\b", (ROOT / file).read_text().split("\n")[int(line) - 1])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_memory_table_is_what_the_function_says(name):
    (row,) = re.findall(rf"^\| `{re.escape(name)}` \| (\d+) \| (.*) \|$", README, re.MULTILINE)
    needs = lambda **how: memory_per_gpu(Config(**CONFIGS[name]), 1, **how)["total"] / 2**30
    columns = [needs(), needs(n_shard=8), needs(n_shard=64), needs(recompute=True), needs(n_shard=64, recompute=True)]
    assert row == (str(CONFIGS[name].get("block_size", 1024)), " | ".join(f"{gib:.1f}" for gib in columns))
