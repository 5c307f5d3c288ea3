"""Vision transformers of timm, small and with made-up weights, and what timm makes of an image with them.

`timm_goldens.safetensors` beside this file holds timm's answers, and which weights each model has; so tests
compare with timm where it is not installed. Run this file where it is (extra `bench`) to write the goldens.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

GOLDENS = Path(__file__).parent / "timm_goldens.safetensors"
SIDE, PATCH, BANDS = 16, 4, 3
MEAN, STD = (400.0, 500.0, 600.0), (200.0, 250.0, 300.0)

SILU = {"act_layer": "silu"}

# Arguments of timm's VisionTransformer besides those of all, below; `mlp_layer` by its name. timm gives
# even SwiGLU a GELU if it is not told otherwise.
MODELS = {
    "plain": {},
    "without class token": {"class_token": False, "global_pool": ""},
    "registers": {"reg_tokens": 3},
    "prefix without positions": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.3},
    "qk norm": {"qk_norm": True, "qkv_bias": False, "proj_bias": False},
    "packed swiglu": {**SILU, "mlp_layer": "SwiGLUPacked", "mlp_ratio": 5.0, "init_values": 0.3},
    "split swiglu": {
        **SILU,
        "mlp_layer": "SwiGLU",
        "mlp_ratio": 2.5,
        "embed_dim": 64,
        "num_heads": 1,
    },
    "no positions": {"pos_embed": "none"},
    "twice the layers": {"depth": 4, "mlp_ratio": 2.0, "embed_dim": 64, "num_heads": 1},
}
OF_ALL = {
    "img_size": SIDE,
    "patch_size": PATCH,
    "in_chans": BANDS,
    "num_classes": 0,
    "embed_dim": 128,
    "num_heads": 2,
    "depth": 2,
}


def image():
    """uint16 [band, y, x], 0 ... 999."""
    values = np.random.default_rng(7).random((BANDS, SIDE, SIDE))
    return np.floor(values * 1000).astype(np.uint16)


def timm_input():
    """The image as timm is given it, float32 [1, band, y, x]."""
    mean, std = (np.array(x)[:, None, None] for x in (MEAN, STD))
    return torch.from_numpy(((image() - mean) / std).astype(np.float32))[None]


def weights(shapes):
    """Numbers that follow from a tensor's name and shape alone."""
    return {name: _weight(name, tuple(shape)) for name, shape in shapes.items()}


def golden(model):
    """Shapes by name of a model's weights, and what comes out of its last norm, [prefix + patch, D]."""
    with safe_open(GOLDENS, framework="pt") as file:
        return json.loads(file.metadata()["shapes"])[model], file.get_tensor(model)


def build(model):
    """timm's own model with these weights."""
    from timm import layers
    from timm.models.vision_transformer import VisionTransformer

    options = {**OF_ALL, **MODELS[model]}
    if "mlp_layer" in options:
        options["mlp_layer"] = getattr(layers, options["mlp_layer"])
    vit = VisionTransformer(**options).eval()
    vit.load_state_dict(weights({name: w.shape for name, w in vit.state_dict().items()}))
    return vit


def write_goldens():
    vits = {model: build(model) for model in MODELS}
    shapes = {m: {n: list(w.shape) for n, w in v.state_dict().items()} for m, v in vits.items()}
    with torch.no_grad():
        tokens = {m: vit.forward_features(timm_input())[0].contiguous() for m, vit in vits.items()}
    save_file(tokens, GOLDENS, metadata={"shapes": json.dumps(shapes)})


def _weight(name, shape):
    spread = np.random.default_rng(zlib.crc32(name.encode())).random(shape) * 2 - 1
    if len(shape) == 1:
        # Norms and layer scales do something; biases are small.
        values = 0.2 * spread + (name.endswith(("weight", "gamma")))
    else:
        values = spread * (3 / np.prod(shape[1:])) ** 0.5
    return torch.from_numpy(values.astype(np.float32))


if __name__ == "__main__":
    write_goldens()
