"""A compiled encoder: the same numbers, and nothing compiled again for a batch of another shape."""

import pytest
import torch
from torch.testing import assert_close

SHAPES = (
    [(1, 0.0)], [(2, 0.2), (1, 0.0)], [(3, 0.1)] * 4, [(1, 0.3), (2, 0.0)], [(2, 0.0)] * 3,
)  # fmt: skip


# What the compiler itself does on its way through the encoder.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("options", [
    {},
    {"position": "rotary", "sequences": "date"},
    {"class_token": True, "register_tokens": 2, "location_token": True, "size_position": True},
    {"windows": 2, "global_every": 2, "class_token": True, "position": "rotary"},
], ids=str)  # fmt: skip
def test_no_batch_makes_a_compiled_encoder_compile_again(make_tiles, make_encoder, options):
    compiled_graphs = []

    def counting(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    encoder = make_encoder(**options)
    compiled, counts = torch.compile(encoder, backend=counting, dynamic=True), []
    for seed, tiles in enumerate(SHAPES):
        batch = make_tiles(seed=seed, tiles=tiles, num_roots=(2, 2)).pack()
        assert_close(compiled(batch).tokens, encoder(batch).tokens, rtol=0, atol=1e-5)
        counts.append(len(compiled_graphs))
    assert counts[0] > 0
    # The second batch may show that a size is no constant; no later one is news.
    assert counts[1:] == [counts[1]] * (len(SHAPES) - 1)
