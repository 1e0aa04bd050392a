"""Matrices as bytes of shared memory: swizzles and the canonical layouts of wgmma operands.

PTX ISA, "Asynchronous warpgroup-level matrix instructions: Shared Memory Matrix Layout" and
"Tensor Copy: swizzling modes". Elements are 16 bits wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

K_MAJOR, MN_MAJOR = 0, 1
SPANS = (0, 128, 64, 32)  # swizzle spans in bytes, indexed by the descriptor's layout field
TENSOR_MAP_SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle counts the other way


def swizzle(offset: NDArray[np.int64], span: int) -> NDArray[np.int64]:
    """Byte offsets (from a 1024-byte aligned base) after the XOR of a span of 0, 32, 64, 128."""
    if span == 0:
        return offset
    return offset ^ (((offset >> 7) & (span // 16 - 1)) << 4)


@dataclass(frozen=True)
class Operand:
    """A (mn, k) operand in shared memory; k is a multiple of 16."""

    mn: int
    k: int
    major: int  # K_MAJOR or MN_MAJOR
    span: int  # swizzle span in bytes, 0: none

    @property
    def layout_code(self) -> int:
        return SPANS.index(self.span)

    @property
    def num_steps(self) -> int:
        return self.k // 16

    @property
    def leading_bytes(self) -> int:
        """LBO; not read by K-major swizzled layouts."""
        if self.span == 0:
            return 128 if self.major == K_MAJOR else self.mn // 8 * 128
        return 0 if self.major == K_MAJOR else self.k * self.span

    @property
    def stride_bytes(self) -> int:
        """SBO."""
        if self.span == 0:
            return self.k // 8 * 128 if self.major == K_MAJOR else 128
        return 8 * self.span

    @property
    def step_offsets(self) -> list[int]:
        """Byte offset of each k16 step's start address."""
        if self.span == 0:
            return [step * 2 * self.leading_bytes for step in range(self.num_steps)]
        if self.major == MN_MAJOR:
            return [step * 16 * self.span for step in range(self.num_steps)]
        columns = self.span // 2  # K-major: inside a swizzle row, then on to the next slab
        starts = [16 * step for step in range(self.num_steps)]
        return [k // columns * self.mn * self.span + k % columns * 2 for k in starts]

    @property
    def image_bytes(self) -> int:
        if self.span == 0:
            return self.mn * self.k * 2
        extent = self.k if self.major == K_MAJOR else self.mn
        num_slabs = -(-extent // (self.span // 2))
        return num_slabs * self.span * (self.mn if self.major == K_MAJOR else self.k)

    def _offset_in_step(self, mn: NDArray[np.int64], k: NDArray[np.int64]) -> NDArray[np.int64]:
        """Byte offset of (mn, k < 16) from the start address, before the swizzle."""
        leading, stride, span = self.leading_bytes, self.stride_bytes, self.span
        if span == 0:
            if self.major == K_MAJOR:
                return mn // 8 * stride + mn % 8 * 16 + k // 8 * leading + 2 * (k % 8)
            return mn // 8 * stride + 2 * (mn % 8) + k % 8 * 16 + k // 8 * leading
        if self.major == K_MAJOR:
            return mn // 8 * stride + mn % 8 * span + 2 * k
        columns = span // 2
        return mn // columns * leading + 2 * (mn % columns) + k % 8 * span + k // 8 * stride

    def offsets(self) -> NDArray[np.int64]:
        """Byte offset of every element, (mn, k)."""
        mn, k = np.ogrid[: self.mn, : self.k]
        start = np.array(self.step_offsets, dtype=np.int64)[k // 16]
        return swizzle(start + self._offset_in_step(mn, k % 16), self.span)

    def image(self, matrix: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """The operand's shared memory; what holds no element is NaN."""
        image = np.full(self.image_bytes // 2, 0x7FFF, dtype=np.uint16)
        image[self.offsets() // 2] = matrix
        return image

    def parameters(self, leading_bytes: int | None = None) -> list[int]:
        """An OperandCase of sm90_wgmma.cu."""
        leading = self.leading_bytes if leading_bytes is None else leading_bytes
        steps = self.step_offsets + [0] * (4 - self.num_steps)
        return [self.layout_code, leading, self.stride_bytes, self.image_bytes, *steps]
