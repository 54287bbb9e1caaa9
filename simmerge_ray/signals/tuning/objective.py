"""What tuning minimises at the answers' positions of one member.

`kl`: KL(P_i || P_m) of the member's kept tokens, all others as one (Expert Merging, arXiv:2509.25712; theory in
SAMerging, arXiv:2512.21288); `nll`: of the answers' tokens; `entropy`: of the candidate alone (AdaMerging,
arXiv:2310.02575), a control that never looks at the member.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Objective = Literal["kl", "nll", "entropy"]


def answer_loss(logits: Tensor, kept: Tensor, own: Tensor, own_rest: Tensor, objective: Objective) -> Tensor:
    """The objective at every position, (S,), in nats.

    Args:
        logits: (S, V) of the candidate. kept: (S, K) int64, tokens, the answer's first.
        own, own_rest: (S, K), (S,) log-probabilities of the answering checkpoint: of the kept tokens, of all others.
    """
    likely = logits.log_softmax(-1)
    if objective == "entropy":
        return -(likely.exp() * likely).sum(-1)
    of_kept = likely.gather(1, kept)
    if objective == "nll":
        return -of_kept[:, 0]
    loss = (own.exp() * (own - of_kept)).sum(-1)
    if kept.shape[1] == logits.shape[1]:
        return loss
    rest = likely.scatter(1, kept, -torch.inf).logsumexp(-1)
    share = own_rest.exp()
    return loss + torch.where(share > 0, share * (own_rest - rest), 0.0)
