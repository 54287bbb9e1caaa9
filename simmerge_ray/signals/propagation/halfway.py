"""The curve of a checkpoint: its outputs half of the way from the base, and what follows between.

Outputs are not linear in the weights, least of all for checkpoints far from their base: half a LoRA is less than half
of its effect. One more forward pass for each checkpoint tells how much, along its own task vector; what two orthogonal
task vectors do together beyond the sum of both is still left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, MergeStep
from simmerge_ray.signals.propagation.merged import merged_steps, model_of, run_probes
from simmerge_ray.signals.signature import SignatureStore, TaskOutputs, outputs_key
from simmerge_ray.signals.tokens import ProbeTokens

_KEPT = 32


def curve_shares(coefficient: float, along: float) -> tuple[float, float]:
    """`4 c (1 - p), c (2 p - 1)`: shares of `base + d_i/2` and `base + d_i` in the outputs of `base + sum_i c_i d_i`.

    To second order the outputs are `l_0 + sum_i c_i J_i + sum_ij c_i c_j Q_ij / 2`. The passes give `J_i + Q_ii / 2`
    and `J_i / 2 + Q_ii / 8`, and of `Q_ij` is kept what d_j has along d_i: `sum_j c_j Q_ij ~ p_i Q_ii`. So a
    checkpoint alone (p = c) follows the parabola through its passes, and identical ones merge to themselves. The base
    has the rest.

    Args:
        coefficient: c_i. along: `p_i = <d_i, d_m> / |d_i|^2`, d_m the merged task vector; taken to lie in [0, 1], as
            parabolas run away outside (at 1 the curve is the straight line).
    """
    inside = min(1.0, max(0.0, along))
    return 4.0 * coefficient * (1.0 - inside), coefficient * (2.0 * inside - 1.0)


def halfway_outputs(
    catalogue: Catalogue, digests: Mapping[str, str], tokens: Mapping[str, ProbeTokens], store: SignatureStore
) -> Callable[[str, str], TaskOutputs]:
    """Outputs of `base + task vector / 2` of a checkpoint on a task, from the store; computed when first asked for.

    What is returned raises CheckpointError for a checkpoint that cannot be read or run.
    """
    base = catalogue.base
    assert base is not None

    def key(checkpoint: str, task: str) -> str:
        return outputs_key(f"{digests[base.id]}+{digests[checkpoint]}/2", tokens[task].digest)

    def compute(checkpoint: str) -> None:
        ref, plan = catalogue.ref(checkpoint), MergePlan((MergeStep(base.id, checkpoint, make_arm("linear")),))
        model = model_of(next(merged_steps(plan, catalogue)), ref, plan.label)
        for task, one in sorted(tokens.items()):
            about = {"checkpoint": checkpoint, "digest": digests[checkpoint], "task": task}
            store.write("halfway", key(checkpoint, task), vars(run_probes(model, ref, one)), about)

    @lru_cache(_KEPT)
    def outputs(checkpoint: str, task: str) -> TaskOutputs:
        if not store.has("halfway", key(checkpoint, task)):
            compute(checkpoint)
        return store.read_outputs(key(checkpoint, task), "halfway")

    return outputs
