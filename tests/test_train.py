"The loop: an interrupted run ends as the straight one, to the bit; nothing bad is kept; one clear error for each bad input."
import io, os, signal, subprocess, sys
from pathlib import Path

import pytest, torch
from torch import nn
from tqdm import tqdm

from m2mkd import folder as folders, train as train_module
from m2mkd.chain import load as load_strictly
from m2mkd.core import seeded
from m2mkd.data import Augment, Batches, load, whole_split
from m2mkd.evaluate import evaluate
from m2mkd.folder import Folder
from m2mkd.train import Phase, Runtime, Training, end_to_end, soft_cross_entropy, train
from m2mkd.vit import ViT

TINY = ViT(depths=(1, 1), options=dict(embed_dim=8, num_heads=2, patch_size=4, drop_path_rate=0.2))
PLAIN = Training(epochs=2, batch_size=16, lr=0.02, warmup=1, augment=Augment(scale=(0.5, 1)))
RICH = PLAIN.but(clip=0.5, average=0.8, accumulate=2)
EVERY_STEP = Runtime(device="cpu", checkpoint_minutes=0, log_steps=1)        # 5 steps an epoch, a checkpoint behind each


@pytest.fixture(scope="module")
def digits(): return load("digits", classes=5, per_class=16)

@pytest.fixture(scope="module")
def test_set(): return load("digits", split="test", classes=5, per_class=4)

def model(seed=0):
    with seeded(seed, "model"): return TINY.build(5, 8)

class Stop(Exception): "Stands for whatever ends a process."

@pytest.fixture
def run(digits, test_set, tmp_path):
    def run(name, settings=PLAIN, stop=None, runtime=EVERY_STEP, spoil=lambda terms, step: terms, record=None):
        "Train two models together into tmp_path/name/{a,b}; Stop before the loss number `stop`; `spoil` changes the losses."
        a, b = end_to_end(model(1), 0, "a"), end_to_end(model(2), 0, "b")
        def loss(models, x, y, step):
            if step == stop: raise Stop
            return spoil({k: v for phase, n in ((a, "a"), (b, "b")) if n in models for k, v in phase.loss(models, x, y, step).items()}, step)
        def results(name, m): return evaluate(m, whole_split(test_set, 8)).summary()
        batches = Batches(digits, settings.batch_size, settings.augment, seed=3)
        return train(Phase(a.trains | b.trains, loss), batches, settings, {n: tmp_path/name/n for n in "ab"}, record, results, runtime)
    return run

def kept(path):
    "What must not depend on interruptions: metrics, results and cost without the seconds, and the weights."
    done = {k: v for k, v in Folder(path).done().items() if k not in ("hash", "seconds", "sums")}
    return [{k: v for k, v in m.items() if k != "seconds"} for m in Folder(path).metrics()], done, Folder(path).weights()

def same(a, b):
    (metrics, done, weights), (others, other_done, other_weights) = kept(a), kept(b)
    assert metrics == others and done == other_done
    assert weights.keys() == other_weights.keys() and all(torch.equal(v, other_weights[k]) for k, v in weights.items())
    return True

def files(path): return sorted(p.name for p in Path(path).iterdir() if p.name[0] != ".")    # less the lock that a kill left


# --- resume ---

@pytest.mark.parametrize("settings,all_stops", [(PLAIN, ((0,), (1,), (5,))), (RICH, ((3,), (9,), (2, 7)))], ids=["plain", "rich"])
def test_resumed_is_straight(run, tmp_path, settings, all_stops):
    "Stopped before any checkpoint, at the end and in the middle of epochs, in the last step, and twice."
    run("straight", settings)
    assert [m["step"] for m in Folder(tmp_path/"straight/a").metrics()] == list(range(11))
    parts = settings.accumulate
    for stops in all_stops:
        name = "-".join(map(str, stops))
        for stop in stops:
            with pytest.raises(Stop): run(name, settings, stop * parts + parts - 1)              # also between the parts of a batch
            assert not (tmp_path/name/"a/done.json").exists()
        run(name, settings)
        assert same(tmp_path/"straight/a", tmp_path/name/"a") and same(tmp_path/"straight/b", tmp_path/name/"b")

def test_rare_checkpoints(run, tmp_path):
    "What was recorded behind the last checkpoint is recorded anew, once."
    run("straight", runtime=Runtime(device="cpu", log_steps=2))
    assert [m["step"] for m in Folder(tmp_path/"straight/a").metrics()] == [0, 2, 4, 5, 6, 8, 10]
    with pytest.raises(Stop): run("resumed", stop=7, runtime=Runtime(device="cpu", log_steps=2))
    assert [m["step"] for m in Folder(tmp_path/"resumed/a").metrics()] == [0, 2, 4, 5, 6] and not (tmp_path/"resumed/a/checkpoint.pt").exists()
    run("resumed", runtime=Runtime(device="cpu", log_steps=2))
    assert same(tmp_path/"straight/a", tmp_path/"resumed/a")

@pytest.mark.parametrize("where", ["save_weights", "finish", "sha256", "write_json"])
def test_stopped_between_the_last_step_and_done(run, tmp_path, monkeypatch, where):
    "Neither results nor weights get lost, and no step is trained again."
    run("straight")
    def stop(*_, **__): raise Stop
    with monkeypatch.context() as patch, pytest.raises(Stop):
        if where == "write_json":
            write = folders.write_json
            patch.setattr(folders, where, lambda path, x: stop() if path.name == "done.json" else write(path, x))
        else: patch.setattr(Folder if hasattr(Folder, where) else folders, where, stop)
        run("resumed")
    assert not (tmp_path/"resumed/a/done.json").exists()
    assert run("resumed", stop=9)["a"]["results"]["images"] == 20
    assert same(tmp_path/"straight/a", tmp_path/"resumed/a") and same(tmp_path/"straight/b", tmp_path/"resumed/b")

def test_checkpoints_of_different_steps(run, tmp_path, monkeypatch):
    "Stopped between the checkpoints of two models that train together: each goes on from its own."
    run("straight")
    save = Folder.save_checkpoint
    def stop(self, state):
        if self.path.name == "b" and state["step"] == 4: raise Stop
        save(self, state)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Folder, "save_checkpoint", stop)
        run("resumed")
    assert [Folder(tmp_path/"resumed"/n).checkpoint()["step"] for n in "ab"] == [4, 3]
    run("resumed")
    for n in "ab":
        weights = [Folder(tmp_path/name/n).weights() for name in ("straight", "resumed")]
        assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
        assert [m["loss"] for m in Folder(tmp_path/"straight"/n).metrics()[1:]] == [m["loss"] for m in Folder(tmp_path/"resumed"/n).metrics()[1:]]
    flops = [sum(Folder(tmp_path/name/n).done()["flops"] for n in "ab") for name in ("straight", "resumed")]
    assert flops[1] == pytest.approx(flops[0], rel=1e-9)                                    # no cost is counted twice

KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import test_train
test_train.two_parts(sys.argv[2], kill=15)
"""

def two_parts(folder, kill=None):
    "Train one model with batches in two parts; `kill` ends the process at that loss, without a word."
    phase, batches = end_to_end(model(1), 0, "a"), Batches(load("digits", classes=5, per_class=16), 16, RICH.augment, seed=3)
    def loss(models, x, y, step):
        if step == kill: os.kill(os.getpid(), signal.SIGKILL)
        return phase.loss(models, x, y, step)
    train(Phase(phase.trains, loss), batches, RICH, {"a": folder}, runtime=EVERY_STEP)

def test_killed_process(tmp_path):
    "SIGKILL in the middle of the second epoch, between the two parts of a batch; another process ends the run."
    assert subprocess.run([sys.executable, "-c", KILLED, Path(__file__).parent, tmp_path/"killed"]).returncode == -signal.SIGKILL
    assert files(tmp_path/"killed") == ["checkpoint.previous.pt", "checkpoint.pt", "metrics.jsonl", "settings.json"]
    two_parts(tmp_path/"killed"), two_parts(tmp_path/"straight")
    assert same(tmp_path/"killed", tmp_path/"straight") and Folder(tmp_path/"killed").done()["steps"] == 10

def test_a_line_cut_off(run, tmp_path):
    "A line of metrics that was being written when the machine stopped is dropped."
    run("straight")
    with pytest.raises(Stop): run("cut", stop=7)
    with open(tmp_path/"cut/a/metrics.jsonl", "a") as f: f.write('{"step": 8, "lo')
    run("cut")
    assert same(tmp_path/"straight/a", tmp_path/"cut/a")

def test_done_is_not_trained_again(run, tmp_path):
    done = run("once", RICH)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/"once").rglob("*")}
    assert run("once", RICH, stop=0) == done
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path/"once").rglob("*")}
    assert files(tmp_path/"once/a") == ["done.json", "metrics.jsonl", "model.safetensors", "settings.json"]
    assert done["a"]["steps"] == 10 and done["a"]["flops"] > 0 and done["a"]["results"]["images"] == 20

def test_what_is_done_and_has_no_weights_is_left_alone(run, tmp_path, capsys):
    "A line says so; the other model of its group goes on, and its facts are those of a run that nobody disturbed."
    run("once"), run("again")
    done = (tmp_path/"again/a/done.json").read_bytes()
    (tmp_path/"again/a/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"): Folder(tmp_path/"again/a").weights()
    capsys.readouterr()
    run("again", stop=0)
    assert f"a: done, and its weights are not here: this model stays as it was given; remove {tmp_path/'again/a'}" in capsys.readouterr().out
    for f in (tmp_path/"again/b").iterdir(): f.unlink()
    run("again")
    assert done == (tmp_path/"again/a/done.json").read_bytes() and files(tmp_path/"again/a") == ["done.json", "metrics.jsonl", "settings.json"]
    metrics, _, weights = kept(tmp_path/"again/b")
    assert metrics == kept(tmp_path/"once/b")[0] and all(torch.equal(v, weights[k]) for k, v in kept(tmp_path/"once/b")[2].items())


# --- what the numbers are ---

def test_equal_runs_are_equal(run, tmp_path):
    run("one", RICH)
    torch.rand(7)
    run("two", RICH)
    assert same(tmp_path/"one/a", tmp_path/"two/a")

def test_a_model_trains_the_same_alone(digits, test_set, run, tmp_path):
    run("both")
    train(end_to_end(model(1), 0, "a"), Batches(digits, 16, PLAIN.augment, seed=3), PLAIN, {"a": tmp_path/"alone"}, runtime=EVERY_STEP)
    both, alone = Folder(tmp_path/"both/a").weights(), Folder(tmp_path/"alone").weights()
    assert all(torch.equal(v, alone[k]) for k, v in both.items())

def test_accumulated_batches(digits, tmp_path):
    "Parts of a batch add up to the whole, where nothing is drawn inside the model."
    found = {}
    for k in (1, 2, 4):
        with seeded(0, "model"): plain = TINY.but(options=TINY.options | dict(drop_path_rate=0.)).build(5, 8)
        settings = PLAIN.but(accumulate=k, clip=0.5, optimizer="sgd", lr=1.)
        train(end_to_end(plain, 0), Batches(digits, 16, settings.augment), settings, {"model": tmp_path/f"{k}"}, runtime=EVERY_STEP)
        found[k] = Folder(tmp_path/f"{k}").weights(), [m["loss"] for m in Folder(tmp_path/f"{k}").metrics()]
    for k in (2, 4):
        assert found[k][1] == pytest.approx(found[1][1], abs=1e-5)
        assert max((v - found[1][0][n]).abs().max() for n, v in found[k][0].items()) < 1e-5

def test_learning_rates(run, tmp_path):
    "Per 512 images: from almost 0 over the warm-up to lr, then down a cosine that would reach min_lr behind the last step."
    run("one", PLAIN.but(epochs=5, lr=0.512, min_lr=0.00512, warmup=1))                          # 5 steps an epoch
    lr, scale = [m["lr"] for m in Folder(tmp_path/"one/a").metrics()[1:]], 16 / 512
    assert len(lr) == 25 and lr[0] == pytest.approx(1e-6 * scale) and lr[5] == pytest.approx(0.512 * scale) == max(lr)
    assert all(a < b for a, b in zip(lr[:5], lr[1:6])) and all(a > b for a, b in zip(lr[5:], lr[6:]))
    assert lr[15] == pytest.approx((0.512 + 0.00512) / 2 * scale) and 0.00512 * scale < lr[-1] < 0.00512 * scale * 2

def test_no_warm_up(run, tmp_path):
    run("one", PLAIN.but(warmup=0))
    lr = [m["lr"] for m in Folder(tmp_path/"one/a").metrics()[1:]]
    assert lr[0] == pytest.approx(0.02 * 16 / 512) == max(lr)

def test_averaged_weights_are_kept(digits, test_set, tmp_path):
    plain, averaged = model(), model()
    for m, where, settings in ((plain, "plain", PLAIN), (averaged, "averaged", PLAIN.but(average=0.9))):
        phase, batches = end_to_end(m, 0), Batches(digits, 16, PLAIN.augment)
        train(phase, batches, settings, {"model": tmp_path/where}, evaluate=lambda _, m: evaluate(m, whole_split(test_set, 8)).summary())
    assert all(torch.equal(v, averaged.state_dict()[k]) for k, v in plain.state_dict().items())   # training itself is the same
    kept = Folder(tmp_path/"averaged").weights()
    assert not torch.equal(kept["0.blocks.0.mlp.fc1.weight"], averaged.state_dict()["0.blocks.0.mlp.fc1.weight"])
    fresh = model()
    fresh.load_state_dict(kept)
    assert evaluate(fresh, whole_split(test_set, 8)).summary() == Folder(tmp_path/"averaged").done()["results"]

def test_bfloat16(run, tmp_path):
    run("full")
    run("half", PLAIN.but(precision="bf16"))
    full, half = ([m["loss"] for m in Folder(tmp_path/name/"a").metrics()[1:]] for name in ("full", "half"))
    assert full != half and full == pytest.approx(half, abs=0.05)
    assert all(v.dtype == torch.float32 for v in Folder(tmp_path/"half/a").weights().values())

def test_tensorboard(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run("one", runtime=EVERY_STEP.but(trackers=("tensorboard",)))
    found = {}
    for f in (tmp_path/"one").rglob("events.out.tfevents*"):
        events = EventAccumulator(str(f)).Reload()
        found |= {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert {"a/loss", "b/loss", "a/top1", "a/lr"} <= found.keys()
    assert found["a/loss"] == [(m["step"], pytest.approx(m["loss"])) for m in Folder(tmp_path/"one/a").metrics()[1:]]

def test_evaluated_now_and_then(run, tmp_path):
    run("one", PLAIN.but(epochs=5, evaluate_every=2))
    assert [m["epoch"] for m in Folder(tmp_path/"one/a").metrics() if "top1" in m] == [0, 2, 4, 5]

def test_cost_is_told_before_a_long_run(run, capsys):
    run("one", RICH)
    said = next(line for line in capsys.readouterr().out.splitlines() if "TFLOP" in line)
    assert "a, b: 10 steps of 16 images" in said and "parameters" in said and "min" in said and "GiB" in said

def test_the_bar_shows_loss_and_accuracy(run, tmp_path, monkeypatch):
    "Means over the models, of what is read anyway."
    shown = []
    class Bar(tqdm):
        def set_postfix_str(self, text, refresh=True): shown.append((text, refresh))
    monkeypatch.setattr(train_module, "progress", lambda **kwargs: Bar(file=io.StringIO(), **{k: v for k, v in kwargs.items() if k != "what"}))
    run("one", runtime=EVERY_STEP.but(log_steps=3))
    lines = list(zip(*(Folder(tmp_path/"one"/n).metrics()[1:] for n in "ab")))
    mean = lambda key, pair: sum(line[key] for line in pair) / 2
    assert [m["step"] for m, _ in lines] == [3, 5, 6, 9, 10] and shown[0] == (f"loss {mean('loss', lines[0]):.3g}", False)
    assert [text for text, _ in shown[1:3]] == [f"loss {mean('loss', pair):.3g}, top-1 {mean('top1', lines[1]):.1%}" for pair in lines[1:3]]


# --- bad input ---

def nan_at(bad): return lambda terms, step: terms if step != bad else terms | {"b": {"loss": terms["b"]["loss"] * float("nan")}}

@pytest.mark.parametrize("log_steps", [1, 3, 50])
def test_nan_stops_the_run(run, tmp_path, log_steps):
    "The step is named whenever it is noticed; the last good checkpoint stays, and a second run stops there again."
    every = EVERY_STEP.but(log_steps=log_steps)
    with pytest.raises(FloatingPointError) as e: run("one", spoil=nan_at(7), runtime=every)
    step = {1: 7, 3: 6, 50: 5}[log_steps]
    assert str(e.value) == f"loss of b became nan in step 8 of 10; the checkpoint of step {step} is kept"
    for n in "ab":
        assert set(files(tmp_path/"one"/n)) - {"checkpoint.previous.pt"} == {"checkpoint.pt", "metrics.jsonl", "settings.json"}
        saved = Folder(tmp_path/"one"/n).checkpoint()
        assert saved["step"] == step and all(v.isfinite().all() for v in saved["model"].values())
        model().load_state_dict(saved["model"])
        assert max(m["step"] for m in Folder(tmp_path/"one"/n).metrics()) == step
    with pytest.raises(FloatingPointError, match="step 8 of 10"): run("one", spoil=nan_at(7), runtime=every)
    run("one", runtime=every), run("straight", runtime=every)
    assert same(tmp_path/"one/b", tmp_path/"straight/b")

def test_nan_before_any_checkpoint(run, tmp_path):
    with pytest.raises(FloatingPointError, match="loss of b became nan in step 2 of 10; no checkpoint had been written"):
        run("one", spoil=nan_at(1), runtime=Runtime(device="cpu", log_steps=1))
    assert files(tmp_path/"one/a") == ["metrics.jsonl", "settings.json"]

def test_infinite_gradient_stops_the_run(run, tmp_path):
    "A finite loss with a gradient that is not: the weights behind it are not kept."
    def spoil(terms, step):
        if step != 6: return terms
        z = terms["b"]["loss"]
        return terms | {"b": {"loss": z + (z - z.detach()).abs().sqrt()}}
    with pytest.raises(FloatingPointError, match="norm of b became nan in step 7 of 10; the checkpoint of step 6 is kept"): run("one", spoil=spoil)
    assert all(v.isfinite().all() for v in Folder(tmp_path/"one/b").checkpoint()["model"].values())

def test_a_folder_of_other_settings(run, tmp_path):
    with pytest.raises(Stop): run("one", stop=3)
    before = (tmp_path/"one/a/settings.json").read_bytes()
    with pytest.raises(ValueError) as e: run("one", PLAIN.but(lr=0.03))
    assert f"run folder {tmp_path/'one/a'} was made with other settings: training.lr is 0.02 there, 0.03 here" == str(e.value)
    assert (tmp_path/"one/a/settings.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"training.augment.flip is 0.5 there, 0.0 here"): run("one", PLAIN.but(augment=PLAIN.augment.but(flip=0.)))
    run("one")
    with pytest.raises(ValueError, match="training.epochs is 2 there, 3 here"): run("one", PLAIN.but(epochs=3))

def flipped(content):
    "`content` with one wrong bit in its middle."
    return content[:(k := len(content) // 2)] + bytes([content[k] ^ 1]) + content[k + 1:]

DAMAGE = dict(cut=lambda b: b[:len(b) // 2], empty=lambda b: b"", other=lambda b: b"not a checkpoint", bit=flipped,
              zeros=lambda b: b[:-4096] + bytes(4096), zeroed=lambda b: bytes(len(b)))

@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_has_a_predecessor(run, tmp_path, capsys, damage):
    "One line names it, both models go on from the step before, and all ends as if nothing had happened."
    run("straight")
    with pytest.raises(Stop): run("one", stop=4)
    file = tmp_path/"one/b/checkpoint.pt"
    file.write_bytes(damage(file.read_bytes()))
    run("one")
    assert len([line for line in capsys.readouterr().out.splitlines() if f"{file} is damaged" in line and "of step 3 is used" in line]) == 1
    assert same(tmp_path/"straight/a", tmp_path/"one/a") and same(tmp_path/"straight/b", tmp_path/"one/b")

def test_both_checkpoints_damaged(run, tmp_path):
    with pytest.raises(Stop): run("one", stop=3)
    both = [tmp_path/"one/b"/name for name in Folder.checkpoints]
    for f in both: f.write_bytes(flipped(f.read_bytes()))
    with pytest.raises(ValueError) as e: run("one")
    assert all(f"{f} is damaged" in str(e.value) for f in both) and "remove both to start this stage again" in str(e.value)
    for f in both: f.unlink()
    run("one")

def test_damaged_weights(run, tmp_path):
    run("one")
    file = tmp_path/"one/b/model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="has changed since the stage was done") as e: run("one")
    assert str(file) in str(e.value)
    with pytest.raises(ValueError, match="is damaged") as e: Folder(tmp_path/"one/b").weights()
    assert str(file) in str(e.value)

@pytest.mark.parametrize("name", ["done.json", "settings.json"])
def test_damaged_json(run, tmp_path, name):
    run("one")
    (tmp_path/"one/a"/name).write_text("{")
    with pytest.raises(ValueError, match="is damaged") as e: run("one")
    assert str(tmp_path/"one/a"/name) in str(e.value)

@pytest.mark.parametrize("wrong,said", [
    (dict(epochs=0), "epochs = 0"), (dict(lr=0), "lr = 0"), (dict(lr=float("nan")), "lr = nan"), (dict(batch_size=0), "batch_size = 0"),
    (dict(warmup=2), "warmup 2.0 must be shorter than epochs 2"), (dict(accumulate=3), "batch_size 16 is not divisible by accumulate 3"),
    (dict(optimizer="adamm"), "unknown optimizer 'adamm'; nearest: "), (dict(precision="fp16"), "precision = 'fp16'"),
    (dict(average=1), "average = 1"), (dict(clip=0), "clip = 0"), (dict(epoch=3), "unknown setting of Training 'epoch'; nearest: epochs"),
    (dict(weight_decay=-1), "weight_decay = -1")])
def test_wrong_training(wrong, said):
    with pytest.raises(ValueError) as e: Training(**{**dict(epochs=2, batch_size=16), **wrong})
    assert said in str(e.value) and "\n" not in str(e.value)

def test_unknown_device():
    with pytest.raises(ValueError, match="Runtime: device = 'gpu': Input should be 'cpu' or 'cuda'"): Runtime(device="gpu")

def test_unknown_tracker(run, tmp_path):
    with pytest.raises(ValueError) as e: run("one", runtime=Runtime(device="cpu", trackers=("tensorbord",)))
    assert "tensorbord" in str(e.value) and "tensorboard" in str(e.value)


# --- what a call of the loop takes ---

@pytest.mark.parametrize("labels", [torch.zeros(4, 1, dtype=torch.long), torch.rand(4), torch.ones(4, dtype=torch.bool), torch.rand(4, 11)], ids=["column", "fractions", "booleans", "other classes"])
def test_labels_that_are_no_classes_and_no_shares(labels):
    with pytest.raises(ValueError, match=r"class numbers \(4,\) or soft targets \(4, 10\)"): soft_cross_entropy(torch.randn(4, 10), labels)


def test_numbers_and_shares_of_classes_are_one_loss():
    z, y = torch.randn(4, 10), torch.tensor([0, 9, 3, 3])
    assert torch.equal(soft_cross_entropy(z, y), soft_cross_entropy(z, nn.functional.one_hot(y, 10).float()))


def test_train_says_what_it_takes(tmp_path):
    model, settings = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), Training(epochs=1, batch_size=4)
    phase = end_to_end(model, 0)
    for wrong, said in (((model, [], settings, {"model": tmp_path}), "phase is an nn.Module .*end_to_end"), ((phase, [], {}, {"model": tmp_path}), "settings is .*a Training"),
                        ((phase, [], settings, tmp_path), "folders is .*{name: folder}")):
        with pytest.raises(TypeError, match=said): train(*wrong)
    with pytest.raises(ValueError, match="folders are for mdel, but what trains is model"): train(phase, [], settings, {"mdel": tmp_path})


def test_a_loss_that_leaves_a_model_out(run):
    with pytest.raises(ValueError, match="the loss has no terms of b, which trains"): run("one", spoil=lambda terms, step: {"a": terms["a"]})


def test_gradients_from_before_the_run_do_not_count(digits, tmp_path):
    found = []
    for looked in (False, True):
        phase, batches = end_to_end(model(), 0), Batches(digits, 16, PLAIN.augment)
        if looked: phase.loss(phase.trains, *batches.at(1, 0), 0)["model"]["loss"].backward()
        train(phase, batches, PLAIN, {"model": tmp_path/f"{looked}"}, runtime=EVERY_STEP)
        found.append(kept(tmp_path/f"{looked}"))
    assert found[0][:2] == found[1][:2] and all(torch.equal(v, found[1][2][k]) for k, v in found[0][2].items())


def test_a_mask_of_infinities_is_no_damage():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    state = Masked().state_dict()
    assert load_strictly(Masked(), state) == []
    with pytest.raises(ValueError, match="damaged checkpoint: NaN or infinity in mask"): load_strictly(Masked(), state | {"mask": torch.full((2, 2), torch.inf)})
    with pytest.raises(ValueError, match="damaged checkpoint: NaN or infinity in weight"): load_strictly(Masked(), state | {"weight": torch.tensor([1., torch.nan])})
