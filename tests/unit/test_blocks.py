"""Is each matrix cut so that its products are small ones, and is half a block only used where it has a whole one's bits?"""

import os
import subprocess
import sys

import numpy as np
import pytest

from policies.blocks import BLOCK_ROWS, FEW_ROWS, MAX_SMALL_PRODUCT, BlockPerceptron, panels_of


@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        # 1,000,000 / (8 rows * 128) = 976 columns would do.
        ((128, 512), [512]),
        # 1,000,000 / (8 * 512) = 244, of which 3 * 64 = 192 is a multiple of 64.
        ((512, 512), [192, 192, 128]),
        # 1,000,000 / (8 * 1024) = 122: 64.
        ((1024, 100), [100]),
        ((1024, 130), [64, 64, 2]),
        # 1,000,000 / (8 * 3136) = 39, less than 64: 2 * 16.
        ((3136, 70), [32, 32, 6]),
        # 1,000,000 / (8 * 8000) = 15: no panel of 16 is small enough.
        ((8000, 512), [512]),
    ],
)
def test_panels_are_as_wide_as_a_small_product_may_be(shape: tuple[int, int], widths: list[int]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape, np.float32)
    panels = panels_of(weight)
    assert [panel.stop - panel.start for panel in panels] == widths
    assert np.array_equal(np.concatenate([panel.weight for panel in panels], axis=1), weight)
    assert len(widths) == 1 or all(BLOCK_ROWS * panel.weight.size <= MAX_SMALL_PRODUCT for panel in panels)


def test_panels_compute_the_same_function() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape, np.float32) / 32 for shape in ((1024, 130), (130, 3))]
    biases = [rng.standard_normal(width, np.float32) for width in (130, 3)]
    x_KRF = rng.standard_normal((2, BLOCK_ROWS, 1024), np.float32)
    expected_KRO = np.maximum(x_KRF @ weights[0] + biases[0], 0) @ weights[1] + biases[1]
    found_KRO = BlockPerceptron(list(zip(weights, biases)), "relu")(x_KRF)
    np.testing.assert_allclose(found_KRO, expected_KRO, atol=1e-4)  # sums of 1024 and 130 float32 numbers of size 1/32


def test_a_kernel_whose_half_blocks_have_other_bits_is_found_out() -> None:
    """OpenBLAS's Haswell kernel multiplies 4 rows of 128 → 512 otherwise than 8: there a row alone needs a whole block.

    The negative control is in the same process: with half a block in spite of that, a row alone has other bits.
    """
    found = _on_haswell(
        """
        from tests.bundles import make_policy
        import numpy as np
        policy = make_policy(1, num_features=128, num_actions=18, hidden=(512, 512))
        obs_ND = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
        is_same = lambda: np.array_equal(policy.outputs(obs_ND), np.concatenate([policy.outputs(row[None]) for row in obs_ND]))
        rows, with_trial = policy.perceptron.min_rows, is_same()
        policy.perceptron.min_rows = 4
        print(rows, with_trial, is_same())
        """
    )
    assert found in (f"{BLOCK_ROWS} True False", f"{FEW_ROWS} True True"), found  # the latter where no kernel can be asked for
    if found.startswith(str(FEW_ROWS)):
        pytest.skip("this numpy has no Haswell kernel")


def _on_haswell(code: str) -> str:
    lines = "\n".join(line.strip() for line in code.strip().splitlines())
    variables = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = os.environ | variables  # two threads would share the product out otherwise
    done = subprocess.run([sys.executable, "-c", lines], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
