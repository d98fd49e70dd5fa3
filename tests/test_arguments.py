"The likely first mistakes: one sentence from the call itself, before anything is computed or written."
import types

import numpy as np
import pytest
import torch
from torch import nn

from m2mkd import arguments, pipeline
from m2mkd.data import Augment, Data
from m2mkd.distill import Distillation
from m2mkd.pipeline import Lab, Stage, Stitched, Task, load
from m2mkd.train import Runtime, Training
from m2mkd.vit import Meta, Model, ViT

VIT = ViT(depths=(1, 1), options=dict(embed_dim=16, num_heads=2, patch_size=4))
META, BRIEF = Meta(like=VIT), Training(epochs=1, batch_size=50, augment=Augment(flip=0))
DIGITS = Data(name="digits", per_class=10)


class Net(Model):
    "Two linear modules, and what may be wrong with them."
    wrong: str = ""

    def build(self, classes, image_size):
        logits = {"more": classes + 1, "fewer": classes - 1, "one": 1}.get(self.wrong, classes)
        parts = [nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, 80), nn.Unflatten(1, (5, 16))),
                 nn.Sequential(nn.Flatten(), nn.Linear(80, logits))]
        if self.wrong == "frozen": nn.Sequential(*parts).requires_grad_(False)
        if self.wrong == "still": parts[0][1].requires_grad_(False)
        if self.wrong == "wide": parts[1][1] = nn.Linear(81, classes)
        if self.wrong == "map": parts[1] = nn.Identity()
        return {"list": nn.ModuleList(parts), "layer": parts[0][1], "nothing": None}.get(self.wrong, nn.Sequential(*parts))


def task(**which): return Task(train=DIGITS.but(**which), test=(Data(name="digits", split="test", **which),))

TASK = task()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A lab with a meta model, the modules of a teacher and the teacher; nothing is trained or loaded after that."
    lab = Lab(tmp_path_factory.mktemp("runs"), runtime=Runtime(device="cpu"), floor=0)
    meta = lab.end_to_end("meta", META, TASK, BRIEF)
    modules = lab.incubate("incubate", VIT, meta, TASK, BRIEF)
    return types.SimpleNamespace(lab=lab, meta=meta, modules=modules, teacher=lab.finetune("teacher", VIT, modules, TASK, BRIEF))


@pytest.fixture
def refused(made, monkeypatch):
    "refused(call, kind, *said): the call fails in one line that says all this, and leaves nothing behind."
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(pipeline, "evaluate_all", lambda *_, **__: pytest.fail("evaluated"))
    def check(call, kind, *said):
        before = sorted(made.lab.root.rglob("*"))
        with pytest.raises(kind) as e: call()
        assert all(s in str(e.value) for s in said) and "\n" not in str(e.value), str(e.value)
        assert sorted(made.lab.root.rglob("*")) == before
    return check


def test_something_else_than_a_model(made, refused):
    e2e = lambda model: made.lab.end_to_end("x", model, TASK, BRIEF)
    for model, said in ((VIT.build(10, 8), "an nn.Module (Sequential)"), (ViT, "the class ViT"), ("vit_tiny_patch16_224", "'vit_tiny_patch16_224'"),
                        (made.meta, "a Stage"), (DIGITS, "a Data"), (None, "None"), ({"class": "ViT"}, "a dict")):
        refused(lambda: e2e(model), TypeError, f"Lab.end_to_end(name, model, task, training, seed, start, position): model is {said}; it should be settings of a model")
        refused(lambda: made.lab.given("x", model, TASK), TypeError, f"model is {said}")
        refused(lambda: made.lab.distill("x", model, made.meta, made.teacher, TASK, BRIEF), TypeError, f"student is {said}")
        refused(lambda: made.lab.fit("x", model, made.teacher, TASK, BRIEF), TypeError, f"meta is {said}")
    refused(lambda: e2e(VIT.build(10, 8)), TypeError, "write a Model settings class whose build returns it (see own_models)")


def test_something_else_than_a_stage(made, refused):
    lab, path = made.lab, made.meta.path
    for stage, said in ((path, f"'{path}'; it should be a finished Stage: Stage('{path}')"), (str(path), f"Stage('{path}')"), (META, "a Meta; "),
                        (made.modules, "a list of 2, the first a Stage; "), (META.build(10, 8), "an nn.Module (Sequential); "), (None, "None; ")):
        refused(lambda: lab.incubate("x", VIT, stage, TASK, BRIEF), TypeError, f"meta is {said}" if "; " in said else said)
        refused(lambda: lab.distill("x", Net(), stage, made.teacher, TASK, BRIEF), TypeError, "meta is ")
        refused(lambda: lab.distill("x", Net(), made.meta, stage, TASK, BRIEF), TypeError, "teacher is ")
        refused(lambda: lab.health(stage, made.teacher, TASK), TypeError, "meta is ")
        if stage is not None: refused(lambda: lab.end_to_end("x", VIT, TASK, BRIEF, start=stage), TypeError, "start is ")
    refused(lambda: lab.finetune("x", VIT, made.teacher, TASK, BRIEF), TypeError, "modules is a Stage; it should be a list of finished Stages: [stage]")
    refused(lambda: lab.finetune("x", VIT, path, TASK, BRIEF), TypeError, f"[Stage('{path}')]")
    refused(lambda: lab.finetune("x", VIT, [path], TASK, BRIEF), TypeError, "each a Stage")
    refused(lambda: lab.health(made.meta, made.teacher, TASK, made.modules[0]), TypeError, "students is a Stage")


def test_something_else_than_a_task_or_settings(made, refused):
    lab = made.lab
    for given, said in ((DIGITS, "Task(train=..., test=(...,))"), ("digits", "Data(name=...)"), (DIGITS.load(), "a ImageSet"), ([DIGITS, DIGITS], "a list of 2, the first a Data")):
        refused(lambda: lab.end_to_end("x", VIT, given, BRIEF), TypeError, "task is ", "it should be a Task", said)
        refused(lambda: lab.health(made.meta, made.teacher, given), TypeError, "task is ")
        refused(lambda: lab.images(given), TypeError, "task is ")
    refused(lambda: lab.end_to_end("x", VIT, TASK, 5), TypeError, "training is 5; it should be a Training: Training(epochs=5)")
    refused(lambda: lab.end_to_end("x", VIT, TASK, {"epochs": 5}), TypeError, "training is a dict", "Training(**...)")
    refused(lambda: lab.distill("x", Net(), made.meta, made.teacher, TASK, BRIEF, 0.5), TypeError, "distillation is 0.5", "Distillation(alpha=0.5)")
    refused(lambda: lab.end_to_end("x", VIT, TASK), TypeError, "Lab.end_to_end", "no training is given, neither here nor to the Lab: training=Training(...)")
    refused(lambda: lab.end_to_end(VIT, TASK, BRIEF), TypeError, "name is a ViT; it should be a name for the stage, as text")


def test_swapped_arguments(made, refused):
    lab, meta, teacher = made.lab, made.meta, made.teacher
    refused(lambda: lab.end_to_end(VIT, "x", TASK, BRIEF), TypeError, "name is a ViT and model is 'x': are they swapped?")
    refused(lambda: lab.end_to_end("x", TASK, VIT, BRIEF), TypeError, "model is a Task and task is a ViT: are they swapped?")
    refused(lambda: lab.incubate("x", meta, VIT, TASK, BRIEF), TypeError, "model is a Stage and meta is a ViT: are they swapped?")
    refused(lambda: lab.fit("x", teacher, META, TASK, BRIEF), TypeError, "meta is a Stage and teacher is a Meta: are they swapped?")
    refused(lambda: lab.distill("x", Net(), meta, teacher, TASK, Distillation(), BRIEF), TypeError, "training is a Distillation and distillation is a Training")
    refused(lambda: lab.distill("x", Net(), teacher, meta, TASK, BRIEF), ValueError, f"the teacher {meta.path.name} is a Meta", "are they swapped?")


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "..", ".", "", " x", "x ", "x.", "a:b", "a\nb", "a\0", "x" * 101, ".x"])
def test_names_that_are_no_folder(made, refused, name):
    refused(lambda: made.lab.end_to_end(name, VIT, TASK, BRIEF), ValueError, "cannot name a folder")
    refused(lambda: made.lab.given(name, VIT, TASK), ValueError, "cannot name a folder")


def test_seeds_floors_and_only(made, refused):
    lab, root = made.lab, made.lab.root
    assert type(Lab(root, seed=np.int64(3)).seed) is int and Lab(str(root)).root == root and Lab(root, floor=np.float32(0.5)).floor == 0.5
    again = lab.incubate("incubate", VIT, made.meta, TASK, BRIEF, seed=np.int64(0), only=(np.int64(1),))
    assert again == made.modules[1:] and lab.incubate("incubate", VIT, made.meta, TASK, BRIEF, only=range(2)) == made.modules
    for seed in ("0", 0.0, True, [0]):
        refused(lambda: Lab(root, seed=seed), TypeError, "Lab(root, task, training, runtime, seed, floor, again, where): seed is ", "a whole number")
        refused(lambda: lab.end_to_end("x", VIT, TASK, BRIEF, seed=seed), TypeError, "seed is ")
    for floor in (-0.1, 1.5, float("nan")): refused(lambda: Lab(root, floor=floor), ValueError, "outside 0..1")
    for given in (dict(runtime="cpu"), dict(runtime=torch.device("cpu")), dict(runtime=0), dict(floor="0.5"), dict(floor=True), dict(root=TASK), dict(root=None)):
        refused(lambda: Lab(**{"root": root, **given}), TypeError, f"{next(iter(given))} is ")
    refused(lambda: Lab(root, runtime="cuda"), TypeError, "Runtime(device='cuda')")
    for given in (Runtime(device="cpu"), torch.device("cpu")): refused(lambda: Lab(root, given), TypeError, "task is a", "it should be a Task: runtime=Runtime(")
    only = lambda which: lab.incubate("x", VIT, made.meta, TASK, BRIEF, only=which)
    for which, kind, said in ((1, TypeError, "[1]"), ("01", TypeError, "only is '01'"), ([0.5], TypeError, "only is"), ([True], TypeError, "only is"),
                              ([], ValueError, "names no module"), ([0, 0], ValueError, "module 0 twice"), ([2], IndexError, "outside 0..1"), ([-1], IndexError, "outside 0..1")):
        refused(lambda: only(which), kind, said)


def test_stages_that_are_no_whole_model_or_not_there(made, refused, tmp_path):
    lab, (one, two) = made.lab, made.modules
    for stage, kind, said in ((one, ValueError, f"{one.path.name} is module 0 of a model; a whole model is wanted here"), (Stage(lab.root/"none"), FileNotFoundError, "there is no stage folder"),
                              (Stage(lab.root), ValueError, "it has no settings.json"), (Stage(next(lab.root.glob("hybrids-*"))), ValueError, "holds no model")):
        refused(lambda: lab.incubate("x", VIT, stage, TASK, BRIEF), kind, said)
        refused(lambda: lab.end_to_end("x", VIT, TASK, BRIEF, start=stage), kind, said)
        refused(lambda: lab.health(stage, made.teacher, TASK), kind, said)
        if stage is not one: refused(lambda: load(stage.path), kind, said)
    (tmp_path/"begun-1").mkdir()
    (tmp_path/"begun-1/settings.json").write_text((made.meta.path/"settings.json").read_text())
    for use in (lambda: lab.fit("x", META, Stage(str(tmp_path/"begun-1")), TASK, BRIEF), lambda: load(tmp_path/"begun-1")): refused(use, ValueError, "is not finished")
    finetune = lambda *stages: lab.finetune("x", VIT, stages, TASK, BRIEF)
    refused(lambda: finetune(two, one), ValueError, "the stages are the modules [1, 0] of a model; they are assembled in order")
    refused(lambda: finetune(made.teacher, one), ValueError, f"of which {made.teacher.path.name} is a whole model")
    refused(lambda: finetune(made.teacher, made.meta), ValueError, "give one whole model")
    refused(lambda: lab.health(made.meta, [two, one], TASK), ValueError, "in order")
    refused(lambda: load(made.meta), TypeError, "path is a Stage", "stage.model()")
    refused(lambda: load(made.meta.model()), TypeError, "path is an nn.Module")


def test_a_stage_of_another_root_given_as_text(made, tmp_path):
    lab = Lab(tmp_path, runtime=Runtime(device="cpu"), floor=0)
    assert len(lab.incubate("incubate", VIT, Stage(str(made.meta.path)), TASK, BRIEF)) == 2


@pytest.mark.parametrize("which,said", [(dict(classes=5), "the task has 5 classes at 8 px, the stage meta"), (dict(image_size=16), "the task has 10 classes at 16 px"),
                                        (dict(classes=tuple("0123456789"[:9])), "the task has 9 classes at 8 px")])
def test_other_images_than_the_meta_model_knows(made, refused, which, said):
    other, lab = task(**which), made.lab
    for call in (lambda: lab.incubate("x", VIT, made.meta, other, BRIEF), lambda: lab.distill("x", Net(), made.meta, made.teacher, other, BRIEF),
                 lambda: lab.health(made.meta, made.teacher, other)):
        refused(call, ValueError, said, "10 at 8 px")
    refused(lambda: lab.fit("x", META, made.teacher, other, BRIEF), ValueError, said.replace("stage meta", "stage teacher"))


def test_a_teacher_of_other_images_than_the_meta_model(made, monkeypatch):
    lab = made.lab
    other = lab.given("five", VIT, task(classes=5))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"x: the stage meta-.* has 10 classes at 8 px, the stage five-.* 5 at 8 px"):
        patch.setattr(Lab, "images", lambda *_: pytest.fail("loaded"))          # known from the records alone
        lab.distill("x", Net(), made.meta, other, TASK, BRIEF)
    names = task(classes=tuple("012345678"))
    nine, eight = (lab.given(n, VIT, task(classes=c)) for n, c in (("nine", tuple("012345678")), ("eight", tuple("123456789"))))
    with pytest.raises(ValueError, match=r"the class '0' where the stage eight-.* has '1'"): lab.health(nine, eight, names)


def test_one_class(made, refused):
    one = task(classes=1)
    for call in (lambda: made.lab.end_to_end("x", VIT, one, BRIEF), lambda: made.lab.given("x", VIT, one)): refused(call, ValueError, "the task has one class, '0'")


@pytest.mark.parametrize("wrong,kind,said", [("more", ValueError, "returns 11 logits; for 10 classes it should return 10"), ("fewer", ValueError, "returns 9 logits"),
    ("one", ValueError, "returns 1 logits"), ("frozen", ValueError, "no parameter that requires a gradient"), ("wide", ValueError, "does not run on images of 8 px: "),
    ("map", ValueError, "(1, 5, 16) for one image"), ("list", TypeError, "build returned an nn.Module (ModuleList); it should return the chain, an nn.Sequential"),
    ("layer", TypeError, "an nn.Module (Linear)"), ("nothing", TypeError, "build returned None")])
def test_own_models_that_are_built_wrong(made, refused, wrong, kind, said):
    net, lab = Net(wrong=wrong), made.lab
    refused(lambda: lab.end_to_end("x", net, TASK, BRIEF), kind, said)
    if wrong != "frozen": refused(lambda: lab.given("x", net, TASK), kind, said)


def test_pairs_that_do_not_fit(made, refused):
    lab, meta, teacher = made.lab, made.meta, made.teacher
    distill = lambda student, of=teacher: lab.distill("x", student, meta, of, TASK, BRIEF)
    refused(lambda: distill(Net(wrong="more")), ValueError, "the student has 11 classes, the meta model 10")
    refused(lambda: lab.incubate("x", Net(wrong="more"), meta, TASK, BRIEF), ValueError, "returns 11 logits")
    refused(lambda: lab.incubate("x", Net(wrong="still"), meta, TASK, BRIEF), ValueError, "x: module 0 has no parameter that requires a gradient")
    refused(lambda: distill(VIT.but(depths=(1, 1, 1))), ValueError, "the student has 3 modules, the meta model 2")
    refused(lambda: lab.fit("x", Meta(like=VIT.but(depths=(1, 1, 1))), teacher, TASK, BRIEF), ValueError, "x: 3 modules for a host of 2")
    refused(lambda: lab.incubate("x", VIT.but(options=VIT.options | dict(embed_dim=12)), meta, TASK, BRIEF), ValueError, "the host with module 0 in its place does not run")
    three = lab.given("three", VIT.but(depths=(1, 1, 1)), TASK)
    refused(lambda: distill(VIT, three), ValueError, "the teacher has 3 modules, the meta model 2")
    wrapped = lab.given("wrapped", Stitched(student=Net(), meta=META), TASK)
    refused(lambda: lab.distill("x", Net(), wrapped, teacher, TASK, BRIEF), ValueError, f"the meta model {wrapped.path.name} is a student with its stitch layers")


def test_a_checkpoint_that_changed_is_another_stage(made, tmp_path):
    spec = VIT.but(checkpoint=str(tmp_path/"vit.pth"))
    def save(seed):
        torch.manual_seed(seed)
        torch.save(VIT.vit(10, 8).state_dict(), tmp_path/"vit.pth")
        return made.lab.given("file", spec.but(options=VIT.options | dict(depth=2)), TASK)
    assert save(0) == save(0) != save(1)


@pytest.mark.parametrize("content,said", [("null", "holds null"), ("3", "holds 3"), ("[]", r"holds \[\]"), ("{}", "holds {}"),
                                          ('{"model": 3}', "it has no module"), ('{"model": 3, "module": null}', "model is 3"),
                                          ('{"model": {}, "module": "x"}', "module is 'x'")])
def test_damaged_settings_of_a_stage_are_named(tmp_path, content, said):
    (tmp_path/"done.json").write_text("{}")
    (tmp_path/"settings.json").write_text(content)
    with pytest.raises(ValueError, match=f"settings.json is damaged: .*{said}"): load(tmp_path)
    with pytest.raises(ValueError, match=f"settings.json is damaged: .*{said}"): arguments.in_order([Stage(tmp_path)])


def test_an_error_inside_a_check_is_not_another_kind():
    def check(value): raise TypeError("a fault of the check")
    @arguments.checked
    def call(x: arguments.Kind.of("int", "a number", check)): return x
    with pytest.raises(TypeError, match="a fault of the check"): call(3)
    with pytest.raises(TypeError, match="x is 'a'; it should be a number"): call("a")


@pytest.mark.parametrize("error", [AssertionError(), AssertionError("Input height (8) doesn't match"), IndexError("out"), AttributeError("no b"), KeyError()])
def test_any_error_of_a_module_is_one_sentence(error):
    class Fails(nn.Module):
        def forward(self, x): raise error
    with pytest.raises(ValueError, match=f"model does not run on images of 8 px: {type(error).__name__}") as e:
        arguments.check_chain("model", nn.Sequential(Fails()), 5, 8)
    assert "\n" not in str(e.value) and not str(e.value).endswith(": ")
