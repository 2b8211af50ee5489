"""What runs of train.py leave, and what the studies of tests/study.py found, in tables.

A result is a line of JSON that study.py writes when a run ends. plot.py draws the pictures.
"""

import fcntl
import json
import math
import os
import re
import statistics
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.checkpoint import list_checkpoints, list_to_resume, read_checkpoint


class Run(NamedTuple):
    """A run of a study. Its baseline is the run of the same group and seed, and of the kind
    `baseline` of the study."""

    group: str  # such as a learning rate: Study.grouped_by says what it is
    kind: str  # of knocks, or the name of another project
    seed: int
    command: str  # the options of train.py, after the name of a peer if it is one's


class Study(NamedTuple):
    """Runs that are compared."""

    grouped_by: str  # what tells the groups of runs apart; "" if there is only one
    runs: list[Run]  # the most valuable first
    tokenizer: str = "byte"  # of the data on which they are trained
    baseline: str = "none"  # the kind of run that the others are compared with

    @property
    def unit(self) -> str:
        """What a loss is the mean over: byte or token."""
        return "byte" if self.tokenizer == "byte" else "token"


# ---- what a run leaves


def read_log(folder: Path) -> tuple[list[dict], list[dict]]:
    """The updates and the evaluations in a run's log.jsonl; none if there is no such file. Raises
    ValueError if it is damaged."""
    path = folder / "log.jsonl"
    try:
        texts = path.read_text().split("\n")[:-1] if path.exists() else []  # whole lines
        lines = [json.loads(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    updates = [line for line in lines if "loss" in line]
    return updates, [line for line in lines if "val_loss" in line]


def last_step(folder: Path) -> int:
    """The last step in a run's log.jsonl, which may be growing; 0 if there is none."""
    path = folder / "log.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - (1 << 16)))
        steps = re.findall(rb'"step": (\d+),.*\n', file.read())
    return int(steps[-1]) if steps else 0


def saved_step(folder: Path) -> int:
    """The step of a run's newest checkpoint; 0 if there is none."""
    names = [Path(path).stem for path in list_checkpoints(str(folder))]
    return int(names[0].removeprefix("step-")) if names else 0


def rounded(number: float | str, digits: int) -> float | None:
    """A number of a log, where text stands for what is not finite; in the results None does."""
    number = float(number)
    return round(number, digits) if math.isfinite(number) else None


def knock_figures(knocks: dict[str, list[float]]) -> dict[str, list]:
    """Of each knock matrix, by layer, the mean of the diagonal and the norm of the rest."""
    figures = {}
    for name, (diagonal, rest) in knocks.items():
        name = re.sub(r"blocks\.\d+\.(attn\.)?", "", name)
        figures.setdefault(name, []).append([rounded(diagonal, 4), rounded(rest, 4)])
    return figures


def knock_matrices(folder: Path | str) -> dict[str, np.ndarray]:
    """The knock matrices in a run's newest checkpoint, each (head_dim, head_dim), float16 in
    steps of 1/256: more than a picture shows, and small when compressed."""
    weights = read_checkpoint(list_to_resume(str(folder))[0])["model"]
    knocks = {name: p for name, p in weights.items() if "knock" in name}
    return {name: ((p * 256).round() / 256).half().numpy() for name, p in knocks.items()}


# ---- the results files


def read_results(folder: Path) -> list[dict]:
    """The results of all studies. Raises ValueError, naming the line, if one is damaged."""
    results, places = [], {}
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # not while another process writes
            texts = file.read().splitlines(keepends=True)
        for number, text in enumerate(texts, start=1):
            place = f"{path}, line {number}"
            try:
                result = json.loads(text)
                key = result["run"], result["data"]
                if not text.endswith(b"\n"):
                    raise ValueError("its end is missing")
            except (ValueError, LookupError, TypeError) as error:
                advice = "delete it, and its run will be done again"
                raise ValueError(f"{place} is damaged ({error}): {advice}") from error
            if key in places:
                raise ValueError(f"{place} is the same run as {places[key]}: delete one of them")
            places[key] = place
            results.append(result)
    return results


def append_result(path: Path, result: dict) -> None:
    """Add a line to a results file. It appears whole or, if the disk is full, not at all."""
    text = json.dumps(result, allow_nan=False).encode() + b"\n"
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.path.getsize(path)
        file.seek(max(0, size - 1))
        if file.read() not in (b"", b"\n"):  # a killed process left half a line
            text = b"\n" + text
        if file.write(text) < len(text):
            file.truncate(size)
            raise OSError(f"{path} cannot grow, the disk is full: it is as it was before")
        os.fsync(file.fileno())


# ---- statistics

# The 97.5% quantile of Student's t with 1, 2, ... degrees of freedom.
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the 95% interval around it: nan for a single value."""
    n = len(values)
    if n < 2:
        return statistics.fmean(values), math.nan
    t = T975[min(n - 2, len(T975) - 1)]  # of more values t is smaller, by at most 4%
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


class Findings:
    """The results of a study that are of the same data, by group, kind and seed."""

    def __init__(self, study: Study, results: list[dict]):
        by_run = {result["run"]: result for result in results}
        self.study = study
        self.groups = list(dict.fromkeys(run.group for run in study.runs))
        self.kinds = list(dict.fromkeys(run.kind for run in study.runs))
        self.results = {}  # (group, kind): {seed: result}
        for run in study.runs:
            if run.command in by_run:
                of_kind = self.results.setdefault((run.group, run.kind), {})
                of_kind[run.seed] = by_run[run.command]

    def pairs(self, group: str, kind: str) -> list[tuple[dict, dict]]:
        """The results of a kind with those of its baselines, where neither diverged.

        Raises ValueError if two differ in more than their knocks.
        """
        pairs, baselines = [], {}
        if kind != self.study.baseline:
            baselines = self.results.get((group, self.study.baseline), {})
        for seed, result in self.results.get((group, kind), {}).items():
            baseline = baselines.get(seed)
            if baseline is None or None in (result["val_loss"], baseline["val_loss"]):
                continue
            one, two = ({**r["settings"], "eval_tokens": r["eval_tokens"]}
                        for r in (result, baseline))
            for name in one.keys() & two.keys():
                if one[name] != two[name] and not name.startswith("knock"):
                    raise ValueError(
                        f"the runs {result['run']!r} and {baseline['run']!r} differ in {name}: they"
                        " are of two versions, so delete the older line and run the study again"
                    )
            pairs.append((result, baseline))
        return pairs

    def differences(self, group: str, kind: str) -> list[float]:
        """The held-out losses of a kind less those of its baselines."""
        return [one["val_loss"] - two["val_loss"] for one, two in self.pairs(group, kind)]

    def rows(self) -> list[tuple[str, str]]:
        """Each group and kind that has a difference, group by group."""
        every = [(group, kind) for group in self.groups for kind in self.kinds]
        return [row for row in every if self.differences(*row)]

    def course(self, group: str, kind: str) -> dict[int, list[float]]:
        """The differences at each evaluation that both runs had, with finite losses, by the tokens
        until then."""
        found = {}
        for one, two in self.pairs(group, kind):
            baselines = {step: loss for step, loss, _ in two["evals"]}
            for step, loss, _ in one["evals"]:
                baseline = baselines.get(step)
                if None not in (loss, baseline):
                    tokens = step * one["settings"]["batch_tokens"]
                    found.setdefault(tokens, []).append(loss - baseline)
        return found

    def sensitivity(self, kind: str) -> dict[int, float]:
        """For each seed, how much the loss depends on the learning rate. A group is a rate.

        LR sensitivity as Wortsman et al. 2023 define it (arXiv 2309.14322): the mean over the
        learning rates of min(loss, loss at initialisation), less the loss at the best of them.
        Only seeds with a run at every learning rate count.
        """
        by_rate = [self.results.get((group, kind), {}) for group in self.groups]
        found = {}
        for seed in sorted(set.intersection(*map(set, by_rate))):
            runs = [by_seed[seed] for by_seed in by_rate]
            losses = [min(run["first_loss"], run["val_loss"] or math.inf) for run in runs]
            found[seed] = statistics.fmean(losses) - min(losses)
        return found


def by_data(name: str, study: Study, results: list[dict]) -> list[Findings]:
    """The findings of a study on each data set where it has done a run itself; results of other
    studies alone are not enough. Those with most results come first."""
    commands = {run.command for run in study.runs}
    sets = {}
    for result in results:
        if result["run"] in commands:
            sets.setdefault(result["data"], []).append(result)
    own = [some for some in sets.values() if any(run["study"] == name for run in some)]
    return [Findings(study, some) for some in sorted(own, key=len, reverse=True)]


# ---- tables


def markdown(rows: list[list[str]]) -> str:
    """A table, its first row the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:], ""])


def difference_cells(differences: list[float]) -> list[str]:
    """The two last cells of a row: mean difference with its interval, and number of pairs."""
    if not differences:
        return ["", ""]
    mean, half = interval(differences)
    text = f"{mean:+.4f}".replace("-", "−")
    if len(differences) > 1:
        text += f" ± {half:.4f}"
    return [text, str(len(differences))]


def loss_table(findings: Findings) -> str:
    """A row for each group and kind: means and sums over seeds, and the difference to the
    baseline."""
    grouped_by = findings.study.grouped_by
    head = ["knocks", "held-out loss", "spikes", "skipped", "runs", "difference", "pairs"]
    rows = [[grouped_by, *head] if grouped_by else head]
    for group in findings.groups:
        for kind in findings.kinds:
            runs = findings.results.get((group, kind), {}).values()
            if not runs:
                continue
            ended = [run for run in runs if run["val_loss"] is not None]
            row = [group, kind] if grouped_by else [kind]
            losses = [run["val_loss"] for run in ended]
            row.append(f"{statistics.fmean(losses):.4f}" if losses else "diverged")
            row += [str(sum(run[key] for run in runs)) for key in ("spikes", "skipped")]
            n_diverged = len(runs) - len(ended)
            row.append(f"{len(runs)} ({n_diverged} diverged)" if n_diverged else str(len(runs)))
            rows.append(row + difference_cells(findings.differences(group, kind)))
    return markdown(rows)


def course_table(findings: Findings) -> str:
    """A row for each kind: the difference to the baseline at each evaluation."""
    courses = {kind: findings.course("", kind) for kind in findings.kinds}
    courses = {kind: course for kind, course in courses.items() if course}
    if not courses:
        return ""
    tokens = sorted(set().union(*courses.values()))
    rows = [["difference after", *(f"{n / 1e6:.0f}M" for n in tokens)]]
    for kind, course in courses.items():
        rows.append([kind, *(difference_cells(course.get(n, []))[0] for n in tokens)])
    return markdown(rows)


def sensitivity_table(findings: Findings) -> str:
    """A row for each kind; "" if no seed has a run at every learning rate."""
    rows = [["knocks", "learning-rate sensitivity", "seeds", "difference", "pairs"]]
    baselines = findings.sensitivity("none")
    for kind in findings.kinds:
        if found := findings.sensitivity(kind):
            seeds = found.keys() & baselines.keys() if kind != "none" else []
            cells = difference_cells([found[seed] - baselines[seed] for seed in seeds])
            mean = statistics.fmean(found.values())
            rows.append([kind, f"{mean:.4f}", str(len(found)), *cells])
    return markdown(rows) if len(rows) > 1 else ""


def seconds(run: dict, step: float | np.ndarray) -> float | np.ndarray:
    """The time of so many updates of a run, each of its median time."""
    return step * run["settings"]["batch_tokens"] / run["tokens_per_s"]


def passing_step(run: dict, target: float) -> float:
    """The update at which a run's held-out loss has come down to `target`, on a straight line from
    one evaluation to the next; inf if it never has."""
    step_before, loss_before = 0, math.inf
    for step, loss, _ in run["evals"]:
        if loss is not None and loss <= target:
            share = (loss_before - target) / (loss_before - loss) if loss_before < math.inf else 1
            return step_before + share * (step - step_before)
        step_before, loss_before = step, math.inf if loss is None else loss
    return math.inf


def best_runs(findings: Findings) -> dict[str, dict]:
    """Of each kind the run that ends at the lowest loss."""
    best = {}
    for (_, kind), by_seed in findings.results.items():
        for run in by_seed.values():
            if run["val_loss"] is not None:
                best[kind] = min(best.get(kind, run), run, key=lambda run: run["val_loss"])
    return best


def time_table(findings: Findings) -> str:
    """A row for each run of time_to_loss. The best of each kind says when it is where nanoGPT's
    best run ends."""
    rows = [["", "learning rate", "held-out loss", "ktokens/s", "training, s",
             "reaches nanoGPT's loss after", "sooner"]]
    best = best_runs(findings)
    theirs = best.get("nanoGPT")
    for kind, group in product(findings.kinds, findings.groups):
        for run in findings.results.get((group, kind), {}).values():
            name = kind if kind == "nanoGPT" else f"ours, {kind}"
            loss = "diverged" if run["val_loss"] is None else f"{run['val_loss']:.4f}"
            passing = ["", ""]
            if theirs and kind != "nanoGPT" and run is best.get(kind):
                step, passing = passing_step(run, theirs["val_loss"]), ["never", ""]
                if step < math.inf:
                    time, share = seconds(run, step), step / run["settings"]["steps"]
                    ratio = theirs["tokens"] / theirs["tokens_per_s"] / time
                    passing = [f"{time:.0f} s, {share:.0%} of the updates", f"{ratio:.2f} x"]
            speed = run["tokens_per_s"]
            speeds = [f"{speed / 1e3:.1f}", f"{run['tokens'] / speed:.0f}"]
            rows.append([name, group, loss, *speeds, *passing])
    return markdown(rows)


DIFFERENCES = (
    " Differences are to the run of the same seed {baseline}, ± their 95% interval (Student's t"
    " over the pairs)."
)
TIMES = (
    " Seconds are those of training alone: updates times the median time of one, by each project's"
    " log, without the start, compilation and evaluations. Between evaluations the loss is taken to"
    " be a straight line."
)


def version(run: dict) -> str:
    """The code of a run: its commit, or where there was no git a hash."""
    if run["commit"] is None:
        return f"source {run['source_sha256'][:7]}"
    changes = " with changes" if run["dirty"] else ""
    return f"commit {run['commit'][:7]}{changes}"


def caption(findings: Findings, explains: str) -> str:
    """What the numbers of a table are, and what its runs have in common."""
    runs = [run for by_seed in findings.results.values() for run in by_seed.values()]
    train, held_out = (f"{size / 1e6:.1f}M" for size in runs[0]["data_bytes"])
    tokens = sorted({run["tokens"] for run in runs if run["val_loss"] is not None})
    versions: dict[str, set[str]] = {}
    for run in runs:
        versions.setdefault(f"{run['gpu']}, torch {run['torch']}", set()).add(version(run))
    machines = [f"{on}, {', '.join(sorted(some))}" for on, some in sorted(versions.items())]
    unit = findings.study.unit
    length = f" {tokens[0] / 1e6:.0f}M {unit}s a run." if len(tokens) == 1 else ""
    return (
        f"Losses in nats per {unit}, over {runs[0]['eval_tokens'] / 1e6:.1f}M {unit}s."
        f"{explains}{length}"
        f" Data: {train} bytes to train on, {held_out} held out, sha256 {runs[0]['data'][:16]}."
        f" {'; '.join(machines)}.\n"
    )


def report(name: str, study: Study, results: list[dict]) -> str:
    """What --table prints, in Markdown."""
    parts = []
    for findings in by_data(name, study, results):
        if name == "time_to_loss":
            parts += [time_table(findings), caption(findings, TIMES)]
            continue
        parts.append(loss_table(findings))
        if name == "types":
            parts.append(course_table(findings))
        if name == "stability":
            parts.append(sensitivity_table(findings))
        baseline = "without knocks" if study.baseline == "none" else f"with '{study.baseline}'"
        parts.append(caption(findings, DIFFERENCES.format(baseline=baseline)))
    return "\n".join(part for part in parts if part) or "No run of its own has ended yet.\n"


def fill(text: str, studies: dict[str, Study], results: list[dict]) -> str:
    """A README's text with new tables between the marks <!-- study NAME --> and <!-- end -->."""

    def table(match: re.Match) -> str:
        name = match[2]
        return f"{match[1]}\n{report(name, studies[name], results)}{match[3]}"

    return re.sub(r"(<!-- study (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)
