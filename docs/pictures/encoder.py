"""Draws every stage between the pixels of real tiles and their tokens, for docs/encoder.md.

`python docs/pictures/encoder.py DATA` writes encoder-*.png beside itself. DATA holds the folders `satclip`
and `s2cloudless` (docs/how-to says what they are). Where a picture needs a trained encoder, it is one of
`STEPS` steps; everything is a function of the data and the seed.
"""

import io
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from model import APTEncoder, EncoderConfig, TileDataset, TokenBatch, scatter_to_grid
from model.objectives import hidden_tokens, random_masking
from model.training import ENCODER, train
from model.training_config import TrainConfig
from pipeline.overlay import display_bands, stretched
from workflows.cli import main as aptile

HERE = Path(__file__).parent
HOW_TO = HERE.parent / "how-to"
STEPS = 300
FIELDS, CLOUDS = "patch_57755/r1c0", "s2_l1c_betsiboka_uint16/r1c0"
BESIDE = ("patch_445/r0c1", "patch_502692/r1c1", "patch_445/r1c1")
# Base cells of which the order is drawn, and (y, x) of the cells whose attention is.
WINDOW = (slice(12, 24), slice(20, 32))
ASKING = ((10, 25), (22, 6))
# Pictures of photographs are larger than those of tokens, and can do with fewer colours.
COLOURS, DPI = 128, 90
GREY = (0.75, 0.75, 0.75)


@dataclass
class Scene:
    """Some tiles of a store in one batch, the first being the one that is drawn."""

    dataset: TileDataset
    tiles: tuple[str, ...]

    @cached_property
    def batch(self) -> TokenBatch:
        ids = self.dataset.tile_ids.tolist()
        return self.dataset.batch([ids.index(tile) for tile in self.tiles])

    def image(self, tile: int = 0) -> np.ndarray:
        """[y, x, rgb] in [0, 1]."""
        (frames,) = self.batch.modalities
        (bands,) = frames.band_sets
        shown = list(display_bands(bands.bands))
        return stretched(bands.pixels[tile, shown].numpy(), bands.valid[tile].numpy())

    def leaves(self, tile: int = 0) -> np.ndarray:
        """int [n, 3]: (y, x) of the top-left base cell and cells a side, of a tile's tokens."""
        first, last = self.batch.cu_seqlens[tile : tile + 2].tolist()
        y, x, scale, _ = self.batch.positions[first:last].long().numpy().T
        return np.stack([y, x, 1 << scale], axis=1)

    def on_grid(self, tokens: Tensor, tile: int = 0) -> np.ndarray:
        """[rows, cols, ...]: values of tokens [N, ...] in the base cells of a tile; NaN where none is."""
        on_grid, covered = scatter_to_grid(tokens.flatten(1), self.batch)
        on_grid = on_grid.masked_fill(~covered[..., None], torch.nan)
        return on_grid[tile].unflatten(-1, tokens.shape[1:]).numpy()


class Colours:
    """The first three principal components of vectors [n, D] as red, green and blue."""

    def __init__(self, vectors: Tensor) -> None:
        self.mean = vectors.mean(0)
        _, _, axes = torch.linalg.svd(vectors - self.mean, full_matrices=False)
        # The sign of a component is arbitrary; the same one every time.
        largest = axes[:3].gather(1, axes[:3].abs().argmax(1, keepdim=True))
        self.axes = axes[:3] * largest.sign()
        parts = (vectors - self.mean) @ self.axes.T
        self.low, self.high = parts.quantile(0.02, 0), parts.quantile(0.98, 0)

    def __call__(self, vectors: Tensor) -> Tensor:
        """[n, 3] in [0, 1]."""
        parts = (vectors - self.mean) @ self.axes.T
        return ((parts - self.low) / (self.high - self.low)).clamp(0, 1)


def panels(widths: tuple[float, ...], height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    return figure, list(axes)


def save(figure: Figure, name: str, colours: int | None = COLOURS) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    picture = Image.open(drawn).convert("RGB")
    if colours is not None:
        picture = picture.quantize(colours)
    picture.save(HERE / f"encoder-{name}.png", optimize=True)


def show(panel: Axes, image: np.ndarray, title: str, cells: int, **how: object) -> None:
    """An image over the extent of a tile of `cells` base cells a side."""
    panel.imshow(image, extent=(0, cells, cells, 0), interpolation="nearest", **how)
    panel.set_title(title)
    panel.set_axis_off()


def outline(panel: Axes, leaves: np.ndarray, colour: str = "yellow", width: float = 0.5) -> None:
    boxes = [Rectangle((x, y), side, side) for y, x, side in leaves.tolist()]
    panel.add_collection(
        PatchCollection(boxes, facecolor="none", edgecolor=colour, linewidth=width)
    )


def draw_tile(scene: Scene) -> None:
    """The tile, its base grid, its quadtree."""
    grid = scene.batch.modalities[0].grid
    base = np.column_stack([grid.cell_yx, np.ones(grid.num_cells, int)])
    figure, axes = panels((4, 4, 4), 4.3)
    titles = ("128 x 128 px", f"{len(base)} base cells", f"{len(scene.leaves())} leaves")
    for panel, title in zip(axes, titles, strict=True):
        show(panel, scene.image(), title, grid.rows)
    outline(axes[1], base, width=0.3)
    outline(axes[2], scene.leaves())
    save(figure, "tile")


def line_through(panel: Axes, points_yx: np.ndarray) -> None:
    """A line from point to point, dark at the beginning and bright at the end."""
    points = points_yx[:, ::-1]
    segments = np.stack([points[:-1], points[1:]], axis=1)
    line = LineCollection(list(segments), cmap="plasma", linewidth=1.6)
    line.set_array(np.arange(len(segments)))
    panel.add_collection(line)


def draw_order(scene: Scene) -> None:
    """The cells of a window in storage order, the same through its leaves, and the run lengths."""
    grid, leaves = scene.batch.modalities[0].grid, scene.leaves()
    rows, cols = WINDOW
    first, size = np.array([rows.start, cols.start]), rows.stop - rows.start
    p = grid.base_patch_size
    cells = inside_window(grid.cell_yx) - first
    shown = inside_window(leaves) - (*first, 0)
    part = scene.image()[rows.start * p : rows.stop * p, cols.start * p : cols.stop * p]
    figure, axes = panels((4.2, 4.2, 4.2), 4.5)
    titles = (f"{len(cells)} cells in storage order", f"their {len(shown)} leaves in that order")
    for panel, title in zip(axes[:2], titles, strict=True):
        show(panel, part * 0.5 + 0.5, title, size)
    line_through(axes[0], cells + 0.5)
    outline(axes[1], shown, "black", 0.8)
    line_through(axes[1], shown[:, :2] + shown[:, 2:] / 2)
    draw_runs(axes[2], shown[:, 2] ** 2)
    save(figure, "order")


def inside_window(places: np.ndarray) -> np.ndarray:
    """Those of places [n, (y, x, ...)] that lie in the window."""
    rows, cols = WINDOW
    y, x = places[:, 0], places[:, 1]
    return places[(y >= rows.start) & (y < rows.stop) & (x >= cols.start) & (x < cols.stop)]


def draw_runs(panel: Axes, lengths: np.ndarray, per_row: int = 16) -> None:
    """Runs of base rows as boxes, `per_row` rows to a line."""
    starts = np.cumsum(lengths) - lengths
    colours = mpl.colormaps["plasma"](starts / starts.max())
    boxes = [
        Rectangle((start % per_row + 0.06, start // per_row + 0.1), length - 0.12, 0.8)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]
    panel.add_collection(PatchCollection(boxes, facecolor=colours))
    panel.set(xlim=(0, per_row), ylim=(lengths.sum() / per_row, 0), xticks=(0, 4, 8, 12, 16))
    panel.set_yticks([])
    panel.set_title("runs of 16, 4 and 1 base rows")


@torch.no_grad()
def draw_embedding(base: Scene, encoder: APTEncoder) -> None:
    """Embedded pixels, encodings and their sum, of every base cell; how alike encodings are."""
    both, encoding = encoder.embed(base.batch), encoder.token_encoding(base.batch)
    figure, axes = panels((3.2, 3.2, 3.2, 3.2), 3.5)
    parts = {"embedded pixels": both - encoding, "encodings": encoding, "their sum": both}
    for panel, (title, tokens) in zip(axes, parts.items(), strict=False):
        image = base.on_grid(Colours(tokens)(tokens))
        show(panel, image, title, len(image))
    unit = base.on_grid(torch.nn.functional.normalize(encoding, dim=1))
    (y, x), _ = ASKING
    show(axes[3], unit @ unit[y, x], "likeness of encodings to one", len(unit), cmap="viridis")
    axes[3].plot(x + 0.5, y + 0.5, "r+")
    save(figure, "embedding", colours=None)


def pixel_part(batch: TokenBatch, encoder: APTEncoder) -> Tensor:
    """[N, D]: tokens less those of the same places without pixels; what is left comes from pixels.

    Embedding, and merging before any training, are linear.
    """
    blank = [
        replace(m, band_sets=tuple(replace(s, pixels=s.pixels * 0) for s in m.band_sets))
        for m in batch.modalities
    ]
    return encoder.embed(batch) - encoder.embed(replace(batch, modalities=tuple(blank)))


@torch.no_grad()
def draw_merged(scene: Scene, base: Scene, encoder: APTEncoder) -> None:
    """Base tokens and the tokens they become, drawn at their leaves, in the same colours."""
    fine, merged = pixel_part(base.batch, encoder), pixel_part(scene.batch, encoder)
    colours = Colours(fine)
    figure, axes = panels((4, 4), 4.3)
    for panel, of, tokens in zip(axes, (base, scene), (fine, merged), strict=True):
        image, leaves = of.on_grid(colours(tokens)), of.leaves()
        show(panel, image, f"{len(leaves)} tokens", len(image))
        outline(panel, leaves, "black", 0.3)
    save(figure, "merged", colours=None)


@torch.no_grad()
def draw_packed(scene: Scene, encoder: APTEncoder) -> None:
    """Several tiles and the one sequence they are packed into."""
    tokens, ends = pixel_part(scene.batch, encoder), scene.batch.cu_seqlens.tolist()
    colours = Colours(tokens)(tokens).numpy()
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    grid = figure.add_gridspec(2, len(scene.tiles), height_ratios=(3, 1))
    for tile in range(len(scene.tiles)):
        panel, leaves = figure.add_subplot(grid[0, tile]), scene.leaves(tile)
        show(panel, scene.image(tile), f"{len(leaves)} tokens", 32)
        outline(panel, leaves, width=0.3)
    strip = figure.add_subplot(grid[1, :])
    strip.imshow(colours[None], aspect="auto", interpolation="nearest", extent=(0, ends[-1], 1, 0))
    strip.vlines(ends, 0, 1, colors="black", linewidth=2, clip_on=False)
    strip.set(xticks=ends, yticks=[], xlabel="cu_seqlens")
    save(figure, "packed")


@torch.no_grad()
def attention(scene: Scene, encoder: APTEncoder) -> Tensor:
    """[n, n]: how much each token of the first tile attends to each, in the last block, mean of heads."""
    kept = []
    last = [m for name, m in encoder.named_modules() if name.endswith("qkv")][-1]
    hook = last.register_forward_hook(lambda module, given, result: kept.append(result))
    encoder(scene.batch)
    hook.remove()
    q, k, _ = kept[0][: scene.batch.cu_seqlens[1]].unflatten(1, (3, -1, 64)).unbind(1)
    return torch.einsum("qhd,khd->hqk", q, k).div(8).softmax(-1).mean(0)


def draw_attention(scene: Scene, encoder: APTEncoder) -> None:
    """Where two tokens of a trained encoder look."""
    weights, leaves = attention(scene, encoder), scene.leaves()
    figure, axes = panels((4, 4, 4), 4.3)
    show(axes[0], scene.image(), "who asks", 32)
    for panel, (y, x), colour in zip(axes[1:], ASKING, ("red", "cyan"), strict=True):
        inside = (leaves[:, :2] <= (y, x)).all(1) & (leaves[:, :2] + leaves[:, 2:] > (y, x)).all(1)
        (asking,) = np.flatnonzero(inside)
        everywhere = weights.new_zeros(scene.batch.num_tokens, 1)
        everywhere[: len(leaves), 0] = weights[asking]
        show(panel, scene.on_grid(everywhere)[..., 0], "where it looks", 32, cmap="magma")
        for drawn in (axes[0], panel):
            outline(drawn, leaves[asking : asking + 1], colour, 2)
    save(figure, "attention")


@torch.no_grad()
def draw_scattered(scene: Scene, encoder: APTEncoder) -> None:
    """Tokens of a trained encoder, back in the cells of the base grid."""
    tokens = encoder(scene.batch).tokens
    colours = Colours(tokens)(tokens)
    figure, axes = panels((4, 4), 4.3)
    show(axes[0], scene.image(), "pixels", 32)
    show(axes[1], scene.on_grid(colours), "tokens on the base grid", 32)
    save(figure, "scattered")


@torch.no_grad()
def draw_masks(scene: Scene, clouds: Scene) -> None:
    """Tokens hidden for training; a tile below clouds and its tokens."""
    figure, axes = panels((4, 4, 4), 4.3)
    for panel, of in zip(axes[::2], (scene, clouds), strict=True):
        tokens = pixel_part(of.batch, fresh_encoder(of.dataset))
        colours = Colours(tokens)(tokens)
        if of is scene:
            hidden = hidden_tokens(random_masking(of.batch, 0.5, (0, 0)))
            colours[hidden] = torch.tensor(GREY)
        image = np.nan_to_num(of.on_grid(colours), nan=1.0)
        show(panel, image, "", 32)
        outline(panel, of.leaves(), "black", 0.3)
    show(axes[1], clouds.image(), "pixels below clouds are missing", 32)
    outline(axes[1], clouds.leaves())
    axes[0].set_title("half of the tokens hidden")
    axes[2].set_title(f"{len(clouds.leaves())} tokens, none in white")
    save(figure, "missing")


def stores(data: Path, folder: Path) -> None:
    """The stores of two how-to pages, and base tokens of the first."""
    for name in ("satclip", "s2cloudless"):
        config = HOW_TO / f"{name}.yaml"
        run("preprocess", data / name, folder / name, "--config", config, "--workers", 1)
    run("repartition", folder / "satclip", "--name", "base", "--uniform-px", 4, "--workers", 1)


def fresh_encoder(dataset: TileDataset) -> APTEncoder:
    """One that has learned nothing."""
    torch.manual_seed(0)
    return APTEncoder(EncoderConfig.for_store(dataset.store))


def run(*arguments: object) -> None:
    try:
        aptile([str(argument) for argument in arguments])
    except SystemExit as done:
        if done.code:
            raise


def draw(data: Path, folder: Path, steps: int = STEPS) -> None:
    """All pictures; stores and the run are made in `folder`."""
    stores(data, folder)
    config = TrainConfig(steps=steps, batch_tiles=4, warmup_steps=min(20, steps - 1))
    train(folder / "satclip", folder / "run", config, lambda step, loss: None)
    trained = APTEncoder.from_pretrained(folder / "run" / ENCODER).eval()
    chips = TileDataset(folder / "satclip")
    scene = Scene(chips, (FIELDS, *BESIDE))
    base = Scene(TileDataset(folder / "satclip", partition="base"), (FIELDS,))
    fresh = fresh_encoder(chips)
    draw_tile(scene)
    draw_order(scene)
    draw_embedding(base, fresh)
    draw_merged(scene, base, fresh)
    draw_packed(scene, fresh)
    draw_attention(scene, trained)
    draw_scattered(scene, trained)
    draw_masks(scene, Scene(TileDataset(folder / "s2cloudless"), (CLOUDS,)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        draw(Path(sys.argv[1]), Path(made))
