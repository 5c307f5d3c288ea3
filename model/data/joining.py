"""Batches of several stores joined to one that has every modality and label of any of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.batch import TokenBatch, cumulative_lengths
from model.frames import BandSetPixels, LabelFrames, ModalityFrames
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Structure:
    """What all batches have in common: modalities and labels without a frame, tile or token.

    `stores` is the store that each name was first seen in.
    """

    modalities: Mapping[str, ModalityFrames]
    labels: Mapping[str, LabelFrames | Tensor]
    normalized: bool
    stores: Mapping[str, str]

    @classmethod
    def common(cls, structures: Sequence["Structure"]) -> "Structure":
        """The union of several; ConfigError, naming two stores, where they contradict each other."""
        first = structures[0]
        union = cls(
            dict(first.modalities), dict(first.labels), first.normalized, dict(first.stores)
        )
        for other in structures[1:]:
            _check_equal("pixels", union, other, union.normalized, other.normalized)
            for name, frames in other.modalities.items():
                if name in union.modalities:
                    own = union.modalities[name]
                    _check_equal(name, union, other, _facts(own), _facts(frames))
            for name, labels in other.labels.items():
                if name in union.labels:
                    own_labels = union.labels[name]
                    _check_equal(name, union, other, _facts(own_labels), _facts(labels))
            _check_labels_per_tile(union, other)
            union = cls(
                {**other.modalities, **union.modalities},
                {**other.labels, **union.labels},
                union.normalized,
                {**other.stores, **union.stores},
            )
        order = [name for s in structures for name in s.modalities]
        modalities = {name: union.modalities[name] for name in dict.fromkeys(order)}
        return replace(union, modalities=modalities)


def structure_of(batch: TokenBatch, store: str) -> Structure:
    """What a batch of a store says of all its batches."""
    names = ["pixels", *(m.name for m in batch.modalities), *batch.labels]
    return Structure(
        {m.name: _frames_of(m, []) for m in batch.modalities},
        {
            name: label[:0] if isinstance(label, Tensor) else _label_frames(label, [])
            for name, label in batch.labels.items()
        },
        batch.normalized,
        dict.fromkeys(names, store),
    )


def join(
    batches: Sequence[TokenBatch],
    starts: Sequence[int],
    structure: Structure,
    skipped: tuple[str, ...] = (),
) -> TokenBatch:
    """The tiles of all batches, one batch after another; `starts` are added to their `tile_indices`."""
    place = {name: number for number, name in enumerate(structure.modalities)}
    first_tile = [sum(b.num_tiles for b in batches[:i]) for i in range(len(batches))]
    counted = dict.fromkeys(structure.modalities, 0)
    frame, modality = [], []
    for batch in batches:
        names = [m.name for m in batch.modalities]
        own = batch.modality.long()
        frame.append(batch.frame + torch.tensor([counted[n] for n in names])[own])
        modality.append(torch.tensor([place[n] for n in names], dtype=torch.uint8)[own])
        for frames in batch.modalities:
            counted[frames.name] += frames.num_frames
    return TokenBatch(
        modalities=tuple(
            _frames_of(empty, _found(batches, first_tile, name))
            for name, empty in structure.modalities.items()
        ),
        labels={
            name: _joined_labels(name, empty, batches, first_tile)
            for name, empty in structure.labels.items()
        },
        scales=torch.cat([b.scales for b in batches]),
        positions=torch.cat([b.positions for b in batches]),
        frame=torch.cat(frame),
        modality=torch.cat(modality),
        band_set=torch.cat([b.band_set for b in batches]),
        mask=torch.cat([b.mask for b in batches]),
        cu_seqlens=cumulative_lengths(torch.cat([b.cu_seqlens.diff() for b in batches])),
        max_seqlen=max(b.max_seqlen for b in batches),
        tile_indices=torch.cat(
            [b.tile_indices + start for b, start in zip(batches, starts, strict=True)]
        ),
        location=torch.cat([b.location for b in batches]),
        normalized=structure.normalized,
        skipped=sum((b.skipped for b in batches), skipped),
        masked=any(b.masked for b in batches),
    )


def _found(
    batches: Sequence[TokenBatch], first_tile: Sequence[int], name: str
) -> list[ModalityFrames]:
    """A modality's frames in every batch that has it, their tiles counted over all batches."""
    return [
        replace(m, tile=m.tile + first)
        for batch, first in zip(batches, first_tile, strict=True)
        for m in batch.modalities
        if m.name == name and m.num_frames
    ]


def _frames_of(like: ModalityFrames, parts: Sequence[ModalityFrames]) -> ModalityFrames:
    """Frames of one modality, part after part; none, but of the same kind, if there is no part."""
    if len(parts) == 1:
        return parts[0]
    band_sets = tuple(
        BandSetPixels(
            own.name,
            own.bands,
            _cat(own.pixels, [p.band_sets[b].pixels for p in parts]),
            _cat(own.valid, [p.band_sets[b].valid for p in parts]),
            _cat(own.band_present, [p.band_sets[b].band_present for p in parts]),
        )
        for b, own in enumerate(like.band_sets)
    )
    per_scale = [p.tokens_per_scale for p in parts] or [(0,) * len(like.tokens_per_scale)]
    return replace(
        like,
        band_sets=band_sets,
        tile=_cat(like.tile, [p.tile for p in parts]),
        timestep=_cat(like.timestep, [p.timestep for p in parts]),
        timestamps=_cat(like.timestamps, [p.timestamps for p in parts]),
        tokens_per_scale=tuple(map(sum, zip(*per_scale, strict=True))),
        num_timesteps=max((p.num_timesteps for p in parts), default=1),
    )


def _label_frames(like: LabelFrames, parts: Sequence[LabelFrames]) -> LabelFrames:
    if len(parts) == 1:
        return parts[0]
    return replace(
        like,
        pixels=_cat(like.pixels, [p.pixels for p in parts]),
        valid=_cat(like.valid, [p.valid for p in parts]),
        tile=_cat(like.tile, [p.tile for p in parts]),
        timestep=_cat(like.timestep, [p.timestep for p in parts]),
    )


def _joined_labels(
    name: str, like: LabelFrames | Tensor, batches: Sequence[TokenBatch], first: Sequence[int]
) -> LabelFrames | Tensor:
    found = [(b.labels[name], f) for b, f in zip(batches, first, strict=True) if name in b.labels]
    if isinstance(like, Tensor):
        return torch.cat([label for label, _ in found if isinstance(label, Tensor)])
    return _label_frames(
        like,
        [
            replace(label, tile=label.tile + f)
            for label, f in found
            if isinstance(label, LabelFrames)
        ],
    )


def _cat(like: Tensor, parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else like[:0].clone()


def _facts(value: ModalityFrames | LabelFrames | Tensor) -> dict[str, Any]:
    """What must be equal in all stores, by the word for it."""
    match value:
        case ModalityFrames():
            sets = value.band_sets
            return {
                "base grid": value.grid,
                "static": value.static,
                "band sets": [s.name for s in sets],
                "bands": [s.bands for s in sets],
                "types": [str(s.pixels.dtype) for s in sets],
                "sizes in px": [tuple(s.pixels.shape[2:]) for s in sets],
            }
        case LabelFrames():
            pixels = value.pixels
            return {
                "type": str(pixels.dtype),
                "size in px": tuple(pixels.shape[2:]),
                "ignore_index": value.ignore_index,
            }
        case _:
            return {"type": str(value.dtype), "shape": tuple(value.shape[1:])}


def _check_equal(name: str, a: Structure, b: Structure, own: Any, other: Any) -> None:
    if not isinstance(own, dict) or not isinstance(other, dict):
        own, other = {"normalize": own}, {"normalize": other}
    if own.keys() != other.keys():
        raise ConfigError(
            f"labels {name!r} are rasters in one of {a.stores[name]} and {b.stores[name]}, and given "
            "per tile in the other; rename one of them"
        )
    for what, value in own.items():
        if value != other[what]:
            raise ConfigError(
                f"{name}: {what} {value} in {a.stores[name]}, {other[what]} in {b.stores[name]}; mixed "
                "stores must agree: preprocess them alike, or choose modalities, bands and dtype that do"
            )


def _check_labels_per_tile(a: Structure, b: Structure) -> None:
    per_tile = [{n for n, v in s.labels.items() if isinstance(v, Tensor)} for s in (a, b)]
    for name in per_tile[0] ^ per_tile[1]:
        raise ConfigError(
            f"labels {name!r} are given for the tiles of one of {a.stores['pixels']} and "
            f"{b.stores['pixels']} only; give them for both"
        )
