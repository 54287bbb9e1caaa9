"""Slow float64 versions of the formulas, one pair and one element at a time, written from the papers' equations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from simmerge_ray.search.headroom import Context, defined_gaps


def kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """sum_v p(v) (log p(v) - log q(v)) of two (V,) log-probability vectors."""
    return float(sum(math.exp(a) * (a - b) for a, b in zip(log_p.tolist(), log_q.tolist(), strict=True)))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def shares(weights):
    return [w / sum(weights) for w in weights]


def linear(base, tensors, weights, normalize=True):
    weights = shares(weights) if normalize else weights
    return sum(w * x for w, x in zip(weights, tensors, strict=True))


def arc(left, right, t, threshold):
    """SLERP of two arrays seen as vectors."""
    norms = max(np.linalg.norm(left), 1e-8) * max(np.linalg.norm(right), 1e-8)
    c = min(1.0, max(-1.0, float(left.ravel() @ right.ravel()) / norms))
    if abs(c) > threshold or math.sqrt(1 - c * c) < 1e-6:
        return (1 - t) * left + t * right
    angle = math.acos(c)
    return (math.sin((1 - t) * angle) * left + math.sin(t * angle) * right) / math.sin(angle)


def slerp(base, tensors, weights, threshold=0.9995):
    return arc(*tensors, shares(weights)[1], threshold)


def nuslerp(base, tensors, weights, flatten=True, row_wise=False):
    origin = 0.0 if base is None else base
    left, right = (x - origin for x in tensors)
    t, threshold = shares(weights)[1], 1.0
    if flatten or left.ndim < 2:
        return origin + arc(left, right, t, threshold)
    merged = np.zeros_like(left)
    axis = 0 if row_wise else left.ndim - 1
    others = [size for dim, size in enumerate(left.shape) if dim != axis]
    for index in np.ndindex(*others):
        where = (*index[:axis], slice(None), *index[axis:])
        merged[where] = arc(left[where], right[where], t, threshold)
    return origin + merged


def summed(vectors, weights, normalize):
    total = sum(w * v for w, v in zip(weights, vectors, strict=True))
    return total / sum(weights) if normalize and sum(weights) != 0 else total


def elected_sum(vectors, weights, normalize):
    """TIES' election and sum, one entry at a time."""
    return majority_sum(vectors, weights, weights, normalize)


def majority_sum(vectors, weights, votes, normalize):
    """Entry by entry: the sign of `sum votes v`, then the sum of the weighted entries that have it."""
    merged = np.zeros(vectors[0].size)
    flat = [v.ravel() for v in vectors]
    for entry in range(merged.size):
        values = [w * v[entry] for w, v in zip(weights, flat, strict=True)]
        sign = 1.0 if sum(vote * v[entry] for vote, v in zip(votes, flat, strict=True)) >= 0 else -1.0
        agreeing = [(w, x) for w, x in zip(weights, values, strict=True) if x * sign > 0]
        if agreeing:
            divisor = sum(w for w, _ in agreeing) if normalize else 1.0
            merged[entry] = sum(x for _, x in agreeing) / divisor
    return merged.reshape(vectors[0].shape)


def task_arithmetic(base, tensors, weights, scale=1.0, normalize=False):
    return base + scale * summed([x - base for x in tensors], weights, normalize)


def per_source(value, tensors):
    return list(value) if isinstance(value, list | tuple) else [value] * len(tensors)


def by_magnitude(vector: np.ndarray) -> list[int]:
    """Flat indices, largest magnitude first, earlier entries first among equals."""
    flat = vector.ravel()
    return sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))


def only(vector: np.ndarray, indices) -> np.ndarray:
    result = np.zeros(vector.size)
    for index in indices:
        result[index] = vector.ravel()[index]
    return result.reshape(vector.shape)


def trimmed(vector: np.ndarray, density: float) -> np.ndarray:
    """Keep the max(1, int(density n)) largest magnitudes."""
    return only(vector, by_magnitude(vector)[: min(vector.size, max(1, int(density * vector.size)))])


def trimmed_together(vectors: list[np.ndarray], density: float) -> list[np.ndarray]:
    """`trimmed` of all tensors of a model as if they were one, in their order."""
    together = trimmed(np.concatenate([vector.ravel() for vector in vectors]), density)
    ends = np.cumsum([vector.size for vector in vectors])
    parts = np.split(together, ends[:-1])
    return [part.reshape(vector.shape) for part, vector in zip(parts, vectors, strict=True)]


def ties(
    base, tensors, weights, density=0.5, scale=1.0, normalize=True, rescale=False, thresholds=None,
    trim_scope="tensor", budgets=None,
):  # fmt: skip
    vectors = [x - base for x in tensors]
    if thresholds is None:
        kept = [trimmed(v, d) for v, d in zip(vectors, per_source(density, tensors), strict=True)]
    else:
        kept = [np.where(abs(v) >= low, v, 0.0) for v, low in zip(vectors, thresholds, strict=True)]
    if rescale:
        kept = [l1_restored(left, v) for left, v in zip(kept, vectors, strict=True)]
    return base + scale * elected_sum(kept, weights, normalize)


def random_masked(vector, probabilities, rescale, seed):
    """Entries whose draw is below their probability, l1 norm restored."""
    draws = torch.rand(vector.shape, generator=torch.Generator().manual_seed(seed)).numpy()
    kept = np.where(draws < np.float32(probabilities), vector, 0.0)
    return l1_restored(kept, vector) if rescale else kept


def l1_restored(kept, vector):
    after = sum(abs(x) for x in kept.ravel())
    return kept * (sum(abs(x) for x in vector.ravel()) / after) if after > 0 else kept


def _dare(total, base, tensors, weights, seeds, density, rescale, scale, normalize):
    kept = [
        random_masked(x - base, p, rescale, seed)
        for x, p, seed in zip(tensors, per_source(density, tensors), seeds, strict=True)
    ]
    return base + scale * total(kept, weights, normalize)


def dare_linear(base, tensors, weights, *, seeds, density=0.5, rescale=True, scale=1.0, normalize=False):
    return _dare(summed, base, tensors, weights, seeds, density, rescale, scale, normalize)


def dare_ties(base, tensors, weights, *, seeds, density=0.5, rescale=True, scale=1.0, normalize=False):
    return _dare(elected_sum, base, tensors, weights, seeds, density, rescale, scale, normalize)


def rank_probabilities(vector: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """density - epsilon for the smallest magnitude of a row to density + epsilon for its largest, evenly in rank."""
    rows = np.atleast_1d(vector)
    result = np.full(rows.shape, float(density))
    n = rows.shape[-1]
    for index in np.ndindex(*rows.shape[:-1]):
        order = sorted(range(n), key=lambda i, row=rows[index]: (abs(row[i]), i))
        for rank, position in enumerate(order):
            if n > 1:
                result[(*index, position)] = density - epsilon + 2 * epsilon * rank / (n - 1)
    return result.reshape(vector.shape)


def _della(total, base, tensors, weights, seeds, density, epsilon, rescale, scale, normalize):
    kept = []
    settings = zip(tensors, per_source(density, tensors), per_source(epsilon, tensors), seeds, strict=True)
    for x, d, e, seed in settings:
        v = x - base
        kept.append(v if d == 1 else random_masked(v, rank_probabilities(v, d, e), rescale, seed))
    return base + scale * total(kept, weights, normalize)


def della(base, tensors, weights, *, seeds, density=0.5, epsilon=0.15, rescale=True, scale=1.0, normalize=True):
    return _della(elected_sum, base, tensors, weights, seeds, density, epsilon, rescale, scale, normalize)


def della_linear(base, tensors, weights, *, seeds, density=0.5, epsilon=0.15, rescale=True, scale=1.0, normalize=False):
    return _della(summed, base, tensors, weights, seeds, density, epsilon, rescale, scale, normalize)


def band(vector: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Without the int(gamma n) largest (fewer where the rest would be too few): the int(density n) next ones."""
    n = vector.size
    top = min(int(gamma * n), n - int(density * n))
    return only(vector, by_magnitude(vector)[top : top + int(density * n)])


def _breadcrumbs(total, base, tensors, weights, density, gamma, rescale, scale, normalize):
    bands = []
    for x, d, g in zip(tensors, per_source(density, tensors), per_source(gamma, tensors), strict=True):
        kept = band(x - base, d, g)
        bands.append(l1_restored(kept, x - base) if rescale else kept)
    return base + scale * total(bands, weights, normalize)


def breadcrumbs(base, tensors, weights, density=0.5, gamma=0.01, rescale=False, scale=1.0, normalize=False):
    return _breadcrumbs(summed, base, tensors, weights, density, gamma, rescale, scale, normalize)


def breadcrumbs_ties(base, tensors, weights, density=0.5, gamma=0.01, rescale=False, scale=1.0, normalize=False):
    return _breadcrumbs(elected_sum, base, tensors, weights, density, gamma, rescale, scale, normalize)


def model_stock(base, tensors, weights, filter_wise=False):
    if filter_wise and base.ndim > 1:
        rows = [model_stock(base[i], [x[i] for x in tensors], weights, True) for i in range(base.shape[0])]
        return np.stack(rows)
    vectors, n = [x - base for x in tensors], len(tensors)
    zero = any(np.linalg.norm(v) == 0 for v in vectors)
    c = 0.0 if zero else np.mean([cosine(a, b) for i, a in enumerate(vectors) for b in vectors[i + 1 :]])
    t = n * c / (1 + (n - 1) * c) if abs(1 + (n - 1) * c) >= 1e-6 else 0.0
    return t * sum(tensors) / n + (1 - t) * base


def karcher(base, tensors, weights, max_iter=10, tol=1e-5):
    weights = shares(weights)
    norms = [np.linalg.norm(x) for x in tensors]
    used = [(w, x / norm) for w, x, norm in zip(weights, tensors, norms, strict=True) if w > 0 and norm > 1e-8]
    weight = sum(w for w, _ in used)
    start = sum(w / weight * u for w, u in used) if used else np.zeros(1)
    if np.linalg.norm(start) < tol:
        return sum(w * x for w, x in zip(weights, tensors, strict=True))
    mean = start / np.linalg.norm(start)
    for _ in range(max_iter):
        step = np.zeros_like(mean)
        for w, u in used:
            c = min(1.0, max(-1.0, float((mean * u).sum())))
            angle = math.acos(c)
            if tol <= angle <= math.pi - tol:
                step += w / weight * angle / math.sin(angle) * (u - c * mean)
        length = np.linalg.norm(step)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * step / length
        mean /= np.linalg.norm(mean)
    return sum(w * norm for w, norm in zip(weights, norms, strict=True)) * mean


def sce(base, tensors, weights, select_topk=1.0):
    vectors = [x - base for x in tensors]
    if select_topk < 1:
        mean = sum(vectors) / len(vectors)
        variance = sum((v - mean) ** 2 / len(vectors) for v in vectors)
        selected = by_magnitude(variance)[: int(np.count_nonzero(variance) * select_topk)]
        vectors = [only(v, selected) for v in vectors]
    energies = [float(np.mean(v**2)) for v in vectors]
    weights = energies if sum(energies) > 0 else [1.0] * len(vectors)
    return base + majority_sum(vectors, weights, [1.0] * len(vectors), normalize=True)


def arcee_fusion(base, tensors, weights):
    """Row by row, entry by entry: |x - base| KL of the row's softmaxes, against median + 1.5 (q3 - q1) of all."""
    x = tensors[0]
    rows = [np.atleast_1d(a).reshape(-1, np.atleast_1d(a).shape[-1]) for a in (x, base)]
    scores = []
    for row, origin in zip(*rows, strict=True):
        p, q = (np.exp(log_softmax(a)) + 1e-8 for a in (row, origin))
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        scores += [abs(a - b) * divergence for a, b in zip(row, origin, strict=True)]
    ordered = sorted(scores)
    low, middle, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    taken = np.array([score >= middle + 1.5 * (high - low) for score in scores]).reshape(base.shape)
    return np.where(taken, x, base)


def nearswap(base, tensors, weights, t=1e-4):
    moved = [min(1.0, t / max(abs(x - b), 1e-6)) * (x - b) for b, x in zip(base.flat, tensors[0].flat, strict=True)]
    return base + np.array(moved).reshape(base.shape)


def ram(base, tensors, weights, epsilon=1e-5):
    return ramplus_tl(base, tensors, weights, r=0.0, epsilon=epsilon)


def ramplus_tl(base, tensors, weights, r=0.1, alpha=0.2, epsilon=1e-5):
    vectors = [(x - base).ravel() for x in tensors]
    who = [[i for i, v in enumerate(vectors) if abs(v[entry]) > epsilon] for entry in range(base.size)]
    boosts = []
    for i in range(len(vectors)):
        own, shared = (sum(i in one and (len(one) > 1) == many for one in who) for many in (False, True))
        rho = shared / own if own else (math.inf if shared else 0.0)
        boosts.append(1 + r * min(alpha, rho))
    change = np.zeros(base.size)
    for entry, one in enumerate(who):
        if len(one) == 1:
            change[entry] = boosts[one[0]] * vectors[one[0]][entry]
        elif one:
            change[entry] = sum(vectors[i][entry] for i in one) / len(one)
    return base + change.reshape(base.shape)


def scale_matched_linear(base, tensors, weights):
    vectors, weights = [x - base for x in tensors], shares(weights)
    norms = [np.linalg.norm(v) for v in vectors]
    units = [v / norm if norm > 0 else 0 * v for v, norm in zip(vectors, norms, strict=True)]
    norm = sum(w * n for w, n in zip(weights, norms, strict=True))
    return base + norm * sum(w * u for w, u in zip(weights, units, strict=True))


def regmean(base, tensors, weights, alpha=0.9, grams=(), input_axis=1):
    if not len(grams):
        return linear(base, tensors, weights)
    matrices = [x.T if input_axis == 1 else x for x in tensors]  # (inputs, outputs)
    left, right = 0.0, 0.0
    for weight, matrix, gram in zip(shares(weights), matrices, grams, strict=True):
        shrunk = alpha * gram + (1 - alpha) * np.diag(np.diag(gram))
        left, right = left + weight * shrunk, right + weight * (shrunk @ matrix)
    found = np.linalg.inv(left) @ right
    return found.T if input_axis == 1 else found


def multislerp(base, tensors, weights, normalize=True, eps=1e-8):
    origin = 0.0 if base is None else base
    vectors, weights = [x - origin for x in tensors], shares(weights) if normalize else weights
    norms = [np.linalg.norm(v) for v in vectors]
    units = [v / (norm + eps) for v, norm in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    if np.linalg.norm(mean) < max(eps, 1e-6):
        return origin + sum(w * v for w, v in zip(weights, vectors, strict=True))
    mean /= np.linalg.norm(mean)
    step = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True))
    length = np.linalg.norm(step)
    direction = math.cos(length) * mean + (math.sin(length) / length if length > 0 else 1.0) * step
    return origin + sum(w * norm for w, norm in zip(weights, norms, strict=True)) * direction


def passthrough(base, tensors, weights, scale=1.0):
    return per_source(scale, tensors)[0] * tensors[0]


OPERATORS = {
    function.__name__: function
    for function in (
        linear,
        slerp,
        nuslerp,
        task_arithmetic,
        ties,
        dare_linear,
        dare_ties,
        della,
        della_linear,
        breadcrumbs,
        breadcrumbs_ties,
        model_stock,
        karcher,
        sce,
        multislerp,
        arcee_fusion,
        nearswap,
        ram,
        ramplus_tl,
        scale_matched_linear,
        regmean,
        passthrough,
    )
}


def pair_features(left, right, weights, names, kinds, layers, density=0.2):
    """Every feature of one ordered pair, one position, layer, head and tensor at a time.

    left, right: dicts of arrays: logits (S, V), hidden (L + 1, S, D), attention (L, H, Sa, K), greedy (S,),
    next_token (S,). weights: (base, left, right), each {tensor name: float64 array}. kinds, layers: by tensor name.
    """
    features = {}
    prompt = [s for s in range(len(left["greedy"])) if not left["greedy"][s]]
    greedy = [s for s in range(len(left["greedy"])) if left["greedy"][s]]
    logs = [log_softmax(side["logits"]) for side in (left, right)]
    for name, positions in (("kl", prompt), ("kl_greedy", greedy)):
        for way, (p, q) in (("lr", logs), ("rl", logs[::-1])):
            values = [kl(p[s], q[s]) for s in positions]
            features[f"{name}_{way}_mean"] = np.mean(values)
            for statistic, level in (("median", 0.5), ("q10", 0.1), ("q90", 0.9)):
                features[f"{name}_{way}_{statistic}"] = np.quantile(values, level)
    hidden = [
        [cosine(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(left["hidden"], right["hidden"], strict=True)
    ]
    attention = [
        [cosine(a, b) for p, q in zip(x, y, strict=True) for a, b in zip(p, q, strict=True)]
        for x, y in zip(left["attention"], right["attention"], strict=True)
    ]
    for name, by_layer in (("activation_cosine", hidden), ("attention_cosine", attention)):
        rows = [value for layer in by_layer for value in layer]
        features[f"{name}_mean"], features[f"{name}_sd"] = np.mean(rows), np.std(rows)
        features[f"{name}_min"] = min(rows)
        for part, chosen in zip(("early", "middle", "late"), thirds_of(len(by_layer)), strict=True):
            features[f"{name}_{part}"] = np.mean([np.mean(by_layer[layer]) for layer in chosen])
    by_tensor = {name: _weight_signals(*(w[name].ravel() for w in weights), [name], weights, density) for name in names}
    groups = {"global": names} | {kind: [n for n in names if kinds[n] == kind] for kind in set(kinds.values())}
    for group, members in groups.items():
        joined = [np.concatenate([w[n].ravel() for n in members]) for w in weights]
        for signal, value in _weight_signals(*joined, members, weights, density).items():
            features[f"{signal}_{group}"] = value
    num_layers = 1 + max(layer for layer in layers.values() if layer is not None)
    for signal in by_tensor[names[0]]:
        values = [by_tensor[n][signal] for n in names]
        features[f"{signal}_mean"], features[f"{signal}_sd"] = np.mean(values), np.std(values)
        features[f"{signal}_min"] = min(values)
        for part, chosen in zip(("early", "middle", "late"), thirds_of(num_layers), strict=True):
            features[f"{signal}_{part}"] = np.mean([by_tensor[n][signal] for n in names if layers[n] in chosen])
    for side, log, values, own in (("left", logs[0], left, weights[1]), ("right", logs[1], right, weights[2])):
        features[f"entropy_{side}"] = np.mean([-sum(math.exp(x) * x for x in log[s].tolist()) for s in prompt])
        labelled = [s for s in prompt if values["next_token"][s] >= 0]
        features[f"loss_{side}"] = np.mean([-log[s, values["next_token"][s]] for s in labelled])
        moved = math.sqrt(sum(((own[n] - weights[0][n]) ** 2).sum() for n in names))
        features[f"task_vector_norm_{side}"] = moved / math.sqrt(sum((weights[0][n] ** 2).sum() for n in names))
    return features


def thirds_of(num_layers):
    """Layers whose index lies in each third, a layer shared where there are fewer than three."""
    bounds = [round(num_layers * part / 3) for part in range(4)]
    return [list(range(bounds[i], bounds[i + 1])) or [min(bounds[i], num_layers - 1)] for i in range(3)]


def _weight_signals(base, left, right, members, weights, density):
    """Weight signals of concatenated tensors; trimming is per tensor."""
    a, b = left - base, right - base
    both_moved = (a != 0) & (b != 0)
    kept = []
    for w in weights[1:]:
        chosen = []
        for name in members:
            vector = (w[name] - weights[0][name]).ravel()
            low = np.sort(abs(vector))[-max(1, int(density * vector.size))]
            chosen.append((abs(vector) >= low) & (vector != 0))
        kept.append(np.concatenate(chosen))
    both = math.sqrt(max(1, kept[0].sum())) * math.sqrt(max(1, kept[1].sum()))
    return {
        "weight_cosine": cosine(left, right),
        "weight_l2": np.linalg.norm(left - right) / np.linalg.norm(base),
        "task_vector_cosine": cosine(a, b) if np.any(a) and np.any(b) else 0.0,
        "task_vector_norm_ratio": math.log(np.linalg.norm(a) / np.linalg.norm(b)),
        "sign_conflict": np.mean(a[both_moved] * b[both_moved] < 0) if both_moved.any() else 0.0,
        "trimmed_overlap": (kept[0] & kept[1]).sum() / both,
    }


def answer_scores(candidate: np.ndarray, own: np.ndarray, tokens: np.ndarray, answer: np.ndarray) -> dict[str, list]:
    """What `signals.candidates.scores` computes, from whole logits, one answer and one token at a time.

    Args:
        candidate, own: (S, V) logits. tokens: (S,) of the answers. answer: (S,) which answer each belongs to.
    """

    def log_softmax(row: np.ndarray) -> np.ndarray:
        row = row.astype(np.float64)
        return row - row.max() - np.log(np.exp(row - row.max()).sum())

    found: dict[str, list] = {"kept": [], "nll": [], "kl": [], "entropy": [], "num_tokens": []}
    for number in sorted(set(answer.tolist())):
        kept, nll, kl, entropy, count = True, 0.0, 0.0, 0.0, 0
        for place in np.flatnonzero(answer == number):
            q, p = log_softmax(candidate[place]), log_softmax(own[place])
            kept = kept and int(q.argmax()) == int(tokens[place])
            nll -= q[tokens[place]]
            kl += float((np.exp(p) * (p - q)).sum())
            entropy -= float((np.exp(q) * q).sum())
            count += 1
        for key, value in zip(found, (kept, nll, kl, entropy, count), strict=True):
            found[key].append(value)
    return found


def plan_coefficients(base: dict, vectors: Sequence[dict], change: dict) -> list[float]:
    """How much of each task vector a change of the base holds: least squares tensor by tensor, then averaged by
    |task vector|^2 / |base tensor|^2. All by tensor name."""
    total, energy = np.zeros(len(vectors)), np.zeros(len(vectors))
    for name, of_base in base.items():
        matrix = np.stack([one[name].ravel() for one in vectors], 1)
        found = np.linalg.lstsq(matrix, change[name].ravel(), rcond=None)[0]
        share = (matrix**2).sum(0) / (of_base**2).sum()
        total += share * found
        energy += share
    return [float(one) for one in np.divide(total, energy, out=np.zeros_like(total), where=energy > 0)]


def gap_closed(contexts: Sequence[Context], chosen_arms: Sequence[str]) -> float | None:
    """Headline GapClosed of the arm that was taken for each context: ratio of sums per task, mean over the tasks."""
    arms = tuple(contexts[0].arms)
    gaps = defined_gaps(contexts, arms)
    closed = [row[arms.index(chosen_arms[place])] for place, row in zip(gaps.rows, gaps.closed, strict=True)]
    sums = {task: np.zeros(2) for task in gaps.tasks}
    for task, *both in zip(gaps.tasks, closed, gaps.gap, strict=True):
        sums[task] += both
    return float(np.mean([top / bottom for top, bottom in sums.values()])) if sums else None
