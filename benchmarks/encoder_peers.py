"""Other ways to encode the same number of tokens, for `bench_encoder.py`.

Each is a function of no arguments that runs a forward pass of a model of the same width, depth and head
width. Plain code for padded and masked attention, as one would write it, begins with the tokens that this
encoder embedded and merged. The packages know only patches of one size: they get the same number of base
patches per tile, but from anywhere in it.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from encoder_scenes import Setting, fresh
from model import APTEncoder, TokenBatch
from model.config import HEAD_WIDTH, NORM_EPS

Forward = Callable[[], Tensor]
PACKAGES = {"timm": "timm", "vit-pytorch": "vit_pytorch"}


def installed(package: str) -> bool:
    return find_spec(PACKAGES[package]) is not None


class PlainBlock(nn.Module):
    """The same block, on [B, n, D] with a mask of who sees whom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(2))
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BND: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x_BND)).unflatten(2, (3, self.heads, HEAD_WIDTH))
        q_BHNK, k_BHNK, v_BHNK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        seen = scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, attn_mask=mask)
        x_BND = x_BND + self.projection(seen.transpose(1, 2).flatten(2))
        return x_BND + self.mlp(self.norm2(x_BND))


class PlainBlocks(nn.Module):
    """Blocks and a norm: the bad ways to keep tiles of unequal length apart."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x_BND: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x_BND = block(x_BND, mask)
        return self.norm(x_BND)


def padded(encoder: APTEncoder, blocks: PlainBlocks, batch: TokenBatch) -> Tensor:
    """Every tile padded to the longest of the batch, masked keys."""
    x_BND, there_BN = batch.padded(encoder.embed(batch))
    return batch.unpad(blocks(x_BND, there_BN[:, None, None]))


def dense_mask(encoder: APTEncoder, blocks: PlainBlocks, batch: TokenBatch) -> Tensor:
    """The batch as one sequence with an N x N mask of blocks."""
    tile = batch.tile_of_token
    return blocks(encoder.embed(batch)[None], (tile[:, None] == tile)[None, None])[0]


def timm_vit(setting: Setting, num_bands: int, width: int, depth: int) -> nn.Module:
    """timm's plain ViT, of the same blocks, on images [F, C, y, x] as one sequence each."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=setting.tile_px,
        patch_size=setting.base_px,
        in_chans=num_bands,
        num_classes=0,
        global_pool="",
        class_token=False,
        embed_dim=width,
        depth=depth,
        num_heads=width // HEAD_WIDTH,
    )


def images_of(batch: TokenBatch) -> Tensor:
    """float32 [F, C, y, x]: the frames of a normalised batch."""
    return batch.modalities[0].band_sets[0].pixels


class _NaFlex(nn.Module):
    """timm's NaFlexViT on base patches, padded to the longest tile, with its mask of keys."""

    def __init__(self, setting: Setting, batch: TokenBatch, width: int, depth: int) -> None:
        super().__init__()
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

        side = setting.tile_px // setting.base_px
        config = NaFlexVitCfg(
            patch_size=setting.base_px,
            embed_dim=width,
            depth=depth,
            num_heads=width // HEAD_WIDTH,
            pos_embed_grid_size=(side, side),
            pos_embed_use_grid_sample=True,
            use_key_only_attn_mask=True,
            global_pool="avg",
        )
        images = images_of(batch)
        self.model = NaFlexVit(config, in_chans=images.shape[1], num_classes=0)
        lengths = batch.cu_seqlens.diff().long()
        of_tile = images.unflatten(0, (batch.num_tiles, -1))
        patches = of_tile.unflatten(4, (side, -1)).unflatten(3, (side, -1))
        # [B, dates * cells, P * P * C]
        patches = patches.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(1, 3)
        place = torch.arange(int(lengths.max()), device=images.device)
        cell = place % side**2
        coordinates = torch.stack([cell // side, cell % side], dim=1)
        self.inputs = {
            "patches": patches[:, : len(place)].contiguous(),
            "patch_coord": coordinates.expand(batch.num_tiles, -1, -1).contiguous(),
            "patch_valid": place < lengths[:, None],
        }

    def forward(self) -> Tensor:
        return self.model.forward_features(**self.inputs)["patches"]


class _NaViT(nn.Module):
    """vit-pytorch's NaViT on strips of as many base patches as the tiles have tokens.

    "packed" puts strips into sequences of up to the uniform grid's length, with an N x N mask;
    "nested" has them as a nested tensor.
    """

    def __init__(
        self, kind: str, setting: Setting, batch: TokenBatch, width: int, depth: int
    ) -> None:
        super().__init__()
        from vit_pytorch.na_vit import NaViT
        from vit_pytorch.na_vit_nested_tensor import NaViT as NestedNaViT

        p, images = setting.base_px, images_of(batch)
        self.longest = setting.cells_per_frame * setting.dates
        self.packed = kind == "packed"
        self.model = (NaViT if self.packed else NestedNaViT)(
            image_size=(p, p * self.longest),
            patch_size=p,
            num_classes=width,
            dim=width,
            depth=depth,
            heads=width // HEAD_WIDTH,
            mlp_dim=4 * width,
            channels=images.shape[1],
            **({} if self.packed else {"token_dropout_prob": 0.0}),
        )
        self.strips = _strips(images.unflatten(0, (batch.num_tiles, -1)), batch, p)

    def forward(self) -> Tensor:
        if self.packed:
            return self.model(self.strips, group_images=True, group_max_seq_len=self.longest)
        return self.model(self.strips)


def _strips(of_tile: Tensor, batch: TokenBatch, p: int) -> list[Tensor]:
    """Of every tile's images [B, dates, C, y, x], its first patches in a row: [C, p, p * n] each."""
    rows = of_tile.unflatten(3, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    ends = batch.cu_seqlens.tolist()
    return [
        row[..., : p * (end - start)].contiguous()
        for row, (start, end) in zip(rows, pairwise(ends), strict=True)
    ]


def peers(
    encoder: APTEncoder, setting: Setting, batch: TokenBatch, uniform: TokenBatch
) -> dict[str, tuple[nn.Module, Forward]]:
    """Every peer that is installed, by what it is called in the table, with its parameters."""
    width, depth = encoder.config.width, encoder.config.depth
    device = batch.device
    blocks = PlainBlocks(width, depth).to(device)
    found: dict[str, tuple[nn.Module, Forward]] = {
        "padded SDPA": (blocks, lambda: padded(encoder, blocks, fresh(batch))),
        "one N x N mask": (blocks, lambda: dense_mask(encoder, blocks, fresh(batch))),
    }
    if installed("timm"):
        images = images_of(uniform)
        vit = timm_vit(setting, images.shape[1], width, depth).to(device)
        if setting.dates == 1:
            found["timm ViT, all base patches"] = vit, lambda: vit(images)
        naflex = _NaFlex(setting, batch, width, depth).to(device)
        found["timm NaFlexViT, padded"] = naflex, naflex
    if installed("vit-pytorch"):
        for kind in ("packed", "nested"):
            navit = _NaViT(kind, setting, batch, width, depth).to(device)
            found[f"vit-pytorch NaViT, {kind}"] = navit, navit
    return found


def absent() -> Sequence[str]:
    return [package for package in PACKAGES if not installed(package)]
