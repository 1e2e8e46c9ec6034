"""How a perceptron answers many rows: as fast as BLAS can without a row's bits depending on the batch that it is in.

BLAS picks its kernel, and so the order of its additions, by the shape of the whole product. So rows are multiplied in blocks of
one shape, padded with zeros. Which shapes are fast was measured, see `docs/adr/0003-blocks-of-eight-rows.md`.

K blocks of R rows, F features, H outputs of a layer, O outputs of the last one.
"""

import functools
from typing import NamedTuple

import numpy as np

from policies.network import ACTIVATIONS, Layers

# The same row in batches of 1, 3, 5 or 128 has different last bits; in blocks of 8 it has the same ones everywhere.
BLOCK_ROWS = 8
# Half a block takes half as long. With most kernels its rows have the bits of a whole one's, with some not: it is tried.
FEW_ROWS = 4
NUM_TRIALS = 32  # blocks: 256 rows, at most some milliseconds per shape and process
# Up to this many multiplications OpenBLAS uses kernels that read a matrix where it lies (AVX-512; others always pack it first):
# https://github.com/OpenMathLib/OpenBLAS/blob/develop/kernel/x86_64/sgemm_small_kernel_permit_skylakex.c
MAX_SMALL_PRODUCT = 1_000_000
PANEL_WIDTHS = (64, 16)  # a panel's width is a multiple of the first if it can be: what the kernels do at a time


class Panel(NamedTuple):
    """Some columns of a weight, [F, stop - start], contiguous: strided ones took up to twice as long."""

    start: int
    stop: int
    weight: np.ndarray


class BlockPerceptron:
    """Fully connected layers. Holds a copy of each weight that is too large for one small product, in panels of columns."""

    def __init__(self, layers: Layers, activation: str) -> None:
        # numpy adds equal shapes in half the time that it takes to repeat one row.
        self.layers = [(panels_of(weight), np.tile(bias, (BLOCK_ROWS, 1))) for weight, bias in layers]
        self._activate = ACTIVATIONS[activation]
        panels = [panel.weight for panels, _ in self.layers for panel in panels]
        self.min_rows = FEW_ROWS if all(_few_rows_have_the_same_bits(*panel.shape) for panel in panels) else BLOCK_ROWS

    def block_rows(self, num_rows: int) -> int:
        """Return how many rows a block must have for this many rows."""
        return self.min_rows if num_rows <= self.min_rows else BLOCK_ROWS

    def __call__(self, x_KRF: np.ndarray) -> np.ndarray:
        """Return the outputs [K, R, O] of contiguous blocks of `block_rows` rows."""
        last, block_rows = len(self.layers) - 1, x_KRF.shape[1]
        for index, (panels, bias_RH) in enumerate(self.layers):
            x_KRF = _multiply(x_KRF, panels)
            x_KRF += bias_RH[:block_rows]
            if index < last:
                self._activate(x_KRF, out=x_KRF)
        return x_KRF


def panels_of(weight: np.ndarray) -> list[Panel]:
    """Return a weight [F, H] in panels whose product with one block is small; in one piece when not even a narrow one's is."""
    num_features, num_columns = weight.shape
    limit = MAX_SMALL_PRODUCT // (BLOCK_ROWS * max(num_features, 1))
    width = next((limit // width * width for width in PANEL_WIDTHS if limit >= width), num_columns)
    if num_columns <= max(limit, width):
        return [Panel(0, num_columns, weight)]
    starts = range(0, num_columns, width)
    stops = [min(start + width, num_columns) for start in starts]
    return [Panel(start, stop, np.ascontiguousarray(weight[:, start:stop])) for start, stop in zip(starts, stops)]


def _multiply(x_KRF: np.ndarray, panels: list[Panel]) -> np.ndarray:
    """Return [K, R, H], one product of fixed shape per block and panel."""
    if len(panels) == 1:
        weight = panels[0].weight
        return np.dot(x_KRF[0], weight)[None] if len(x_KRF) == 1 else x_KRF @ weight  # `dot` costs less per call
    y_KRH = np.empty((*x_KRF.shape[:-1], panels[-1].stop), np.float32)
    for start, stop, weight in panels:
        np.matmul(x_KRF, weight, out=y_KRH[..., start:stop])
    return y_KRH


@functools.cache
def _few_rows_have_the_same_bits(num_features: int, num_columns: int) -> bool:
    """Try it with random numbers: another order of additions shows in the last bits of a quarter of the products or more."""
    if BLOCK_ROWS * num_features * num_columns > MAX_SMALL_PRODUCT:
        return False
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((num_features, num_columns), np.float32)
    x_KRF = rng.standard_normal((NUM_TRIALS, BLOCK_ROWS, num_features), np.float32)
    halves_KRF = x_KRF.reshape(-1, FEW_ROWS, num_features)
    return np.array_equal((halves_KRF @ weight).reshape(NUM_TRIALS, BLOCK_ROWS, num_columns), x_KRF @ weight)
