"""Ranks as processes, over gloo: they answer alike, share the weights, and none outlives its engine or hangs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from harness import generate, make_engine, reference_logprobs
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model
from transformers import AutoConfig, PreTrainedModel

from twofold import LLM, ConfigError, ModelError, RankDiedError, RequestError, RequestOutput, SamplingParams
from twofold.executor.local import LocalExecutor
from twofold.models.loader import empty_model, fill_randomly

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_num_batched_tokens": 64,
    "block_size": 8,
}
SECONDS = 20  # in which a process must be gone, also on a machine that is busy


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(tiny_config("llama"))


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llms(folder: Path) -> Iterator[dict[int, LLM]]:
    """One engine for each number of ranks."""
    made = {
        num_ranks: LLM(str(folder), prefill_context_parallel_size=num_ranks, **ARGUMENTS) for num_ranks in (1, 2, 3)
    }
    yield made
    for llm in made.values():
        llm.shutdown()


def pids_of(llm: LLM) -> list[int]:
    assert isinstance(llm.engine.executor, LocalExecutor)
    return llm.engine.executor.pids


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + SECONDS
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"orphans: {alive}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ranks_that_keep_shares_of_the_cache_answer_alike(folder: Path, llms: dict[int, LLM]) -> None:
    """They read each other's shares in a file that all map; answers at the second time begin with cached blocks."""
    arguments = ARGUMENTS | {"kv_cache": "sharded", "kv_cache_memory_bytes": 1 << 20}
    with LLM(str(folder), prefill_context_parallel_size=2, **arguments) as llm:
        assert llm.engine.is_sharded
        for _ in range(2):
            assert tokens_of(llm, GREEDY) == tokens_of(llms[1], GREEDY)
        assert llm.engine.is_idle
        assert llm.engine.kv_cache_capacity > 1.95 * (1 << 20) // (4 * 2 * 2 * 16 * 4)


PROMPTS = [np.random.default_rng(n).integers(3, VOCAB_SIZE, n).tolist() for n in (1, 3, 20, 150)]
GREEDY = SamplingParams(temperature=0, max_tokens=10, prompt_logprobs=0)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, seed=3, n=2, max_tokens=10, repetition_penalty=1.1)


def tokens_of(llm: LLM, params: SamplingParams | list[SamplingParams]) -> list[list[list[int]]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    return [[one.token_ids for one in output.outputs] for output in outputs]


def test_answers_are_the_same_for_any_number_of_ranks(llms: dict[int, LLM], model: PreTrainedModel) -> None:
    """Greedy and sampled, prompts in chunks; twice, so that the second pass finds prefixes in the cache."""
    params = [GREEDY, SAMPLED, GREEDY, SAMPLED]
    expected = tokens_of(llms[1], params)
    for llm in llms.values():
        for _ in range(2):
            assert tokens_of(llm, params) == expected
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], GREEDY, use_tqdm=False)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            assert output.prompt_logprobs is not None
            found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs, prompt, strict=True) if entry]
            np.testing.assert_allclose(found, reference_logprobs(model, prompt), rtol=0, atol=1e-4)
        assert llm.engine.is_idle


def weight_maps(pid: int) -> list[tuple[str, int]]:
    """(device and inode, bytes) of each mapping of the file that ranks share."""
    maps = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, _, _, device, inode, *name = line.split(maxsplit=5)
        if name and "twofold-weights" in name[0]:
            first, last = (int(address, 16) for address in addresses.split("-"))
            maps.append((f"{device} {inode}", last - first))
    return maps


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_share_the_memory_of_the_weights(llms: dict[int, LLM], model: PreTrainedModel, num_ranks: int) -> None:
    """All of them map one file in memory, as large as the weights; it has no name, so it goes with the last of them."""
    maps = [weight_maps(pid) for pid in pids_of(llms[num_ranks])]
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert all(sum(num_bytes for _, num_bytes in mine) >= size for mine in maps)
    assert len({file for mine in maps for file, _ in mine}) == 1
    for pid in pids_of(llms[num_ranks]):
        names = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "twofold-weights" in line]
        assert all(name.endswith("(deleted)") for name in names)


# --- What a user can do wrong; the engine goes on --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_token_ids": [3, VOCAB_SIZE]}, f"token id {VOCAB_SIZE} is out of range; .* 0 to {VOCAB_SIZE - 1}"),
        ({"prompt_token_ids": [-1]}, "token id -1 is out of range"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt_token_ids": [5] * 256}, "256 tokens, more than the 255 that max_model_len=256"),
        ("text", "skip_tokenizer_init"),
    ],
)
def test_a_wrong_prompt_leaves_the_others(llms: dict[int, LLM], prompt: Any, message: str) -> None:
    """None of the call's prompts is run, and the next call is answered as ever."""
    llm = llms[2]
    expected = tokens_of(llm, GREEDY)
    with pytest.raises(RequestError, match=message) as caught:
        llm.generate([{"prompt_token_ids": PROMPTS[2]}, prompt], GREEDY, use_tqdm=False)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("prompt 1: ")
    assert llm.engine.is_idle
    assert tokens_of(llm, GREEDY) == expected


def test_parameters_are_counted(llms: dict[int, LLM]) -> None:
    with pytest.raises(RequestError, match="2 prompts have 1 sampling_params"):
        llms[1].generate([PROMPTS[0], PROMPTS[1]], [GREEDY], use_tqdm=False)
    assert llms[1].engine.is_idle


def test_one_prompt_of_token_ids_may_come_bare(llms: dict[int, LLM]) -> None:
    """As with vLLM: a list of numbers is one prompt, a list of lists several."""
    llm = llms[2]
    (bare,) = llm.generate(PROMPTS[2], GREEDY, use_tqdm=False)
    several = llm.generate([PROMPTS[2], PROMPTS[1]], GREEDY, use_tqdm=False)
    assert bare.prompt_token_ids == several[0].prompt_token_ids == PROMPTS[2]
    assert bare.outputs[0].token_ids == several[0].outputs[0].token_ids
    assert bare.request_id != several[0].request_id


# --- Models and machines that do not fit -----------------------------------------------------------------------------


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def of_other_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))


def quantised(folder: Path) -> None:
    """AutoFP8's scales were not applied: the answer was garbage, and the exit code 0."""
    tensors = load_file(folder / "model.safetensors")
    scales = {f"{name}_scale": torch.ones(1) for name in tensors if "proj" in name}
    save_file(tensors | scales, folder / "model.safetensors", metadata={"format": "pt"})


def nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def recurrent(folder: Path) -> None:
    tiny_config("mamba").save_pretrained(folder)


def of_no_known_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "abacus"}')


BROKEN: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "a refused type": (recurrent, {}, r"\(mamba\) is not served: it is recurrent"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), {}, r"has no \*.safetensors"),
    "no configuration": (lambda path: (path / "config.json").unlink(), {}, "has no config.json"),
    "a configuration that is no JSON": (
        lambda path: (path / "config.json").write_text("{"),
        {},
        "configuration of model",
    ),
    "an unknown type": (of_no_known_type, {}, "configuration of model .*abacus"),
    "no directory": (shutil.rmtree, {}, "model"),
    "no tokenizer": (lambda path: None, {"skip_tokenizer_init": False}, "cannot load a tokenizer .* tokenizer="),
    "another tokenizer's name": (
        lambda path: None,
        {"skip_tokenizer_init": False, "tokenizer": "/no/such"},
        "'/no/such'",
    ),
    "weights cut off": (truncated, {}, "has a broken or incomplete model.safetensors"),
    "weights that lack a tensor": (without_a_tensor, {}, "lacks a tensor .* model.layers.2.mlp.up_proj.weight"),
    "weights of other shapes": (of_other_shapes, {}, r"of shape \[64, 64\] in model.safetensors, where config.json"),
    "quantised weights": (quantised, {}, r"has 28 tensors that the model does not use, such as .*_proj.weight_scale"),
    # This is found by the ranks.
    "weights that are NaN": (
        nan,
        {"prefill_context_parallel_size": 2},
        "has NaN in the tensor model.layers.2.mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_cannot_be_loaded(folder: Path, tmp_path: Path, name: str) -> None:
    """A line that says what is wrong with which model, and no process left. Missing weights are never made up."""
    break_it, arguments, message = BROKEN[name]
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    break_it(copied)
    children = set(psutil.Process().children())
    with pytest.raises(ModelError, match=message) as caught:
        LLM(str(copied), **(ARGUMENTS | arguments))
    assert "\n" not in str(caught.value)
    if arguments.get("tokenizer") is None:
        assert str(copied) in str(caught.value)
    assert set(psutil.Process().children()) <= children


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefill_context_parallel_size": 0}, "prefill_context_parallel_size must be .* at least 1, got 0"),
        ({"prefill_context_parallel_size": 10_000}, r"prefill_context_parallel_size must be at most \d+ .* got 10000"),
        ({"max_model_len": 257}, r"max_model_len must be at most the model's 256 positions .* got 257"),
        ({"prefill_size": 2}, "unknown engine argument 'prefill_size'"),
        ({"dtype": "float8"}, "dtype must be one of .* got 'float8'"),
        ({"partition_policy": "zigzag"}, "partition_policy must be one of .* got 'zigzag'"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization must be more than 0"),
        ({"kv_cache_memory_bytes": 10**15}, r"kv_cache_memory_bytes=10{15} is more than the \d+ bytes .* lower it"),
        ({"kv_cache_memory_bytes": 40_000}, r"the cache holds \d+ tokens, fewer than max_model_len=256.*at least \d+"),
    ],
)
def test_arguments_that_do_not_fit(folder: Path, arguments: dict[str, Any], message: str) -> None:
    """One case is a pool too small for one request, which only a rank that has loaded the model can tell."""
    with pytest.raises(ConfigError, match=message) as caught:
        LLM(str(folder), **(ARGUMENTS | arguments))
    assert "\n" not in str(caught.value)


# --- Ends ------------------------------------------------------------------------------------------------------------


def step_until_idle(llm: LLM) -> None:
    while llm.engine.has_unfinished_requests:
        llm.engine.step()


def test_a_rank_that_is_killed_ends_the_run(folder: Path) -> None:
    """The other rank waits for it in a collective and would wait for ever. An error says which one it was."""
    llm = LLM(str(folder), prefill_context_parallel_size=2, **ARGUMENTS)
    pids = pids_of(llm)
    prompt = {"prompt_token_ids": PROMPTS[3]}
    llm.engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=100))
    for _ in range(3):
        llm.engine.step()
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(RankDiedError, match="rank 1 was killed by signal 9") as caught:
        step_until_idle(llm)
    assert "\n" not in str(caught.value)
    wait_until_gone(pids)
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(RankDiedError, match="have ended"):
        llm.generate(prompt, GREEDY, use_tqdm=False)


@pytest.mark.parametrize("rank", [0, 1])
def test_generate_outlives_a_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    """A rank is killed in the midst of prefills and decodes; the answers are those of ranks in good health."""
    params = [GREEDY, SAMPLED, SAMPLED, GREEDY]
    with LLM(str(folder), prefill_context_parallel_size=2, **ARGUMENTS) as llm:
        expected = tokens_of(llm, params)
        pids, step, steps = pids_of(llm), llm.engine.step, count(1)

        def step_and_kill() -> list[RequestOutput]:
            if next(steps) == 3:
                os.kill(pids[rank], signal.SIGKILL)
            return step()

        monkeypatch.setattr(llm.engine, "step", step_and_kill)
        assert tokens_of(llm, params) == expected
        assert f"rank {rank} was killed by signal 9" in caplog.text
        assert llm.engine.stats.num_restarts == 1
        assert llm.engine.is_idle
        wait_until_gone(pids)


def test_a_rank_that_never_comes_up_is_noticed(llms: dict[int, LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards recovery: new ranks may hang while they load, too."""
    monkeypatch.setattr(LocalExecutor, "command", (sys.executable, "-c", "import time; time.sleep(1e6)"))
    with pytest.raises(RankDiedError, match="did not answer for 1 s"):
        LocalExecutor(llms[1].engine.runtime, start_timeout=1.0)


PARENT = """
import sys
from twofold import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], prefill_context_parallel_size=2, skip_tokenizer_init=True)
    print(*llm.engine.executor.pids, flush=True)
    while True:
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=50), use_tqdm=False)
"""


def test_no_rank_outlives_its_engine(folder: Path, tmp_path: Path) -> None:
    """A parent that is killed cleans nothing up: the kernel ends the ranks, also those that wait for one another or are
    stopped. In 1 of 5 tries the folder that they shared stayed behind; they share none any more.
    """
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        os.kill(pids[1], signal.SIGSTOP)
        time.sleep(0.3)  # now the other one is in a collective, and reads no message
        parent.kill()
        try:
            wait_until_gone(pids)
            assert not list(tmp_path.glob("twofold*"))
        finally:
            for pid in filter(is_running, pids):
                os.kill(pid, signal.SIGKILL)


def test_dummy_weights_are_the_same_on_every_rank(folder: Path, tmp_path: Path) -> None:
    """No weights are read then. And leaving the engine's context ends its ranks, with a request under way."""
    shutil.copy(folder / "config.json", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    model = empty_model(config, torch.float32, torch.device("cpu"))
    fill_randomly(model, 7)
    engine = make_engine(model, 1)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=10)
    expected = [[one.token_ids for one in output.outputs] for output in generate(engine, PROMPTS, params)]
    engine.shutdown()
    arguments = ARGUMENTS | {"load_format": "dummy", "prefill_context_parallel_size": 2, "seed": 7}
    with LLM(str(tmp_path), **arguments) as llm:
        pids = pids_of(llm)
        assert tokens_of(llm, params) == expected
        llm.engine.add_request("a", PROMPTS[2], GREEDY)
        llm.engine.step()
        assert all(is_running(pid) for pid in pids)
    wait_until_gone(pids)


INTERRUPTED = """
import os, signal, sys, threading, time
from twofold import LLM, SamplingParams

llm = LLM(sys.argv[1], prefill_context_parallel_size=2, skip_tokenizer_init=True)
llm.engine.max_steps_in_flight = int(sys.argv[2])
params = SamplingParams(temperature=0, max_tokens=60)
prompts = [[5, 6, 7], list(range(3, 90))]
expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
start = time.perf_counter()
llm.generate(prompts, params, use_tqdm=False)
usual, num_interrupted, slowest = time.perf_counter() - start, 0, 0.0
for number in range(24):
    timer = threading.Timer(usual * (number + 1) / 26, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        llm.generate(prompts, params, use_tqdm=False)
        timer.join()
        time.sleep(0.01)
    except KeyboardInterrupt:
        num_interrupted += 1
    start = time.perf_counter()
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)] == expected
    slowest = max(slowest, time.perf_counter() - start)
    assert llm.engine.is_idle
print(num_interrupted, llm.engine.stats.num_restarts, slowest, flush=True)
"""


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_an_interrupt_costs_no_rank(folder: Path, steps_in_flight: int) -> None:
    """After Ctrl-C in `generate` the next one cost 32 s in 1 of 12 tries: an answer of a rank had been taken from its
    pipe and lost, and the ranks were ended as hung."""
    command = [sys.executable, "-c", INTERRUPTED, str(folder), str(steps_in_flight)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    num_interrupted, num_restarts, slowest = done.stdout.split()
    assert int(num_interrupted) >= 12
    assert int(num_restarts) == 0
    assert float(slowest) < 10
