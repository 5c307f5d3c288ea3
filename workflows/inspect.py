"""`aptile inspect`: token counts of a store, and pictures of its tiles."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from pipeline.calibrate import store_curve
from pipeline.errors import EXIT_OK, ConfigError
from pipeline.rules import rule_in_words
from pipeline.settings.canonical import plain
from pipeline.stats import TOKEN_PERCENTILES, token_table
from pipeline.storage.partitions import DEFAULT_PARTITION
from pipeline.store import Store, open_store
from workflows.locations import StoreLocation
from workflows.terminal import console, note, plain_table, print_json

# Rows of the curve are at these fractions of the scores.
_CURVE_STEPS = 20


def inspect(
    store: StoreLocation,
    tile: str | None = None,
    *,
    modality: str | None = None,
    timestep: int | None = None,
    partition: str = DEFAULT_PARTITION,
    commit: int | None = None,
    curve: Annotated[bool, Parameter(negative="")] = False,
    png: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Show tokens per tile, the saving against the uniform base grid, and how patches are shared out.

    Parameters
    ----------
    store
        A store made by `aptile preprocess`: a path, or a URL (s3://, gs://, az://).
    tile
        Id of one tile, as listed with --json; its counts instead of the whole store's.
    modality
        One modality only, and the one that is drawn; all of them, and the first, when not given.
    timestep
        Which of the tile's dates is drawn, counted from 0; the first that is there when not given.
    partition
        Which of the store's partitions; `aptile repartition` makes others than the default one.
    commit
        An earlier state of the store by its number; `aptile log` lists them.
    curve
        Show instead how many tokens per tile other thresholds would give, from the stored scores.
    png
        Draw the tile's quadtree over its image, beside its score maps, or the curve, into this file.
    json
        Print the numbers as JSON on stdout.
    """
    opened = open_store(store, commit)
    if curve:
        if tile is not None or partition != DEFAULT_PARTITION:
            raise ConfigError(
                "--curve is about all tiles and any thresholds; leave out the tile and --partition"
            )
        show_curves(opened, png, json)
        return EXIT_OK
    if png is not None and tile is None:
        first = opened.manifest["id"][0].as_py()
        raise ConfigError(
            f"--png needs a tile to draw; for example: aptile inspect {store} {first}"
        )
    if timestep is not None and png is None:
        raise ConfigError("--timestep has no effect without --png")
    for content in summaries(opened, tile, partition, modality):
        if json:
            print_json(content)
        else:
            show_summary(content)
    if png is not None and tile is not None:
        draw(opened, tile, png, partition, modality, timestep)
    return EXIT_OK


def summaries(
    store: Store,
    tile: str | None = None,
    partition: str = DEFAULT_PARTITION,
    modality: str | None = None,
) -> list[dict[str, Any]]:
    """The token table of every modality that has tokens and the partition, or of one; of the whole store
    or of one tile."""
    shown = [store.layout_of(modality).modality] if modality is not None else store.tokenized
    having = [name for name in shown if partition in store.partitions(name)]
    if not having and store.layouts[shown[0]].tokenized:
        store.check_partition(shown[0], partition)
    tables = [token_table(store, name, partition) for name in having]
    if tile is not None:
        index = store.tile_index(tile)
        tables = [table.select([index]) for table in tables]
    return [
        {
            "store": store.location,
            **table.summary(),
            "rule": plain(store.partition(partition, table.modality).rule),
            "quarantined": store.quarantined(),
            "per_tile": [
                {"tile": name, "tokens": int(tokens.sum()), "base_cells": int(cells)}
                for name, tokens, cells in zip(
                    table.tile_ids, table.tokens, table.base_cells, strict=True
                )
            ],
        }
        for table in tables
    ]


def show_curves(store: Store, png: Path | None, as_json: bool) -> None:
    """Mean tokens per tile against thresholds, of every modality; the first one's is drawn."""
    contents = [
        curve_summary(store, name) for name, layout in store.layouts.items() if layout.scored
    ]
    for content in contents:
        if as_json:
            print_json(plain(content))
        else:
            _show_curve(content)
    if png is not None:
        from pipeline.curve_plot import draw_curve  # matplotlib is an extra

        try:
            draw_curve(contents[0], png)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--png {png}: cannot write the picture: {error}") from None
        note(f"drew {png}")


def curve_summary(store: Store, modality: str) -> dict[str, Any]:
    """Thresholds (fine to coarse) and mean tokens per tile at each step of the quantile."""
    curve = store_curve(store, modality)
    quantiles = [step / _CURVE_STEPS for step in range(_CURVE_STEPS + 1)]
    return {
        "store": store.location,
        "modality": modality,
        "patch_sizes": list(store.layouts[modality].grid.patch_sizes),
        "tiles": curve.num_tiles,
        "curve": [
            {
                "quantile": quantile,
                "thresholds": curve.thresholds(quantile),
                "mean_tokens": curve.mean_tokens(quantile),
            }
            for quantile in quantiles
        ],
    }


def _show_curve(content: dict[str, Any]) -> None:
    out = console()
    out.print(f"{content['store']}  modality {content['modality']}  tiles {content['tiles']}")
    out.print()
    sizes = [f"threshold {size} px" for size in content["patch_sizes"][1:]]
    table = plain_table("quantile", *sizes, "tokens per tile")
    for row in content["curve"]:
        shown = [f"{threshold:.4g}" for threshold in row["thresholds"]]
        table.add_row(f"{row['quantile']:.2f}", *shown, f"{row['mean_tokens']:.2f}")
    out.print(table)


def draw(
    store: Store,
    tile: str,
    png: Path,
    partition: str = DEFAULT_PARTITION,
    modality: str | None = None,
    timestep: int | None = None,
) -> None:
    """The overlay picture of one date of a tile, of the first modality unless one is named."""
    from pipeline.overlay import draw_tile  # matplotlib is an extra

    layout = store.layout_of(modality)
    shown = store.tile(tile, layout.modality, partition)
    present = shown.timesteps.tolist()
    if timestep is None and present:
        timestep = present[0]
    if timestep not in present:
        raise ConfigError(
            f"--png: {tile} has no frame of {layout.modality} at timestep {timestep}; it has {present}"
        )
    try:
        draw_tile(shown, layout.bands, png, present.index(timestep))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--png {png}: cannot write the picture: {error}") from None
    note(f"drew {png}")


def show_summary(content: dict[str, Any]) -> None:
    """One modality's numbers as text on stdout."""
    out = console()
    ratio, valid = content["token_ratio"], content["valid_fraction"]
    out.print(f"{content['store']}  modality {content['modality']}")
    out.print(f"partition        {content['partition']}: {rule_in_words(content['rule'])}")
    out.print(f"tiles            {content['tiles']}")
    out.print(
        f"tokens           {content['tokens']} of {content['uniform_base_tokens']} on the uniform "
        f"base grid ({_percent(ratio)}; saving {_percent(None if ratio is None else 1 - ratio)})"
    )
    spread = content["tokens_per_tile"]
    if spread:
        marks = "  ".join(f"p{p} {spread[f'p{p}']:.0f}" for p in TOKEN_PERCENTILES)
        out.print(f"tokens per tile  min {spread['min']:.0f}  {marks}  max {spread['max']:.0f}")
    missing = f", {content['missing_frames']} missing" if content["missing_frames"] else ""
    out.print(f"frames           {content['frames']}{missing}")
    cloud, nodata = content["cloud_fraction"], content["nodata_fraction"]
    out.print(
        f"valid pixels     {_percent(valid)} (cloud {_percent(cloud)}, no data {_percent(nodata)})"
    )
    if content["quarantined"]:
        out.print(f"quarantined      {len(content['quarantined'])} scenes, see --json")
    out.print()
    table = plain_table("patch size", "tokens", "share of tokens", "share of area")
    for row in content["patch_sizes"]:
        table.add_row(
            f"{row['size_px']} px",
            str(row["tokens"]),
            _percent(row["share_of_tokens"]),
            _percent(row["share_of_area"]),
        )
    out.print(table)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
