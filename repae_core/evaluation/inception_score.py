"""The Inception score (Salimans et al. 2016) from class logits."""

from __future__ import annotations

import torch
from torch import Tensor


def inception_score(logits: Tensor, *, chunk: int = 5000) -> float:
    """exp(mean KL(p(y|x) || p(y))), averaged over consecutive chunks of `chunk` images in index order.

    logits: [N,K]. The last chunk may be smaller.
    """
    scores = []
    for part in logits.double().split(chunk):
        log_p = part.log_softmax(dim=1)
        marginal = log_p.exp().mean(dim=0, keepdim=True)
        divergence = (log_p.exp() * (log_p - marginal.log())).sum(dim=1).mean()
        scores.append(divergence.exp())
    return float(torch.stack(scores).mean())
