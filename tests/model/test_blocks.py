"""Blocks over packed sequences, against the same formulas under dense masks."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import gelu, silu
from torch.testing import assert_close

from model.attention import Packed
from model.blocks import Block, BlockStack, hidden_width
from model.config import HEAD_WIDTH, EncoderOptions
from model.encodings import apply_rotary
from model.sequences import plan, windowed

WIDTH, LENGTHS, NUM_ROWS = 128, (5, 0, 9, 1), 15
ALL_OPTIONS = {"qk_norm": True, "layer_scale": 0.3, "mlp": "swiglu"}


def pack(lengths):
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return Packed(cu_seqlens, max(lengths))


def make_stack(depth=2, seed=0, **options):
    """A stack whose every weight has moved away from its initial value."""
    torch.manual_seed(seed)
    stack = BlockStack(EncoderOptions(width=WIDTH, **options), depth)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return stack


def random_rows(num_rows=NUM_ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, WIDTH, generator=generator).requires_grad_()


def random_angles(num_rows, seed=1):
    angles = torch.rand(num_rows, 32, generator=torch.Generator().manual_seed(seed))
    return angles.cos(), angles.sin()


def dense_attention(block, x, may_see, rotary):
    heads = block.qkv(x).view(len(x), 3, WIDTH // HEAD_WIDTH, HEAD_WIDTH)
    q, k, v = heads.unbind(1)
    if block.q_norm is not None:
        q, k = block.q_norm(q), block.k_norm(k)
    if rotary is not None:
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
    logits = torch.einsum("nhk,mhk->hnm", q, k) / HEAD_WIDTH**0.5
    logits = logits.masked_fill(~may_see, -torch.inf)
    found = torch.einsum("hnm,mhk->nhk", logits.softmax(-1), v)
    return block.projection(found.flatten(1))


def dense_mlp(mlp, x):
    if hasattr(mlp, "gate"):
        return mlp.out(silu(mlp.gate(x)) * mlp.value(x))
    return mlp[2](gelu(mlp[0](x)))


def dense_stack(stack, x, masks, rotary=None):
    """The stack in evaluation, by one dense mask bool [N, N] per block."""
    for block, may_see in zip(stack.blocks, masks, strict=True):
        scales = [1.0 if s is None else s for s in (block.scale1, block.scale2)]
        x = x + scales[0] * dense_attention(block, block.norm1(x), may_see, rotary)
        x = x + scales[1] * dense_mlp(block.mlp, block.norm2(x))
    return stack.norm(x)


def same_sequence(packed, num_rows):
    owner = packed.sequence_of_row(num_rows)
    return owner[:, None] == owner


def gradients(out, stack, x):
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    inputs = (x, *stack.parameters())
    return torch.autograd.grad((out * weights).sum() / len(out), inputs)


@pytest.mark.parametrize("turned", [False, True], ids=["", "rotary"])
@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": True}, {"layer_scale": 0.3}, {"mlp": "swiglu", "mlp_ratio": 3}, ALL_OPTIONS],
    ids=str,
)
def test_packed_blocks_are_blocks_under_a_dense_mask(options, turned):
    stack, x, packed = make_stack(**options), random_rows(), pack(LENGTHS)
    rotary = random_angles(len(x)) if turned else None
    out = stack(x, packed, rotary)
    expected = dense_stack(stack, x, [same_sequence(packed, len(x))] * 2, rotary)
    assert_close(out, expected, rtol=0, atol=1e-5)
    assert_close(gradients(out, stack, x), gradients(expected, stack, x), rtol=0, atol=1e-5)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 99),
    per=st.sampled_from(["tile", "date"]),
    num_prefix=st.integers(0, 2),
    global_every=st.sampled_from([None, 2, 3]),
)
def test_windows_are_blocks_under_a_dense_mask(seed, per, num_prefix, global_every, make_tiles):
    tiles = make_tiles(seed, [(2, 0.2), (1, 0.0)], num_roots=(2, 2), num_scales=2)
    batch = tiles.pack()
    sequences = plan(batch, per, num_prefix=num_prefix)
    windows = windowed(batch, sequences, 2)
    stack = make_stack(depth=3, windows=2, global_every=global_every)
    x = random_rows(batch.num_tokens + sequences.num_sequences * num_prefix)
    rotary = random_angles(len(x))
    may_see = same_sequence(sequences.packed, len(x))
    y, x_cells = batch.positions[:, :2].unbind(1)
    squares = y * 2 // tiles.grid.rows * 2 + x_cells * 2 // tiles.grid.cols
    prefix = torch.full((sequences.num_sequences, num_prefix), 4)
    square = sequences.put(squares.long(), prefix)
    near = may_see & (square[:, None] == square)
    masks = [
        may_see if global_every and not number % global_every else near for number in (1, 2, 3)
    ]
    out = stack(x, sequences.packed, rotary, windows)
    expected = dense_stack(stack, x, masks, rotary)
    assert_close(out, expected, rtol=0, atol=1e-5)
    assert_close(gradients(out, stack, x), gradients(expected, stack, x), rtol=0, atol=1e-5)


def test_a_stack_with_windows_wants_them():
    with pytest.raises(ValueError, match="give those of the sequences as `windows`"):
        make_stack(windows=2)(random_rows(), pack(LENGTHS))


def test_a_swiglu_has_the_weights_of_an_mlp():
    sizes = {}
    for kind in ("gelu", "swiglu"):
        options = EncoderOptions(width=384, mlp=kind, mlp_ratio=3)
        mlp = Block(options).mlp
        sizes[kind] = sum(p.numel() for p in mlp.parameters() if p.ndim == 2)
        assert mlp[0].out_features == 3 * 384 if kind == "gelu" else True
        assert hidden_width(options) % 8 == 0
    assert sizes["swiglu"] == pytest.approx(sizes["gelu"], rel=0.01)


def test_a_layer_scale_starts_as_it_is_set():
    block = Block(EncoderOptions(width=WIDTH, layer_scale=1e-5))
    x, packed = random_rows(), pack(LENGTHS)
    assert_close(block(x, packed), x, rtol=0, atol=1e-4)
    assert not torch.equal(block(x, packed), x)
    assert block.scale1.shape == block.scale2.shape == (WIDTH,)


def dropping(rate, **options):
    """A block whose MLP adds nothing, so that attention's branch is all there is."""
    torch.manual_seed(0)
    block = Block(EncoderOptions(width=WIDTH, **options), drop_path=rate)
    with torch.no_grad():
        block.mlp[2].weight.zero_()
        block.mlp[2].bias.zero_()
    return block


def test_whole_sequences_lose_a_branch_and_the_others_make_up_for_it():
    block, lengths = dropping(0.75), [3] * 4000
    x, packed = random_rows(sum(lengths)), pack(lengths)
    with torch.no_grad():
        branch = block(x, packed) - x
        block.eval()
        whole = block(x, packed) - x
    branch, whole = (x.view(len(lengths), 3, WIDTH) for x in (branch, whole))
    dropped = ~branch.flatten(1).any(1)
    assert dropped.float().mean() == pytest.approx(0.75, abs=0.03)
    assert_close(branch[~dropped], 4 * whole[~dropped], rtol=0, atol=1e-4)


def test_evaluation_and_the_first_block_drop_nothing():
    stack, x, packed = make_stack(depth=3, drop_path=0.5), random_rows(), pack(LENGTHS)
    assert [block.drop_path for block in stack.blocks] == [0, 0.25, 0.5]
    plain = make_stack(depth=3)
    stack.eval()
    assert torch.equal(stack(x, packed), plain(x, packed))
    stack.train()
    assert not torch.equal(stack(x, packed), plain(x, packed))


def test_windows_of_a_sequence_are_dropped_together(make_tiles):
    batch = make_tiles(tiles=[(1, 0.0)] * 12, num_roots=(2, 2)).pack()
    sequences = plan(batch)
    windows = windowed(batch, sequences, 2)
    block = dropping(0.5)
    x = random_rows(batch.num_tokens)
    owner = sequences.packed.sequence_of_row(len(x))
    out = block(windows.enter(x), windows.packed, None, owner[windows.order])
    changed = (windows.leave(out) != x).any(1)
    per_sequence = [set(part.tolist()) for part in changed.split(sequences.packed.lengths)]
    assert all(len(kinds) == 1 for kinds in per_sequence)
    assert {True} in per_sequence
    assert {False} in per_sequence


@pytest.mark.parametrize("options", [{}, {"drop_path": 0.5, **ALL_OPTIONS}], ids=["", "all"])
def test_checkpointing_computes_twice_and_gives_the_same_gradients(options):
    results, calls = [], []
    for checkpointing in (False, True):
        stack = make_stack(checkpointing=checkpointing, **options)
        stack.blocks[0].register_forward_pre_hook(lambda *_: calls.append(len(results)))
        x = random_rows()
        torch.manual_seed(3)
        out = stack(x, pack(LENGTHS), random_angles(len(x)))
        results.append((out, *gradients(out, stack, x)))
    assert calls == [0, 1, 1]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("options", [{}, {"drop_path": 0.5, **ALL_OPTIONS}], ids=["", "all"])
def test_autocast_gives_near_and_finite_numbers(options):
    stack, x, packed = make_stack(**options), random_rows(), pack(LENGTHS)
    rotary = random_angles(len(x))
    torch.manual_seed(3)
    expected = stack(x, packed, rotary)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        out = stack(x, packed, rotary)
    assert_close(out.float(), expected, rtol=0, atol=0.1)
    assert all(gradient.isfinite().all() for gradient in gradients(out, stack, x))


def test_a_stack_in_sixteen_bits_stays_there():
    stack = make_stack(drop_path=0.5, **ALL_OPTIONS).bfloat16()
    x = random_rows().bfloat16()
    out = stack(x, pack(LENGTHS), random_angles(len(x)))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_gradients_are_those_of_finite_differences():
    stack = make_stack(**ALL_OPTIONS).double()
    x = random_rows(3).detach().double().requires_grad_()
    packed, rotary = pack([2, 0, 1]), tuple(t.double() for t in random_angles(3))
    assert torch.autograd.gradcheck(lambda x: stack(x, packed, rotary), x, fast_mode=True)


SHAPES = ([5, 0, 9, 1], [3, 4], [8, 8, 8], [40, 2, 3, 4, 5])
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)]
of_the_compiler_itself = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@of_the_compiler_itself
@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"drop_path": 0.5, **ALL_OPTIONS}, marks=pytest.mark.full),
        pytest.param({"checkpointing": True}, marks=pytest.mark.full),
    ],
    ids=["", "all", "checkpointing"],
)
def test_no_batch_makes_a_compiled_stack_compile_again(backend, options):
    torch._dynamo.reset()
    stack = make_stack(**options)
    # What inductor draws, it draws otherwise.
    stack.train(backend == "aot_eager")
    counter = CompileCounterWithBackend(backend)
    compiled, counts = torch.compile(stack, backend=counter, dynamic=True), set()
    for lengths in SHAPES:
        x, results = random_rows(sum(lengths)), []
        for one in (compiled, stack):
            torch.manual_seed(3)
            out = one(x, pack(lengths))
            results.append((out, *gradients(out, stack, x)))
        assert_close(*results, rtol=0, atol=1e-5)
        # The compiler may have needed two attempts at the first.
        counts.add(counter.frame_count)
    assert len(counts) == 1


@of_the_compiler_itself
@pytest.mark.parametrize("backend", COMPILERS)
def test_windows_rotations_and_fewer_bits_compile_once_too(backend, make_tiles):
    torch._dynamo.reset()
    stack = make_stack(depth=3, windows=2, global_every=2).eval()
    counter = CompileCounterWithBackend(backend)
    compiled, counts = torch.compile(stack, backend=counter, dynamic=True), set()
    for seed, tiles in enumerate([[(1, 0.2)], [(2, 0.1), (1, 0.3)], [(1, 1.0), (3, 0.0)]]):
        batch = make_tiles(seed, tiles, num_roots=(2, 2)).pack()
        sequences = plan(batch, num_prefix=1)
        windows = windowed(batch, sequences, 2)
        x = random_rows(batch.num_tokens + sequences.num_sequences)
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = (
                one(x, sequences.packed, random_angles(len(x)), windows)
                for one in (compiled, stack)
            )
        assert_close(out, expected, rtol=0, atol=0.05)
        counts.add(counter.frame_count)
    assert len(counts) == 1


def test_without_being_told_that_lengths_vary_the_compiler_finds_out_once():
    torch._dynamo.reset()
    stack, counter = make_stack(depth=1), CompileCounterWithBackend("eager")
    compiled, counts = torch.compile(stack, backend=counter), []
    for lengths in SHAPES:
        compiled(random_rows(sum(lengths)), pack(lengths))
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2]
