"""Weights of timm's VisionTransformer in an APTEncoder, and back.

On uniform tokens both compute the same: every base cell a token, one frame a tile, its date unknown, all
pixels valid. The encoder then runs on any tokens, its merging as it is initialised.

| timm | here |
|---|---|
| `patch_embed.proj` | `embedding`; weights of validity 0, absent bands add nothing |
| `pos_embed` of patches | `encoding.grid`, less what the encodings of a first date and band set add |
| `cls_token`, `reg_token`, their `pos_embed` added | `prefix.learned` |
| `blocks.i`, `norm` | `stack.blocks.i`, `stack.norm`; see `_BLOCK` |
| `head` | left out |

Inputs timm wants as `(x - mean) / std` have the value range `value_range(mean, std)`.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from model.blocks import hidden_width
from model.config import HEAD_WIDTH, EncoderConfig, EncoderOptions, ModalityConfig, group_name
from model.encoder import APTEncoder
from model.encodings import sincos
from pipeline.errors import ConfigError

# Modules of a block, theirs and ours.
_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "qkv",
    "attn.q_norm": "q_norm",
    "attn.k_norm": "k_norm",
    "attn.proj": "projection",
    "norm2": "norm2",
}
_MLP = {
    "gelu": {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"},
    "swiglu": {"mlp.fc1_g": "mlp.gate", "mlp.fc1_x": "mlp.value", "mlp.fc2": "mlp.out"},
}
# Linear maps, which with timm's qkv_bias and proj_bias False have none.
_BIAS_OPTIONAL = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")
_LAYER_SCALE = {"ls1.gamma": "scale1", "ls2.gamma": "scale2"}
# Options under which a ViT of timm has a counterpart for everything but merging.
_EXPORTABLE = {
    "position": "learned",
    "size_position": False,
    "location_token": False,
    "windows": None,
}


def value_range(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """(low, high) of every band under which the encoder's normalised pixels are `(x - mean) / std`."""
    return tuple((m - s, m + s) for m, s in zip(mean, std, strict=True))


def load_vit(
    weights: Mapping[str, Tensor],
    num_heads: int,
    modality: ModalityConfig,
    cells: tuple[int, int] | None = None,
    **options: Any,
) -> APTEncoder:
    """An encoder with the weights of a VisionTransformer, its `state_dict()`.

    `num_heads` as of the model, whose weights do not tell; heads must be 64 wide. `modality` has one band
    set, of as many bands as the model has channels, in its order. `cells` are (rows, columns) of the
    positions, needed if they are no square. MLPs are taken to be timm's `Mlp` with GELU, or its `SwiGLU` or
    `SwiGLUPacked` with SiLU, which weights do not tell either. `options` are those of `EncoderConfig` that
    the weights leave open, as `merge`.

    Raises ConfigError for weights the encoder has no place for, such as a norm before the blocks or after
    pooling.
    """
    body = _Weights({n: w for n, w in weights.items() if not n.startswith("head.")})
    given = _split_packed(body)
    config = _config_of(given, num_heads, modality, cells, options)
    encoder = APTEncoder(config)
    state = encoder.state_dict()
    state.update(_state_of(given, config))
    for name, fresh in encoder.state_dict().items():
        if state[name].shape != fresh.shape:
            raise ConfigError(
                f"weights of a ViT: those for {name} have shape {tuple(state[name].shape)}, the encoder's "
                f"have {tuple(fresh.shape)}; {num_heads} heads of {HEAD_WIDTH} and "
                f"{len(modality.band_sets[0].bands)} bands were given"
            )
    encoder.load_state_dict(state)
    return encoder


def export_vit(encoder: APTEncoder) -> dict[str, Tensor]:
    """The encoder's weights as `state_dict()` of a VisionTransformer without a head.

    `pos_embed` has rows for prefix tokens too (timm's default), zeros; MLPs "swiglu" are timm's `SwiGLU`.
    Weights of merging and of absent bands are left out.

    Raises ConfigError for an encoder of several modalities or band sets, or with options that timm's model
    has not.
    """
    config, state = encoder.config, encoder.state_dict()
    group = _only_group(config)
    for option, needed in _EXPORTABLE.items():
        if getattr(config, option) != needed:
            raise ConfigError(
                f"export_vit: {option} is {getattr(config, option)!r}; a VisionTransformer needs "
                f"{needed!r}"
            )
    exported = {theirs: state[ours] for theirs, ours in _same_names(config) if ours in state}
    kernel = state[f"embedding.{group}.weight"]
    exported["patch_embed.proj.weight"] = kernel[:, :-1]
    # Of patches that are valid everywhere the validity channel is a constant.
    exported["patch_embed.proj.bias"] = state[f"embedding.{group}.bias"] + kernel[:, -1].sum((1, 2))
    grid_LD = state["encoding.grid"].flatten(1).T + _of_a_first_frame(config)
    grid_LD = grid_LD + functional.pad(
        state[f"encoding.band_sets.{group}"], (0, 3 * config.width // 4)
    )
    exported["pos_embed"] = functional.pad(grid_LD, (0, 0, config.num_prefix, 0))[None]
    if config.class_token:
        exported["cls_token"] = state["prefix.learned"][None, :1]
    if config.register_tokens:
        exported["reg_token"] = state["prefix.learned"][None, int(config.class_token) :]
    return {name: weight.contiguous().clone() for name, weight in exported.items()}


class _Weights(dict[str, Tensor]):
    def __missing__(self, name: str) -> Tensor:
        raise ConfigError(
            f"weights of a ViT: {name} is missing; needed are those of timm's VisionTransformer with "
            "learned norms, its last norm before pooling"
        )


def _config_of(
    given: Mapping[str, Tensor],
    num_heads: int,
    modality: ModalityConfig,
    cells: tuple[int, int] | None,
    options: Mapping[str, Any],
) -> EncoderConfig:
    width = given["norm.weight"].numel()
    if width != num_heads * HEAD_WIDTH:
        raise ConfigError(
            f"weights of a ViT: norm.weight has {width} numbers, and num_heads is {num_heads}; heads must "
            f"be {HEAD_WIDTH} wide"
        )
    registers = given["reg_token"].shape[1] if "reg_token" in given else 0
    num_prefix = ("cls_token" in given) + registers
    mlp: Literal["gelu", "swiglu"] = "swiglu" if "blocks.0.mlp.fc1_g.weight" in given else "gelu"
    return EncoderConfig(
        **options,
        modalities=(modality,),
        width=width,
        depth=len({name.split(".")[1] for name in given if name.startswith("blocks.")}),
        kernel_px=given["patch_embed.proj.weight"].shape[-1],
        position="learned",
        position_cells=_cells_of(given, num_prefix, cells),
        class_token="cls_token" in given,
        register_tokens=registers,
        mlp=mlp,
        mlp_ratio=_ratio(given["blocks.0.mlp.fc2.weight"].shape[1], width, mlp),
        qk_norm="blocks.0.attn.q_norm.weight" in given,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in given else None,
    )


def _cells_of(
    given: Mapping[str, Tensor], num_prefix: int, cells: tuple[int, int] | None
) -> tuple[int, int]:
    if "pos_embed" not in given:
        return (1, 1)
    length = given["pos_embed"].shape[1]
    fits = {length, length - num_prefix}
    squares = [(isqrt(n), isqrt(n)) for n in fits if n > 0 and isqrt(n) ** 2 == n]
    if cells is None and len(squares) == 1:
        return squares[0]
    if cells is None or cells[0] * cells[1] not in fits:
        raise ConfigError(
            f"weights of a ViT: pos_embed has {length} rows, perhaps with {num_prefix} prefix tokens', and "
            f"cells is {cells}; give the (rows, columns) of its patches"
        )
    return cells


def _ratio(hidden: int, width: int, mlp: Literal["gelu", "swiglu"]) -> float:
    """The `mlp_ratio` that gives this inner width."""
    share = 1.0 if mlp == "gelu" else 1.5
    # Half of one more where the division rounds down.
    for more in (0, 0.5):
        ratio = (share * hidden + more) / width
        if hidden_width(EncoderOptions(width=width, mlp=mlp, mlp_ratio=ratio)) == hidden:
            return ratio
    raise ConfigError(
        f"weights of a ViT: the inner width of its SwiGLU is {hidden}; it must be a multiple of 8"
    )


def _state_of(given: "_Weights", config: EncoderConfig) -> dict[str, Tensor]:
    """By our names; every weight given is used."""
    group, left = _only_group(config), _Weights(given)
    state = {}
    for theirs, ours in _same_names(config):
        if theirs not in given and theirs.removesuffix(".bias").endswith(_BIAS_OPTIONAL):
            rows = given[theirs.replace("bias", "weight")].shape[0]
            state[ours] = torch.zeros(rows)
        else:
            state[ours] = given[theirs]
            del left[theirs]
    # One more channel: validity.
    kernel = functional.pad(given["patch_embed.proj.weight"], (0, 0, 0, 0, 0, 1))
    state[f"embedding.{group}.weight"] = kernel
    state[f"embedding.{group}.bias"] = given["patch_embed.proj.bias"]
    del left["patch_embed.proj.weight"], left["patch_embed.proj.bias"]
    state[f"encoding.band_sets.{group}"] = torch.zeros(config.width // 4)
    state.update(_positions(left, config))
    if left:
        raise ConfigError(
            f"weights of a ViT: the encoder has no place for {', '.join(sorted(left))}; it takes those of "
            "timm's VisionTransformer with plain attention, and its last norm before pooling"
        )
    return state


def _positions(left: dict[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Prefix tokens and the grid, taken out of `left`."""
    assert config.position_cells is not None
    rows, cols = config.position_cells
    prefix_RD = torch.cat(
        [left.pop(name)[0] for name in ("cls_token", "reg_token") if name in left]
        or [torch.zeros(0, config.width)]
    )
    position_LD = left.pop("pos_embed", torch.zeros(1, rows * cols, config.width))[0]
    of_prefix, of_cells = position_LD.split([len(position_LD) - rows * cols, rows * cols])
    if len(of_prefix):
        prefix_RD = prefix_RD + of_prefix
    grid_LD = of_cells - _of_a_first_frame(config)
    state = {"encoding.grid": grid_LD.T.unflatten(1, (rows, cols))}
    if len(prefix_RD):
        state["prefix.learned"] = prefix_RD
    return state


def _of_a_first_frame(config: EncoderConfig) -> Tensor:
    """[D]: what the encodings add to every row of a frame of timestep 0 whose date is unknown."""
    quarter = config.width // 4
    return functional.pad(sincos(torch.zeros(1), quarter)[0], (quarter, 2 * quarter))


def _same_names(config: EncoderConfig) -> Iterator[tuple[str, str]]:
    """(theirs, ours) of weights that are the same."""
    modules = {**_BLOCK, **_MLP[config.mlp]}
    if not config.qk_norm:
        modules = {theirs: ours for theirs, ours in modules.items() if "_norm" not in ours}
    for i in range(config.depth):
        for theirs, ours in modules.items():
            for kind in ("weight", "bias"):
                yield f"blocks.{i}.{theirs}.{kind}", f"stack.blocks.{i}.{ours}.{kind}"
        if config.layer_scale is not None:
            for theirs, ours in _LAYER_SCALE.items():
                yield f"blocks.{i}.{theirs}", f"stack.blocks.{i}.{ours}"
    for kind in ("weight", "bias"):
        yield f"norm.{kind}", f"stack.norm.{kind}"


def _split_packed(weights: "_Weights") -> "_Weights":
    """`SwiGLUPacked` as `SwiGLU`: of its first layer the first half is the gate, the second the value."""
    split = _Weights()
    for name, weight in weights.items():
        head, fc1, kind = name.partition(".mlp.fc1.")
        inner = weights[f"{head}.mlp.fc2.weight"].shape[1] if fc1 else 0
        if fc1 and weight.shape[0] == 2 * inner:
            gate, value = weight.split(inner)
            split |= {f"{head}.mlp.fc1_g.{kind}": gate, f"{head}.mlp.fc1_x.{kind}": value}
        else:
            split[name] = weight
    return split


def _only_group(config: EncoderConfig) -> str:
    names = [group_name(m.name, s.name) for m in config.modalities for s in m.band_sets]
    if len(names) > 1:
        raise ConfigError(
            f"a VisionTransformer reads one band set of one modality, not {', '.join(names)}"
        )
    return names[0]
