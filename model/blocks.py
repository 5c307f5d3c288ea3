"""The transformer: pre-norm blocks over packed sequences.

`BlockStack` runs `Block`s over a packed buffer, some of them on windows if so configured, and norms what
comes out. The names of parameters are part of the checkpoint's format:

| name in a block | what |
|---|---|
| `norm1`, `norm2` | layer norms before attention and before the MLP |
| `qkv` | queries, keys and values of all heads, in this order, each head 64 wide |
| `q_norm`, `k_norm` | layer norms over a head's width, with `qk_norm` |
| `projection` | of what the heads found |
| `mlp.0`, `mlp.2` | the MLP's two layers with GELU between; `mlp.gate`, `mlp.value`, `mlp.out` for SwiGLU |
| `scale1`, `scale2` | layer scale of the two branches, [D], with `layer_scale` |

Shape suffixes are those of `model.batch`; here N are the rows of a packed buffer and S its sequences.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from model.attention import Packed, choose_attention
from model.config import HEAD_WIDTH, NORM_EPS, EncoderOptions
from model.encodings import apply_rotary
from model.sequences import Windows

# A SwiGLU has three matrices where an MLP has two; its inner width is rounded up to a multiple of 8.
_SWIGLU_SHARE, _SWIGLU_MULTIPLE = 2 / 3, 8

# cos, sin [N, 32] of every row, as `model.encodings` makes them
Rotary = tuple[Tensor, Tensor]


def layer_norm(width: int) -> nn.LayerNorm:
    """The layer norm used everywhere in the encoder."""
    return nn.LayerNorm(width, eps=NORM_EPS)


def hidden_width(options: EncoderOptions) -> int:
    """Inner width of an MLP: `mlp_ratio` times the width; for SwiGLU what takes as many weights."""
    wanted = options.mlp_ratio * options.width
    if options.mlp == "gelu":
        return int(wanted)
    return -(-int(wanted * _SWIGLU_SHARE) // _SWIGLU_MULTIPLE) * _SWIGLU_MULTIPLE


class SwiGLU(nn.Module):
    """`out(silu(gate(x)) * value(x))` (Shazeer, 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.value = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x_ND: Tensor) -> Tensor:
        out: Tensor = self.out(silu(self.gate(x_ND)) * self.value(x_ND))
        return out


def _mlp(options: EncoderOptions) -> nn.Module:
    width, hidden = options.width, hidden_width(options)
    if options.mlp == "swiglu":
        return SwiGLU(width, hidden)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Block(nn.Module):
    """Pre-norm transformer block: attention inside each sequence, then an MLP, each added to its input.

    `drop_path`, 0 ... below 1, is the probability with which a branch of a sequence is left out of a
    training step (stochastic depth, Huang et al. 2016); the branches kept are scaled by its complement's
    inverse, so that the expectation is what evaluation computes.
    """

    def __init__(self, options: EncoderOptions, drop_path: float = 0.0) -> None:
        super().__init__()
        width = options.width
        self.num_heads = width // HEAD_WIDTH
        self.drop_path = drop_path
        self.norm1 = layer_norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = layer_norm(HEAD_WIDTH) if options.qk_norm else None
        self.k_norm = layer_norm(HEAD_WIDTH) if options.qk_norm else None
        self.projection = nn.Linear(width, width)
        self.scale1 = _layer_scale(options)
        self.norm2 = layer_norm(width)
        self.mlp = _mlp(options)
        self.scale2 = _layer_scale(options)

    def forward(
        self,
        x_ND: Tensor,
        packed: Packed,
        rotary: Rotary | None = None,
        sequence_of_row: Tensor | None = None,
    ) -> Tensor:
        """[N, D]. `sequence_of_row` int64 [N] says which rows are dropped together.

        Without it those of one of the sequences of `packed` are.
        """
        owner = sequence_of_row
        if owner is None and self.training and self.drop_path:
            owner = packed.sequence_of_row(x_ND.shape[0])
        attended = self._attend(self.norm1(x_ND), packed, rotary)
        x_ND = x_ND + self._kept(attended, self.scale1, packed, owner)
        return x_ND + self._kept(self.mlp(self.norm2(x_ND)), self.scale2, packed, owner)

    def _attend(self, x_ND: Tensor, packed: Packed, rotary: Rotary | None) -> Tensor:
        qkv = self.qkv(x_ND).unflatten(1, (3, self.num_heads, HEAD_WIDTH))
        q_NHK, k_NHK, v_NHK = qkv.unbind(1)
        if self.q_norm is not None and self.k_norm is not None:
            q_NHK, k_NHK = self.q_norm(q_NHK), self.k_norm(k_NHK)
        if rotary is not None:
            q_NHK, k_NHK = apply_rotary(q_NHK, *rotary), apply_rotary(k_NHK, *rotary)
        # Norms and rotations may give wider numbers than autocast's products.
        q_NHK, k_NHK = q_NHK.to(v_NHK.dtype), k_NHK.to(v_NHK.dtype)
        attend = choose_attention(v_NHK.device.type, v_NHK.dtype)
        out: Tensor = self.projection(attend(q_NHK, k_NHK, v_NHK, packed).flatten(1))
        return out

    def _kept(
        self, branch_ND: Tensor, scale: Tensor | None, packed: Packed, owner: Tensor | None
    ) -> Tensor:
        """The branch with layer scale, and with some sequences' rows zero in training."""
        if scale is not None:
            branch_ND = branch_ND * scale
        if not self.training or not self.drop_path or owner is None:
            return branch_ND
        keep = 1 - self.drop_path
        # `packed` may be of windows: no fewer than the sequences.
        drawn_S = torch.rand(packed.num_sequences, device=branch_ND.device) < keep
        kept_S = drawn_S.to(branch_ND.dtype) / keep
        return branch_ND * kept_S.index_select(0, owner)[:, None]


def _layer_scale(options: EncoderOptions) -> nn.Parameter | None:
    if options.layer_scale is None:
        return None
    return nn.Parameter(torch.full((options.width,), options.layer_scale))


class BlockStack(nn.Module):
    """`depth` blocks and a final norm.

    Stochastic depth grows from 0 at the first block to `drop_path` at the last. With `windows`, blocks
    attend inside windows, but every `global_every`-th in whole sequences.
    """

    def __init__(self, options: EncoderOptions, depth: int) -> None:
        super().__init__()
        rates = torch.linspace(0, options.drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(options, rate) for rate in rates)
        self.in_windows = [in_windows(options, number) for number in range(1, depth + 1)]
        self.drop_path, self.checkpointing = options.drop_path, options.checkpointing
        self.norm = layer_norm(options.width)

    def forward(
        self,
        x_ND: Tensor,
        packed: Packed,
        rotary: Rotary | None = None,
        windows: Windows | None = None,
    ) -> Tensor:
        """[N, D] for the rows of a packed buffer; `rotary` and `windows` are of the same rows."""
        if windows is None and any(self.in_windows):
            raise ValueError("blocks attend in windows: give those of the sequences as `windows`")
        drops = self.training and self.drop_path
        owner = packed.sequence_of_row(x_ND.shape[0]) if drops else None
        whole = _Rows(packed, rotary, owner)
        within = None if windows is None else whole.inside(windows)
        inside = False
        for block, in_windows in zip(self.blocks, self.in_windows, strict=True):
            if windows is not None and in_windows != inside:
                x_ND = windows.enter(x_ND) if in_windows else windows.leave(x_ND)
            inside = in_windows
            x_ND = self._run(block, x_ND, within if within is not None and inside else whole)
        if windows is not None and inside:
            x_ND = windows.leave(x_ND)
        normed: Tensor = self.norm(x_ND)
        return normed

    def _run(self, block: nn.Module, x_ND: Tensor, rows: "_Rows") -> Tensor:
        arguments = (x_ND, rows.packed, rows.rotary, rows.sequence_of_row)
        if self.checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, *arguments, use_reentrant=False)
        else:
            out = block(*arguments)
        return out


@dataclass(frozen=True, eq=False)
class _Rows:
    """What a block is told of the rows it gets, in their order."""

    packed: Packed
    rotary: Rotary | None
    sequence_of_row: Tensor | None

    def inside(self, windows: Windows) -> "_Rows":
        rotary, owner = self.rotary, self.sequence_of_row
        return _Rows(
            windows.packed,
            rotary and (windows.enter(rotary[0]), windows.enter(rotary[1])),
            None if owner is None else owner.index_select(0, windows.order),
        )


def in_windows(options: EncoderOptions, number: int) -> bool:
    """Of block `number`, counted from 1."""
    if options.windows is None:
        return False
    return options.global_every is None or number % options.global_every != 0
