"""What an encoder costs: its parameters, and a forward pass's operations as a function of token counts.

A multiplication and the addition after it are two operations, as in `torch.utils.flop_counter`. Counted are
products of matrices, attention's included; what goes number by number (norms, activations, sums) is not. A
backward pass takes about twice as many.

D = width, H = inner width of an MLP, P = side of a base cell in px.
"""

from dataclasses import dataclass
from typing import Self

from model.batch import TokenBatch
from model.blocks import hidden_width, in_windows
from model.config import HEAD_WIDTH, EncoderConfig
from model.encodings import LOCATION_FEATURES
from model.sequences import See, plan, windowed

# (y, x, size) of a token.
_PLACE_FEATURES = 3


@dataclass(frozen=True)
class Cost:
    """Numbers by part of the encoder.

    `embed`: patches to rows. `merge`: rows to tokens. `attention` and `mlp`: those of the blocks, with all
    their linear maps. `rest`: encodings, prefix tokens, norms, layer scales.
    """

    embed: int = 0
    merge: int = 0
    attention: int = 0
    mlp: int = 0
    rest: int = 0

    @property
    def total(self) -> int:
        return self.embed + self.merge + self.attention + self.mlp + self.rest


@dataclass(frozen=True)
class GroupCounts:
    """Tokens of one band set of a modality.

    - `modality`: its name. `num_bands`: of the band set.
    - `cell_px`: side of a base cell in px of the band set. `grid`: rows and columns of a frame's cells.
    - `tokens_per_scale`: fine to coarse, for every scale of the quadtree.
    """

    modality: str
    num_bands: int
    cell_px: int
    grid: tuple[int, int]
    tokens_per_scale: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Base cells of the tokens."""
        return sum(n * 4**scale for scale, n in enumerate(self.tokens_per_scale))

    @property
    def num_merges(self) -> int:
        """2x2 blocks that become one row, over all levels."""
        return sum(n * (4**scale - 1) // 3 for scale, n in enumerate(self.tokens_per_scale))

    @property
    def num_coarse(self) -> int:
        return sum(self.tokens_per_scale[1:])


@dataclass(frozen=True)
class TokenCounts:
    """All that the cost of a forward pass depends on.

    - `groups`: one of every band set of every modality.
    - `tiles`: how many tiles there are.
    - `sequences`: rows of every sequence, prefix tokens included; `windows`: likewise of every window, for
      an encoder that has them.
    """

    groups: tuple[GroupCounts, ...]
    tiles: int
    sequences: tuple[int, ...]
    windows: tuple[int, ...] = ()

    @classmethod
    def of(cls, batch: TokenBatch, config: EncoderConfig, see: See = "online") -> Self:
        """Of a batch and an encoder of that configuration."""
        sequences = plan(batch, config.sequences, see, config.num_prefix)
        windows: tuple[int, ...] = ()
        if config.windows is not None:
            windows = windowed(batch, sequences, config.windows).packed.lengths
        groups = tuple(
            GroupCounts(
                frames.name,
                len(band_set.bands),
                -(-band_set.pixels.shape[-1] // frames.grid.cols),
                (frames.grid.rows, frames.grid.cols),
                frames.tokens_per_scale,
            )
            for frames in batch.modalities
            for band_set in frames.band_sets
        )
        return cls(groups, batch.num_tiles, sequences.packed.lengths, windows)

    @property
    def num_tokens(self) -> int:
        return sum(sum(group.tokens_per_scale) for group in self.groups)


def count_parameters(config: EncoderConfig) -> Cost:
    """Numbers an encoder of that configuration learns."""
    width, hidden, depth = config.width, hidden_width(config), config.depth
    sets = [band_set for modality in config.modalities for band_set in modality.band_sets]
    patch = config.kernel_px**2
    embed = sum(width * ((len(s.bands) + 1) * patch + 1 + len(s.bands)) for s in sets)
    stacks = config.merge_levels or 1
    merge = stacks * (stacks + 1) // 2 * _linear(4 * width, width)
    if config.merge_init == "zero":
        merge += stacks * _linear(width, width)
    attention = _linear(width, 3 * width) + _linear(width, width)
    attention += config.qk_norm * 2 * 2 * HEAD_WIDTH
    inwards = 2 if config.mlp == "swiglu" else 1
    mlp = inwards * _linear(width, hidden) + _linear(hidden, width)
    scales = 0 if config.layer_scale is None else 2 * width
    norms = depth * (2 * 2 * width + scales) + 2 * width
    encodings = len(sets) * (width // 4) + _encoding_parameters(config)
    return Cost(embed, merge, depth * attention, depth * mlp, norms + encodings)


def count_flops(config: EncoderConfig, counts: TokenCounts) -> Cost:
    """Operations of one forward pass over these tokens."""
    width, hidden = config.width, hidden_width(config)
    rows = sum(counts.sequences)
    inwards = 2 if config.mlp == "swiglu" else 1
    mlp = 2 * rows * width * hidden * (inwards + 1)
    linear = 2 * rows * width * 4 * width
    scores = sum(
        4 * n * n * width
        for number in range(1, config.depth + 1)
        for n in (counts.windows if in_windows(config, number) else counts.sequences)
    )
    return Cost(
        embed=sum(_embed_flops(config, group) for group in counts.groups),
        merge=_merge_flops(config, counts),
        attention=config.depth * linear + scores,
        mlp=config.depth * mlp,
        rest=_encoding_flops(config, counts),
    )


def _linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear map with a bias."""
    return (inputs + 1) * outputs


def _encoding_parameters(config: EncoderConfig) -> int:
    width = config.width
    learned = (config.class_token + config.register_tokens) * width
    if config.position_cells is not None:
        learned += width * config.position_cells[0] * config.position_cells[1]
    if config.size_position:
        learned += _linear(_PLACE_FEATURES, width) + _linear(width, width)
    if config.location_token:
        learned += _linear(LOCATION_FEATURES, width) + width
    return learned


def _embed_flops(config: EncoderConfig, group: GroupCounts) -> int:
    """Patches of all base cells; with merge_init "zero" those of coarse tokens, shrunk, as well."""
    channels, px = group.num_bands + 1, group.cell_px
    # Absent bands and the bias are columns of the product too.
    features = channels * px**2 + group.num_bands + 1
    rows, times = group.num_rows, 1
    if config.merge_init == "zero":
        rows += group.num_coarse
        times += len(group.tokens_per_scale) - 1
    return 2 * rows * features * config.width + times * _resize_flops(config, channels, px)


def _resize_flops(config: EncoderConfig, channels: int, px: int) -> int:
    """Of a kernel: one product of the stored pixels with the wanted ones."""
    kernel = config.kernel_px
    return 0 if px == kernel else 2 * config.width * channels * kernel**2 * px**2


def _merge_flops(config: EncoderConfig, counts: TokenCounts) -> int:
    width = config.width
    flops = sum(group.num_merges for group in counts.groups) * 2 * 4 * width * width
    if config.merge_init == "zero":
        flops += sum(group.num_coarse for group in counts.groups) * 2 * width * width
    return flops


def _encoding_flops(config: EncoderConfig, counts: TokenCounts) -> int:
    width, flops = config.width, 0
    if config.position_cells is not None:
        flops += _grid_flops(config, counts)
    if config.merge_init == "zero":
        # Band sets of tokens are chosen by a product.
        flops += 2 * counts.num_tokens * len(counts.groups) * width
    if config.size_position:
        flops += 2 * counts.num_tokens * (_PLACE_FEATURES * width + width * width)
    if config.location_token:
        flops += 2 * counts.tiles * LOCATION_FEATURES * width
    return flops


def _grid_flops(config: EncoderConfig, counts: TokenCounts) -> int:
    """Of laying the learned grid over frames: for the rows of every band set, and for coarse tokens."""
    sampled = [group.grid for group in counts.groups]
    if config.merge_init == "zero":
        shapes = {group.modality: group for group in counts.groups}
        sampled += [
            (of.grid[0] >> scale, of.grid[1] >> scale)
            for of in shapes.values()
            for scale in range(len(of.tokens_per_scale))
        ]
    assert config.position_cells is not None
    rows, cols = config.position_cells
    return sum(
        2 * config.width * wanted_rows * cols * (rows + wanted_cols)
        for wanted_rows, wanted_cols in sampled
        if (wanted_rows, wanted_cols) != (rows, cols)
    )
