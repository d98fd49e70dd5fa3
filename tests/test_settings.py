"What a user gives counts, or is refused in one sentence: parameters, what decays, schedules, routers, losses, trackers."
import ast, json, os, pickle, subprocess, sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from m2mkd import nac
from m2mkd.core import Parameters, Settings, from_plain, hash_of, number, parameters, seeded, to_plain
from m2mkd.data import Augment, Data
from m2mkd.distill import Distillation, hard_distillation, m2mkd_loss, soft_distillation
from m2mkd.optimizer import groups, layers, make_optimizer, make_schedule, no_decay
from m2mkd.pipeline import Lab, Stitched, Task
from m2mkd.study import alike
from m2mkd.tokenizers import Patches
from m2mkd.train import Runtime, Training, end_to_end, soft_cross_entropy, train, with_auxiliary
from m2mkd.vit import Meta, ViT
from m2mkd.vmoe import Mixture, VMoE

experiments = sorted((Path(__file__).resolve().parents[1]/"nbs/experiments").glob("*.ipynb"))
OWN = "epochs: int = 3\nlr = 0.1\nseeds: list[int] = [0]\nname = ''\nsizes = {'a': [1]}\non: bool = False"
CIRCUIT = nac.preset("micro").but(mediators=nac.Latents(count=8), tokenizer=Patches(size=2, positions=4))
TEACHER = ViT(depths=(1, 2), options=dict(embed_dim=8, num_heads=2, patch_size=4, depth=3))


def fails(what, *said, kind=ValueError):
    with pytest.raises(kind) as e: what()
    assert all(s in str(e.value) for s in said) and "\n" not in str(e.value), str(e.value)


def given(*lines): return parameters([OWN, "# Parameters\n" + "\n".join(lines)])


# --- parameters ---

@pytest.mark.parametrize("line,value", [
    ("lr = float('inf')", float("inf")), ("lr = -2", -2.), ("lr = 1e-3 / 2", 5e-4), ("epochs = -1", -1), ("seeds = '[3, 4]'", [3, 4]),
    ("seeds = 7", [7]), ("name = 12", "12"), ("name = 'a\\nb'", "a\nb"), ("sizes = \"{'b': [2, 3]}\"", {"b": [2, 3]}), ("on = True", True)])
def test_a_value_arrives(line, value):
    p, name = given(line), line.split()[0]
    assert getattr(p, name) == value and type(getattr(p, name)) is type(value) and p.given == {name}

@pytest.mark.parametrize("line", [
    "lr = '0.5'", "lr = True", "lr = None", "epochs = 1.0", "epochs = None", "seeds = ['a']", "seeds = [True]", "seeds = '[3'", "name = 1e5",
    "on = 1", "on = 'false'", "sizes = [1]", "epochs = base * 2", "epochs = int('3')"])
def test_a_value_of_another_kind_is_refused(line): fails(lambda: given(line), f"parameter {line.split()[0]}")

def test_what_papermill_injects_by_itself_is_no_parameter():
    p = given("PAPERMILL_INPUT_PATH = 'in.ipynb'", "PAPERMILL_OUTPUT_DIR_PATH = '.'", "lr = float('nan')")
    assert p.lr != p.lr and p.given == {"lr"} and "PAPERMILL_INPUT_PATH" not in vars(p)

def test_what_would_be_passed_over_is_said():
    fails(lambda: parameters(["# Parameters\nlr = 0.5", OWN]), "tag `parameters`")
    fails(lambda: parameters([OWN + "\nif on: epochs = 1"]), "parameter epochs is set by more than")
    fails(lambda: given("epochs += 1"), "parameter epochs")
    fails(lambda: parameters(["lr = 0.1 * base\nclip = 1."]), "parameter lr: 0.1 * base cannot be read")
    fails(lambda: given("epocs = 1"), "unknown parameter", "nearest: epochs")

def test_edited_and_run_again():
    p = parameters([OWN, "# Parameters\nlr = 1", "p = parameters()", OWN.replace("3", "5")])
    assert (p.epochs, p.lr) == (5, 0.1) and p.given == {"epochs"}

def another(v):
    if isinstance(v, list): return v[::-1] if len(v) > 1 else v * 2 or [1]
    return {"other": [1]} if isinstance(v, dict) else v + "x" if isinstance(v, str) else (not v if isinstance(v, bool) else v + 1)

def test_parameters_that_are_sent_to_a_process_know_what_was_given():
    sent = pickle.loads(pickle.dumps(Parameters({"seed": 1, "epochs": 9}, ["seed"])))
    sent.smaller(seed=0, epochs=2)
    assert vars(sent) == {"seed": 1, "epochs": 2} and sent.given == {"seed"}
    with pytest.raises(ValueError, match="parameter seed = 1 would have no effect"):
        sent.unused("there are no seeds", "seed")


@pytest.mark.parametrize("path", experiments, ids=lambda p: p.stem)
def test_a_small_run_keeps_what_is_given(path):
    "Whatever single parameter is given with smoke: it has that value afterwards, or is refused by its name."
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    rules = [ast.unparse(s) for c in cells for s in (ast.parse(c).body if "P.smaller(" in c or "P.unused(" in c else ())
             if "P.smaller(" in ast.unparse(s) or "P.unused(" in ast.unparse(s)]
    assert rules
    for name, value in vars(parameters([cells[0]])).items():
        if name == "smoke": continue
        P = parameters([cells[0], f"# Parameters\nsmoke = True\n{name} = {another(value)!r}"])
        try:
            for rule in rules: exec(rule, {"P": P})
        except ValueError as e: assert f"parameter {name} = " in str(e)
        assert getattr(P, name) == another(value)


# --- numbers and truth values ---

def test_numbers_of_numpy_and_torch():
    a, b = (Training(epochs=e, batch_size=n, lr=lr) for e, n, lr in ((2, 32, 0.25), (np.int64(2), torch.tensor(32), np.float32(0.25))))
    assert a == b and hash_of(a, 3) == hash_of(b, np.int64(3)) and json.dumps(to_plain(b)) == json.dumps(to_plain(a))
    assert hash_of(VMoE(depths=(1, 1))) == hash_of(VMoE(depths=(np.int64(1), 1))) and number("x") == "x"
    fails(lambda: Training(epochs=True), "epochs = True")
    fails(lambda: Training(epochs=1, lr=np.bool_(True)), "lr = ")

class Pair(Settings):
    a: int = 1
    b: int = 1
    def together(self):
        if self.a > self.b: raise ValueError("a above b")

def test_records_are_not_asked_what_they_say_together(monkeypatch):
    fails(lambda: Pair(a=2), "a above b")
    fails(lambda: Pair().but(a=2), "a above b")
    plain = to_plain(Training(epochs=2)) | {"min_lr": 1.}
    assert from_plain(plain).min_lr == 1.                              # it was run, once
    fails(lambda: Training(epochs=2, min_lr=1.), "min_lr = 1.0 is above lr = 0.0005")


# --- what decays ---

def names(model, **how):
    still = {id(p) for g in groups(model, 0.05, **how) if not g["weight_decay"] for p in g["params"]}
    return {n for n, p in model.named_parameters() if id(p) in still}

@pytest.fixture(scope="module")
def whole():
    with seeded(0, "whole"): return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=8, num_heads=2, depth=3, num_classes=3)

def test_all_decay_or_matrices_as_in_timm(whole):
    from m2mkd.vit import to_chain
    chain = to_chain(whole, (1, 2))
    theirs = {id(p): g["weight_decay"] for g in param_groups_weight_decay(whole, 0.05, no_weight_decay_list=whole.no_weight_decay()) for p in g["params"]}
    assert {id(p): g["weight_decay"] for g in groups(chain, 0.05) for p in g["params"]} == theirs and 0. in theirs.values()
    assert {"0.embed.vit.pos_embed", "0.embed.vit.cls_token", "0.blocks.0.norm1.weight", "1.head.vit.head.bias"} < names(chain)
    assert "0.embed.vit.patch_embed.proj.weight" not in names(chain) and not names(chain, decay="all")
    theirs = {id(p): (g["lr_scale"], g["weight_decay"]) for g in param_groups_layer_decay(whole, 0.05, whole.no_weight_decay(), layer_decay=0.7) for p in g["params"]}
    assert {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups(chain, 0.05, layer_decay=0.7) for p in g["params"]} == theirs

def test_what_decays_in_our_students():
    with seeded(0, "students"): moe, circuit = VMoE(depths=(1, 1), width=8, heads=2, patch=4, experts=2).build(3, 8), CIRCUIT.build(3, 8)
    assert {"0.blocks.0.mlp.b1", "1.blocks.0.mlp.b2", "0.blocks.0.mlp.router.gate.bias", "0.embed.vit.cls_token"} < names(moe)
    assert not {"0.blocks.0.mlp.w1", "0.blocks.0.mlp.router.gate.weight"} & names(moe)
    assert "0.tokenizer.grid" in names(circuit) and not {"0.mediators.codes", "0.mediators.signatures"} & names(circuit)
    kept = {n: p for n, p in circuit.named_parameters() if n in names(circuit)}
    assert all(p.ndim <= 1 or n == "0.tokenizer.grid" for n, p in kept.items())
    assert names(nn.Sequential(moe[0]))                                # a module alone

def test_layers_of_any_chain():
    conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU())
    chain = nn.Sequential(nn.Sequential(conv(3, 4), conv(4, 4)), nn.Sequential(conv(4, 4), nn.Sequential(nn.Flatten(), nn.Linear(4, 2))))
    assert layers(chain) == ["0.0", "0.1", "1.0", "1.1"]
    scales = [g["lr_scale"] for g in groups(chain, 0., layer_decay=0.5)]
    assert sorted(set(scales)) == [0.125, 0.25, 0.5, 1.]
    fails(lambda: groups(nn.Linear(2, 2), 0., layer_decay=0.5), "layer_decay = 0.5 has no effect")
    chain.requires_grad_(False)[0][0].requires_grad_(True)
    assert sum(len(g["params"]) for g in groups(chain, 0.)) == 4 and not no_decay(nn.Linear(2, 2)) - {"*.bias"}

def test_one_step_with_and_without_decay():
    "The first step of AdamW moves a parameter by lr, and by lr * decay of itself more only where it decays."
    for rule, shrinks in (("all", True), ("matrices", False)):
        model = nn.Linear(2, 2)
        nn.init.ones_(model.bias)
        settings = Training(epochs=1, batch_size=512, lr=0.1, weight_decay=0.5, decay=rule)
        optimizer = make_optimizer(model, settings)
        model.weight.grad, model.bias.grad = torch.zeros(2, 2), torch.zeros(2)
        optimizer.step()
        assert model.bias.allclose(torch.full((2,), 0.95 if shrinks else 1.))

def test_a_stage_records_what_decays(tmp_path):
    task = Task(train=Data(name="digits", classes=3, per_class=8), test=(Data(name="digits", split="test", classes=3, per_class=3),))
    lab, brief = Lab(tmp_path, runtime=Runtime(device="cpu"), floor=0), Training(epochs=1, batch_size=8, augment=Augment(flip=0))
    assert nac.NAC().decays == Stitched(student=nac.NAC(), meta=Meta(like=TEACHER)).decays == "all" and TEACHER.decays == "matrices"
    meta = lab.end_to_end("meta", Meta(like=TEACHER), task, brief)
    other = lab.end_to_end("meta", Meta(like=TEACHER), task, brief.but(decay="all"))
    module = lab.incubate("module", TEACHER, meta, task, brief, only=[0])[0]
    assert [s.settings["training"]["decay"] for s in (meta, other, module)] == ["matrices", "all", "matrices"] and meta.hash != other.hash
    assert lab.end_to_end("meta", Meta(like=TEACHER), task, brief.but(decay="matrices")).path == meta.path
    fails(lambda: alike([meta, other]), "weight decay differs", "all and matrices")
    record = json.loads((other.path/"settings.json").read_text())
    del record["training"]["decay"]                                    # as older ones are
    (other.path/"settings.json").write_text(json.dumps(record))
    fails(lambda: alike([meta, other]), "all and matrices")
    fails(lambda: lab.end_to_end("x", TEACHER, task, brief, position="resizd"), "position", "'resizd'", "resize")


# --- schedules, warm-up, optimizers, trackers ---

def rates(schedule, steps, optimizer): return [[g["lr"] for g in optimizer.param_groups] for s in range(steps) if not schedule.step_update(s)]

def test_the_cosine_is_the_one_it_was():
    settings = Training(epochs=3, batch_size=48, lr=8e-3, min_lr=1e-5, warmup=0.7)
    ours, theirs = (torch.optim.SGD([torch.zeros(1)], lr=settings.lr * 48 / 512) for _ in "ab")
    old = CosineLRScheduler(theirs, t_initial=21 - 5, lr_min=1e-5 * 48 / 512, warmup_t=5, warmup_lr_init=1e-6 * 48 / 512, warmup_prefix=True, t_in_epochs=False)
    assert rates(make_schedule(ours, settings, 7), 21, ours) == rates(old, 21, theirs)

def test_schedules_and_layers_scale_together():
    settings = Training(epochs=4, batch_size=512, lr=1., schedule="step", schedule_options=dict(decay_epochs=2), layer_decay=0.5, weight_decay=0.)
    chain = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    optimizer = make_optimizer(chain, settings)
    found = np.array(rates(make_schedule(optimizer, settings, 1), 4, optimizer))
    assert np.allclose(found[:, ::2], [[0.5, 1.], [0.5, 1.], [0.05, 0.1], [0.05, 0.1]])

@pytest.mark.parametrize("wrong,said", [
    (dict(lr=1e-6), "min_lr = 1e-05 (the default) is above lr = 1e-06"), (dict(min_lr=0.1), "would rise"), (dict(optimizer="adahessian"), "cannot run here"),
    (dict(optimizer="bnbadam8bit"), "bnbadam8bit"), (dict(schedule="plateau"), "unknown schedule 'plateau'"), (dict(schedule="step"), "decay_epochs"),
    (dict(schedule="multistep", schedule_options=dict(decay_milestones=[1, 9])), "9 is no epoch"), (dict(schedule_options=dict(decay_rate=1.)), "decay_rate"),
    (dict(schedule="constant", min_lr=1e-6), "min_lr = 1e-06 has no effect"), (dict(layer_decay=1.), "layer_decay")])
def test_training_that_would_not_do_what_it_says(wrong, said):
    if wrong.get("optimizer", "").startswith("bnb") and torch.cuda.is_available(): pytest.skip("it may run here")
    fails(lambda: Training(**{"epochs": 4, **wrong}), said)

def test_names_of_optimizers_in_any_case(): assert Training(epochs=1, optimizer="AdamW") == Training(epochs=1)

@pytest.mark.parametrize("epochs,warmup,steps", [(1, 0.96, 6), (1, 0.1, 1), (2, 1.9, 3)])
def test_a_warm_up_of_all_steps_is_refused_before_anything_is_written(tmp_path, epochs, warmup, steps):
    class Few(list):
        def __len__(self): return steps
    settings = Training(epochs=epochs, batch_size=8, warmup=warmup)
    fails(lambda: train(end_to_end(nn.Linear(2, 2), 0), Few(), settings, {"model": tmp_path/"x"}), "warmup", "at least one")
    assert not (tmp_path/"x").exists()

def test_trackers():
    fails(lambda: Runtime(trackers=("wandbb",)), "unknown tracker 'wandbb'; nearest: wandb")
    missing = next(n for n in ("comet_ml", "aim", "clearml", "wandb") if not __import__("importlib").util.find_spec(n))
    fails(lambda: Runtime(trackers=("tensorboard", missing)), missing, "is not installed")


# --- a router of one expert ---

def test_a_router_of_one_expert_learns():
    torch.manual_seed(0)
    x, mixture = torch.randn(2, 9, 8), Mixture(8, 16, experts=4, top_k=1)
    mixture(x).square().sum().backward()
    assert mixture.router.softmax == "before" and mixture.router.gate.weight.grad.abs().max() > 0
    fixed = Mixture(8, 16, experts=4, top_k=1, softmax="after")
    fails(lambda: fixed(x), "top_k = 1", "never learn", "softmax = 'before'")
    with torch.no_grad(): assert fixed.eval()(x).isfinite().all()       # a published one can be evaluated
    fixed.train().requires_grad_(False)(x)
    assert Mixture(8, 16, experts=1, top_k=1, softmax="after")(x).requires_grad

def test_where_the_softmax_stands():
    assert [VMoE(top_k=k).softmax for k in (1, 2)] == ["before", "after"] and VMoE(top_k=1).but(top_k=2).softmax == "after"
    assert VMoE().but(top_k=1).softmax == "before" and hash_of(VMoE()) == hash_of(VMoE(softmax="after"))
    old = to_plain(VMoE(top_k=1, softmax="after"))
    assert from_plain(old).softmax == "after"
    fails(lambda: from_plain(old).check_training(), "top_k = 1")
    fails(lambda: VMoE(priority="weight"), "priority = 'weight' has no effect")
    assert from_plain(to_plain(VMoE()) | {"priority": "weight"}).mixture(0).gating.priority == "weight"


# --- losses in float32 ---

@pytest.mark.parametrize("tau", [1., 4.])
def test_losses_under_autocast_are_those_of_float32(tau):
    torch.manual_seed(0)
    s, y = torch.randn(64, 1000) * 3, torch.randn(64, 1000).softmax(1)
    t = s + torch.randn(64, 1000) * 0.02
    s, t, y = s.bfloat16(), t.bfloat16(), y.bfloat16()
    loss = {"soft": lambda a, b, c: soft_distillation(a, b, tau, "batchmean"), "hard": lambda a, b, c: hard_distillation(a, b, tau, "mean"),
            "label": lambda a, b, c: soft_cross_entropy(a, c), "all": lambda a, b, c: m2mkd_loss(a, b, c, alpha=0.5, tau=tau, reduction="mean")}
    for name, f in loss.items():
        with torch.autocast("cpu", torch.bfloat16): got = f(s, t, y)
        assert got.dtype == torch.float32 and got.item() == pytest.approx(f(s.double(), t.double(), y.double()).item(), rel=2e-2), name
        assert torch.equal(got, f(s.float(), t.float(), y.float()))

def test_auxiliary_losses_know_no_autocast():
    class Own(nn.Linear):
        def auxiliary(self): return {"product": (self.weight @ self.weight.T).sum()}
    with seeded(0, "own"): model = Own(64, 64)
    with torch.autocast("cpu", torch.bfloat16): terms = with_auxiliary({"loss": torch.zeros(())}, model)
    assert torch.equal(terms["product"], (model.weight @ model.weight.T).sum())

def test_settings_without_effect():
    fails(lambda: Distillation(kind="hard", tau=4), "tau = 4.0 has no effect")
    fails(lambda: Distillation(kind="hard", reduction="mean"), "reduction = 'mean' has no effect")
    assert Distillation(kind="hard").tau == 1


# --- a container with nothing in it ---

SLIM = """
import sys
from m2mkd import report, nac, study
from m2mkd.data import Augment, Data
from m2mkd.pipeline import Lab, Task, load
from m2mkd.train import Runtime, Training
from m2mkd.vit import ViT
few = [Data(name="digits", split=s, classes=3, per_class=4) for s in ("train", "test")]
lab = Lab(sys.argv[1], runtime=Runtime(device="cpu"))
brief = Training(epochs=1, batch_size=4, augment=Augment(flip=0))
model = ViT(depths=(1, 1), options=dict(embed_dim=8, num_heads=2, patch_size=4))
stage = lab.end_to_end("vit", model, Task(train=few[0], test=(few[1],)), brief)
load(stage.path)
arms = study.Study(lab, "vit", data="digits")
arms.add("vit", 0, stage)
report.save(report.intervals(arms), sys.argv[1] + "/a.svg", alt="One point.")
print("commit", stage.done["commit"])
"""

def test_no_git_no_display_no_home(tmp_path):
    (tmp_path/"file").touch()
    env = dict(PATH=str(tmp_path/"nowhere"), HOME=str(tmp_path/"file"/"home"), M2MKD_CACHE=str(tmp_path/"cache"), TMPDIR=str(tmp_path),
               PYTHONPATH=os.pathsep.join(filter(None, sys.path)), OMP_NUM_THREADS="1")
    run = subprocess.run([sys.executable, "-c", SLIM, tmp_path/"runs"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "commit None" in run.stdout, run.stderr


# --- schedules ---

@pytest.mark.parametrize("schedule,options", [
    ("multistep", dict(decay_milestones=2)), ("step", dict(decay_epochs=[1, 2])), ("wsd", dict(decay_epochs="2")),
    ("step", dict(decay_epochs=1, decay_rate="x")), ("wsd", dict(decay_fn="nonsense")), ("cosine", dict(k_decay=None)),
    ("multistep", dict(decay_milestones=[1, "2"])), ("step", dict(decay_epochs=1, decay_rate=-1.))])
def test_options_that_a_schedule_cannot_follow(schedule, options):
    with pytest.raises(ValueError, match=f"are none that the {schedule} schedule can follow") as e:
        Training(epochs=4, batch_size=50, schedule=schedule, schedule_options=options)
    assert str(options) in str(e.value) and "\n" not in str(e.value)


def test_epochs_of_options_count_from_the_end_of_the_warm_up():
    late = dict(epochs=4, batch_size=50, schedule="multistep", schedule_options=dict(decay_milestones=[3]))
    assert Training(**late)
    with pytest.raises(ValueError, match="3 is no epoch between 0 and 2, counted from the end of the warm-up"): Training(**late, warmup=2)


def test_a_training_from_a_record_can_be_changed():
    record = to_plain(Training(epochs=2, batch_size=50, schedule="constant"))
    assert from_plain(record).but(epochs=3).epochs == 3
    with pytest.raises(ValueError, match="min_lr = 0.001 has no effect"): from_plain(record).but(min_lr=1e-3)
