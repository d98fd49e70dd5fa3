"Jobs in processes: the same results to the bit, one line of errors, and nothing lost to a signal."
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from m2mkd import Augment, Data, Here, Lab, Meta, Processes, Runtime, Task, Training, ViT

TEACHER = ViT(depths=(1, 1), options=dict(embed_dim=16, num_heads=2, patch_size=4))
DIGITS = Task(train=Data(name="digits", per_class=20), test=Data(name="digits", split="test"))
SHORT = Training(epochs=2, batch_size=50, augment=Augment(flip=0))


def study(root, where):
    "Three students of a meta model of seed 0, as stages."
    lab = Lab(root, DIGITS, SHORT, runtime=Runtime(device="cpu"), floor=0, where=where)
    meta = lab.end_to_end("meta", Meta(like=TEACHER))
    def arm(name, seed):
        if name == "E2E": return lab.end_to_end(name, TEACHER, seed=seed)
        return lab.finetune(name, TEACHER, lab.incubate("incubate", TEACHER, meta, seed=seed), seed=seed)
    return lab.map(arm, ["E2E", "E2E", "incubated"], [0, 1, 1])


def kept(stage):
    "What must not depend on where a stage was made."
    lines = [{k: v for k, v in m.items() if k != "seconds"} for m in stage.metrics]
    return stage.path.name, lines, stage.results, stage.predictions().tolist()


def test_processes_give_the_results_of_one_process(tmp_path):
    here, there = study(tmp_path/"here", Here()), study(tmp_path/"there", Processes(2, threads=1))
    assert [kept(s) for s in here] == [kept(s) for s in there]
    for a, b in zip(here, there):
        assert all(torch.equal(v, b.state()[k]) for k, v in a.state().items())
    names = [sorted(p.name for p in root.iterdir()) for root in (tmp_path/"here", tmp_path/"there")]
    assert names[0] == names[1] and len(names[0]) > 6


def test_the_default_is_a_process_a_core(tmp_path):
    def who(seed):
        file = tmp_path/f"{seed}"
        if not file.exists(): file.write_text(f"{os.getpid()}")
        return int(file.read_text())
    lab = Lab(tmp_path/"lab", runtime=Runtime(device="cpu"))
    cores = len(os.sched_getaffinity(0))
    assert (os.getpid() in lab.map(who, range(4))) == (cores == 1)
    assert lab.map(who, [9]) == [os.getpid()]                  # a single job needs no process


def test_an_error_of_a_job_is_raised_here(tmp_path):
    lab = Lab(tmp_path, DIGITS, SHORT, runtime=Runtime(device="cpu"), where=Processes(2))
    with pytest.raises(ValueError, match="cannot name a folder") as e:
        lab.map(lambda name: lab.end_to_end(name, TEACHER), ["a", "/"])
    assert "in a process of its own" in e.value.__notes__[0]


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_wrong_numbers_of_processes(wrong):
    with pytest.raises(ValueError, match="should be a whole number from 1 on"): Processes(wrong)
    with pytest.raises(ValueError, match="should be a whole number from 1 on"): Processes(2, wrong)


def test_columns_of_one_length_and_a_where(tmp_path):
    with pytest.raises(ValueError, match=r"columns of one length, got \[2, 1\]"):
        Processes(2).map(pow, [1, 2], [3])
    with pytest.raises(TypeError, match=r"Processes\(2\)"): Lab(tmp_path, where=2)


LONG = """
import sys
from m2mkd import *
from m2mkd.where import Processes
task = Task(train=Data(name="digits"), test=Data(name="digits", split="test"))
model = ViT(depths=(1, 1), options=dict(embed_dim=16, num_heads=2, patch_size=4))
lab = Lab(sys.argv[1], task, Training(epochs=2000, batch_size=50, augment=Augment(flip=0)), runtime=Runtime(device="cpu"), where=Processes(2))
lab.map(lambda seed: lab.end_to_end("long", model, seed=seed), [0, 1, 2])
"""

def begun(root):
    "The stages that have trained some steps."
    return [p.parent for p in root.glob("*/metrics.jsonl") if len(p.read_text().splitlines()) > 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_processes_and_nothing_is_lost(tmp_path, number):
    run = subprocess.Popen([sys.executable, "-c", LONG, str(tmp_path)], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 300
    while len(begun(tmp_path)) < 2 and time.monotonic() < until: time.sleep(0.1)
    run.send_signal(number)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 128 + number, err
    assert out.count("long: stopped by SIGTERM") == 2 and "jobs: stopped by" in out, out
    for path in begun(tmp_path):
        assert (path/"checkpoint.pt").exists() and not (path/"done.json").exists()
    assert len(begun(tmp_path)) == 2                            # the third was not begun
