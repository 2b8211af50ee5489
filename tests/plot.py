"""Pictures of what tests/study.py found, and of runs of your own. This needs matplotlib."""

import math
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from kha import INITS
from tests.report import (
    Findings,
    best_runs,
    difference_cells,
    interval,
    passing_step,
    seconds,
)

COLORS = {
    "none": "#444444",
    "linear on v, decay": "#0072b2",
    "mlp on v, decay": "#d55e00",
    "gate on v, decay": "#cc79a7",
    "linear on q, k, v, decay": "#56b4e9",
    "mlp on q, k, v, decay": "#e69f00",
    "mlp on v, random start, decay": "#009e73",
    "mlp on v": "#882255",
    "nanoGPT": "#0072b2",
    "linear on v": "#0072b2",
    "gate on v": "#cc79a7",
    "mlp on q, k, v": "#e69f00",
    "mlp on v, decay to the start": "#0072b2",
    "mlp on v, slow, decay": "#009e73",
    "mlp on v, one for each head, decay": "#009e73",
    "mlp on v, one for each head": "#009e73",
}
LOSS = "held-out loss, nats per byte"
DIFFERENCE = "difference to no knocks, nats per byte"
RANGE = 0.01  # nats per byte; the paper's gain of 0.02 nats a token is about 0.005 a byte
plt.switch_backend("Agg")  # files, no windows
plt.rcParams.update({
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=list(dict.fromkeys(COLORS.values()))),
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "svg.hashsalt": "kha",  # the same picture is the same file
})


def save(figure: plt.Figure, path: Path) -> Path:
    """Write a figure, without its date."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return path


def draw_study(name: str, findings: Findings, folder: Path) -> list[Path]:
    """All pictures of a study, in a folder of results. Without a pair there are none. That of
    `gpt2` shows its first group with a pair, which has the most kinds of knock."""
    rows = findings.rows()
    if not rows:
        return []
    if name == "stability":
        return [draw_rates(findings, folder / "stability.svg")]
    if name == "tokens":
        return [draw_lengths(findings, folder / "tokens.svg")]
    if name == "time_to_loss":
        return [draw_times(findings, folder / "time_to_loss.svg")]
    if name == "gpt2":
        return [draw_losses(findings, rows[0][0], folder / "gpt2.svg")]
    paths = []
    if len(rows) > 1:  # the table says as much as a picture of one row
        paths.append(draw_differences(findings, folder / f"{name}.svg"))
    if name == "types":
        paths.append(draw_losses(findings, "", folder / "loss.svg"))
        matrices = {}
        for path in sorted(folder.glob("figure3-*.npz")):
            with np.load(path) as file:
                matrices.update(file)
        if matrices:
            paths.append(draw_matrices(matrices, folder / "figure3.png"))
    return paths


def without_decay(kind: str) -> bool:
    """Whether a kind has no knocks that decay. Pictures of a run's course leave out the others."""
    return not kind.endswith(", decay")


def draw_losses(findings: Findings, group: str, path: Path) -> Path:
    """Two pictures of a group against tokens. Above, the held-out loss: the mean of the seeds that
    all kinds have, and their range as a band. Below, the difference to no knocks: the mean of the
    pairs, and its 95% interval as a band."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6.5), sharex=True)

    def draw(axes: plt.Axes, kind: str, tokens: np.ndarray, middle: np.ndarray, low: np.ndarray,
             high: np.ndarray, label: str) -> None:
        axes.plot(tokens, middle, "o-", color=COLORS[kind], markersize=4, label=f"{kind}, {label}")
        axes.fill_between(tokens, low, high, color=COLORS[kind], alpha=0.15, linewidth=0)

    found = {
        kind: runs
        for (name, kind), runs in findings.results.items()
        if name == group and without_decay(kind)
    }
    shared = set.intersection(*(set(runs) for runs in found.values()))
    for kind, runs in found.items():
        runs = [runs[seed] for seed in shared if runs[seed]["val_loss"] is not None]
        if runs:
            steps = np.array([step for step, _, _ in runs[0]["evals"]])
            tokens = steps * runs[0]["settings"]["batch_tokens"] / 1e6
            losses = np.array([[loss for _, loss, _ in run["evals"]] for run in runs], dtype=float)
            low, high = losses.min(0), losses.max(0)
            draw(top, kind, tokens, losses.mean(0), low, high, f"{len(runs)} seeds")
        course = findings.course(group, kind)
        if course:
            n_pair = len(findings.pairs(group, kind))
            tokens = np.array(list(course)) / 1e6
            mean, half = np.array([interval(differences) for differences in course.values()]).T
            draw(bottom, kind, tokens, mean, mean - half, mean + half, f"{n_pair} pairs")
    bottom.axhline(0, color=COLORS["none"], linewidth=1)
    unit = findings.study.unit
    top.set(ylabel=LOSS.replace("byte", unit))
    bottom.set(xlabel=f"millions of {unit}s trained on", ylabel=DIFFERENCE.replace("byte", unit))
    for axes in (top, bottom):
        if axes.get_legend_handles_labels()[0]:  # else no seed is shared, or there is no pair
            axes.legend()
    return save(figure, path)


def draw_interval(
    axes: plt.Axes, at: float, differences: list[float], color: str, upright: bool
) -> None:
    """Differences at one place of an axis: dots, and their mean with its 95% interval as a bar. An
    arrow says that the bar goes on beyond the range."""

    def place(value: float) -> tuple[float, float]:
        return (at, value) if upright else (value, at)

    axes.plot(*zip(*map(place, differences), strict=True), ".", color=color, alpha=0.4)
    mean, half = interval(differences)
    bar = {"yerr" if upright else "xerr": half}
    axes.errorbar(*place(mean), **bar, fmt="s", color=color, capsize=4)
    for sign, arrow in zip((-1, 1), "v^" if upright else "<>", strict=True):
        if sign * mean + np.nan_to_num(half) > RANGE:
            axes.plot(*place(sign * RANGE), arrow, color=color, clip_on=False)


def draw_differences(findings: Findings, path: Path) -> Path:
    """The difference to the baseline, a row for each group and kind: pairs as dots, their mean and
    its 95% interval as a bar. All such pictures have the same range."""
    figure, axes = plt.subplots()
    rows = findings.rows()
    for y, (group, kind) in enumerate(rows):
        differences = findings.differences(group, kind)
        draw_interval(axes, y, differences, COLORS[kind], upright=False)
        text, n = difference_cells(differences)
        axes.text(1.03, y, f"{text} ({n})", transform=axes.get_yaxis_transform(), va="center")
    axes.axvline(0, color=COLORS["none"], linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{group}, {kind}".strip(", ") for group, kind in rows])
    label = DIFFERENCE.replace("no knocks", findings.study.baseline.replace("none", "no knocks"))
    axes.set_xticks(np.linspace(-RANGE, RANGE, 5))
    axes.set(xlim=(-RANGE, RANGE), ylim=(len(rows) - 0.5, -0.5),
             xlabel=label, ylabel=findings.study.grouped_by)
    axes.text(1.03, -0.8, "mean ± 95% (pairs)", transform=axes.get_yaxis_transform())
    figure.set_size_inches(9, 1.2 + 0.4 * len(rows))
    return save(figure, path)


def draw_lengths(findings: Findings, path: Path) -> Path:
    """The difference that the MLP knock on v makes, with and without weight decay, against the
    bytes of a whole run: pairs as dots, their means and 95% intervals as bars."""
    figure, axes = plt.subplots(figsize=(7, 4))
    ticks = set()
    for kind, shift in (("mlp on v", 0.97), ("mlp on v, decay", 1.03)):  # side by side
        for group in findings.groups:
            differences = findings.differences(group, kind)
            if differences:
                millions = findings.pairs(group, kind)[0][0]["tokens"] / 1e6
                ticks.add(millions)
                draw_interval(axes, shift * millions, differences, COLORS[kind], upright=True)
        axes.plot([], [], "s", color=COLORS[kind], label=kind)
    axes.axhline(0, color=COLORS["none"], linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [f"{x:.0f}" for x in sorted(ticks)], minor=False)
    axes.set(xlabel="millions of bytes trained on", ylabel=DIFFERENCE, ylim=(-RANGE, RANGE))
    axes.minorticks_off()
    axes.legend()
    return save(figure, path)


def draw_rates(findings: Findings, path: Path) -> Path:
    """The held-out loss against the learning rate, and below it the difference to no knocks: seeds
    or pairs as dots, their means as a line. Runs that diverged are crosses at the top."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6.5), sharex=True)

    def draw(axes: plt.Axes, kind: str, values: dict[float, list[float]]) -> None:
        for rate, some in values.items():
            axes.plot([rate] * len(some), some, ".", color=COLORS[kind], alpha=0.4)
        points = [(rate, np.mean(some)) for rate, some in values.items() if some]
        if points:
            axes.plot(*np.array(points).T, "s-", color=COLORS[kind], markersize=5, label=kind)

    for kind in findings.kinds:
        losses, differences = {}, {}
        for group in findings.groups:
            runs = findings.results.get((group, kind), {}).values()
            rate, ended = float(group), [run for run in runs if run["val_loss"] is not None]
            losses[rate] = [run["val_loss"] for run in ended]
            differences[rate] = findings.differences(group, kind)
            if len(ended) < len(runs):
                height = top.get_xaxis_transform()  # y is a share of the picture's height
                top.plot(rate, 0.98, "x", color=COLORS[kind], transform=height)
        draw(top, kind, losses)
        draw(bottom, kind, differences)
    bottom.axhline(0, color=COLORS["none"], linewidth=1)
    bottom.set_xscale("log")
    bottom.minorticks_off()
    bottom.set_xticks([float(group) for group in findings.groups], findings.groups)
    bottom.set(xlabel="peak learning rate", ylabel=DIFFERENCE)
    top.set(ylabel=LOSS)
    top.legend()
    return save(figure, path)


def draw_times(findings: Findings, path: Path) -> Path:
    """The best run of each kind against the seconds of training: the training loss as a faint line,
    the held-out loss as dots, and a square where ours comes to the loss at which nanoGPT ends."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    best = {kind: run for kind, run in best_runs(findings).items() if without_decay(kind)}
    target = best["nanoGPT"]["val_loss"] if "nanoGPT" in best else -math.inf
    later = []  # losses after the first tenth of a run, which falls from far above
    for kind, run in best.items():
        color, name = COLORS[kind], kind if kind == "nanoGPT" else f"ours, {kind}"
        curve = np.array(run["curve"], dtype=float)
        later += [loss for loss in curve[len(curve) // 10 :] if np.isfinite(loss)]
        times = seconds(run, run["curve_bin"] * np.arange(1, len(curve) + 1))
        axes.plot(times, curve, color=color, alpha=0.3, linewidth=1)
        steps, losses, _ = np.array(run["evals"], dtype=float).T
        axes.plot(seconds(run, steps), losses, "o-", color=color, markersize=4, label=name)
        time = seconds(run, passing_step(run, target))
        if kind != "nanoGPT" and time < math.inf:
            axes.plot(time, target, "s", color=color, markersize=7)
    if target > 0:
        axes.axhline(target, color=COLORS["nanoGPT"], linewidth=1, linestyle="--")
    axes.set_ylim(top=max(later, default=None))
    label = "loss, nats per token (line: training, dots: held out)"
    axes.set(xlabel="seconds of training", ylabel=label)
    axes.legend()
    return save(figure, path)


def draw_matrices(matrices: dict[str, np.ndarray], path: Path) -> Path:
    """Knock matrices by the names of their parameters: a row for each of T, W^up, W^gate, W^down,
    a column for each layer. The ranges of colours are those of figure 3 of the paper."""
    rows = {}
    for name, matrix in matrices.items():
        layer, kind = re.fullmatch(r"blocks\.(\d+)\.(.*)", name).groups()
        rows.setdefault(kind, []).append((int(layer), matrix.astype(np.float32)))

    def order(row: tuple) -> tuple:
        return list(INITS).index(row[0].split(".")[-1]), row[0]

    n_layer = max(len(layers) for layers in rows.values())
    size = (1.5 + n_layer, 0.5 + len(rows))
    figure, grid = plt.subplots(len(rows), n_layer, figsize=size, dpi=220, squeeze=False)
    for axes, (kind, layers) in zip(grid, sorted(rows.items(), key=order), strict=True):
        limits, colors = ((-0.1, 0.1), "RdBu") if kind.endswith("gate") else ((0, 1), "viridis")
        colors = plt.get_cmap(colors, 21)  # more colours would make a large file
        for column, (layer, matrix) in zip(axes, sorted(layers), strict=True):
            image = column.imshow(matrix, colors, interpolation="nearest")
            image.set_clim(limits)
            column.set(xticks=[], yticks=[])
            column.spines[:].set_visible(False)
            if axes[0] is grid[0, 0]:
                column.set_title(f"layer {layer + 1}", fontsize=8)
        axes[0].set_ylabel(symbol(kind))
        figure.colorbar(image, ax=list(axes), aspect=10)
    return save(figure, path)


def symbol(kind: str) -> str:
    """The paper's symbol for a knock matrix, from its parameter's name without the layer."""
    *where, matrix = kind.removeprefix("attn.").split(".")
    place = re.search("[qkv]", "".join(where).replace("knock", ""))
    place = place[0].upper() if place else ""
    return f"$T^{{{place}}}$" if matrix == "t" else f"$W^{{{matrix}}}$ ({place})"


def draw_logs(logs: dict[str, tuple[list[dict], list[dict]]], path: Path) -> Path:
    """Losses of runs against their updates: the training loss as a faint line of 200 means, the
    held-out loss as dots. `logs` are updates and evaluations by the names of the runs."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    later = []  # means after the first tenth of a run, which falls from far above
    for number, (name, (updates, evals)) in enumerate(logs.items()):
        color = f"C{number}"
        losses = np.array([float(update["loss"]) for update in updates])
        bins = np.array_split(losses, min(200, len(losses)))
        ends = np.cumsum([len(some) for some in bins])
        steps = [updates[end - 1]["step"] for end in ends]
        means = [some.mean() for some in bins]
        held_out = [float(line["val_loss"]) for line in evals]
        axes.plot(steps, means, color=color, alpha=0.5, linewidth=1)
        axes.plot([line["step"] for line in evals], held_out, "o-", color=color, label=name)
        later += [mean for mean in means[len(means) // 10 :] if np.isfinite(mean)]
    axes.set_ylim(top=max(later, default=None))
    axes.set(xlabel="update", ylabel="loss, nats per token (line: training, dots: held out)")
    axes.legend().set_in_layout(False)  # a long name must not make the axes small
    return save(figure, path)
