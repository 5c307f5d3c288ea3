"""The encoder's speed against the share of tokens that are left, on real scenes.

Settings are tiles of 64 and 128 px, base patches of 4 and 2 px, 1 and 2 dates; thresholds are read off
stored score maps such that a share of the base grid's tokens is left. A batch has 4096 base cells, whatever
the setting; its pixels are normalised float32, as the loader gives them. All contenders of a setting take
turns; a ratio is the median of the rounds' ratios. On a CPU a time is CPU time of one thread, so that
other work on the machine hardly matters; `--threads` above 1 takes wall time. `forward` is without
gradients; `forward + backward` ends with gradients of all weights.

- `speedup`: the time of the uniform base grid, same encoder and attention, over the time at a token ratio;
  `of the FLOPs`: over the ratio of their FLOPs, those of all matrix products, embedding included
- `timm ViT`: a plain ViT of the same width, depth and blocks on the uniform grid
- `share`: embedding, encodings, merging and scatter of a step, scatter and loss on the grid included
- `memory`: peak of a step over what the process had before, each in a process of its own
- `operators`: how many run in a step, attention aside, for batches that differ in tiles and tokens
- `peers`: as many tokens as the encoder has, see `encoder_peers`
- with `--device cuda`: all in bf16, larger batches, and a base model with every packed attention

Without --archive FOLDER (scenes of one date each) it takes the Sentinel-2 chip of the package spyndex. With
--pictures FOLDER it draws `encoder_speedup.png` and `encoder_step.png`; with --drawn-from FILE, written by
--json before, it does so without measuring.
"""

import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import arguments, save
from encoder_clock import (
    BLOCKS,
    EMBED,
    FORWARD,
    MERGE,
    STEP,
    Forward,
    median_ratio,
    operators,
    parts_of,
    seconds,
    step,
    taking_turns,
)
from encoder_gpu import gpu_rows
from encoder_model import encoded, encoder_of, flops_of, on_grid, one_operator_attention
from encoder_peers import (
    PlainBlocks,
    absent,
    dense_mask,
    images_of,
    installed,
    padded,
    peers,
    timm_vit,
)
from encoder_scenes import UNIFORM, Setting, batches_of, fresh, store_of, with_dates
from encoder_tables import tables
from model import APTEncoder, EncoderConfig, TokenBatch
from model.upsample import to_grid

RATIOS = (1.0, 0.7, 0.5, 0.35, 0.2)
SHOWN = 0.35  # the ratio that is looked into
CELLS = 4096
SETTINGS = [
    Setting(tile_px, base_px, dates, CELLS)
    for dates in (1, 2)
    for tile_px, base_px in ((64, 4), (128, 4), (64, 2))
]
QUICK = [Setting(64, 4, 1, 1024)]
GPU_CELLS = 64 * 1024
OPTIONS: dict[str, dict[str, Any]] = {
    "--archive": {"type": Path, "metavar": "FOLDER", "help": "scenes of one date each"},
    "--device": {"choices": ["cpu", "cuda"], "default": "cpu", "help": "where to run"},
    "--threads": {"type": int, "default": 1, "help": "of torch on a CPU"},
    "--rounds": {"type": int, "default": 4, "help": "how often all take turns"},
    "--drawn-from": {"type": Path, "metavar": "FILE", "help": "only draw, from these figures"},
}

Rows = list[dict[str, Any]]


def speed_rows(
    setting: Setting,
    encoder: APTEncoder,
    batches: dict[float, TokenBatch],
    rounds: int,
    device: str,
) -> Rows:
    """Against the uniform grid, by ratio; and the uniform grid against timm's ViT."""
    contenders: dict[str, tuple[nn.Module, Forward]] = {
        f"{ratio:g}": (encoder, partial(encoded, encoder, batch))
        for ratio, batch in batches.items()
    }
    uniform = batches[UNIFORM]
    with_timm = installed("timm") and setting.dates == 1
    if with_timm:
        images = images_of(uniform)
        width, depth = encoder.config.width, encoder.config.depth
        vit = timm_vit(setting, images.shape[1], width, depth).to(device)
        contenders["timm"] = vit, partial(vit, images)
    found = taking_turns(contenders, rounds, device)
    base, rows = found[f"{UNIFORM:g}"], []
    for ratio, batch in batches.items():
        flops = flops_of(encoder, uniform) / flops_of(encoder, batch)
        row: dict[str, Any] = {"what": f"speedup: {setting.name}", "wanted ratio": ratio}
        row |= {"token ratio": batch.num_tokens / uniform.num_tokens, "FLOP ratio": flops}
        for what in (FORWARD, STEP):
            row[what] = median_ratio(base[what], found[f"{ratio:g}"][what])
            row[f"{what}, of the FLOPs"] = row[what] / flops
        rows.append(row)
    if with_timm:
        row = {"what": f"uniform: {setting.name}"}
        rows.append(row | {w: median_ratio(base[w], found["timm"][w]) for w in (FORWARD, STEP)})
    return rows


def share_row(
    setting: Setting, encoder: APTEncoder, batch: TokenBatch, rounds: int, device: str
) -> dict[str, Any]:
    """What a step spends before and after the blocks, each forward and backward by itself."""
    with torch.no_grad():
        tokens = encoded(encoder, batch)
    leaf = tokens.clone().requires_grad_()
    contenders: dict[str, tuple[nn.Module, Forward]] = {
        "step": (encoder, partial(on_grid, encoder, batch)),
        "embed": (encoder, lambda: encoder.embed(fresh(batch))),
        "scatter": (encoder, lambda: to_grid(leaf, fresh(batch))[0]),
    }
    found = taking_turns_of_steps(contenders, rounds, device)
    embed, scatter = (median_ratio(found[what], found["step"]) for what in ("embed", "scatter"))
    return {
        "what": f"share: {setting.name}, ratio {SHOWN}",
        "embedding + merging": embed,
        "scatter": scatter,
        "together": embed + scatter,
    }


def taking_turns_of_steps(
    contenders: dict[str, tuple[nn.Module, Forward]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Like `taking_turns`, forward and backward only."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, (module, forward) in contenders.items():
            taken = seconds(partial(step, forward, device), device)
            module.zero_grad(set_to_none=True)
            if number:
                found[name].append(taken)
    return found


def part_rows(setting: Setting, encoder: APTEncoder, batches: dict[float, TokenBatch]) -> Rows:
    """Where the time of a step goes, by ratio."""
    methods = {
        EMBED: (encoder, "embed"),
        MERGE: (encoder.merge, "forward"),
        BLOCKS: (encoder.stack, "forward"),
    }
    rows = []
    for ratio in (UNIFORM, SHOWN):
        run = partial(step, partial(on_grid, encoder, batches[ratio]), "cpu")
        encoder.zero_grad(set_to_none=True)
        shares = parts_of(run, methods, repeats=2)
        whole = min(seconds(run, "cpu") for _ in range(2))
        row: dict[str, Any] = {"what": f"step: {setting.name}, ratio {ratio}", "ms": 1e3 * whole}
        rows.append(row | {part: shares[part] for part in shares})
    return rows


WAYS = ("packed", "padded", "one N x N mask")


def peak_bytes(config: str, batch: TokenBatch, way: str, device: str) -> int:
    """Peak of a step over what there was before, in a process that has done a small step."""
    torch.set_num_threads(1)
    encoder = APTEncoder(EncoderConfig.model_validate_json(config)).to(device)
    blocks = PlainBlocks(encoder.config.width, encoder.config.depth).to(device)
    ways = {
        "packed": encoded,
        "padded": partial(padded, blocks=blocks),
        "one N x N mask": partial(dense_mask, blocks=blocks),
    }
    batch = batch.to(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(lambda: ways[way](encoder=encoder, batch=batch), device)
        return torch.cuda.max_memory_allocated() - before
    for parameter in (*encoder.parameters(), *blocks.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    before = psutil.Process().memory_info().rss
    step(lambda: ways[way](encoder=encoder, batch=batch), device)
    # KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def memory_rows(
    setting: Setting,
    encoder: APTEncoder,
    batches: dict[float, TokenBatch],
    quick: bool,
    device: str,
) -> Rows:
    """Peaks by ratio, and of padding and masks at the ratio that is looked into."""
    asked = [("packed", ratio) for ratio in batches]
    asked += [(way, SHOWN) for way in WAYS if way != "packed"]
    if quick:
        asked = asked[:1]
    config = encoder.config.model_dump_json()
    peaks = {}
    for way, ratio in asked:
        # A new process for each: memory that was free before would hide what is taken.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one:
            job = one.submit(peak_bytes, config, batches[ratio].to("cpu"), way, device)
            peaks[way, ratio] = job.result()
    return [
        {
            "what": f"memory: {setting.name}, {way}, ratio {ratio:g}",
            "peak, MiB": peak / 2**20,
            "of the base grid": peak / peaks["packed", UNIFORM],
        }
        for (way, ratio), peak in peaks.items()
    ]


def operator_rows(encoder: APTEncoder, batches: dict[float, TokenBatch]) -> Rows:
    """Of batches of one tile, and of all tiles by ratio."""
    encoder.zero_grad(set_to_none=True)
    rows = []
    for name, batch in compositions(batches).items():
        row: dict[str, Any] = {"what": f"operators: {name}", "tokens": batch.num_tokens}
        row["tiles"] = batch.num_tiles
        for what, run in (
            (FORWARD, partial(encoded, encoder, batch)),
            (STEP, partial(step, partial(on_grid, encoder, batch), batch.device.type)),
        ):
            with one_operator_attention():
                row[what] = operators(run)
        rows.append(row)
    return rows


def compositions(batches: dict[float, TokenBatch]) -> dict[str, TokenBatch]:
    """Batches that differ in everything but their modality."""
    ratios = {max(batches), SHOWN, min(batches)}
    named = {f"ratio {ratio:g}": batches[ratio] for ratio in sorted(ratios, reverse=True)}
    return {**named, f"ratio {SHOWN}, two dates": with_dates(batches[SHOWN], 2)}


def peer_rows(
    setting: Setting,
    encoder: APTEncoder,
    batches: dict[float, TokenBatch],
    rounds: int,
    device: str,
) -> Rows:
    """Times over the encoder's."""
    batch, uniform = batches[SHOWN], batches[UNIFORM]
    contenders: dict[str, tuple[nn.Module, Forward]] = {
        "aptile": (encoder, partial(encoded, encoder, batch)),
        **peers(encoder, setting, batch, uniform),
    }
    found = taking_turns(contenders, rounds, device)
    return [
        {
            "what": f"peers: {setting.name}, ratio {SHOWN}: {name}",
            **{f"{w}, ms": 1e3 * statistics.median(found[name][w]) for w in (FORWARD, STEP)},
            **{
                f"{w}, times aptile's": median_ratio(found[name][w], found["aptile"][w])
                for w in (FORWARD, STEP)
            },
        }
        for name in found
    ]


def rows_of(folder: Path, args: Any) -> Iterator[Rows]:
    """Setting by setting."""
    settings, size = (QUICK, "nano") if args.quick else (SETTINGS, "tiny")
    if args.device == "cuda" and not args.quick:
        settings = [replace(setting, cells=GPU_CELLS) for setting in settings]
    rounds = 1 if args.quick else args.rounds
    ratios = (UNIFORM, SHOWN) if args.quick else RATIOS
    for number, setting in enumerate(settings):
        print(setting.name, file=sys.stderr)
        store = store_of(setting, args.archive, folder)
        batches = {r: b.to(args.device) for r, b in batches_of(store, setting, ratios).items()}
        encoder = encoder_of(batches[UNIFORM], store, size)
        yield speed_rows(setting, encoder, batches, rounds, args.device)
        yield [share_row(setting, encoder, batches[SHOWN], rounds, args.device)]
        if number < 2:
            yield peer_rows(setting, encoder, batches, min(rounds, 3), args.device)
        if number == 0:
            yield operator_rows(encoder, batches)
            yield part_rows(setting, encoder, batches) if args.device == "cpu" else []
        if number == min(1, len(settings) - 1):
            yield memory_rows(setting, encoder, batches, args.quick, args.device)
            yield gpu_rows(setting, store, ratios, rounds) if args.device == "cuda" else []
    yield [{"what": f"peers: {name}", "note": "not installed"} for name in absent()]


def main() -> None:
    args = arguments(__doc__, pictures=True, further=OPTIONS)
    if args.drawn_from is not None:
        draw(args.pictures or Path(), json.loads(args.drawn_from.read_text())["rows"])
        return
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(args.threads)
    how = {"torch": torch.__version__, "device": args.device, "threads": args.threads}
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for found in rows_of(Path(folder), args):
            rows += found
            if args.json is not None:
                save(rows, args.json, **how)
    print("\n\n".join(tables(rows).values()))
    if args.pictures is not None:
        draw(args.pictures, rows)


def draw(folder: Path, rows: Rows) -> None:
    # matplotlib takes seconds to load, also in every process that measures memory.
    import encoder_pictures

    encoder_pictures.draw(folder, rows)


if __name__ == "__main__":
    main()
