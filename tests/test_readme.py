"""The claims of README.md, BENCHMARKS.md and results/README.md that a machine can check."""

import re
from functools import cache
from statistics import fmean

import pytest
import torch

from data.figures import count_params, memory_per_gpu
from kha import CONFIGS, Config, Transformer
from tests.peers import ROOT
from tests.report import by_data, difference_cells, interval, passing_step, read_results
from tests.study import RESULTS, STUDIES

README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "tests" / "BENCHMARKS.md").read_text()


@pytest.mark.parametrize("name,file", re.findall(r"`(\w+)` ([\w/]+\.py)", README))
def test_the_reading_guide_names_what_is_there(name, file):
    assert re.search(rf"^\s*(class |def )?{name}\b", (ROOT / file).read_text(), re.MULTILINE)


MLP = "mlp on v"
SMALL = "`small`, 4 value heads for 12 query heads, mlp on v, 250M bytes of Python source"


@cache
def findings(study):
    """Those of a study, on each of its data."""
    return by_data(study, STUDIES[study], read_results(RESULTS))


@pytest.mark.parametrize("row,study,data,group,kind", [
    ("`gpt2`, mlp on v, 82M tokens of Python source", "gpt2", 0, "82M", MLP),
    ("the same, as a control: a knock of its own for each head", "gpt2", 0, "82M",
     "mlp on v, one for each head"),
    ("`gpt2`, mlp on q, k and v (H100s against H200s)", "gpt2", 0, "82M", "mlp on q, k, v"),
    ("`gpt2`, mlp on v, 82M tokens of English books and manuals", "gpt2", 1, "82M", MLP),
    ("`moe-0.4b-2.3b` with 50,304 token ids, mlp on v, 33M tokens of Python source (not shown)",
     "mixture", 0, "", MLP),
    (SMALL, "types", 0, "", MLP),
    ("the same with 12 value heads", "kv_heads", 0, "12", MLP),
    ("the same with 1 value head", "kv_heads", 0, "1", MLP),
])
def test_a_row_of_results_is_what_its_study_says(row, study, data, group, kind):
    found = findings(study)[data]
    difference, n = difference_cells(found.differences(group, kind))
    assert f"| {row} | {difference} nats a {found.study.unit} | {n} | " in README


def test_the_headline_is_what_the_results_say():
    prose = " ".join(README.split())
    details = " ".join((RESULTS / "README.md").read_text().split())

    def shown(differences, sign=-1):
        mean, half = interval(differences)
        return f"{sign * mean:.4f} ± {half:.4f}"

    sizes = findings("sizes")[0]
    pairs = [sizes.differences(group, MLP) for group in sizes.groups]
    complete = [differences for differences in pairs if len(differences) == 3]
    assert len(complete) == 6 and max(map(max, complete)) < 0
    by_seed = [sum(seed) / len(seed) for seed in zip(*complete, strict=True)]
    assert f"experts, end {shown(by_seed)} nats a byte lower" in prose
    texts = findings("gpt2")
    every = {  # a pair can be in several studies
        (one["run"], none["run"], one["data"]): one["val_loss"] < none["val_loss"]
        for study in STUDIES if STUDIES[study].baseline == "none"
        for found in findings(study) for group in found.groups
        for one, none in found.pairs(group, MLP)
    }
    gains = f"Of all {len(every)} pairs of runs {sum(every.values())} end lower with it"
    assert gains in prose and gains in details
    pairs, lower = texts[0].pairs("164M", MLP), shown(texts[0].differences("164M", MLP))
    ours, none = (fmean(run["val_loss"] for run in runs) for runs in zip(*pairs, strict=True))
    shares = [passing_step(a, b["val_loss"]) / a["settings"]["steps"] for a, b in pairs]
    first, last = (round(100 * share) for share in (min(shares), max(shares)))
    assert len(pairs) == 3 and (
        f"`gpt2` ends {lower} nats a token lower after 164M tokens of Python source: at {ours:.3f},"
        f" not {none:.3f}. It passes {none:.3f} after {first} to {last}% of its updates"
    ) in prose
    one, own = (texts[0].results["82M", f"mlp on v{more}"]
                for more in ("", ", one for each head"))
    apart = [one[seed]["val_loss"] - own[seed]["val_loss"] for seed in own]
    assert f"it ends {shown(apart)} higher than with one knock for all heads" in details
    long = findings("tokens")[0].differences("1B", MLP)
    assert f"`small` {shown(long)} after 1B" in prose
    types = findings("types")[0].results
    start, identity = types["", "mlp on v, random start, decay"], types["", "mlp on v, decay"]
    worse = [start[seed]["val_loss"] - identity[seed]["val_loss"] for seed in start]
    assert f"ends {shown(worse, 1)} above the start at the identity" in details


@pytest.mark.parametrize("name", CONFIGS)
def test_the_memory_table_is_what_the_function_says(name):
    config, gib = Config(**CONFIGS[name]), []
    for how in ({}, {"n_shard": 8}, {"n_shard": 64}, {"recompute": True},
                {"n_shard": 64, "recompute": True}):
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
