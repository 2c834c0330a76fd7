"""Ranks that Ray places on two machines: they answer as Transformers does, and no loss of rank, node or link shows."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from clusters import Machines, two_machines, wait_until
from harness import reference_continuation
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model

from twofold import LLM, SamplingParams
from twofold.executor.local import KEPT_MEMORY
from twofold.executor.ray import RayExecutor

ARGUMENTS: dict[str, Any] = {
    "prefill_context_parallel_size": 2,
    "distributed_executor_backend": "ray",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_num_batched_tokens": 64,
    "block_size": 8,
    "step_costs": '{"decode": [[1, 1.0, 1.0]], "prefill": [[1, 1.0, 1.0]]}',
}
PROMPTS = [np.random.default_rng(n).integers(3, VOCAB_SIZE, n).tolist() for n in (3, 20, 150)]
FAMILIES = ("deepseek_v3", "qwen3_moe", "llama")


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with two_machines() as machines, pytest.MonkeyPatch.context() as patch, machines.inside():
        for name, value in machines.environment.items():
            patch.setenv(name, value)
        patch.setenv("RAY_ADDRESS", machines.ray_address)
        yield machines


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        tiny_model(tiny_config(family)).save_pretrained(made[family])
    return made


@pytest.fixture(scope="module")
def llm(machines: Machines, folders: dict[str, Path]) -> Iterator[LLM]:
    """Of the tests of faults; its ranks are lost again and again. Fewer would do for it, but not at once."""
    with LLM(str(folders["llama"]), step_timeout=60.0, placement_timeout=300.0, min_ranks=1, **ARGUMENTS) as llm:
        yield llm


ENGINE = """
import json, sys, time
from twofold import LLM, SamplingParams
arguments, prompts = json.loads(sys.argv[2])
with LLM(sys.argv[1], **arguments) as llm:
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    print(json.dumps([output.outputs[0].token_ids for output in outputs]), flush=True)
    time.sleep(1e6)
"""


def start_engine(
    folder: Path, environment: Mapping[str, str], prompts: list[list[int]]
) -> "tuple[subprocess.Popen[str], list[list[int]]]":
    """An engine in a process of its own, with two ranks, and its answers."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINE, folder, json.dumps((ARGUMENTS, prompts))],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    answers = json.loads(process.stdout.readline())
    process.stdout.close()
    return process, answers


def test_nothing_is_left_of_an_engine_that_was_killed(machines: Machines, folders: dict[str, Path]) -> None:
    """Ranks on all machines end at once, and Ray takes back their places: engines of other tests get them."""
    engine, answers = start_engine(folders["qwen3_moe"], os.environ, PROMPTS)
    ranks = [*machines.ranks(0), *machines.ranks(1)]
    assert len(ranks) == 2
    engine.kill()
    engine.wait()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive
    check_answers(answers, "qwen3_moe")


@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_two_machines_answer_as_transformers_does(
    machines: Machines, folders: dict[str, Path], family: str, request: pytest.FixtureRequest
) -> None:
    """Over latents, and by heads: KV entries travel from machine to machine. (With experts: the test before.)"""
    if family == "llama":
        check_ranks(request.getfixturevalue("llm"), machines, family)
        return
    with LLM(str(folders[family]), **ARGUMENTS) as llm:
        check_ranks(llm, machines, family)


def check_ranks(llm: LLM, machines: Machines, family: str) -> None:
    executor, params = llm.engine.executor, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    assert isinstance(executor, RayExecutor)
    assert executor.runtime.num_nodes == 2
    assert num_ranks(machines) == [1, 1]
    assert machines.ranks(1)[0].environ().items() >= KEPT_MEMORY.items()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    check_answers([output.outputs[0].token_ids for output in outputs], family)
    assert llm.engine.is_idle


def check_answers(answers: list[list[int]], family: str) -> None:
    model = tiny_model(tiny_config(family))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = reference_continuation(model, prompt, 10)
        assert expected
        assert answer[: len(expected)] == expected


def num_ranks(machines: Machines) -> list[int]:
    return [len(machines.ranks(machine)) for machine in range(2)]


def with_fault(llm: LLM, fault: Callable[[], object]) -> list[list[int]]:
    """Answers to the prompts; the fault comes when each has three tokens of sixty."""
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(f"{number}", {"prompt_token_ids": prompt}, params)
    found: dict[int, list[int]] = {}
    is_due = True
    while engine.has_work:
        for output in engine.step_or_recover():
            found[int(output.request_id)] = output.outputs[0].token_ids
        if is_due and len(found) == len(PROMPTS) and min(map(len, found.values())) >= 3:
            is_due = False
            fault()
    assert not is_due
    return [found[number] for number in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    """Of ranks in good health."""
    return with_fault(llm, lambda: None)


def test_a_killed_rank_is_replaced(
    llm: LLM, machines: Machines, expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """No token is lost, and the log says where the rank was and how it ended."""
    restarts = llm.engine.stats.num_restarts
    assert with_fault(llm, lambda: machines.ranks(1)[0].kill()) == expected
    assert llm.engine.stats.num_restarts == restarts + 1
    assert f"rank 1 on {machines.addresses[1]} was killed by signal 9" in caplog.text
    assert num_ranks(machines) == [1, 1]


def test_a_killed_raylet_ends_its_ranks_and_the_engine_waits_for_it(
    llm: LLM, machines: Machines, expected: list[list[int]]
) -> None:
    """While Ray has one place for two ranks, the engine says what it waits for; then all streams go on."""

    def come_back() -> None:
        wait_until(lambda: "2 CPUs are needed" in str(llm.engine.waits.reason))
        machines.kill(1)
        machines.start_node(1)

    node = threading.Thread(target=come_back)

    def fault() -> None:
        machines.kill(1, "raylet")
        wait_until(lambda: not machines.ranks(1))
        node.start()

    assert with_fault(llm, fault) == expected
    node.join()
    assert llm.engine.waits.reason is None
    assert num_ranks(machines) == [1, 1]


def test_a_link_that_is_down_for_five_seconds_costs_nothing_else(
    llm: LLM, machines: Machines, expected: list[list[int]]
) -> None:
    """Neither the ranks' collectives nor their channels nor Ray end: the same ranks go on."""
    if not machines.has_link:
        assert with_fault(llm, lambda: None) == expected, "two nodes of one machine have no link"
        return
    ranks, restarts = [machines.ranks(machine) for machine in range(2)], llm.engine.stats.num_restarts
    plug = threading.Timer(5.0, machines.set_link, [True])

    def fault() -> None:
        machines.set_link(False)
        plug.start()

    assert with_fault(llm, fault) == expected
    plug.join()
    assert llm.engine.stats.num_restarts == restarts
    assert [machines.ranks(machine) for machine in range(2)] == ranks


def test_a_node_that_comes_back_under_another_address_is_used(
    llm: LLM, machines: Machines, expected: list[list[int]]
) -> None:
    """Its link is cut for good, its ranks end by themselves, and it joins the cluster anew."""
    lost = machines.ranks(1)

    def come_back() -> None:
        psutil.wait_procs(lost, timeout=60)
        machines.kill(1)
        machines.move(1, machines.addresses[1][:-1] + "9")
        if machines.has_link:
            machines.set_link(True)
        machines.start_node(1)

    node = threading.Thread(target=come_back)

    def fault() -> None:
        if machines.has_link:
            machines.set_link(False)
        else:
            machines.kill(1)  # there is no link that could be cut
        node.start()

    assert with_fault(llm, fault) == expected
    node.join()
    assert not any(process.is_running() for process in lost)
    assert llm.engine.executor._hosts == machines.addresses  # type: ignore[attr-defined]


def test_an_engine_goes_on_with_the_ranks_that_are_left(
    llm: LLM, machines: Machines, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it may, and the lost node does not come back in time. The next test has it ask for all again."""
    start = llm.engine._make_executor
    assert isinstance(start, partial)
    runtime, waits = start.args
    hasty = replace(runtime, engine=replace(runtime.engine, placement_timeout=1.0))
    monkeypatch.setattr(llm.engine, "_make_executor", partial(RayExecutor, hasty, waits))

    def fault() -> None:
        machines.kill(1)
        wait_until(lambda: not machines.ranks(1))

    assert with_fault(llm, fault) == expected
    assert num_ranks(machines) == [1, 0]
    assert llm.engine.runtime.num_ranks == 1
    machines.start_node(1)


def test_a_lost_head_is_waited_for(llm: LLM, machines: Machines, expected: list[list[int]]) -> None:
    """With Ray's head all places end, and so the ranks; requests outlive it, since the engine is no driver of Ray's."""

    def come_back() -> None:
        for machine in range(2):
            machines.kill(machine)
        for machine in range(2):
            machines.start_node(machine)

    node = threading.Thread(target=come_back)

    def fault() -> None:
        machines.kill(0, "gcs_server")
        wait_until(lambda: not machines.ranks(0))
        node.start()

    assert with_fault(llm, fault) == expected
    node.join()
    assert num_ranks(machines) == [1, 1]


def test_a_cluster_of_ones_own_is_bound_to_loopback_and_ends_with_its_engine(folders: dict[str, Path]) -> None:
    """Without RAY_ADDRESS the engine starts Ray on this machine: nobody asked for ports that others can reach."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    engine, _ = start_engine(folders["llama"], environment, PROMPTS[:1])
    family = psutil.Process(engine.pid).children(recursive=True)
    assert sum("twofold.worker" in process.cmdline() for process in family) == 2
    listening = {
        (process.name(), connection.laddr.ip)
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {ip.removeprefix("::ffff:") for _, ip in listening} <= {"127.0.0.1", "::1"}, listening
    engine.kill()
    engine.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
