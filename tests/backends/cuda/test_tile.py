"""Where the elements of tiles, fragments and boxes lie: csrc/cuda/tile against the PTX ISA.

Run by the emulator. What is expected is written here, and in probes.fragments, from the tables
of the PTX ISA, section by section; no function of csrc/cuda takes part in it. What the emulator
makes of the bare instructions is test_emulation.py's.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import pytest
from emulation.library import (
    AT_ISSUE,
    FOLDER,
    HOST_FLAGS,
    KERNEL_FLAGS,
    LATEST,
    ROOT,
    Emulator,
    build_runtime,
    compile_all,
    link,
    rewritten_jobs,
)
from probes.bits16 import bfloat16_bits, element_bits
from probes.fragments import mma_a_map, mma_b_map, mma_d_map, wgmma_d_map
from probes.probe import Array, Run

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulator switches stacks in x86-64 assembly"
)

KERNELS = tuple(sorted((FOLDER / "kernels/tile").glob("*.cu")))
HOST = (ROOT / "csrc/cuda/tensor_map.cpp", ROOT / "csrc/cuda/device.cpp")
UNTOUCHED = 0xEEEE


@dataclass(frozen=True)
class Tile:
    """SmemTile<rows, cols>, 16-bit elements."""

    index: int  # in emulation/kernels/tile/shapes.h
    rows: int
    cols: int

    @property
    def span(self) -> int:
        """Bytes of a row of a slab."""
        return 128 if self.cols % 64 == 0 else 64

    def places(self) -> Array:
        """Byte offset of element (row, col), (rows, cols).

        PTX ISA, "Tensor Copy: Swizzling Modes": slabs of one span are written densely, row after
        row, then the 16-byte chunk index of each address (bits 4 to 6 for 128 bytes, 4 and 5 for
        64) is XORed with address bits 7 and up.
        """
        row, col = np.ogrid[: self.rows, : self.cols]
        slab, byte = np.divmod(2 * col, self.span)
        dense = slab * self.rows * self.span + row * self.span + byte
        return dense ^ ((dense >> 7) % (self.span // 16) << 4)

    def image(self, matrix: Array) -> Array:
        """The matrix as the tile's bytes, in elements of two bytes."""
        elements = np.full(self.rows * self.cols, UNTOUCHED, dtype=np.uint16)
        elements[self.places() // 2] = matrix
        return elements


TILES = (Tile(0, 64, 32), Tile(1, 64, 64), Tile(2, 64, 96), Tile(3, 16, 128), Tile(4, 32, 256))
each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.rows}x{tile.cols}")


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    jobs = [*rewritten_jobs(KERNELS, {}, KERNEL_FLAGS), *rewritten_jobs(HOST, {}, HOST_FLAGS)]
    emulator = Emulator.load(link("layouts", compile_all(jobs), [build_runtime()]))
    emulator.set_device((9, 0), num_sms=4, shared_bytes=232448)
    emulator.configure(LATEST)
    return emulator


def numbered(rows: int, cols: int) -> Array:
    return np.arange(rows * cols, dtype=np.uint16).reshape(rows, cols)


def halves(registers: Array) -> Array:
    """32-bit registers as their 16-bit halves, low half first."""
    return registers.view(np.uint16).reshape(*registers.shape, 2)


def integers(*shape: int, seed: int = 0) -> Array:
    """Small enough that sums of products are exact in float32 and, once more, in 16 bits."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def spread(matrix: Array) -> Array:
    """(16 m, cols) as accumulators of 16 rows, (m, 32 lanes, cols / 2).

    PTX ISA, "Matrix Fragments for mma.m16n8k16": slots 4j .. 4j + 3 are the n8 tile j.
    """
    row, col = mma_d_map()
    tiles = matrix.reshape(matrix.shape[0] // 16, 16, matrix.shape[1] // 8, 8)
    slots = tiles.transpose(0, 2, 1, 3)[:, :, row, col]  # (m, j, lane, 4)
    return slots.transpose(0, 2, 1, 3).reshape(len(tiles), 32, -1)


# ---- tiles in shared memory --------------------------------------------------------------------
@each_tile
@pytest.mark.parametrize("access", range(3), ids=["element", "pair", "chunk"])
def test_elements_of_a_tile(emulator: Emulator, tile: Tile, access: int) -> None:
    """PTX ISA, "Tensor Copy: Swizzling Modes"."""
    out = np.zeros(tile.rows * tile.cols, dtype=np.uint16)
    placed = emulator.call("layout_place", Run(out, out, [tile.index, access]))
    assert np.array_equal(placed, tile.image(numbered(tile.rows, tile.cols)))


@each_tile
def test_eight_rows_of_a_chunk_meet_all_banks(tile: Tile) -> None:
    """The swizzle's purpose, of the formula itself: the 16-byte rows of an 8x8 matrix, as ldmatrix
    reads them, lie in eight different groups of four banks."""
    groups = tile.places()[:, ::8] // 16 % 8  # (rows, chunks)
    for first in range(0, tile.rows, 8):
        assert (np.sort(groups[first : first + 8], axis=0) == np.arange(8)[:, None]).all()


WINDOWS = {  # first row, valid rows, channels
    "whole": (0, 0, 64, None),
    "inside": (5, 0, 100, None),
    "ragged_end": (40, 0, 57, None),
    "before_the_start": (-7, 0, 64, None),
    "left_padded": (0, 11, 64, None),
    "nothing": (64, 0, 20, None),
    "few_channels": (0, 0, 64, 8),
    "ragged_both": (3, 9, 23, 24),
}


@each_tile
@pytest.mark.parametrize("as_window", [0, 1], ids=["row_of", "window"])
@pytest.mark.parametrize("name", WINDOWS)
def test_copied_rows(emulator: Emulator, tile: Tile, as_window: int, name: str) -> None:
    """PTX ISA, "cp.async": bytes beyond src-size are zeros. Rows outside are never touched: the
    emulator would end the launch, and the matrix holds nothing but valid rows after the first."""
    first_row, begin, end, channels = WINDOWS[name]
    channels = channels or tile.cols
    matrix = numbered(end, tile.cols) + 1
    matrix[:begin] = UNTOUCHED
    rows = first_row + np.arange(tile.rows)
    valid = (rows >= begin) & (rows < end)
    expected = np.where(valid[:, None], matrix[rows.clip(0, end - 1)], 0)
    expected[:, channels:] = 0
    out = np.zeros(tile.rows * tile.cols, dtype=np.uint16)
    params = [tile.index, as_window, first_row, begin, end, channels]
    copied = emulator.call("layout_copy", Run(matrix, out, params))
    assert np.array_equal(copied, tile.image(expected))


@each_tile
@pytest.mark.parametrize(("rows", "channels"), [(16, 32), (11, 24), (1, 8), (0, 32)])
def test_stored_rows(emulator: Emulator, tile: Tile, rows: int, channels: int) -> None:
    matrix = numbered(tile.rows, tile.cols)
    out = np.full(matrix.shape, UNTOUCHED, dtype=np.uint16)
    run = Run(tile.image(matrix), out, [tile.index, rows, channels])
    expected = out.copy()
    expected[:rows, :channels] = matrix[:rows, :channels]
    assert np.array_equal(emulator.call("layout_store", run), expected)


# ---- fragments and accumulators ----------------------------------------------------------------
def fragment_elements(loader: str) -> tuple[Array, Array]:
    """(row, col) of the tile that each slot holds, (32, 4, 2), counted from the fragment's corner.

    PTX ISA, "Matrix Fragments for mma.m16n8k16": A is (row, k); B is (k, n), here of two n8 tiles
    side by side.
    """
    if loader.startswith("a"):
        row, k = mma_a_map()
        return (k, row) if loader.endswith("transposed") else (row, k)
    k, n = (np.concatenate([index, index], axis=1) for index in mma_b_map())
    n = n + np.array([0, 0, 8, 8])[:, None]
    return (k, n) if loader.endswith("transposed") else (n, k)


@each_tile
@pytest.mark.parametrize("loader", ["a", "a_transposed", "b", "b_transposed"])
def test_fragments_of_a_tile(emulator: Emulator, tile: Tile, loader: str) -> None:
    """PTX ISA, "ldmatrix" and "Matrix Fragments for mma.m16n8k16"."""
    matrix = numbered(tile.rows, tile.cols)
    row, col = fragment_elements(loader)
    number = ["a", "a_transposed", "b", "b_transposed"].index(loader)
    for first_row in range(0, tile.rows, 16):
        for col16 in range(tile.cols // 16):
            params = [tile.index, number, first_row, col16]
            run = Run(tile.image(matrix), np.zeros((32, 4), dtype=np.uint32), params)
            found = halves(emulator.call("layout_fragment", run))
            assert np.array_equal(found, matrix[first_row + row, 16 * col16 + col])


def test_accumulators_and_their_a_fragments(emulator: Emulator) -> None:
    """PTX ISA, "Matrix Fragments for mma.m16n8k16": D, and A of a product over its columns."""
    row, col = np.ogrid[:16, :32]
    matrix = ((1 + 16 * row + col % 16) * (1 - 2 * (col // 16))).astype(np.float32)  # exact in bf16
    (acc,) = spread(matrix)
    out = emulator.call("layout_accumulator", Run(acc, np.zeros((32, 44), dtype=np.int32)))
    slots = out[:, :32].reshape(32, 16, 2)
    assert np.array_equal(matrix[slots[..., 0], slots[..., 1]], acc)
    fragments = halves(out[:, 32:40].copy().view(np.uint32).reshape(32, 2, 4))
    a_row, a_k = mma_a_map()
    for step in range(2):
        wanted = bfloat16_bits(matrix[a_row, 16 * step + a_k])
        assert np.array_equal(fragments[:, step], wanted)
    quads = acc[:, :2].reshape(8, 4, 2)  # the four lanes that share a row
    reduced = np.stack([quads.max(axis=1), quads.sum(axis=1)], axis=2)  # (quad, slot, operation)
    assert np.array_equal(out[:, 40:].reshape(8, 4, 2, 2), np.repeat(reduced[:, None], 4, axis=1))


@pytest.mark.parametrize("row", [0, 16, 48])
def test_accumulator_to_a_tile(emulator: Emulator, row: int) -> None:
    matrix = integers(16, 64)
    (acc,) = spread(matrix)
    out = np.zeros(64 * 64, dtype=np.uint16)
    whole = np.full((64, 64), UNTOUCHED, dtype=np.uint16)
    whole[row : row + 16] = bfloat16_bits(matrix)
    stored = emulator.call("layout_store_accumulator", Run(acc, out, [0, row]))
    assert np.array_equal(stored, TILES[1].image(whole))


def test_accumulator_to_float_rows(emulator: Emulator) -> None:
    matrix = integers(16, 64)
    (acc,) = spread(matrix)
    expected = np.full((32, 96), -1, dtype=np.float32)
    expected[16:, 32:] = 2 * matrix
    run = Run(acc, np.zeros((32, 96), dtype=np.float32), [1, 16])
    assert np.array_equal(emulator.call("layout_store_accumulator", run), expected)


@pytest.mark.parametrize("is_float16", [0, 1], ids=["bf16", "f16"])
@pytest.mark.parametrize("product", range(4), ids=["a_bt", "p_v", "p_b", "at_b"])
def test_products_of_a_warp(emulator: Emulator, product: int, is_float16: int) -> None:
    a, b, p = integers(32, 64, seed=1), integers(32, 96, seed=2), integers(32, 32, seed=3)
    expected = (
        lambda: a @ a[16:].T,
        lambda: p @ b,
        lambda: p[:, :16] @ b[16:, 16:80],
        lambda: a[:, 16:48].T @ b[:, 32:64],
    )[product]()
    a_bits, b_bits = (element_bits(x, bool(is_float16)) for x in (a, b))
    operand_b = np.concatenate(
        [Tile(-1, 32, 96).image(b_bits).view(np.uint8), spread(p).reshape(-1).view(np.uint8)]
    )
    out = np.full(spread(expected).shape, np.nan, dtype=np.float32)
    run = Run(Tile(-1, 32, 64).image(a_bits), out, [product, is_float16], operand_b)
    assert np.array_equal(emulator.call("layout_product", run), spread(expected))


# ---- sm_90a: boxes, descriptors, warpgroups ----------------------------------------------------
@dataclass(frozen=True)
class Box:
    """A box of the rows of one head of a (batch, heads, rows, channels) tensor."""

    name: str
    row: int = 0
    head: int = 1
    batch: int = 1
    rows: int = 70
    channels: int | None = None  # those of the tile
    expanded_head: bool = False
    expanded_batch: bool = False
    fused: bool = False  # strides of (batch, rows, heads, channels)


BOXES = (
    Box("inside", row=3),
    Box("end", row=45),
    Box("beyond", row=70),
    Box("before", row=-9),
    Box("few_channels", channels=24),
    Box("few_rows", rows=5, row=2),
    Box("expanded_head", expanded_head=True),
    Box("expanded_batch", expanded_batch=True, row=20),
    Box("fused", fused=True, row=33, channels=16),
)


@each_tile
@pytest.mark.parametrize("box", BOXES, ids=lambda box: box.name)
@pytest.mark.parametrize("completion", [AT_ISSUE, LATEST], ids=["at_issue", "latest"])
def test_boxes_of_a_tensor(emulator: Emulator, tile: Tile, box: Box, completion: int) -> None:
    """PTX ISA, "Tensor Copy: Tiled Mode" and "Swizzling Modes": boxes are dense, then swizzled, and
    zeros where they leave the tensor, in rows and in channels."""
    channels = box.channels or tile.cols
    heads, batch = (1 if box.expanded_head else 2), (1 if box.expanded_batch else 2)
    tensor = (np.arange(batch * heads * box.rows * channels) % 60000 + 1).astype(np.uint16)
    if box.fused:
        tensor = tensor.reshape(batch, box.rows, heads, channels)
        strides = [box.rows * heads * channels, channels, heads * channels]
        head = tensor[box.batch, :, box.head]
    else:
        tensor = tensor.reshape(batch, heads, box.rows, channels)
        strides = [heads * box.rows * channels, box.rows * channels, channels]
        head = tensor[box.batch % batch, box.head % heads]
    strides[0] *= not box.expanded_batch
    strides[1] *= not box.expanded_head
    expected = np.zeros((tile.rows, tile.cols), dtype=np.uint16)
    for row in range(tile.rows):
        if 0 <= box.row + row < box.rows:
            expected[row, :channels] = head[box.row + row]
    params = [tile.index, 2, 2, box.rows, channels, *strides, box.row, box.head, box.batch]
    out = np.zeros(tile.rows * tile.cols, dtype=np.uint16)
    emulator.configure(completion)
    copied = emulator.call("layout_box", Run(tensor, out, params))
    assert np.array_equal(copied, tile.image(expected))


def described(descriptor: int, mn: Array, k: Array, mn_major: bool) -> Array:
    """Shared address of element (mn, k), k < 16, that a matrix descriptor names.

    PTX ISA, "Asynchronous warpgroup-level matrix instructions: Matrix Descriptor Format" (bits 0-13
    start, 16-29 leading and 32-45 stride byte offset, in units of 16 bytes; 49-51 base offset;
    62-63 swizzle: 1 of 128, 2 of 64, 3 of 32 bytes) and "Shared Memory Matrix Layout".
    """
    start, leading, stride = (descriptor >> shift & 0x3FFF for shift in (0, 16, 32))
    assert descriptor >> 49 & 7 == 0
    span = {1: 128, 2: 64, 3: 32}[descriptor >> 62]
    if mn_major:
        slab, inside = np.divmod(mn, span // 2)
        offset = 16 * leading * slab + 2 * inside + k % 8 * span + k // 8 * 16 * stride
    else:
        offset = mn // 8 * 16 * stride + mn % 8 * span + 2 * k
    address = 16 * start + offset
    return address ^ ((address >> 7) % (span // 16) << 4)


@each_tile
def test_descriptors_name_the_elements_of_a_tile(emulator: Emulator, tile: Tile) -> None:
    """Every k16 step of the tile (mn, k), and of the tile read as (k, mn)."""
    out = emulator.call(
        "layout_descriptor", Run(np.zeros(1), np.zeros(33, np.uint64), [tile.index])
    )
    places = int(out[32]) + 1024 + tile.places()  # the tile lies 1024 bytes into shared memory
    for step in range(tile.cols // 16):
        mn, k = np.ogrid[: tile.rows, :16]
        found = described(int(out[step]), mn, k, mn_major=False)
        assert np.array_equal(found, places[:, 16 * step : 16 * step + 16])
    for step in range(tile.rows // 16):
        k, mn = np.ogrid[:16, : tile.cols]
        found = described(int(out[16 + step]), mn, k, mn_major=True)
        assert np.array_equal(found, places[16 * step : 16 * step + 16])


@pytest.mark.parametrize("is_float16", [0, 1], ids=["bf16", "f16"])
@pytest.mark.parametrize("completion", [AT_ISSUE, LATEST], ids=["at_issue", "latest"])
def test_products_of_a_warpgroup(emulator: Emulator, completion: int, is_float16: int) -> None:
    """PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16": A . B^T out of shared memory, and
    its rounded accumulators as A in registers of a product with B, MN-major."""
    operands = integers(64, 128, seed=1) // 2, integers(64, 128, seed=2) // 2
    scores = operands[0] @ operands[1].T
    assert np.abs(scores).max() <= 256  # so that bfloat16 holds them
    product = scores @ operands[1]
    images = [Tile(-1, 64, 128).image(element_bits(x, bool(is_float16))) for x in operands]
    emulator.configure(completion)
    run = Run(images[0], np.full(128 * 96, np.nan, np.float32), [is_float16], images[1])
    out = emulator.call("layout_wgmma", run)
    assert np.array_equal(out[: 128 * 32].reshape(128, 32), scores[wgmma_d_map(64)])
    assert np.array_equal(out[128 * 32 :].reshape(128, 64), product[wgmma_d_map(128)])


@pytest.mark.parametrize("row", [0, 16])
def test_stored_fragments(emulator: Emulator, row: int) -> None:
    """PTX ISA, "stmatrix"."""
    matrix = integers(16, 128)
    (acc,) = spread(matrix)
    whole = np.full((32, 128), UNTOUCHED, dtype=np.uint16)
    whole[row : row + 16] = bfloat16_bits(matrix)
    run = Run(acc, np.zeros(32 * 128, dtype=np.uint16), [row])
    stored = emulator.call("layout_store_fragments", run)
    assert np.array_equal(stored, Tile(-1, 32, 128).image(whole))
