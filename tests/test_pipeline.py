"The whole method on a few digits: stages are named by their content, made once, resumed, loaded anywhere; source and target differ."
import json, shutil, subprocess, sys
from pathlib import Path

import pytest, timm, torch
from PIL import Image

from m2mkd import core, pipeline
from m2mkd.chain import assemble, hybrid, unstitched
from m2mkd.core import seeded
from m2mkd.data import Augment, Data
from m2mkd.distill import Distillation
from m2mkd.evaluate import evaluate
from m2mkd.folder import Folder, _own_sum
from m2mkd.pipeline import HybridError, Lab, Stitched, Task, cost, load, stages_in
from m2mkd.train import Runtime, Training
from m2mkd.vit import Meta, ViT
from m2mkd.vmoe import VMoE

TEACHER = ViT(depths=(2, 1, 1), options=dict(embed_dim=16, num_heads=2, patch_size=4))
META = Meta(like=TEACHER)
STUDENT = VMoE(depths=(1, 1, 1), width=8, heads=2, patch=4, experts=2, top_k=1)
SOURCE = Task(train=Data(name="digits", per_class=10), test=(Data(name="digits", split="test", per_class=4),))
TARGET = Task(train=Data(name="digits", classes=5, image_size=16, per_class=10), test=(Data(name="digits", split="test", classes=5, image_size=16, per_class=8),))
BRIEF = Training(epochs=1, batch_size=20, augment=Augment(flip=0))
CPU = Runtime(device="cpu")
CLASSIFIER = ["2.head.vit.head.weight", "2.head.vit.head.bias"]


def experiment(lab, **distillation):
    "The method from a meta model to a fine-tuned student on the target."
    meta = lab.end_to_end("meta", META, SOURCE, BRIEF)
    teacher = lab.finetune("teacher", TEACHER, lab.incubate("incubate", TEACHER, meta, SOURCE, BRIEF), SOURCE, BRIEF)
    modules = lab.distill("distill", STUDENT, meta, teacher, SOURCE, BRIEF, Distillation(**distillation))
    return dict(meta=meta, teacher=teacher, modules=modules, final=lab.finetune("m2mkd", STUDENT, modules, TARGET, BRIEF))

def lab_at(root, **others): return Lab(root, runtime=CPU, **{"floor": 0, **others})

@pytest.fixture(scope="module")
def root(tmp_path_factory): return tmp_path_factory.mktemp("runs")

@pytest.fixture(scope="module")
def stages(root): return experiment(lab_at(root))

@pytest.fixture
def no_training(monkeypatch): monkeypatch.setattr(pipeline, "train", lambda *_, **__: pytest.fail("trained again"))

def folders(root): return {p.name for p in Path(root).glob("*-s*-*")}

def fails(what, *said, kind=ValueError):
    "One error of `kind`, in one line, that says all of `said`."
    with pytest.raises(kind) as e: what()
    assert all(s in str(e.value) for s in said) and "\n" not in str(e.value), str(e.value)

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# --- from 10 classes at 8 pixels to 5 at 16 ---

def test_every_stage_has_its_place(stages):
    for stage in stages["final"].everything():
        done = stage.done
        assert stage.path.name == f"{stage.name}-s0-{stage.hash}" and done["name"] == stage.name and done["seed"] == 0 and done["flops"] > 0 and done["results"]["images"] > 0
        assert not (stage.path/"checkpoint.pt").exists() and not list(stage.path.glob("*.partial"))
    assert stages["final"].done["results"]["images"] == len(stages["final"].predictions()) == 40
    assert stages["final"].metrics[0]["step"] == 0 and "top1" in stages["final"].metrics[0]       # right after assembly

def started(spec, modules, position="resize"):
    "(chain, treated keys) of a start on the target."
    with seeded(0, "target"): chain = spec.build(5, 16)
    return chain, pipeline.start_from(chain, spec, modules, dict(classes=[str(c) for c in range(5)], image_size=16), position)

@pytest.mark.parametrize("position", ["resize", "new"])
def test_what_is_new_or_resized_on_the_target(stages, position):
    chain, treated = started(STUDENT, stages["modules"], position)
    assert treated == ["0.embed.vit.pos_embed", *CLASSIFIER]
    with seeded(0, "target"): fresh = STUDENT.build(5, 16).state_dict()
    trained = {f"{i}.{k}": v for i, s in enumerate(stages["modules"]) for k, v in unstitched(s.state()).items()}
    for k, v in chain.state_dict().items(): assert k in treated or torch.equal(v, trained[k])
    assert all(torch.equal(chain.state_dict()[k], fresh[k]) for k in CLASSIFIER)
    assert torch.equal(chain.state_dict()[treated[0]], fresh[treated[0]]) == (position == "new")

def test_the_teacher_on_the_target(stages):
    assert started(TEACHER, [stages["teacher"]])[1] == ["0.embed.vit.pos_embed", *CLASSIFIER]
    assert started(META, [stages["meta"]])[1] == ["0.embed.vit.pos_embed", *CLASSIFIER]

def test_stitch_layers_that_come_off(stages):
    bare = STUDENT.build(10, 8)
    dropped = [sorted(set(s.state()) - {f"module.{k}" for k in m.state_dict()}) for s, m in zip(stages["modules"], bare)]
    before, after = ["before.linear.bias", "before.linear.weight"], ["after.linear.bias", "after.linear.weight"]
    assert dropped == [after, sorted(after + before), before]
    assert assemble(bare, [unstitched(s.state()) for s in stages["modules"]]) == []

def test_stitch_layers_that_stay(stages, root, capsys):
    wrapped = Stitched(student=STUDENT, meta=META)
    chain, treated = started(wrapped, stages["modules"])
    assert treated == ["0.module.embed.vit.pos_embed", "2.module.head.vit.head.weight", "2.module.head.vit.head.bias"]
    assert all(torch.equal(v, stages["modules"][1].state()[k]) for k, v in chain[1].state_dict().items())
    stage = lab_at(root).finetune("stitched", wrapped, stages["modules"], TARGET, BRIEF)
    assert "stitched: new or resized: 0.module.embed.vit.pos_embed, 2.module.head.vit.head.weight" in capsys.readouterr().out
    assert any(k.startswith("1.before.linear") for k in stage.state()) and stage.done["results"]["images"] == 40

def test_within_one_task_nothing_is_new(stages, root, capsys):
    again = lab_at(root).finetune("same_task", STUDENT, stages["modules"], SOURCE, BRIEF)
    assert "new or resized" not in capsys.readouterr().out
    with seeded(0, "init"): chain = STUDENT.build(10, 8)
    assert pipeline.start_from(chain, STUDENT, stages["modules"], again.settings, "resize") == []


# --- stages are made once ---

def test_a_second_lab_trains_nothing(stages, root, no_training):
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*")}
    again = experiment(lab_at(root))
    assert again == stages and [s.hash for s in again["final"].everything()] == [s.hash for s in stages["final"].everything()]
    assert before == {f: f.stat().st_mtime_ns for f in root.rglob("*")}

def test_equal_experiments_are_equal_to_the_bit(stages, tmp_path):
    again = experiment(lab_at(tmp_path))
    assert [s.path.name for s in again["final"].everything()] == [s.path.name for s in stages["final"].everything()]
    assert equal(again["final"].state(), stages["final"].state())
    assert [m["loss"] for m in again["final"].metrics[1:]] == [m["loss"] for m in stages["final"].metrics[1:]]

def test_another_setting_shares_what_it_can(stages, root):
    other = experiment(lab_at(root), alpha=0.9)
    assert other["teacher"] == stages["teacher"] and other["meta"] == stages["meta"]
    assert not {s.path for s in (*other["modules"], other["final"])} & {s.path for s in (*stages["modules"], stages["final"])}

def test_what_the_hash_covers(stages, root, monkeypatch):
    "Everything that changes numbers, and not where data or runs are."
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: None)
    lab = lab_at(root)
    def name(model=META, task=SOURCE, training=BRIEF, seed=0): return lab.end_to_end("e2e", model, task, training, seed).path.name
    names = [name(), name(model=TEACHER), name(task=TARGET), name(training=BRIEF.but(lr=1e-3)), name(seed=1), name(training=BRIEF.but(precision="bf16"))]
    assert len(set(names)) == len(names) and name() == names[0]

def test_only_some_modules(stages, root, no_training):
    "Each module is a job of its own, on whatever machine, and finds its folder again."
    for i, done in enumerate(stages["teacher"].inputs):
        assert lab_at(root).incubate("incubate", TEACHER, stages["meta"], SOURCE, BRIEF, only=[i]) == [done]

def without_weights(root, *stages):
    "Remove the weights of the stages (all if none is given), as in a fresh clone; what is left, by name."
    for path in [s.path for s in stages] or Path(root).glob("*-s*-*"): (path/"model.safetensors").unlink(missing_ok=True)
    return {f: f.read_bytes() for f in Path(root).rglob("*.json*")}

def test_a_clone_without_weights_is_done(stages, tmp_path, no_training):
    "Every call finds its stage, and only who asks for weights hears what they cost and how to have them."
    shutil.copytree(stages["final"].path.parent, tmp_path/"runs")
    facts, lab = without_weights(tmp_path/"runs"), lab_at(tmp_path/"runs")
    found = experiment(lab)
    assert found["final"].hash == stages["final"].hash and found["modules"].health.equals(stages["modules"].health)
    assert equal_arrays(found["final"].correct(), stages["final"].correct())
    for ask in (found["final"].state, found["modules"][0].model, lambda: load(found["meta"].path)):
        fails(ask, "model.safetensors is missing: weights are not in git", " s by its record", "Lab(..., again=True)", kind=FileNotFoundError)
    before = folders(lab.root)
    for call in (lambda: lab.finetune("more", STUDENT, found["modules"], SOURCE, BRIEF), lambda: lab.incubate("more", TEACHER, found["meta"], SOURCE, BRIEF),
                 lambda: lab.distill("more", STUDENT, found["meta"], found["teacher"], SOURCE, BRIEF), lambda: lab.fit("more", META, found["teacher"], SOURCE, BRIEF),
                 lambda: lab.health(found["meta"], found["teacher"], SOURCE, list(found["teacher"].inputs))):
        fails(call, "weights are not in git", kind=FileNotFoundError)
    assert folders(lab.root) == before and facts == {f: f.read_bytes() for f in (tmp_path/"runs").rglob("*.json*")}

def equal_arrays(a, b): return a.dtype == b.dtype and a.tolist() == b.tolist()

def test_one_module_is_made_beside_others_without_weights(stages, tmp_path):
    "The weights of what is done are not needed for the rest of its group; what is done stays as it was."
    shutil.copytree(stages["final"].path.parent, tmp_path/"runs")
    lab, (one, two, three) = lab_at(tmp_path/"runs"), (tmp_path/"runs"/s.path.name for s in stages["modules"])
    (one/"model.safetensors").unlink()
    shutil.rmtree(two)
    before = (one/"done.json").read_bytes(), (three/"done.json").read_bytes()
    again = experiment(lab)["modules"]
    assert max((v - stages["modules"][1].state()[k]).abs().max() for k, v in again[1].state().items()) < 1e-5
    assert before == ((one/"done.json").read_bytes(), (three/"done.json").read_bytes()) and not again[0].stored

def test_weights_are_made_again_where_they_are_asked_for(stages, tmp_path, capsys):
    "Of a model and all that it needs, the same to the bit; the facts stay untouched."
    shutil.copytree(stages["final"].path.parent, tmp_path/"runs")
    facts, lab = without_weights(tmp_path/"runs"), lab_at(tmp_path/"runs", again=True)
    found = experiment(lab)
    assert "again" not in capsys.readouterr().out and not found["final"].stored
    assert equal(found["final"].state(), stages["final"].state()) and equal(found["modules"][1].state(), stages["modules"][1].state())
    said = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "are made again; it took" in line]
    assert sorted(said) == ["distill-0, distill-1, distill-2", "incubate-0, incubate-1, incubate-2", "m2mkd", "meta", "teacher"]    # who trained together does
    assert facts == {f: f.read_bytes() for f in (tmp_path/"runs").rglob("*.json*")} and not (tmp_path/"runs/.again").exists()
    assert equal(found["final"].model().state_dict(), stages["final"].state())

def test_other_weights_are_said_and_replace_the_facts(stages, tmp_path, capsys):
    lab = lab_at(tmp_path, again=True)
    stage, given = lab.end_to_end("meta", META, SOURCE, BRIEF), lab.given("given", TEACHER, SOURCE)
    for s in (stage, given):
        (s.path/"model.safetensors").unlink()
        done = s.done
        sums = done["sums"] | {"model.safetensors": "0" * 64}
        core.write_json(s.path/"done.json", done | {"threads": 99, "seconds": 1234, "sums": sums | {"done.json": _own_sum(done | {"threads": 99, "seconds": 1234, "sums": sums})}})
        assert s.state() and s.done["seconds"] < 1000 and Folder(s.path).done() and s.correct().shape == (40,)
        said = capsys.readouterr().out
        assert f"{s.name}: the weights are not here and are made again; it took 1,234 s" in said
        assert f"{s.name}: these weights are not the recorded ones (threads 99 there, 1 here); the facts are replaced" in said

def test_an_interrupted_experiment(stages, tmp_path, monkeypatch):
    "Stopped while the modules are distilled, with some of them done: the rest is made, and all is as if nothing had happened."
    real, calls = pipeline.train, []
    def stops(phase, *args, **kwargs):
        calls.append(list(phase.trains))
        if len(calls) == 4: raise KeyboardInterrupt
        return real(phase, *args, **kwargs)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "train", stops)
        experiment(lab_at(tmp_path))
    lab, s = lab_at(tmp_path), stages
    lab.distill("distill", STUDENT, *(pipeline.Stage(tmp_path/s[k].path.name, s[k].inputs) for k in ("meta", "teacher")), SOURCE, BRIEF, only=[1])
    assert calls[3] == ["distill-0", "distill-1", "distill-2"]
    again = experiment(lab_at(tmp_path))
    assert again["final"].path.name == s["final"].path.name
    for a, b in zip(again["modules"], s["modules"]):
        assert max((v - b.state()[k]).abs().max() for k, v in a.state().items()) < 1e-5      # one was trained alone

def test_cost_counts_each_stage_once(stages):
    every = stages["final"].everything()
    assert len(every) == 1 + 3 + 1 + 3 + 1 == len({s.path for s in every})
    assert cost(stages["final"]) == (sum(s.done["flops"] for s in every), sum(s.done["seconds"] for s in every))
    assert cost(stages["final"], stages["teacher"], *stages["modules"]) == cost(stages["final"])
    assert cost(stages["meta"])[0] == stages["meta"].done["flops"] < cost(stages["teacher"])[0] < cost(stages["final"])[0]

def test_health_is_measured_once(stages, root, capsys):
    table = lab_at(root).health(stages["meta"], stages["teacher"], SOURCE, stages["modules"])
    assert list(table.columns) == ["stage", "seed", "meta", "teacher", "student", "kl"] and len(table) == 3
    lab, host = lab_at(root), stages["meta"].model()
    assert table.teacher[1] == evaluate(hybrid(host, 1, stages["teacher"].model()[1]), lab.test(SOURCE)).top(1)
    assert table.student[2] == evaluate(hybrid(host, 2, stages["modules"][2].model()), lab.test(SOURCE)).top(1)
    assert table.meta[0] == stages["meta"].done["results"]["top1"]
    assert not capsys.readouterr().out and table.equals(stages["modules"].health) and list(table.stage) == ["distill"] * 3
    record = next(s for s in stages_in(root).values() if s.name == "hybrids" and len(s.inputs) == 5)
    assert record.path.name == f"hybrids-s0-{record.hash}" and record.health().equals(table)
    assert record.done["of"] == dict(meta="meta", teacher="teacher", students="distill") and record.seed == 0

FRESH = """
import sys, torch
from m2mkd.pipeline import load
models, images = [load(path).eval() for path in sys.argv[2:]], torch.load(sys.argv[1] + "/in.pt")
with torch.no_grad(): torch.save([m(x) for m, x in zip(models, images)], sys.argv[1] + "/out.pt")
"""

def test_a_stage_loads_in_a_fresh_process(stages, tmp_path):
    "A whole model and a single module, from their folders alone."
    paths, images = [stages["final"].path, stages["modules"][0].path], [torch.randn(2, 3, n, n) for n in (16, 8)]
    torch.save(images, tmp_path/"in.pt")
    subprocess.run([sys.executable, "-c", FRESH, tmp_path, *paths], check=True)
    with torch.no_grad():
        for path, x, y in zip(paths, images, torch.load(tmp_path/"out.pt")): assert torch.equal(load(path).eval()(x), y)

def test_given_models(tmp_path, no_training):
    "A model from a local checkpoint of timm: evaluated, kept, and from then on loaded without it."
    with seeded(0, "given"): vit = timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=10, depth=4, **TEACHER.options)
    torch.save(vit.state_dict(), tmp_path/"teacher.pth")
    spec = ViT(depths=(2, 1, 1), checkpoint=str(tmp_path/"teacher.pth"), options=dict(depth=4, **TEACHER.options))
    stage = lab_at(tmp_path/"runs").given("given", spec, SOURCE)
    assert stage.done["results"]["images"] == 40 and stage.done["flops"] == 0 and lab_at(tmp_path/"runs").given("given", spec, SOURCE) == stage
    (tmp_path/"teacher.pth").unlink()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(stage.model().eval()(x), vit.eval()(x))


# --- teachers that were trained otherwise ---

@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    "(lab, task, training, meta model, teacher): both trained end to end, each on its own, until they know something."
    task = Task(train=Data(name="digits", classes=5, per_class=80), test=(Data(name="digits", split="test", classes=5),))
    lab, training = Lab(tmp_path_factory.mktemp("apart"), runtime=CPU), Training(epochs=4, batch_size=20, lr=0.08, warmup=1, clip=1., augment=Augment(flip=0))
    return lab, task, training, lab.end_to_end("meta", META, task, training), lab.end_to_end("teacher", TEACHER, task, training)

def test_a_cut_teacher_does_not_fit_a_meta_model_trained_apart(apart):
    lab, task, training, meta, teacher = apart
    assert min(s.done["results"]["top1"] for s in (meta, teacher)) > 0.6
    with pytest.raises(HybridError, match=r"teacher module \d does not fit the meta model: its hybrid reaches .*less than 0.5 of the meta model's"):
        lab.health(meta, teacher, task)
    with pytest.raises(HybridError, match=r"teacher module \d does not fit"): lab.distill("distill", STUDENT, meta, teacher, task, training)
    assert not [n for n in folders(lab.root) if n.startswith("distill")]
    assert (lab.health(meta, teacher, task, floor=0).teacher < 0.5).any()

def test_a_fitted_meta_model_fits(apart):
    lab, task, training, _, teacher = apart
    training = training.but(epochs=3)
    fitted = lab.fit("fit", META, teacher, task, training)
    assert fitted[0].inputs == (teacher,) and all(s.done["results"]["top1"] > 0.5 for s in fitted)
    meta = lab.finetune("meta_fitted", META, fitted, task, training)
    assert (lab.health(meta, teacher, task).teacher > 0.5).all()
    assert len(lab.distill("distill", STUDENT, meta, teacher, task, BRIEF)) == 3


# --- bad input ---

def test_more_students_than_modules(stages, tmp_path):
    lab, meta, teacher = lab_at(tmp_path), stages["meta"], stages["teacher"]
    more, fewer = STUDENT.but(depths=(1, 1, 1, 1)), STUDENT.but(depths=(2, 1))
    distill = lambda student: lab.distill("distill", student, meta, teacher, SOURCE, BRIEF)
    fails(lambda: distill(more), "the student has 4 modules, the meta model 3")
    fails(lambda: distill(fewer), "the student has 2 modules, the meta model 3")
    fails(lambda: lab.incubate("incubate", TEACHER.but(depths=(1, 1, 1, 1)), meta, SOURCE, BRIEF), "incubate: 4 modules for a host of 3")
    fails(lambda: lab.finetune("few", STUDENT, stages["modules"][:2], TARGET, BRIEF), "2 trained modules for a chain of 3")
    short = lab.given("given", TEACHER.but(depths=(2, 2)), SOURCE)
    fails(lambda: lab.distill("distill", STUDENT, meta, short, SOURCE, BRIEF), "the teacher has 2 modules, the meta model 3")
    fails(lambda: lab.incubate("incubate", TEACHER, meta, SOURCE, BRIEF, only=[3]), "incubate: module index 3 is outside 0..2", kind=IndexError)
    assert {n.partition("-")[0] for n in folders(tmp_path)} <= {"hybrids", "given"}

def test_modules_in_another_order(stages, tmp_path):
    one, two, three = stages["modules"]
    fails(lambda: lab_at(tmp_path).finetune("mixed", STUDENT, [one, three, two], TARGET, BRIEF), "0, 2, 1")
    assert not folders(tmp_path)

@pytest.mark.parametrize("spec,said", [(TEACHER.but(depths=(2, 0, 1)), "depths (2, 0, 1)"), (TEACHER.but(depths=()), "depths ()"),
    (TEACHER.but(options=TEACHER.options | dict(depth=5)), "depths (2, 1, 1) sum to 4, but the model has 5 layers"),
    (TEACHER.but(name="vit_tny_patch16_224"), "unknown timm model 'vit_tny_patch16_224'; nearest: vit_tiny_patch16_224"),
    (TEACHER.but(options=dict(embed_dim=16, num_heads=2, patch_size=3)), "image size 8 is not divisible by the patch size 3"),
    (STUDENT.but(patch=3), "image size 8 is not divisible by the patch size 3")])
def test_models_that_cannot_be_built(tmp_path, spec, said):
    fails(lambda: lab_at(tmp_path).end_to_end("e2e", spec, SOURCE, BRIEF), said)
    fails(lambda: lab_at(tmp_path).given("given", spec, SOURCE), said)
    assert not folders(tmp_path)

def test_a_batch_larger_than_the_set(tmp_path):
    fails(lambda: lab_at(tmp_path).end_to_end("e2e", META, SOURCE, BRIEF.but(batch_size=101)), "batch_size = 101, but the training set has 100 images")
    assert not folders(tmp_path)

def test_test_images_in_the_training_set(tmp_path):
    both = Task(train=Data(name="digits", per_class=20), test=(Data(name="digits", split="test"), Data(name="digits", per_class=(15, 30))))
    fails(lambda: lab_at(tmp_path).end_to_end("e2e", META, both, BRIEF), "50 images of split 'train' are in the training set and in the test set")
    assert not folders(tmp_path)

def test_other_classes_in_the_test_set(tmp_path):
    other = Task(train=Data(name="digits", classes=("0", "1")), test=(Data(name="digits", split="test", classes=("0", "2")),))
    fails(lambda: lab_at(tmp_path).end_to_end("e2e", META, other, BRIEF), "has other classes than the training set")

def test_weights_of_another_model(stages, tmp_path):
    wide, lab = TEACHER.but(options=TEACHER.options | dict(embed_dim=12)), lab_at(tmp_path)
    fails(lambda: lab.end_to_end("e2e", wide, SOURCE, BRIEF, start=stages["teacher"]),
          "checkpoint of another model: 0.embed.vit.cls_token is (1, 1, 16) in it, (1, 1, 12) here")
    deep = TEACHER.but(depths=(2, 2, 1))
    fails(lambda: lab.finetune("e2e", deep, [stages["teacher"]], SOURCE, BRIEF), "checkpoint of another model: missing: 1.blocks.1.norm1.weight, ")
    fails(lambda: lab.finetune("e2e", STUDENT.but(experts=3), stages["modules"], SOURCE, BRIEF),
          "checkpoint of another model: blocks.0.mlp.w1 is (2, 8, 32) in it, (3, 8, 32) here")
    fails(lambda: lab.finetune("e2e", STUDENT, [stages["teacher"]], TARGET, BRIEF), "checkpoint of another model: ")
    assert not folders(tmp_path)

def test_weights_in_a_stage_of_another_model(stages, tmp_path):
    stage = lab_at(tmp_path).end_to_end("meta", META, SOURCE, BRIEF)
    (stage.path/"model.safetensors").write_bytes((stages["final"].path/"model.safetensors").read_bytes())
    for look in (stage.model, stage.state): fails(look, "model.safetensors has changed since the stage was done")
    meta = lab_at(tmp_path).end_to_end("meta", META, SOURCE, BRIEF)
    fails(lambda: lab_at(tmp_path).incubate("incubate", TEACHER, meta, SOURCE, BRIEF), "model.safetensors has changed since the stage was done")
    assert folders(tmp_path) == {meta.path.name}

def test_a_timm_checkpoint_of_another_model(tmp_path):
    narrow = timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=10, depth=4, patch_size=4, embed_dim=8, num_heads=2)
    torch.save(narrow.state_dict(), tmp_path/"narrow.pth")
    spec = ViT(depths=(2, 1, 1), checkpoint=str(tmp_path/"narrow.pth"), options=dict(depth=4, **TEACHER.options))
    fails(lambda: lab_at(tmp_path/"runs").given("given", spec, SOURCE), "checkpoint of another model: cls_token is (1, 1, 8) in it, (1, 1, 16) here")
    (tmp_path/"narrow.pth").write_bytes(b"not a checkpoint")
    fails(lambda: lab_at(tmp_path/"runs").given("given", spec, SOURCE), str(tmp_path/"narrow.pth"), "damaged")
    fails(lambda: lab_at(tmp_path/"runs").given("given", spec.but(checkpoint="nowhere.pth"), SOURCE), "checkpoint nowhere.pth is missing", kind=FileNotFoundError)
    assert not folders(tmp_path/"runs")

def test_a_stage_folder_of_other_settings(stages, tmp_path):
    stage = lab_at(tmp_path).end_to_end("meta", META, SOURCE, BRIEF)
    settings = json.loads((stage.path/"settings.json").read_text())
    (stage.path/"settings.json").write_text(json.dumps(settings | {"seed": 5}))
    fails(lambda: lab_at(tmp_path).end_to_end("meta", META, SOURCE, BRIEF), f"run folder {stage.path} was made with other settings: seed is 5 there, 0 here")

def test_unknown_way_to_treat_positions(stages, tmp_path):
    fails(lambda: lab_at(tmp_path).finetune("e2e", STUDENT, stages["modules"], TARGET, BRIEF, position="resized"), "unknown way to treat the position embedding 'resized'")
    assert not folders(tmp_path)

def test_a_damaged_image_goes_no_further_than_loading(tmp_path, monkeypatch):
    monkeypatch.setenv("M2MKD_CACHE", str(tmp_path/"cache"))
    for split, name, k in [(s, n, k) for s in ("train", "test") for n in ("crow", "owl") for k in range(3)]:
        (tmp_path/"birds"/split/name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (60 * k, 0, 0)).save(tmp_path/"birds"/split/name/f"{k}.png")
    birds = Data(name="birds", root=tmp_path/"birds")
    task = Task(train=birds, test=(birds.but(split="test"),))
    damaged = tmp_path/"birds/test/owl/1.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    fails(lambda: lab_at(tmp_path/"runs").end_to_end("e2e", META, task, BRIEF.but(batch_size=4)), str(damaged), "damaged")
    assert not folders(tmp_path/"runs")
