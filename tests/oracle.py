"""Slow, obvious definitions of scores and partitions, written from the definitions alone."""

import numpy as np


def entropy(pixels: np.ndarray, num_bins: int, low: float, high: float) -> float:
    """Bits of the histogram of a flat array over [low, high]; NaN if it is empty."""
    if pixels.size == 0:
        return float("nan")
    clipped = np.clip(pixels.astype(np.float64), low, high)
    counts, _ = np.histogram(clipped, bins=num_bins, range=(low, high))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def score_map(image, valid, size, num_bins, ranges):
    """[cell_y, cell_x] of patches of `size` px, mean over bands; sizes must divide the image."""
    rows, cols = image.shape[1] // size, image.shape[2] // size
    scores = np.empty((rows, cols))
    for y in range(rows):
        for x in range(cols):
            cut = np.s_[y * size : (y + 1) * size, x * size : (x + 1) * size]
            bits = [
                entropy(band[cut][valid[cut]], num_bins, low, high)
                for band, (low, high) in zip(image, ranges, strict=True)
            ]
            scores[y, x] = np.mean(bits)
    return scores


def leaves(maps, thresholds, num_scales):
    """Top-down recursion: set of (y, x, scale, missing), positions in base cells."""
    found = set()

    def visit(y, x, scale):
        score = maps[scale][y >> scale, x >> scale]
        if np.isnan(score):
            found.add((y, x, scale, True))
        elif scale == 0 or score < np.float32(thresholds[scale - 1]):
            found.add((y, x, scale, False))
        else:
            half = 2 ** (scale - 1)
            for dy in (0, half):
                for dx in (0, half):
                    visit(y + dy, x + dx, scale - 1)

    side = 2 ** (num_scales - 1)
    for y in range(0, maps[0].shape[0], side):
        for x in range(0, maps[0].shape[1], side):
            visit(y, x, num_scales - 1)
    return found


def budget_leaves(maps, num_tokens, num_scales):
    """Greedy, from the definition: every round looks at all leaves anew.

    Set of (y, x, scale, missing), positions in base cells.
    """
    side = 2 ** (num_scales - 1)

    def score(y, x, scale):
        return maps[scale][y >> scale, x >> scale]

    def place(y, x, scale):
        """Storage order as a path: the root, then a quadrant per level."""
        quadrants = [(y >> level & 1, x >> level & 1) for level in range(num_scales - 2, -1, -1)]
        return [(y // side, x // side), *quadrants]

    def children(y, x, scale):
        half = 2 ** (scale - 1)
        return [(y + dy, x + dx, scale - 1) for dy in (0, half) for dx in (0, half)]

    def present(nodes):
        return sum(not np.isnan(score(*node)) for node in nodes)

    found = {
        (y, x, num_scales - 1)
        for y in range(0, maps[0].shape[0], side)
        for x in range(0, maps[0].shape[1], side)
    }
    while True:
        fitting = [
            leaf
            for leaf in found
            if leaf[2] > 0
            and present([leaf])
            and present(found) - 1 + present(children(*leaf)) <= num_tokens
        ]
        if not fitting:
            return {(*leaf, not present([leaf])) for leaf in found}
        highest = max(score(*leaf) for leaf in fitting)
        chosen = min((leaf for leaf in fitting if score(*leaf) == highest), key=lambda n: place(*n))
        found = (found - {chosen}) | set(children(*chosen))
