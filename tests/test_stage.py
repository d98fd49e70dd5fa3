"A stage read back from its folder: who played which part, what it cost, what is missing; a lab's defaults; weights that go into git."
import ast, json, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest, torch

from m2mkd import core
from m2mkd.core import hash_of, write_json
from m2mkd.data import Augment, Data
from m2mkd.folder import Folder
from m2mkd.pipeline import Lab, Pairs, Task, cost
from m2mkd.stage import Compute, Stage, compute, stages_in
from m2mkd.train import Runtime, Training
from m2mkd.vit import Meta, ViT
from m2mkd.vmoe import VMoE
from refusing import refusing

root = Path(__file__).resolve().parents[1]
VIT = ViT(depths=(1, 1), options=dict(embed_dim=16, num_heads=2, patch_size=4))
NET = VMoE(depths=(1, 1), width=8, heads=2, patch=4, experts=2, top_k=1)
TASK = Task(train=Data(name="digits", per_class=10), test=(Data(name="digits", split="test", per_class=4),))
OTHER = Task(train=Data(name="digits", per_class=12), test=(Data(name="digits", split="test", per_class=4),))
BRIEF = Training(epochs=1, batch_size=50, augment=Augment(flip=0))
CPU = Runtime(device="cpu")


def made(study, name, inputs=(), module=None, alpha=None, seed=1, **facts):
    "A stage as training would leave it, without weights."
    record = dict(name=name, model={}, module=module, images="images", seed=seed, inputs=[s.hash for s in inputs])
    if alpha is not None: record["distillation"] = {"alpha": alpha}
    folder = Folder(study/f"stages/{name}{'' if module is None else f'-{module}'}-s{seed}-{hash_of(record)}").start(record)
    folder.finish(**{"flops": 10, "seconds": 2, "results": {"top1": 0.5}, **facts})
    return Stage(folder.path, tuple(inputs))


# --- parts and prices ---

def test_roles_and_totals_of_every_way_to_a_student(tmp_path):
    "A teacher that was incubated in the meta model; one that a meta model was fitted to; a student that goes on, and one from scratch."
    e2e = made(tmp_path, "E2E", flops=7)
    meta = made(tmp_path, "meta", flops=1)
    grown = [made(tmp_path, "incubate", [meta], i, alpha=0.0, flops=100) for i in range(2)]
    teacher = made(tmp_path, "teacher", grown, flops=1000)
    modules = [made(tmp_path, "distill", [meta, teacher], i, alpha=0.5, flops=20, teacher_flops=5) for i in range(2)]
    student = made(tmp_path, "m2mkd", modules, flops=3)
    longer = made(tmp_path, "m2mkd-longer", [student], flops=4)
    assert compute(e2e) == Compute(7, 7, 7) and e2e.parts == () == meta.parts and e2e.meta is None is e2e.teacher
    assert [(s.meta, s.teacher, s.parts) for s in (grown[0], modules[1])] == [(meta, None, ()), (meta, teacher, ())]
    assert student.parts == tuple(modules) and longer.parts == (student,) and teacher.parts == tuple(grown)
    assert compute(student) == (3 + 2 * 15, 3 + 2 * 20 + 1, 3 + 2 * 20 + 1 + 1000 + 200)
    assert compute(longer) == tuple(x + 4 for x in compute(student))
    assert compute(student, longer, *modules, meta) == (4 + 3 + 2 * 15 + 1, *compute(longer)[1:]) and compute() == (0, 0, 0)
    assert cost(longer) == (compute(longer).trained, 2 * len(longer.everything())) and len(longer.everything()) == 8
    fits = [made(tmp_path, "fit", [e2e], i, alpha=1.0, flops=50, teacher_flops=30) for i in range(2)]
    fitted = made(tmp_path, "meta_fitted", fits)
    assert (fits[0].meta, fits[0].teacher) == (None, e2e) and compute(fitted) == (10 + 40, 10 + 100, 10 + 100 + 7)
    late = made(tmp_path, "late", [made(tmp_path, "distill", [fitted, e2e], 0, alpha=0.5, seed=2)], seed=2)
    assert compute(late) == (20, 20 + 10 + 100, 20 + 10 + 100 + 7)
    found = stages_in(tmp_path)
    assert found == stages_in(tmp_path/"stages") and Stage.of(longer.path) == longer == found[longer.hash] and len(found) == 14
    assert (longer.name, longer.seed, modules[1].name, late.seed) == ("m2mkd-longer", 1, "distill-1", 2)
    assert (longer.done["name"], longer.done["seed"], modules[1].done["name"]) == ("m2mkd-longer", 1, "distill-1")

def test_what_is_not_there_is_named(tmp_path):
    "An input, a study's folder, labels; and a Stage that was given other inputs than its record names is not cheap, but an error."
    meta, teacher = made(tmp_path, "meta"), made(tmp_path, "teacher")
    student = made(tmp_path, "s", [made(tmp_path, "distill", [meta, teacher], 0, alpha=0.5)])
    for bare in (Stage(student.path), Stage(student.path, (meta,))):
        for ask in (bare.everything, lambda: bare.parts, lambda: cost(bare), lambda: compute(bare)):
            with pytest.raises(ValueError, match=r"was built from .*Stage.of\(path\) finds them"): ask()
    with pytest.raises(FileNotFoundError, match="images.json is missing"): student.labels()
    with pytest.raises(FileNotFoundError, match="predictions.json is missing"): student.correct()
    with pytest.raises(ValueError, match="is no table of hybrids"): student.health()
    shutil.rmtree(meta.path)
    for read in (lambda: Stage.of(student.path), lambda: stages_in(tmp_path)):
        with pytest.raises(ValueError, match=f"stage distill-0-s1-.* was built from the stage {meta.hash}, which is not in "): read()
    with pytest.raises(FileNotFoundError, match="none is missing"): stages_in(tmp_path/"none")
    with pytest.raises(FileNotFoundError, match="done.json is missing"): Stage.of(meta.path)
    assert stages_in(tmp_path/"stages"/student.path.name) == {}

def test_damaged_facts_are_not_read(tmp_path):
    stage = made(tmp_path, "a")
    for name, content, said in (("predictions.json", [1, 2], "changed|predictions of 2 images, and there are labels of 3"), ("predictions.json", [True], "is damaged"), ("predictions.json", [], "is damaged")):
        write_json(tmp_path/"labels/images.json", [0, 1, 2]), write_json(stage.path/name, content)
        with pytest.raises(ValueError, match=said): stage.correct()
    write_json(stage.path/"predictions.json", [0, 2, 2]), stage.path.joinpath("metrics.jsonl").write_text('{"step": 1}\n')
    Folder(stage.path).finish(flops=1, seconds=1, results={})
    assert stage.correct().tolist() == [True, False, True] and stage.labels().dtype == np.int64 and stage.metrics == [{"step": 1}]
    for name, read in (("metrics.jsonl", lambda: stage.metrics), ("predictions.json", stage.predictions)):
        with open(stage.path/name, "a") as f: f.write('{"step": 2}\n')
        with pytest.raises(ValueError, match=f"{name} has changed since the stage was done"): read()
    write_json(stage.path/"done.json", json.loads((stage.path/"done.json").read_text()) | {"flops": 0})
    with pytest.raises(ValueError, match="done.json has changed"): stage.flops

FREE = refusing(("torch", "safetensors", "timm", "accelerate")) + """
from m2mkd.stage import compute, stages_in
print([(s.name, s.seed, compute(s), s.correct().mean(), s.results) for s in stages_in(sys.argv[1]).values()])
"""

def test_facts_are_read_without_torch(tmp_path):
    for name in ("stage", "folder", "arguments"):
        names = [n for node in ast.parse((root/f"m2mkd/{name}.py").read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
                 for n in [getattr(node, "module", None) or "", *(a.name for a in node.names)]]
        assert not {n.partition(".")[0] for n in names} & {"torch", "safetensors", "products", "chain", "vit", "pandas"}, name
    stage = made(tmp_path, "a")
    write_json(tmp_path/"labels/images.json", [0, 1]), write_json(stage.path/"predictions.json", [0, 0])
    run = subprocess.run([sys.executable, "-c", FREE, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0 and "('a', 1, Compute(student=10.0, given=10.0, trained=10.0)" in run.stdout, run.stderr


# --- what a lab gives every call ---

@pytest.fixture(scope="module")
def lab(tmp_path_factory): return Lab(tmp_path_factory.mktemp("study"), TASK, BRIEF, runtime=CPU, seed=3, floor=0)

@pytest.fixture(scope="module")
def stages(lab):
    meta = lab.end_to_end("meta", Meta(like=VIT))
    grown = lab.incubate("incubate", VIT, meta)
    teacher = lab.finetune("teacher", VIT, grown)
    return dict(meta=meta, grown=grown, teacher=teacher, modules=lab.distill("distill", NET, meta, teacher))

def test_defaults_and_what_overrides_them(lab, stages):
    "The same stages as with everything written out, by name or by position; another task, training or seed is another stage."
    bare = Lab(lab.root, runtime=CPU, floor=0)
    meta, teacher = stages["meta"], stages["teacher"]
    assert bare.end_to_end("meta", Meta(like=VIT), TASK, BRIEF, 3) == meta == bare.end_to_end("meta", Meta(like=VIT), seed=3, training=BRIEF, task=TASK)
    assert bare.incubate("incubate", VIT, meta, TASK, BRIEF, 3) == stages["grown"] == Lab(lab.root, OTHER, BRIEF, runtime=CPU, seed=3, floor=0).incubate("incubate", VIT, meta, TASK)
    assert bare.distill("distill", NET, meta, teacher, TASK, BRIEF, seed=3) == stages["modules"] and stages["meta"].seed == 3
    others = [lab.end_to_end("meta", Meta(like=VIT), **one) for one in (dict(seed=0), dict(task=OTHER), dict(training=BRIEF.but(lr=1e-3)))]
    assert len({s.hash for s in [meta, *others]}) == 4 and others[0].seed == 0 and lab.images()[0] is lab.images(TASK)[0]
    for call, what in ((lambda: bare.end_to_end("x", VIT), "task"), (lambda: bare.end_to_end("x", VIT, TASK), "training"), (lambda: bare.given("x", VIT), "task"),
                       (lambda: bare.fit("x", Meta(like=VIT), teacher, training=BRIEF), "task"), (lambda: bare.health(meta, teacher), "task")):
        with pytest.raises(TypeError, match=rf"Lab\.\w+: no {what} is given, neither here nor to the Lab: {what}="): call()
    for wrong, said in ((lambda: lab.distill("x", NET, meta, teacher, stages["modules"]), "a list of 2"), (lambda: lab.end_to_end("x", VIT, BRIEF), "training=Training"),
                        (lambda: lab.health(meta, teacher, stages["modules"]), r"students=\[...\]")):
        with pytest.raises(TypeError, match=f"task is .*{said}"): wrong()

def test_pairs_and_their_health(lab, stages, capsys):
    "Each call gives the table that it measured; nothing is printed."
    meta, teacher, grown, modules = (stages[k] for k in ("meta", "teacher", "grown", "modules"))
    again = lab.distill("distill", NET, meta, teacher)
    assert isinstance(again, Pairs) and again == modules and again.health.equals(modules.health)
    assert again.health.index.name == "module" and list(again.health) == ["stage", "seed", "meta", "teacher", "student", "kl"]
    assert list(grown.health) == ["stage", "seed", "meta", "teacher"] and list(grown.health.stage) == ["incubate"] * 2 and set(again.health.seed) == {3}
    assert list(grown.health.teacher) == [s.results["top1"] for s in grown] and list(modules.health.student) == [s.results["top1"] for s in modules]
    one = lab.distill("distill", NET, meta, teacher, only=[1])
    assert one == modules[1:] and one.health.student[1] == modules.health.student[1] and list(one.health.index) == [1]
    assert lab.incubate("incubate", VIT, meta, only=[0]).health.equals(grown.health.loc[[0]])
    fitted = lab.fit("fit", Meta(like=VIT), teacher)
    assert list(fitted.health.meta) == [s.results["top1"] for s in fitted] and set(fitted.health.teacher) == {teacher.results["top1"]}
    assert not [line for line in capsys.readouterr().out.splitlines() if "TFLOP" not in line]
    assert fitted[0].teacher == teacher and fitted[0].teacher_flops > 0 == grown[0].teacher_flops and modules[0].meta == meta

def test_every_tested_stage_has_its_labels(lab, stages):
    "The same file for all stages of one test set; right and wrong are those of the results."
    given = lab.given("given", VIT)
    assert len(list((lab.root/"labels").iterdir())) == 1 + (OTHER in lab.sets)
    for stage in (stages["meta"], stages["teacher"], given):
        assert stage.correct().mean() == pytest.approx(stage.results["top1"]) and stage.labels().tolist() == lab.images()[1].labels.tolist()


# --- weights that go into git ---

def test_shared_weights(lab, stages, tmp_path):
    "Rounded, tested as such, read in float32, and the stage that others go on from where no other weights are."
    meta = stages["meta"]
    shared = lab.shared(meta)
    state, exact = shared.state(), meta.state()
    assert shared.name == "meta-shared" and shared.parts == (meta,) and [f.name for f in shared.path.glob("*.safetensors")] == ["shared.safetensors"]
    assert all(v.dtype == exact[k].dtype and torch.equal(v, exact[k].half().to(v.dtype)) for k, v in state.items()) and any(not torch.equal(v, exact[k]) for k, v in state.items())
    assert shared.results["images"] == 40 and shared.correct().mean() == pytest.approx(shared.results["top1"]) and cost(shared)[0] == meta.flops
    shutil.copytree(lab.root, tmp_path/"clone")
    for file in (tmp_path/"clone").rglob("model.safetensors"): file.unlink()
    clone = Lab(tmp_path/"clone", TASK, BRIEF, runtime=CPU, seed=3, floor=0)
    mine = clone.shared(clone.end_to_end("meta", Meta(like=VIT)))
    assert mine.hash == shared.hash and len(clone.incubate("after", VIT, mine)) == 2 and clone.finetune("more", Meta(like=VIT), [mine]).parts == (mine,)
    file = mine.path/"shared.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    for ask in (mine.state, lambda: clone.shared(clone.end_to_end("meta", Meta(like=VIT)))):
        with pytest.raises(ValueError, match="shared.safetensors has changed since the stage was done"): ask()
    large = lab.given("large", VIT.but(options=VIT.options | dict(embed_dim=256)))
    with pytest.raises(ValueError, match="the weights of large take .* MB in float16; .* less than 1 MB"): lab.shared(large)
    with pytest.raises(ValueError, match="is module 0 of a model"): lab.shared(stages["modules"][0])
    assert not list(lab.root.glob("large-shared-*"))

def test_shared_weights_in_git_are_small_and_have_their_sums():
    run = subprocess.run(["git", "ls-files", "-z", "runs"], cwd=root, capture_output=True, text=True)
    if run.returncode: pytest.skip("not a git checkout")
    files = [root/name for name in run.stdout.split("\0") if name.endswith((".safetensors", ".pt", ".pth"))]
    assert {f.name for f in files} <= {"shared.safetensors"} and max([f.stat().st_size for f in files], default=0) < 1_000_000
    assert sum(f.stat().st_size for f in files) < 10_000_000
    for f in files: assert Folder(f.parent).mark()["sums"][f.name] == core.sha256(f), f
