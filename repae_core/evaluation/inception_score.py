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
        p = part.softmax(dim=1)
        # The mean divergence as a difference of entropies, in which a probability of zero counts nothing.
        divergence = torch.special.entr(p.mean(dim=0)).sum() - torch.special.entr(p).sum(dim=1).mean()
        scores.append(divergence.exp())
    return float(torch.stack(scores).mean())
