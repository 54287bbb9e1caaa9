"""How many probes a signal needs, and from where, on a finished demo run.

`python -m benchmarks.signals.probes RUN [--out docs]` writes OUT/figures/signals-probes.png and .json and prints the
Markdown tables. Every checkpoint is run once over 256 fresh probes of each of the four tasks, over a mixture of all
tasks, and over the package's general texts, and all token positions are kept; every figure below is a subset of these.

The reference is a signal of an ordered pair on all 256 probes of a task t that one of the two was tuned for. It is
compared with the same signal from fewer or other probes, by Spearman's rank correlation over pairs:

    own           n probes of t, all their positions; a part of the reference, so it flatters itself for large n
    own, 64       the same probes, but only 64 positions kept of them, as signatures do by default
    twice own     two disjoint sets of n own probes with each other: no part in common
    mixture       n / 4 probes of each of the four tasks, none of them in the reference
    general       n of the 48 general texts, cut to the demo's context
    wrong         n probes of a task d that neither was tuned for

A cell is (t, d): the ordered pairs of which one was tuned for t and neither for d. All kinds are compared on the same
cells; a figure is the mean over the 12 cells and over the drawn subsets. Its 95 % interval comes from resamples of the
checkpoints (a pair weighs the product of how often its two were drawn), each with another one of the drawn subsets.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.signals.command import figure_command
from simmerge_ray.base.markdown import table_lines, with_interval

SIZES = (4, 8, 16, 32, 64, 128, 256)
POSITIONS = (16, 64, 256)
DEFAULT_POSITIONS = 64
SUBSETS = 20  # drawn per size, in disjoint pairs where the set has two of them
RESAMPLES = 1000
ALL = 1 << 30  # more positions than there are
MIXTURE = "mixture"
MAIN = {
    "kl_lr_mean": "KL on the prompt (mean)",
    "kl_greedy_lr_mean": "KL on 8 greedy tokens (mean)",
    "activation_cosine_mean": "activation cosine (mean)",
    "attention_cosine_mean": "attention cosine (mean)",
    "entropy": "entropy",
    "loss": "loss",
}
OTHERS = (
    *map("_".join, product(("kl_lr", "kl_greedy_lr"), ("median", "q10", "q90"))),
    *map("_".join, product(("activation_cosine", "attention_cosine"), ("sd", "min", "early", "middle", "late"))),
)
COLUMNS = (*MAIN, *OTHERS)
PANELS = ("kl_lr_mean", "activation_cosine_mean", "attention_cosine_mean", "kl_greedy_lr_mean", "entropy", "loss")
KINDS = {
    "own": "own task",
    "own64": "own task, 64 positions kept",
    "mixture": "mixture of the four tasks",
    "general": "general texts of the package",
    "wrong": "wrong task",
}


def resampled(num: int, num_resamples: int, seed: int) -> np.ndarray:
    """How often each of `num` checkpoints was drawn, (num, 1 + num_resamples); once each in the first column."""
    drawn = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=num_resamples).T
    return np.concatenate([np.ones((num, 1)), drawn], axis=1)


def weighted_spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation when row p occurs weights[p, b] times; ties share their mean rank.

    Args:
        x, y: (..., P). weights: (P, B).

    Returns:
        (..., B), NaN where either is constant.
    """
    total = weights.sum(0)
    ranks = []
    for values in (x, y):
        above = values[..., :, None] - values[..., None, :]
        rank = ((above > 0) + 0.5 * (above == 0)) @ weights
        ranks.append(rank - (rank * weights).sum(-2, keepdims=True) / np.maximum(total, 1))
    both = (ranks[0] * ranks[1] * weights).sum(-2)
    spread = np.sqrt(((ranks[0] ** 2) * weights).sum(-2) * ((ranks[1] ** 2) * weights).sum(-2))
    return np.divide(both, spread, out=np.full_like(both, np.nan), where=spread > 1e-9)


def subsets(groups: Sequence[np.ndarray], size: int, count: int, generator: np.random.Generator) -> list[np.ndarray]:
    """`count` sorted subsets of `size` probes with the same share of every group; 2k and 2k + 1 are disjoint if that
    is possible. One subset where the groups have no more probes."""
    each = size // len(groups)
    smallest = min(map(len, groups))
    if each == smallest:
        return [np.sort(np.concatenate(groups))]
    found: list[np.ndarray] = []
    while len(found) < count:
        orders = [generator.permutation(group) for group in groups]
        for start in (0, each) if 2 * each <= smallest else (0,):
            found.append(np.sort(np.concatenate([order[start : start + each] for order in orders])))
    return found[:count]


def sampled_positions(
    outputs: Sequence[Any], probes: np.ndarray, num_positions: int, generator: np.random.Generator
) -> list[Any]:
    """Outputs at `num_positions` prompt positions of these probes and a quarter as many greedy ones; attention rows at
    a fifth of all, the shares of `SignatureSpec`. All outputs must have been kept at all positions."""
    first = outputs[0]
    assert len(first.probe) == len(first.attention_probe)
    inside = np.isin(first.probe, probes)
    parts = []
    for pool, count in (
        (np.flatnonzero(inside & ~first.greedy), num_positions),
        (np.flatnonzero(inside & first.greedy), -(-num_positions // 4)),
    ):
        parts.append(generator.permutation(pool)[:count])
    taken = np.sort(np.concatenate(parts))
    shown = np.sort(generator.permutation(taken)[: num_positions // 4])
    return [outputs_at(one, taken, shown) for one in outputs]


def outputs_at(outputs: Any, taken: np.ndarray, shown: np.ndarray) -> Any:
    """Outputs at some of their positions, with attention rows at some of those that have them."""
    return replace(
        outputs,
        logits=outputs.logits[taken],
        hidden=outputs.hidden[:, taken],
        attention=outputs.attention[:, :, shown],
        greedy=outputs.greedy[taken],
        next_token=outputs.next_token[taken],
        probe=outputs.probe[taken],
        attention_probe=outputs.attention_probe[shown],
    )


def signal_values(outputs: Sequence[Any], probes: np.ndarray) -> np.ndarray:
    """(C, M, M) of COLUMNS from these probes; entropy and loss are those of the left checkpoint."""
    from simmerge_ray.signals.pairs import output_matrices

    taken, shown = np.isin(outputs[0].probe, probes), np.isin(outputs[0].attention_probe, probes)
    matrices = output_matrices([outputs_at(one, taken, shown) for one in outputs], with_base=True)
    return np.stack([matrices[column] for column in COLUMNS])


def probe_sets(tasks: Sequence[str], tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """256 probes of each task, as many of the mixture, the general texts; and what had to be done to the latter."""
    from simmerge_ray.checkpoints.probes import GENERAL, Probe, ProbeSet, general_probe_set
    from simmerge_ray.research.zoo.domains import probe_texts
    from simmerge_ray.research.zoo.model import MAX_POSITIONS
    from simmerge_ray.signals.signature import NUM_GREEDY_TOKENS

    largest, share = max(SIZES), max(SIZES) // len(tasks)
    texts = {task: probe_texts(task, largest + share) for task in tasks}
    mixture = [text for task in tasks for text in texts[task][largest:]]
    room = MAX_POSITIONS - NUM_GREEDY_TOKENS - 1  # a token per character, and the one in front
    whole = [probe.text for probe in general_probe_set().probes]
    general = [text[:room] for text in whole]
    sets = {task: texts[task][:largest] for task in tasks} | {MIXTURE: mixture, GENERAL: general}
    ids = [tokenizer(text)["input_ids"] for text in general]
    unknown = [sum(token == tokenizer.unk_token_id for token in row) for row in ids]
    about = {
        "num_texts": len(general),
        "num_cut": sum(len(text) > room for text in whole),
        "cut_to_characters": room,
        "num_with_unknown": sum(count > 0 for count in unknown),
        "unknown_share": sum(unknown) / sum(map(len, ids)),
    }
    return {name: ProbeSet(name, tuple(map(Probe, found))) for name, found in sets.items()}, about


def run_checkpoints(root: Path) -> tuple[tuple[str, ...], list[str | None], dict[str, list[Any]], dict[str, Any]]:
    """Tasks, own task of each checkpoint, outputs of all checkpoints by probe set, and a description."""
    from transformers import AutoTokenizer

    from simmerge_ray.base.runs import RunLayout
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.signals.compute import Signatures, local_executor
    from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
    from simmerge_ray.signals.tokens import tokenize_probes

    catalogue = load_catalogue(RunLayout(root).catalogue)
    own = [catalogue.own_task[name] for name in catalogue.ids]
    tasks = tuple(dict.fromkeys(task for task in own if task))
    tokenizer = AutoTokenizer.from_pretrained(catalogue.checkpoints[0].path, local_files_only=True)
    sets, about_general = probe_sets(tasks, tokenizer)
    spec = SignatureSpec(num_positions=ALL, num_attention_positions=ALL)
    with tempfile.TemporaryDirectory(prefix="simmerge-probes-") as directory:
        store = SignatureStore(directory)
        signatures = Signatures(catalogue, catalogue.digests(), spec, store, local_executor(catalogue))
        tokens = signatures.tokens(tokenize_probes(catalogue, sets, spec))
        signatures.complete(tokens)
        outputs = {
            name: [signatures.outputs(checkpoint, one) for checkpoint in catalogue.ids] for name, one in tokens.items()
        }
    kept = {name: [int((~found[0].greedy).sum()), int(found[0].greedy.sum())] for name, found in outputs.items()}
    about = {"checkpoints": list(catalogue.ids), "own_task": own, "general": about_general, "positions": kept}
    return tasks, own, outputs, about


def all_values(
    tasks: Sequence[str], outputs: Mapping[str, Sequence[Any]], seed: int
) -> tuple[dict[tuple[str, str, int], np.ndarray], dict[tuple[str, int], np.ndarray]]:
    """Values of every subset, (R, C, M, M): by (all or default positions, probe set, number of probes), and by
    (task, number of positions) for samples of the positions of all probes."""
    by_probes, by_positions = {}, {}
    for name, found in outputs.items():
        generator = np.random.default_rng([seed, *name.encode()])
        indices = np.unique(found[0].probe)
        groups = np.split(indices, len(tasks)) if name == MIXTURE else [indices]
        for size in (*(size for size in SIZES if size < len(indices)), len(indices)):
            drawn = subsets(groups, size, SUBSETS, generator)
            by_probes["all", name, size] = np.stack([signal_values(found, probes) for probes in drawn])
            if name in tasks:
                drawn = drawn * (SUBSETS // len(drawn))
                parts = [(p, sampled_positions(found, p, DEFAULT_POSITIONS, generator)) for p in drawn]
                by_probes["default", name, size] = np.stack([signal_values(part, p) for p, part in parts])
        for count in POSITIONS if name in tasks else ():
            parts = [sampled_positions(found, indices, count, generator) for _ in range(SUBSETS)]
            by_positions[name, count] = np.stack([signal_values(part, indices) for part in parts])
        print(f"{name}: {len(indices)} probes", flush=True)
    return by_probes, by_positions


class Agreement:
    """Rank correlations of subsets with the reference, over the cells and the resamples of checkpoints."""

    def __init__(self, tasks: Sequence[str], own: Sequence[str | None], reference: Mapping[str, np.ndarray], seed: int):
        self._reference = reference
        drawn = resampled(len(own), RESAMPLES, seed)
        self.cells: dict[tuple[str, str], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for t, d in product(tasks, tasks):
            found = [(i, j) for (i, a), (j, b) in permutations(enumerate(own), 2) if t in (a, b) and d not in (a, b)]
            if found:
                left, right = np.array(found).T
                self.cells[t, d] = (left, right, drawn[left] * drawn[right])

    def with_reference(self, values: Mapping[tuple[str, str], np.ndarray]) -> dict[str, list[float]]:
        """values: by cell (R, C, M, M); per column [mean, low, high]."""
        return self._summary(
            {cell: [(self._reference[cell[0]], subset) for subset in found] for cell, found in values.items()}
        )

    def of_halves(self, values: Mapping[tuple[str, str], np.ndarray]) -> dict[str, list[float]]:
        """The same of subsets 2k with 2k + 1."""
        return self._summary({cell: list(zip(found[::2], found[1::2], strict=True)) for cell, found in values.items()})

    def _summary(
        self, sides: Mapping[tuple[str, str], Sequence[tuple[np.ndarray, np.ndarray]]]
    ) -> dict[str, list[float]]:
        points, resamples = [], []
        for cell, found in sides.items():
            left, right, weights = self.cells[cell]
            result = np.full((len(COLUMNS), RESAMPLES), np.nan)
            mine = []
            for index, (one, other) in enumerate(found):
                rows = np.arange(index, RESAMPLES, len(found))
                taken = weights[:, [0, *(1 + rows)]]
                rho = weighted_spearman(one[:, left, right], other[:, left, right], taken)
                mine.append(rho[:, 0])
                result[:, rows] = rho[:, 1:]
            points.append(np.mean(mine, axis=0))
            resamples.append(result)
        means = np.mean(points, axis=0)
        low, high = np.nanquantile(np.nanmean(resamples, axis=0), [0.025, 0.975], axis=1)
        rows = zip(COLUMNS, means, low, high, strict=True)
        return {column: [round(float(value), 4) for value in figures] for column, *figures in rows}


def measure(root: Path, seed: int) -> dict[str, Any]:
    from simmerge_ray.checkpoints.probes import GENERAL

    tasks, own, outputs, about = run_checkpoints(root)
    by_probes, by_positions = all_values(tasks, outputs, seed)
    largest = max(SIZES)
    agreement = Agreement(tasks, own, {t: by_probes["all", t, largest][0] for t in tasks}, seed)
    cells = list(agreement.cells)
    # which probe set a cell (t, d) takes
    sources = {
        "own": ("all", lambda t, d: t),
        "own64": ("default", lambda t, d: t),
        "mixture": ("all", lambda t, d: MIXTURE),
        "general": ("all", lambda t, d: GENERAL),
        "wrong": ("all", lambda t, d: d),
    }
    kinds: dict[str, dict[int, Any]] = {}
    for kind, (mode, name) in sources.items():
        sizes = sorted({size for m, n, size in by_probes if m == mode and n == name(*cells[0])})
        kinds[kind] = {
            size: agreement.with_reference({cell: by_probes[mode, name(*cell), size] for cell in cells})
            for size in sizes
        }
    kinds["twice own"] = {
        size: agreement.of_halves({cell: by_probes["all", cell[0], size] for cell in cells})
        for size in SIZES
        if 2 * size <= largest
    }
    positions = {
        count: agreement.with_reference({cell: by_positions[cell[0], count] for cell in cells}) for count in POSITIONS
    }
    num_pairs = [len(agreement.cells[cell][0]) // 2 for cell in cells]
    about |= {"num_cells": len(cells), "pairs_per_cell": sorted(set(num_pairs)), "subsets": SUBSETS, "seed": seed}
    return {"about": about | {"resamples": RESAMPLES}, "kinds": kinds, "positions": positions}


def shown(figures: Sequence[float]) -> str:
    return with_interval(figures[0], figures[1:], digits=2)


def lines(results: Mapping[str, Any]) -> list[str]:
    kinds, positions = results["kinds"], results["positions"]
    own = [[title, *(shown(kinds["own"][size][column]) for size in SIZES[:-1])] for column, title in MAIN.items()]
    found = ["**Own probes**", "", *table_lines(["", *map(str, SIZES[:-1])], own)]
    rows = []
    for column in COLUMNS:
        cells = [kinds["twice own"][16][column], kinds["own64"][64][column], kinds["mixture"][256][column]]
        rows.append([column, *map(shown, [*cells, kinds["general"][48][column], kinds["wrong"][256][column]])])
    header = ["", "two disjoint sets of 16", "own 64, 64 positions", "mixture 256", "general 48", "wrong 256"]
    found += ["**Other probes**", "", *table_lines(header, rows)]
    rows = [[column, *(shown(positions[count][column]) for count in POSITIONS)] for column in COLUMNS]
    return [*found, "**Positions kept of all 256 own probes**", "", *table_lines(["", *map(str, POSITIONS)], rows)]


def draw(results: Mapping[str, Any], directory: Path) -> Path:
    from simmerge_ray.reports.figures import new_figure, save_figure

    styles = {  # colour, marker, line, shift along the axis in octaves, so that intervals do not hide each other
        "own": ("C0", "o", "-", 0.0),
        "own64": ("C0", "o", ":", 0.12),
        "mixture": ("C2", "s", "-", -0.12),
        "general": ("C4", "D", "-", 0.06),
        "wrong": ("C3", "^", "-", -0.06),
    }
    figure, axes = new_figure(11.5, 7, columns=3, rows=2)
    figure.set_layout_engine("constrained")
    for index, (axis, column) in enumerate(zip(axes.flat, PANELS, strict=True)):
        for kind, (colour, marker, line, shift) in styles.items():
            by_size = results["kinds"][kind]
            sizes = np.array(sorted(by_size)) * 2.0**shift
            middle, low, high = np.array([by_size[size][column] for size in sorted(by_size)]).T
            reach = np.maximum(0, [middle - low, high - middle])
            filled = "white" if kind == "own64" else colour
            style = {"c": colour, "marker": marker, "ms": 4.5, "mfc": filled, "lw": 1.6, "elinewidth": 0.8}
            axis.errorbar(sizes, middle, reach, ls=line, label=KINDS[kind], **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, map(str, SIZES))
        axis.set_ylim(top=1.03)
        axis.set_title(MAIN[column], fontsize=11)
        axis.grid(alpha=0.25, lw=0.6)
        if index >= 3:
            axis.set_xlabel("number of probes")
        if index % 3 == 0:
            axis.set_ylabel("rank correlation with\n256 own probes")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9.5, frameon=False)
    figure.suptitle("Each panel has its own scale; bars are 95 % intervals over checkpoints and subsets", fontsize=9.5)
    return save_figure(figure, directory, "signals-probes.png")


if __name__ == "__main__":
    figure_command(__doc__, "signals-probes.json", measure, lines, draw)
