"""Products of few rows by our own kernel are those of the library."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

from twofold.models.transforms.few_row_linear import TUNINGS, Tuning  # noqa: E402

SHAPES = [([2048], 4096), ([256, 128], 512), ([33], 192), ([48, 20, 7], 200), ([1000, 17], 7168)]  # outputs, inputs
CLOSE = {"atol": 2e-2, "rtol": 2e-2}


def example(
    outputs: list[int], inputs: int, num_rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Weights are columns of wider ones, as in steps by heads."""
    torch.manual_seed(0)
    weights = [torch.randn(out, 2 * inputs, device="cuda", dtype=dtype) * inputs**-0.5 for out in outputs]
    return torch.randn(num_rows, inputs, device="cuda", dtype=dtype), [weight[:, inputs:] for weight in weights]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rows(outputs: list[int], inputs: int, dtype: torch.dtype) -> None:
    """One more row than the kernel serves goes to the library."""
    for num_rows in (0, 1, 2, 3, 4, 7, 16, 17):
        x, weights = example(outputs, inputs, num_rows, dtype)
        found = torch.ops.twofold.few_row_linear(x, weights)
        for ours, weight in zip(found, weights, strict=True):
            assert ours.is_contiguous()
            torch.testing.assert_close(ours, torch.nn.functional.linear(x, weight), **CLOSE)


@pytest.mark.parametrize("tuning", [tuning for *_, tuning in TUNINGS if tuning is not None])
def test_every_tuning_gives_the_same_bits_again(tuning: Tuning) -> None:
    from twofold.models.transforms.few_row_kernels import launch

    for outputs, inputs in SHAPES:
        x, weights = example(outputs, inputs, 3 if tuning.by_dot else 1, torch.bfloat16)
        first, second = (launch(x, weights, tuning) for _ in range(2))
        for ours, again, weight in zip(first, second, weights, strict=True):
            assert torch.equal(ours, again)
            torch.testing.assert_close(ours, torch.nn.functional.linear(x, weight), **CLOSE)


def test_rows_that_lie_apart_and_weights_of_float32() -> None:
    x, weights = example([64, 32], 256, 4, torch.float32)
    for ours, weight in zip(torch.ops.twofold.few_row_linear(x, weights), weights, strict=True):
        torch.testing.assert_close(ours, torch.nn.functional.linear(x, weight), **CLOSE)
    x, weights = example([64, 32], 256, 8, torch.bfloat16)
    for rows in (x[::2], x.t().contiguous().t()):
        for ours, weight in zip(torch.ops.twofold.few_row_linear(rows, weights), weights, strict=True):
            torch.testing.assert_close(ours, torch.nn.functional.linear(rows, weight), **CLOSE)
