"""Transformer blocks over packed tokens."""

from torch import Tensor, nn

from model.attention import choose_attention
from model.config import HEAD_WIDTH, NORM_EPS

MLP_RATIO = 4


class Block(nn.Module):
    """Pre-norm transformer block over packed tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = width // HEAD_WIDTH
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width)
        )

    def forward(self, x_ND: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        attend = choose_attention(x_ND.device.type)
        qkv = self.qkv(self.norm1(x_ND)).view(-1, 3, self.num_heads, HEAD_WIDTH)
        q_NHK, k_NHK, v_NHK = qkv.unbind(1)
        attended = attend(q_NHK, k_NHK, v_NHK, cu_seqlens, max_seqlen)
        x_ND = x_ND + self.projection(attended.flatten(1))
        return x_ND + self.mlp(self.norm2(x_ND))


class BlockStack(nn.Module):
    """Blocks and a final norm."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x_ND: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        for block in self.blocks:
            x_ND = block(x_ND, cu_seqlens, max_seqlen)
        return self.norm(x_ND)
