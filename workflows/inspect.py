"""`aptile inspect`: token counts of a store, and pictures of its tiles."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from pipeline.errors import EXIT_OK, ConfigError
from pipeline.stats import TOKEN_PERCENTILES, token_table
from pipeline.store import Store, open_store
from workflows.terminal import console, note, plain_table, print_json


def inspect(
    store: Path,
    tile: str | None = None,
    *,
    png: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Show tokens per tile, the saving against the uniform base grid, and how patches are shared out.

    Parameters
    ----------
    store
        A store made by `aptile preprocess`.
    tile
        Id of one tile, as listed with --json; its counts instead of the whole store's.
    png
        Draw the tile's quadtree over its image, beside its score maps, into this file.
    json
        Print the numbers as JSON on stdout.
    """
    opened = open_store(store)
    if png is not None and tile is None:
        first = opened.manifest["id"][0].as_py()
        raise ConfigError(
            f"--png needs a tile to draw; for example: aptile inspect {store} {first}"
        )
    for content in summaries(opened, tile):
        if json:
            print_json(content)
        else:
            show_summary(content)
    if png is not None and tile is not None:
        draw(opened, tile, png)
    return EXIT_OK


def summaries(store: Store, tile: str | None = None) -> list[dict[str, Any]]:
    """The token table of every modality, of the whole store or of one tile."""
    tables = [token_table(store, modality) for modality in store.modalities]
    if tile is not None:
        index = store.tile_index(tile)
        tables = [table.select([index]) for table in tables]
    return [
        {
            "store": str(store.path),
            **table.summary(),
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


def draw(store: Store, tile: str, png: Path) -> None:
    """The overlay picture of a tile's first modality."""
    from pipeline.overlay import draw_tile  # matplotlib is an extra

    modality = store.modalities[0]
    try:
        draw_tile(store.tile(tile, modality), store.layouts[modality].bands, png)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--png {png}: cannot write the picture: {error}") from None
    note(f"drew {png}")


def show_summary(content: dict[str, Any]) -> None:
    """One modality's numbers as text on stdout."""
    out = console()
    ratio, valid = content["token_ratio"], content["valid_fraction"]
    out.print(f"{content['store']}  modality {content['modality']}")
    out.print(f"tiles            {content['tiles']}")
    out.print(
        f"tokens           {content['tokens']} of {content['uniform_base_tokens']} on the uniform "
        f"base grid ({_percent(ratio)}; saving {_percent(None if ratio is None else 1 - ratio)})"
    )
    spread = content["tokens_per_tile"]
    if spread:
        marks = "  ".join(f"p{p} {spread[f'p{p}']:.0f}" for p in TOKEN_PERCENTILES)
        out.print(f"tokens per tile  min {spread['min']:.0f}  {marks}  max {spread['max']:.0f}")
    out.print(f"valid pixels     {_percent(valid)}")
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
