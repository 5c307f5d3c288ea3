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
- with `--device cuda`: a base model in bf16 with every attention there is

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
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from torch import Tensor, nn
from torch.profiler import record_function

sys.path.insert(0, str(Path(__file__).parent))
from common import arguments, save
from encoder_clock import (
    BLOCKS,
    EMBED,
    FORWARD,
    MERGE,
    SCATTER,
    STEP,
    Forward,
    median_ratio,
    operators,
    parts_of,
    seconds,
    step,
    taking_turns,
)
from encoder_flops import flops_of
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
from model import APTEncoder, EncoderConfig, TokenBatch, attention
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
# Compared with peers: the first two.
LOOKED_INTO = [*SETTINGS[:2], *QUICK]
OPTIONS: dict[str, dict[str, Any]] = {
    "--archive": {"type": Path, "metavar": "FOLDER", "help": "scenes of one date each"},
    "--device": {"choices": ["cpu", "cuda"], "default": "cpu", "help": "where to run"},
    "--threads": {"type": int, "default": 1, "help": "of torch on a CPU"},
    "--rounds": {"type": int, "default": 5, "help": "how often all take turns"},
    "--drawn-from": {"type": Path, "metavar": "FILE", "help": "only draw, from these figures"},
}

Rows = list[dict[str, Any]]


def encoder_of(batch: TokenBatch, store: Any, size: str) -> APTEncoder:
    """A fresh encoder for the batch's band set."""
    torch.manual_seed(0)
    chosen = {m.name: [s.name for s in m.band_sets] for m in batch.modalities}
    config = EncoderConfig.for_store(store, chosen, size=size)
    return APTEncoder(config).to(batch.device)


def encoded(encoder: APTEncoder, batch: TokenBatch) -> Tensor:
    """[N, D]; nothing is taken over from an earlier call."""
    return encoder(fresh(batch)).tokens


def on_grid(encoder: APTEncoder, batch: TokenBatch) -> Tensor:
    batch = fresh(batch)
    tokens = encoder(batch).tokens
    with record_function(SCATTER):
        return to_grid(tokens, batch)[0]


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
        row = {"what": f"uniform, time over timm ViT: {setting.name}"}
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
            taken = seconds(partial(step, forward), device)
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
    scatter = {SCATTER: (_Nothing(), "forward")}
    rows = []
    for ratio in (UNIFORM, SHOWN):
        run = partial(step, partial(on_grid, encoder, batches[ratio]))
        encoder.zero_grad(set_to_none=True)
        shares = parts_of(run, methods | scatter, repeats=3)
        whole = min(seconds(run, "cpu") for _ in range(3))
        row: dict[str, Any] = {"what": f"step: {setting.name}, ratio {ratio}", "ms": 1e3 * whole}
        rows.append(row | {part: shares[part] for part in shares})
    return rows


class _Nothing:
    def forward(self) -> None: ...


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
        step(lambda: ways[way](encoder=encoder, batch=batch))
        return torch.cuda.max_memory_allocated() - before
    for parameter in (*encoder.parameters(), *blocks.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    before = psutil.Process().memory_info().rss
    step(lambda: ways[way](encoder=encoder, batch=batch))
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
            (STEP, lambda batch=batch: step(partial(on_grid, encoder, batch))),
        ):
            with one_operator_attention():
                row[what] = operators(run)
        rows.append(row)
    return rows


def compositions(batches: dict[float, TokenBatch]) -> dict[str, TokenBatch]:
    """Batches that differ in everything but their modality."""
    whole, shown = batches[UNIFORM], batches[SHOWN]
    named = {f"ratio {ratio:g}": batch for ratio, batch in batches.items()}
    return {"two dates": with_dates(shown, 2), "no merging": whole, **named}


@contextmanager
def one_operator_attention() -> Iterator[None]:
    """The CPU's attention runs operators per sequence; put some in its place whose number is fixed."""

    def sum_of_three(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        return q + k + v

    with mock.patch("model.blocks.choose_attention", return_value=sum_of_three):
        yield


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
        "aptile, all base patches": (encoder, partial(encoded, encoder, uniform)),
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


def gpu_rows(setting: Setting, store: Any, rounds: int) -> Rows:
    """A base model in bf16, with every attention there is, by ratio.

    Utilisation is of the fastest product of matrices of 8192 x 8192 in the same run.
    """
    peak = matmul_flops()
    batches = {r: b.to("cuda") for r, b in batches_of(store, setting, RATIOS).items()}
    encoder = encoder_of(batches[UNIFORM], store, "base")
    blocks = PlainBlocks(encoder.config.width, encoder.config.depth).to("cuda")
    contenders: dict[str, tuple[nn.Module, Forward]] = {}
    for ratio, batch in batches.items():
        for name, attend in packed_attentions().items():
            call = partial(with_attention, attend, partial(encoded, encoder, batch))
            contenders[f"{name}, ratio {ratio:g}"] = encoder, in_bf16(call)
        call = partial(padded, encoder, blocks, batch)
        both = nn.ModuleList([encoder, blocks])
        contenders[f"padded SDPA, ratio {ratio:g}"] = both, in_bf16(call)
    found = taking_turns(contenders, rounds, "cuda")
    rows = []
    for name, times in found.items():
        way, ratio = name.split(", ratio ")
        batch = batches[float(ratio)]
        row: dict[str, Any] = {"what": f"GPU: {setting.name}, {name}", "tokens": batch.num_tokens}
        # Forward; a backward pass has twice as many.
        flops = flops_of(encoder, batch)
        for what, factor in ((FORWARD, 1), (STEP, 3)):
            taken = statistics.median(times[what])
            row[f"{what}, tokens/s"] = batch.num_tokens / taken
            row[f"{what}, utilisation"] = factor * flops / taken / peak
            uniform = found[f"{way}, ratio {UNIFORM:g}"]
            row[f"{what}, speedup"] = median_ratio(uniform[what], times[what])
        row["FLOP ratio"] = flops_of(encoder, batches[UNIFORM]) / flops
        rows.append(row)
    return rows


def packed_attentions() -> dict[str, Any]:
    """Those of the encoder that can be had here, by name; private, as only one is ever chosen."""
    made = (attention._flash_attention(), attention._torch_varlen_attention())
    return {attend.__name__: attend for attend in made if attend is not None}


def with_attention(attend: Any, forward: Forward) -> Tensor:
    with mock.patch("model.blocks.choose_attention", return_value=attend):
        return forward()


def in_bf16(forward: Forward) -> Forward:
    def run() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return forward()

    return run


def matmul_flops(side: int = 8192) -> float:
    """FLOP/s of large matrix products in bf16."""
    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    return 2 * side**3 / min(seconds(lambda: a @ a, "cuda") for _ in range(10))


def rows_of(folder: Path, args: Any) -> Rows:
    """Setting by setting."""
    settings, size = (QUICK, "nano") if args.quick else (SETTINGS, "tiny")
    rounds = 1 if args.quick else args.rounds
    ratios = (UNIFORM, SHOWN) if args.quick else RATIOS
    rows: Rows = []
    for setting in settings:
        print(setting.name, file=sys.stderr)
        store = store_of(setting, args.archive, folder)
        batches = {r: b.to(args.device) for r, b in batches_of(store, setting, ratios).items()}
        encoder = encoder_of(batches[UNIFORM], store, size)
        rows += speed_rows(setting, encoder, batches, rounds, args.device)
        rows.append(share_row(setting, encoder, batches[SHOWN], rounds, args.device))
        if setting in LOOKED_INTO:
            rows += peer_rows(setting, encoder, batches, rounds, args.device)
        if setting == settings[0]:
            rows += operator_rows(encoder, batches)
            rows += part_rows(setting, encoder, batches) if args.device == "cpu" else []
        if setting == (settings[1] if len(settings) > 1 else settings[0]):
            rows += memory_rows(setting, encoder, batches, args.quick, args.device)
    return [*rows, *({"what": f"peers: {name}", "note": "not installed"} for name in absent())]


def main() -> None:
    args = arguments(__doc__, pictures=True, further=OPTIONS)
    if args.drawn_from is not None:
        draw(args.pictures or Path(), json.loads(args.drawn_from.read_text())["rows"])
        return
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(Path(folder), args)
    print("\n\n".join(tables(rows).values()))
    if args.json is not None:
        save(rows, args.json, torch=torch.__version__, device=args.device, threads=args.threads)
    if args.pictures is not None:
        draw(args.pictures, rows)


def draw(folder: Path, rows: Rows) -> None:
    # matplotlib takes seconds to load, also in every process that measures memory.
    import encoder_pictures

    encoder_pictures.draw(folder, rows)


if __name__ == "__main__":
    main()
