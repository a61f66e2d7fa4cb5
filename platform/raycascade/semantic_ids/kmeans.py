"""k-means for the first codebooks: residual by residual, as in TIGER (Rajput et al., NeurIPS 2023), with the seeds of
k-means++ (Arthur and Vassilvitskii, SODA 2007).

Shapes: N points, Z numbers of a point, L levels, K codes.
"""

import numpy as np
import torch
from torch import Tensor

from raycascade.semantic_ids.rqvae import exact_float32, nearest


@torch.no_grad()
def residual_codebooks(
    latent_NZ: Tensor, *, levels: int, codes: int, iterations: int, rng: np.random.Generator
) -> Tensor:
    """[L, K, Z]: k-means of the points, then of what its centres leave of them, level by level. N must reach K."""
    assert len(latent_NZ) >= codes, "the caller refuses fewer points than codes"
    residual_NZ, books = latent_NZ, []
    with exact_float32(latent_NZ.device.type):
        for _ in range(levels):
            centres_KZ = k_means(residual_NZ, codes, iterations=iterations, rng=rng)
            books.append(centres_KZ)
            residual_NZ = residual_NZ - centres_KZ[nearest(residual_NZ, centres_KZ)]
    return torch.stack(books)


def k_means(points_NZ: Tensor, codes: int, *, iterations: int, rng: np.random.Generator) -> Tensor:
    """Centres [K, Z] after some of Lloyd's iterations; a centre that no point is nearest to stays where it is."""
    centres_KZ = _spread_seeds(points_NZ, codes, rng)
    for _ in range(iterations):
        owner_N = nearest(points_NZ, centres_KZ)
        sums_KZ = torch.zeros_like(centres_KZ).index_add_(0, owner_N, points_NZ)
        counts_K = torch.bincount(owner_N, minlength=codes)
        filled_K = counts_K > 0
        centres_KZ[filled_K] = sums_KZ[filled_K] / counts_K[filled_K, None]
    return centres_KZ


def _spread_seeds(points_NZ: Tensor, codes: int, rng: np.random.Generator) -> Tensor:
    """k-means++: each next seed is drawn in proportion to its squared distance from the seeds there are; of points that
    are all seeds already, evenly."""
    chosen = [int(rng.integers(len(points_NZ)))]
    least_N = torch.full((len(points_NZ),), torch.inf, device=points_NZ.device, dtype=torch.float64)
    while len(chosen) < codes:
        distance_N = (points_NZ - points_NZ[chosen[-1]]).square().sum(dim=1).double()
        least_N = torch.minimum(least_N, distance_N)
        rising_N = torch.cumsum(least_N, dim=0).cpu().numpy()
        drawn = int(np.searchsorted(rising_N, rng.random() * rising_N[-1], side="right"))
        chosen.append(drawn if drawn < len(points_NZ) else int(rng.integers(len(points_NZ))))
    return points_NZ[torch.tensor(chosen, device=points_NZ.device)].clone()
