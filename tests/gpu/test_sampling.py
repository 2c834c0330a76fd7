"""What a rank answers leaves the GPU with the step that made it."""

import time

import pytest
import torch

from twofold.worker.device import CUDA
from twofold.worker.sampler import compute_logprobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_log_probabilities_do_not_wait_for_the_next_step() -> None:
    """With two steps in flight they were copied when they were collected: behind the step launched in between."""
    device = CUDA(0)
    logits = torch.randn(64, 50_000, device="cuda")
    compute_logprobs(logits, torch.arange(64, device="cuda"), 20).to_cpu()
    torch.cuda.synchronize()
    tensors = compute_logprobs(logits, torch.arange(64, device="cuda"), 20).to_cpu()
    done = device.record()
    torch.cuda._sleep(2 * 10**9)  # the next step: about a second
    start = time.perf_counter()
    done.synchronize()
    found = tensors.to_numpy()
    assert time.perf_counter() - start < 0.3
    torch.cuda.synchronize()
    expected = logits.log_softmax(-1).diagonal().cpu().numpy()
    assert abs(found.logprobs[:, 0] - expected).max() < 1e-4
