"""FLOPs of the encoder's matrix products, forward, for `bench_encoder.py`."""

from model import APTEncoder, TokenBatch


def flops_of(encoder: APTEncoder, batch: TokenBatch) -> int:
    """Two per product and sum. A backward pass has twice as many, so that ratios hold for both."""
    width, depth = encoder.config.width, encoder.config.depth
    tokens = batch.num_tokens
    squares = int((batch.cu_seqlens.diff().long() ** 2).sum())
    embedding = merging = 0
    for frames in batch.modalities:
        for band_set in frames.band_sets:
            inputs = (len(band_set.bands) + 1) * frames.grid.base_patch_size**2
            embedding += 2 * inputs * width * frames.num_covered
            for scale, n in enumerate(frames.tokens_per_scale):
                merging += 8 * width**2 * n * ((4**scale - 1) // 3)
    return embedding + merging + depth * (24 * width**2 * tokens + 4 * width * squares)
