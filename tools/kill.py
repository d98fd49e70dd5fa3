"""Kills a small run of the whole method at random moments, lets another process end it, and compares with a run that nobody disturbed.

    python tools/kill.py [KILLS] [SEED]

Prints a row a kill; exits with 1 if any run ended otherwise: weights and predictions to the bit, metrics and results but for the seconds."""
import os, random, signal, sys, tempfile, time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch

from m2mkd.augment import Augment
from m2mkd.core import read_json
from m2mkd.data import Data
from m2mkd.distill import Distillation
from m2mkd.folder import Folder
from m2mkd.pipeline import Lab, Task
from m2mkd.train import Runtime, Training
from m2mkd.vit import Meta, ViT
from m2mkd.vmoe import VMoE

DIGITS = Task(train=Data(name="digits", per_class=40), test=(Data(name="digits", split="test", per_class=20),))
TEACHER = ViT(depths=(1, 1), options=dict(embed_dim=24, num_heads=2, patch_size=2, drop_path_rate=0.1))
STUDENT = VMoE(depths=(1, 1), width=16, heads=2, patch=2, experts=2, top_k=2)
SHORT = Training(epochs=4, batch_size=50, lr=0.02, average=0.9, augment=Augment(flip=0))
SIGNALS = (signal.SIGKILL,) * 3 + (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)      # half of all are SIGKILL


def method(root):
    "Meta model, incubation, teacher, distillation, student: seven trained stages and three tables of hybrids, a checkpoint every other step."
    lab = Lab(Path(root)/"stages", runtime=Runtime(device="cpu", checkpoint_minutes=0, log_steps=2), floor=0)
    meta = lab.end_to_end("meta", Meta(like=TEACHER), DIGITS, SHORT)
    teacher = lab.finetune("teacher", TEACHER, lab.incubate("incubate", TEACHER, meta, DIGITS, SHORT), DIGITS, SHORT)
    modules = lab.distill("distill", STUDENT, meta, teacher, DIGITS, SHORT, Distillation(tau=2))
    lab.finetune("m2mkd", STUDENT, modules, DIGITS, SHORT)


def child(root):
    "A process (a fork: it need not import torch again) that runs the method into `root`, without a word."
    if (pid := os.fork()): return pid
    os.dup2(os.open(f"{root}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    code = 1
    try:
        method(root)
        code = 0
    except SystemExit as e: code = e.code
    except BaseException:
        import traceback
        traceback.print_exc()
    finally: os._exit(code)


def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kept(path):
    "What must not depend on kills, of one stage."
    done = {k: v for k, v in Folder(path).done().items() if k not in ("seconds", "sums")}
    metrics = [{k: v for k, v in m.items() if k != "seconds"} for m in Folder(path).metrics()]
    predictions = read_json(path/"predictions.json") if (path/"predictions.json").exists() else None
    return done, metrics, predictions, sorted(f.name for f in path.iterdir())


def differs(one, other):
    "The first stage of two runs that is not equal; empty if all are."
    one, other = one/"stages", other/"stages"
    names = [sorted(p.name for p in root.iterdir()) for root in (one, other)]
    if names[0] != names[1]: return "other stages"
    for name in names[0]:
        if kept(one/name) != kept(other/name): return name
        if not (one/name/"model.safetensors").exists(): continue
        a, b = Folder(one/name).weights(), Folder(other/name).weights()
        if a.keys() != b.keys() or not all(torch.equal(v, b[k]) for k, v in a.items()): return name
    return ""


def where(root):
    "At which stage and step a run stood when it ended."
    begun = [p for p in (root/"stages").glob("*") if not (p/"done.json").exists()]
    return ", ".join(f"{p.name.rsplit('-', 2)[0]}: {[0, *(m['step'] for m in Folder(p).metrics())][-1]}" for p in sorted(begun)) or "between stages"


def killed(root, number, moment, straight):
    "A row of the table: one run that gets the signal `number` after `moment` seconds and is then ended by another."
    pid = child(root)
    time.sleep(moment)
    os.kill(pid, number)
    row = dict(signal=number.name, seconds=round(moment, 2), exit=ended(pid), stood=where(root))
    again = ended(child(root))
    return row | dict(equal=(differs(straight, root) or "yes") if again == 0 else f"NO: exit {again}")


def main(kills=20, seed=0):
    draw = random.Random(int(seed))
    with tempfile.TemporaryDirectory() as d:
        start = time.monotonic()
        if ended(child(straight := Path(d)/"straight")): sys.exit(Path(f"{straight}.log").read_text())
        took = time.monotonic() - start
        rows = [killed(Path(d)/f"{k}", draw.choice(SIGNALS), draw.uniform(0, took), straight) for k in range(int(kills))]
        print(f"undisturbed: {took:.1f} s, {len(list(straight.glob('stages/*')))} stages")
    table = pd.DataFrame(rows)
    print(table.to_string())
    equal = int((table.equal == "yes").sum())
    print(f"{equal} of {len(table)} equal to the bit")
    sys.exit(equal < len(table))


if __name__ == "__main__": main(*sys.argv[1:])
