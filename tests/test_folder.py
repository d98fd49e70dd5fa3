"A run folder that two may touch and that may be stopped or damaged at any moment."
import contextlib, errno, fcntl, os, resource, signal, stat, subprocess, threading, time

import pytest, torch

from m2mkd import folder as folders
from m2mkd import __main__ as command
from m2mkd.core import read_json, seeded, whole, write_json
from m2mkd.data import Batches
from m2mkd.folder import Folder, code, environment
from m2mkd.lock import owned, owner
from m2mkd.stop import GRACE, Stopped, stopping
from m2mkd.train import Phase, Runtime, end_to_end, train
from test_train import EVERY_STEP, PLAIN, Stop, digits, model, run, same, test_set  # noqa: F401 (fixtures)

RARELY = Runtime(device="cpu", log_steps=3)                  # a checkpoint only where a signal asks for one


# --- signals ---

def signalled(run, name, number, at, again=None, **others):
    "Train, and get the signal `number` in step `at` (or in the evaluation after it, where `at` is half a step more)."
    def send(terms, step):
        if step == at: os.kill(os.getpid(), number)
        return terms
    with pytest.raises(Stopped) as e: run(name, spoil=send, runtime=RARELY, **others)
    assert e.value.code == 128 + number

@pytest.mark.parametrize("number,at", [(signal.SIGTERM, 0), (signal.SIGINT, 3), (signal.SIGUSR1, 4), (signal.SIGTERM, 9)])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(run, tmp_path, capsys, number, at):
    "Also between two lines of the record and in the last step of an epoch; what follows is as if it had not come."
    before = signal.getsignal(number)
    run("straight", runtime=RARELY)
    signalled(run, "stopped", number, at)
    assert signal.getsignal(number) is before
    said = [line for line in capsys.readouterr().out.splitlines() if "stopped by" in line]
    assert said == [f"a, b: stopped by {signal.Signals(number).name}; the checkpoint of step {at + 1} of 10 is written, the next run goes on there"]
    assert {Folder(tmp_path/"stopped"/n).checkpoint()["step"] for n in "ab"} == {at + 1}
    run("stopped", runtime=RARELY)
    for n in "ab": assert same(tmp_path/"straight"/n, tmp_path/"stopped"/n)

@pytest.mark.parametrize("nth,step", [(1, 0), (3, 5), (5, 10)])
def test_a_signal_during_an_evaluation(digits, run, tmp_path, monkeypatch, nth, step):
    "It does not wait for the end: before the first step, after an epoch whose line is not written yet, at the very end."
    import test_train
    real, calls = test_train.evaluate, []
    def evaluate(*args):
        calls.append(args)
        if len(calls) == nth: os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    run("straight", runtime=RARELY)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(test_train, "evaluate", evaluate)
        run("stopped", runtime=RARELY)
    assert len(calls) == nth
    assert [s["step"] for n in "ab" if (s := Folder(tmp_path/"stopped"/n).checkpoint())] == [step] * 2 * (step > 0)
    run("stopped", runtime=RARELY)
    for n in "ab": assert same(tmp_path/"straight"/n, tmp_path/"stopped"/n)

def test_a_kill_between_the_very_first_checkpoints(run, tmp_path, monkeypatch):
    "One of two models that train together has a checkpoint, the other none yet: both start again."
    run("straight")
    save = Folder.save_checkpoint
    def stop(self, state):
        if self.path.name == "b": raise Stop
        save(self, state)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Folder, "save_checkpoint", stop)
        run("one")
    run("one")
    assert same(tmp_path/"straight/a", tmp_path/"one/a") and same(tmp_path/"straight/b", tmp_path/"one/b")

def test_who_was_alone_before_goes_on_from_its_own_checkpoint(digits, run, tmp_path):
    "And pays for its own: what the models that train together share is shared step by step."
    def alone(stop=None):
        phase = end_to_end(model(1), 0, "a")
        def loss(models, x, y, step):
            if step == stop: raise Stop
            return phase.loss(models, x, y, step)
        batches = Batches(digits, PLAIN.batch_size, PLAIN.augment, seed=3)
        return train(Phase(phase.trains, loss), batches, PLAIN, {"a": tmp_path/"one/a"}, runtime=EVERY_STEP)
    with pytest.raises(Stop): alone(stop=1)
    assert Folder(tmp_path/"one/a").checkpoint()["step"] == 1 and len(Folder(tmp_path/"one/a").generations()) == 1
    seen = []
    run("one", spoil=lambda terms, step: seen.append((step, *terms)) or terms)
    assert seen[:11] == [(s, "b") for s in range(10)] + [(1, "a")]
    straight = run("straight")
    for n in "ab": assert Folder(tmp_path/"one"/n).done()["flops"] == straight[n]["flops"]

def test_a_second_signal_does_not_wait(run, tmp_path, monkeypatch):
    "It comes while the checkpoint is written: nothing half-written stays, and the run ends as it should all the same."
    run("straight", runtime=RARELY)
    def save(self, state): raise KeyboardInterrupt                    # what SIGINT does where nobody handles it
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Folder, "save_checkpoint", save)
        signalled(run, "stopped", signal.SIGINT, 3)
    run("stopped", runtime=RARELY)
    assert same(tmp_path/"straight/a", tmp_path/"stopped/a")

@pytest.mark.parametrize("twin", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_twice_is_one(run, tmp_path, twin):
    "A group's and the relay's, some milliseconds apart: the checkpoint is written, the exit code is the first one's."
    def send(terms, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.005, os.kill, (os.getpid(), twin)).start()
        return terms
    with pytest.raises(Stopped) as e: run("stopped", spoil=send, runtime=RARELY)
    assert e.value.code == 143 and {Folder(tmp_path/"stopped"/n).checkpoint()["step"] for n in "ab"} == {4}

def test_a_twin_after_the_end_of_all_blocks():
    "Where nothing is under way the process waits for it, so that it does not meet the caller's handler."
    called = []
    before = signal.signal(signal.SIGUSR1, lambda *_: called.append("own"))
    try:
        with pytest.raises(Stopped), stopping("outer"), stopping("inner"):
            threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            os.kill(os.getpid(), signal.SIGUSR1)
        assert called == ["own"]
    finally: signal.signal(signal.SIGUSR1, before)

def test_a_signal_after_the_grace_acts_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt), stopping("lesson") as stop, stop.held():
        for _ in range(3): os.kill(os.getpid(), signal.SIGINT)
        done.append("as one")
        stop.at -= GRACE
        os.kill(os.getpid(), signal.SIGINT)
        done.append("not reached")
    assert done == ["as one"] and stop.torn

def test_the_relay_passes_a_twin_on_once(monkeypatch):
    class Kernel:
        got = []
        def send_signal(self, number): self.got.append(number)
        def kill(self): self.got.append("kill")
    class Process:
        def children(self): return [Kernel()]
    def leave(code): raise SystemExit(code)
    monkeypatch.setattr(command.psutil, "Process", Process)
    monkeypatch.setattr(command.os, "_exit", leave)
    relay = command._Relay()
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM): relay(number, None)
    assert Kernel.got == [signal.SIGUSR1] and relay.came == signal.SIGUSR1
    relay.at -= GRACE
    with pytest.raises(SystemExit, match="143"): relay(signal.SIGTERM, None)
    assert Kernel.got[1:] == ["kill"]

def test_a_child_forked_while_another_thread_draws_can_draw():
    inside, leave = threading.Event(), threading.Event()
    def hold():
        with seeded(0, "other"): inside.set(), leave.wait()
    thread = threading.Thread(target=hold)
    thread.start(), inside.wait()
    child = os.fork()
    if not child:
        signal.alarm(5)
        with seeded(0, "mine"): os._exit(0)
    leave.set(), thread.join()
    assert os.waitpid(child, 0)[1] == 0

def test_whose_handlers_they_are():
    "What was ignored stays ignored, a caller's own handler is called behind the saving, another thread has none."
    called = []
    with contextlib.ExitStack() as stack:
        for number, handler in ((signal.SIGUSR1, lambda *_: called.append("own")), (signal.SIGTERM, signal.SIG_IGN)):
            stack.callback(signal.signal, number, signal.signal(number, handler))
        with pytest.raises(Stopped), stopping("outer"), stopping("inner") as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            with stop.held():
                os.kill(os.getpid(), signal.SIGUSR1)
                called.append("end of the step")
        assert called == ["end of the step", "own"]
    def elsewhere():
        with stopping("thread"): called.append(signal.getsignal(signal.SIGTERM))
    thread = threading.Thread(target=elsewhere)
    thread.start(), thread.join()
    assert called[-1] == signal.getsignal(signal.SIGTERM)


# --- one owner ---

def in_a_child(what):
    "Fork, and call what() there; the child's id."
    if (child := os.fork()): return child
    try: what()
    finally: os._exit(0)

def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end: time.sleep(0.02)
    return condition()

def hold(folder):
    with owned(folder):
        (folder/"left.npy.123.partial").touch(), (folder/".tmpAbc").touch()
        time.sleep(60)

@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_a_killed_owner_frees_the_stage(tmp_path, capsys, monkeypatch, locks):
    "The second says whom it waits for, goes on when that one was killed, and cleans up after it."
    def none(*_): raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    if not locks: monkeypatch.setattr(fcntl, "flock", none)
    child = in_a_child(lambda: hold(tmp_path/"meta"))
    assert wait_for(lambda: (tmp_path/"meta/.tmpAbc").exists()) and f"process {child} on " in owner(tmp_path/"meta")
    threading.Timer(1.5, os.kill, (child, signal.SIGKILL)).start()
    reaper = threading.Thread(target=os.waitpid, args=(child, 0))
    reaper.start()
    with owned(tmp_path/"meta"):
        assert f"process {os.getpid()} on " in owner(tmp_path/"meta")
        assert not {"left.npy.123.partial", ".tmpAbc"} & set(os.listdir(tmp_path/"meta"))
    reaper.join()
    said = capsys.readouterr().out
    assert said.count(f"meta: process {child} on ") == 1 and "has it; waiting" in said
    assert not (tmp_path/"meta").exists()                                    # it was empty
    assert ("without locks" in said) == (not locks)

def test_a_folder_that_this_thread_owns_may_be_taken_again(tmp_path):
    with owned(tmp_path/"b", tmp_path/"a"), owned(tmp_path/"a"), owned(tmp_path/"b", tmp_path/"a"): assert (tmp_path/"a/.lock").exists()
    assert not os.listdir(tmp_path)

def test_a_forked_child_does_not_own_what_its_parent_owns(tmp_path):
    "Nor does it free that, or keep it when the parent is done."
    with owned(tmp_path/"a"):
        child = in_a_child(lambda: time.sleep(60))
        second = in_a_child(lambda: hold(tmp_path/"a"))
        time.sleep(1)
        assert f"process {os.getpid()} on " in owner(tmp_path/"a")
    assert wait_for(lambda: f"process {second} on " in owner(tmp_path/"a"))
    for c in (child, second): os.kill(c, signal.SIGKILL), os.waitpid(c, 0)

def test_two_jobs_train_one_stage_once(run, tmp_path):
    "Two threads, as two processes, at the same models: each ends with them, and the record has each step once."
    run("alone")
    jobs = [threading.Thread(target=run, args=("shared",)) for _ in range(2)]
    for j in jobs: j.start()
    for j in jobs: j.join()
    assert [m["step"] for m in Folder(tmp_path/"shared/a").metrics()] == list(range(11))
    for n in "ab":
        assert same(tmp_path/"alone"/n, tmp_path/"shared"/n)
        assert sorted(os.listdir(tmp_path/"shared"/n)) == sorted(os.listdir(tmp_path/"alone"/n))

def test_two_threads_at_different_stages(run, tmp_path):
    "They take turns: neither draws from the other's random numbers."
    run("alone")
    jobs = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for j in jobs: j.start()
    for j in jobs: j.join()
    for name in ("one", "two"): assert same(tmp_path/"alone/a", tmp_path/name/"a") and same(tmp_path/"alone/b", tmp_path/name/"b")

def test_jobs_that_want_some_of_the_same_never_wait_in_a_circle(tmp_path):
    def job(names, times=20):
        for _ in range(times):
            with owned(*(tmp_path/n for n in names)): pass
    jobs = [threading.Thread(target=job, args=(names,), daemon=True) for names in ("ab", "bca", "cb")]
    for j in jobs: j.start()
    for j in jobs: j.join(60)
    assert not any(j.is_alive() for j in jobs)

def test_what_a_kill_leaves_beside_a_done_stage_is_cleaned(run, tmp_path):
    "Between the done-mark and the end of the process: the checkpoints, the lock, the owner. A user's file is nobody's business."
    run("one")
    for name in (*Folder.checkpoints, ".lock", ".owner.json", "model.safetensors.7.partial", ".tmpX", "notes.txt"): (tmp_path/"one/a"/name).write_text("x")
    run("one", stop=0)
    assert sorted(os.listdir(tmp_path/"one/a")) == ["done.json", "metrics.jsonl", "model.safetensors", "notes.txt", "settings.json"]


# --- what is written ---

def test_files_have_the_mode_that_the_umask_says(run, tmp_path):
    before = os.umask(0o027)
    try:
        with pytest.raises(Stop): run("one", stop=3)
        run("two")
    finally: os.umask(before)
    for f in [*(tmp_path/"one/a").iterdir(), *(tmp_path/"two/a").iterdir()]: assert stat.S_IMODE(f.stat().st_mode) == 0o640, f

def test_a_user_s_file_is_not_summed(run, tmp_path):
    with pytest.raises(Stop): run("one", stop=3)
    (tmp_path/"one/a/notes.txt").write_text("first")
    run("one")
    (tmp_path/"one/a/notes.txt").write_text("second")
    run("one", stop=0)

def one_sentence(e, path): assert str(path) in str(e.value) and "\n" not in str(e.value), str(e.value)

def test_a_full_disk_is_one_sentence(run, tmp_path):
    "Here: no file may be longer than 3,000 bytes. What was there before stays."
    state = {"w": torch.zeros(10_000)}
    Folder(tmp_path).save_checkpoint({"step": 1, "model": {}})
    before, limits = sorted(os.listdir(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        for write, name in ((lambda: Folder(tmp_path).save_checkpoint({"step": 2, "model": state}), "checkpoint.pt"),
                            (lambda: Folder(tmp_path).save_weights(state), "model.safetensors"),
                            (lambda: write_json(tmp_path/"long.json", list(range(5000))), "long.json")):
            with pytest.raises(OSError, match="cannot be written") as e: write()
            one_sentence(e, tmp_path/name)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path)) == before and Folder(tmp_path).checkpoint()["step"] == 1

def test_a_file_in_the_way_and_a_path_too_long(run, tmp_path):
    (tmp_path/"one").write_text("")
    (tmp_path/"two").mkdir()
    (tmp_path/"two/a").write_text("")
    for name, path in (("one", tmp_path/"one/a"), ("two", tmp_path/"two/a"), ("x" * 300, tmp_path/("x" * 300)/"a")):
        with pytest.raises(OSError) as e: run(name)
        one_sentence(e, path)

def test_a_failed_rename_leaves_nothing(tmp_path, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as e, whole(tmp_path/"a.txt") as p: p.write_text("a")
    one_sentence(e, tmp_path/"a.txt")
    assert not os.listdir(tmp_path)


# --- what is damaged ---

BROKEN = {"list": b"[]", "null": b"null", "nothing": b"{}", "text": b'"a"', "empty": b"", "cut": b'{"sums"', "bytes": b"\xff\xfe{}", "kind": b'{"sums": 3}'}

@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_damaged_done_or_settings_file_is_named(run, tmp_path, content):
    run("one")
    for name in ("done.json", "settings.json"):
        file = tmp_path/"one/a"/name
        good = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(ValueError) as e: run("one")
        assert str(file.parent) in str(e.value) and "\n" not in str(e.value)
        if name == "done.json":
            with pytest.raises(ValueError) as e: Folder(file.parent).weights()
            one_sentence(e, file)
        file.write_bytes(good)
    run("one", stop=0)

def test_done_guards_itself(run, tmp_path):
    run("one")
    file = tmp_path/"one/a/done.json"
    done = read_json(file)
    write_json(file, done | {"results": done["results"] | {"top1": 1.0}})
    with pytest.raises(ValueError, match="done.json has changed since the stage was done"): run("one")
    write_json(file, done | {"sums": {k: v for k, v in done["sums"].items() if k != "done.json"}})     # as stages did before
    run("one", stop=0)

def test_weights_with_a_wrong_bit_are_not_loaded(run, tmp_path):
    run("one")
    file = tmp_path/"one/a/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="model.safetensors has changed since the stage was done"): Folder(file.parent).weights()

@pytest.mark.parametrize("spoil,said", [
    (lambda lines: [*lines[:2], '{"step": 2, "lo', *lines[3:]], "line 3 is damaged"),
    (lambda lines: [*lines[:1], '{"loss": 1.0}', *lines[2:]], "line 2 is damaged: it has no step"),
    (lambda lines: [*lines[:1], "[1]", *lines[2:]], "line 2 is damaged"), (lambda lines: [*lines[:1], "\0" * 50, *lines[2:]], "line 2 is damaged"),
    (lambda lines: lines[:-1], "has 3 lines up to step 3"), (lambda lines: [], "has 0 lines up to step 3")])
def test_a_damaged_record_is_not_gone_on_with(run, tmp_path, spoil, said):
    "The line is named; lines that are missing are noticed too."
    with pytest.raises(Stop): run("one", stop=3)
    file = tmp_path/"one/a/metrics.jsonl"
    file.write_text("".join(f"{line}\n" for line in spoil(file.read_text().splitlines())))
    with pytest.raises(ValueError) as e: run("one")
    one_sentence(e, file)
    assert said in str(e.value)

def test_a_deleted_record(run, tmp_path):
    with pytest.raises(Stop): run("one", stop=3)
    (tmp_path/"one/a/metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="metrics.jsonl has 0 lines up to step 3"): run("one")
    run("two")
    (tmp_path/"two/a/metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="metrics.jsonl is missing, though the stage is done"): run("two")

def test_zeros_behind_the_last_line(run, tmp_path):
    "As some file systems leave them when the power goes: they stand for lines that are written again."
    run("straight")
    with pytest.raises(Stop): run("one", stop=7)
    with open(tmp_path/"one/a/metrics.jsonl", "ab") as f: f.write(bytes(100))
    run("one")
    assert same(tmp_path/"straight/a", tmp_path/"one/a")


# --- weights that are lost ---

def test_weights_that_are_not_finite_never_become_a_checkpoint(run, tmp_path):
    "The loss of the step was finite, and its gradient: only what the step made of the weights is not."
    def spoil(terms, step):
        return terms | {"b": {"loss": terms["b"]["loss"] * 1e30}} if step == 6 else terms
    with pytest.raises(FloatingPointError) as e: run("one", PLAIN.but(optimizer="sgd", lr=1e10), spoil=spoil)
    kept = Folder(tmp_path/"one/b").checkpoint()
    assert f"the checkpoint of step {kept['step']} is kept" in str(e.value)
    assert all(v.isfinite().all() for v in kept["model"].values())

def test_weights_with_nan_are_not_kept(tmp_path):
    with pytest.raises(FloatingPointError, match="head.weight holds NaN"): Folder(tmp_path).save_weights({"head.weight": torch.tensor([0, float("nan")])})
    assert not os.listdir(tmp_path)


# --- where it was computed ---

def test_no_git_and_somebody_else_s_git(tmp_path, monkeypatch):
    "The commit is unknown, and that is no error."
    monkeypatch.setenv("PATH", str(tmp_path))
    code.cache_clear()
    assert code() is None and environment()["commit"] is None
    monkeypatch.undo()
    code.cache_clear()
    package = tmp_path/"site-packages/m2mkd"
    package.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(folders.importlib.util, "find_spec", lambda _: type("Spec", (), {"origin": str(package/"__init__.py")}))
    assert code() is None
    code.cache_clear()

def test_going_on_elsewhere_is_said(run, tmp_path, capsys, monkeypatch):
    with pytest.raises(Stop): run("one", stop=3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    run("one")
    assert "a: goes on from step 3, maybe not to the bit: threads " in capsys.readouterr().out
