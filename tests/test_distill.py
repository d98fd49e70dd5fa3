"The loss against the published numbers; the joint pass: a pair does not notice its company, and nothing but the students changes."
import json
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from m2mkd.chain import freeze, hybrid, stitch
from m2mkd.core import seeded
from m2mkd.data import Batches, load
from m2mkd.distill import Distillation, hybrids, m2mkd_loss, m2mkd_terms, match_host, match_modules, paired, prefix
from m2mkd.folder import Folder, seal
from m2mkd.measure import flop_counter, peak_bytes
from m2mkd.train import Phase, Runtime, Trainer, Training, train
from m2mkd.vit import Meta, ViT
from m2mkd.vmoe import VMoE

REFERENCE = Path(__file__).parent/"reference"/"m2mkd_loss"
TEACHER = ViT(depths=(2, 1, 1), options=dict(embed_dim=16, num_heads=2, patch_size=4, drop_path_rate=0.3))
STUDENT = VMoE(depths=(1, 1, 1), width=8, heads=2, patch=4, experts=4, noise=1., drop_path=0.3)
BRIEF = Training(epochs=2, batch_size=16)                                          # 5 steps an epoch
EACH = Runtime(device="cpu", checkpoint_minutes=0, log_steps=1)


# --- the loss ---

@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("reduction,key", [("mean", "official"), ("batchmean", "batchmean")])
def test_loss_of_the_published_code(reduction, key, tau):
    t = load_file(REFERENCE.with_suffix(".safetensors"))
    assert "batchmean by batch" in json.loads(REFERENCE.with_suffix(".json").read_text())["note"]
    ours = m2mkd_loss(t["student_logits"], t["teacher_logits"], t["soft_labels"], alpha=0.5, tau=tau, reduction=reduction)
    assert abs(ours.item() - t[f"{key}_alpha0.5_tau{tau}"].item()) < 1e-10


@pytest.fixture
def logits():
    s, t, y = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return s, t, y.softmax(1)


def test_hard_loss_is_the_explicit_formula(logits):
    s, t, y = logits
    p = s.softmax(1)
    label = -(y * p.log()).sum() / 6
    hard = -sum(p[b, t[b].argmax()].log() for b in range(6)) / 6
    for tau, reduction in ((1, "mean"), (4, "batchmean")):
        loss = m2mkd_loss(s, t, y, alpha=0.3, tau=tau, reduction=reduction, kind="hard")
        assert abs(loss - (0.7 * label + 0.3 * hard)) < 1e-12


def test_ends_of_alpha(logits):
    s, t, y = logits
    how = dict(tau=2, reduction="batchmean")
    assert m2mkd_loss(s, t, y, alpha=0, **how) == m2mkd_loss(s, None, y, alpha=0, **how)
    assert m2mkd_loss(s, s, y, alpha=1, **how).abs() < 1e-12                       # the teacher's own logits: nothing to learn
    assert set(m2mkd_terms(s, None, y, alpha=0, **how)) == {"loss", "label"}


@pytest.mark.parametrize("wrong,said", [(dict(alpha=-0.1), "alpha = -0.1 is outside 0..1"), (dict(alpha=1.1), "alpha = 1.1 is outside 0..1"),
    (dict(alpha=float("nan")), "alpha = nan"), (dict(tau=0), "tau = 0"), (dict(reduction="men"), "unknown reduction 'men'"),
    (dict(kind="sotf"), "unknown kind of distillation 'sotf'; nearest: soft")])
def test_wrong_loss(logits, wrong, said):
    with pytest.raises(ValueError) as e: m2mkd_loss(*logits, **(dict(alpha=0.5, tau=1, reduction="mean") | wrong))
    assert said in str(e.value)


def test_a_loss_without_teacher(logits):
    with pytest.raises(ValueError, match="alpha = 0.5 needs a teacher"): m2mkd_loss(logits[0], None, logits[2], alpha=0.5, tau=1, reduction="mean")


@pytest.mark.parametrize("wrong,said", [(dict(alpha=1.5), "alpha = 1.5"), (dict(alpha=-1), "alpha = -1"), (dict(tau=0), "tau = 0"),
    (dict(reduction="sum"), "reduction = 'sum'"), (dict(kind="medium"), "kind = 'medium'"), (dict(alfa=0.5), "nearest: alpha")])
def test_wrong_distillation(wrong, said):
    with pytest.raises(ValueError) as e: Distillation(**wrong)
    assert said in str(e.value) and "\n" not in str(e.value)


# --- the joint pass ---

@pytest.fixture(scope="module")
def batches(): return Batches(load("digits", classes=5, per_class=16), 16, seed=0)


def chains(dtype=torch.float32, student=STUDENT):
    "Meta model and teacher (frozen) and the stitched modules of the student, always the same."
    with seeded(0, "chains"):
        meta, teacher, student = Meta(like=TEACHER).build(5, 8), TEACHER.build(5, 8), student.build(5, 8)
        students = stitch(student, meta, torch.zeros(1, 3, 8, 8), norm=True)
    for model in (meta, teacher): freeze(model.to(dtype))
    return meta, teacher, [s.to(dtype).train() for s in students]


def phase_of(only=(0, 1, 2), dtype=torch.float32, student=STUDENT):
    "(meta, teacher, students, the phase that distils the students `only`)."
    meta, teacher, students = chains(dtype, student)
    matched = match_modules(meta, dict(enumerate(teacher)))
    return meta, teacher, students, paired(meta, {i: students[i] for i in only}, Distillation(alpha=0.5, tau=2), 7, matched, fixed=(teacher,))


def gradients(only, batches, step=3, images=16):
    "{i: gradients of students[i] by name} in float64 of the losses of the pairs `only`."
    _, _, students, phase = phase_of(only, torch.float64)
    x, y = (t[:images].double() for t in batches.at(0, 1))
    sum(t["loss"] for t in phase.loss(phase.trains, x, y, step).values()).backward()
    return {i: {n: p.grad for n, p in students[i].named_parameters()} for i in only}


@pytest.mark.parametrize("images", [16, 1])          # a product of one row and one of three are computed differently
def test_gradients_do_not_depend_on_the_company(batches, images):
    joint = gradients((0, 1, 2), batches, images=images)
    for i in range(3):
        alone = gradients((i,), batches, images=images)[i]
        assert alone.keys() == joint[i].keys() and sum(g.abs().sum() for g in alone.values()) > 1
        assert all(torch.equal(alone[n], joint[i][n]) for n in alone)
    other = gradients((1,), batches, 4, images)[1].values()
    assert images == 1 or any((a - b).abs().max() > 1e-3 for a, b in zip(other, joint[1].values()))     # the noise is on


def stacked(host, modules, flows, around):
    "The hybrids in one graph, as they were computed at first: together through each link of the host."
    flying = {}
    for j, link in enumerate(host):
        if flying: flying = dict(zip(flying, link(torch.cat([*flying.values()])).chunk(len(flying))))
        with around(j): flying[j] = modules[j](flows[j])
    return flying


def test_gradients_are_those_of_the_summed_loss(batches):
    "In float64, of the losses of all pairs stacked in one graph, noise and drop path and all."
    meta, teacher, students = chains(torch.float64)
    x, y = (t.double() for t in batches.at(0, 1))
    flows = prefix(meta, x)
    with torch.no_grad(): targets = stacked(meta, teacher, flows, lambda i: seeded(0, i))
    logits = stacked(meta, students, flows, lambda i: seeded(7, f"module-{i}", 3))
    terms = [m2mkd_terms(logits[i], targets[i], y, alpha=0.5, tau=2, reduction="batchmean") for i in range(3)]
    sum(t["loss"] for t in terms).backward()
    ours = phase_of(dtype=torch.float64)[3]
    for part in ours.parts(ours.trains, x, y, 3):
        (name, found), = part.items()
        found["loss"].backward()
        by_hand, i = terms[int(name[-1])], int(name[-1])
        assert all((found[k] - by_hand[k]).abs() < 1e-12 for k in by_hand)
        pairs = [(p.grad, q.grad) for p, q in zip(ours.trains[name].parameters(), students[i].parameters())]
        assert max((a - b).abs().max() for a, b in pairs) < 1e-12


def fitted(where, phase, batches, settings, runtime=EACH):
    "{name: what is to be equal to the bit, weights and metrics without the seconds} of a phase that is trained."
    train(phase, batches, settings, {n: where/n for n in phase.trains}, runtime=runtime)
    timeless = {n: [{k: v for k, v in m.items() if k != "seconds"} for m in Folder(where/n).metrics()] for n in phase.trains}
    return {n: (Folder(where/n).weights(), timeless[n]) for n in phase.trains}


def equal(a, b):
    "Whether two results of `fitted` are equal to the bit."
    (weights, metrics), (others, other_metrics) = a, b
    return metrics == other_metrics and weights.keys() == others.keys() and all(torch.equal(v, others[k]) for k, v in weights.items())


LOSSES = dict(importance=0.1, load=0.1, z=0.1, capacity=1.)                          # of the student, which observes what it drops
CLIPPED = Training(epochs=2, batch_size=16, lr=0.5, clip=0.02, optimizer="sgd")
SHORT = CLIPPED.but(epochs=1)                                                        # 5 steps
LOOPS = dict(clipped=SHORT, rich=SHORT.but(accumulate=2, average=0.5, optimizer="adamw"), bf16=SHORT.but(precision="bf16"))


@pytest.mark.parametrize("settings", LOOPS.values(), ids=LOOPS)
def test_one_pair_is_the_same_to_the_bit_in_any_company(batches, tmp_path, settings):
    "Through the loop: weights, losses of its own, observations, norms; also where all losses are summed before they go backward."
    def of(only): return phase_of(only, student=STUDENT.but(**LOSSES))[3]
    def run(where, phase): return fitted(tmp_path/where, phase, batches, settings, Runtime(device="cpu", log_steps=1))
    phase, before = of((0, 1, 2)), chains()[2]
    summed = Phase(phase.trains, lambda *batch: phase.loss(*batch), phase.fixed)
    joint, whole, some = run("joint", of((0, 1, 2))), run("summed", summed), run("some", of((2, 0)))
    for i in range(3):
        name = f"module-{i}"
        alone = run(f"alone-{i}", of((i,)))[name]
        assert equal(alone, joint[name]) and equal(joint[name], whole[name]) and (i == 1 or equal(alone, some[name]))
        weights, metrics = alone
        assert max((v - before[i].state_dict()[k]).abs().max() for k, v in weights.items()) > 1e-3
        assert len(metrics) == 5 and all(m["norm"] > 0.02 for m in metrics) and {"distill", "importance", "load", "z", "dropped"} <= {*metrics[0]}
    flops = {where: [Folder(tmp_path/where/f"module-{i}").done()["flops"] for i in range(3)] for where in ("joint", "summed")}
    assert flops["joint"] == flops["summed"]


def test_a_pair_that_has_gone_backward_is_let_go(batches, tmp_path):
    "At its peak a step of 8 pairs needs little more than one of the first pair alone, which has the longest way behind it."
    spec, x, y = TEACHER.but(depths=(1,) * 8), *batches.at(0, 0)
    with seeded(0, "eight"): meta, teacher, students = Meta(like=spec).build(5, 8), spec.build(5, 8), spec.build(5, 8).train()
    def peak(only):
        phase = paired(meta, {i: students[i] for i in only}, Distillation(), 0, match_modules(meta, dict(enumerate(teacher))), (teacher,))
        loop = Trainer(phase, [None], BRIEF, {n: Folder(tmp_path/f"{len(only)}"/n) for n in phase.trains}, runtime=EACH)
        for _ in range(2): loop.update(x, y)
        return peak_bytes(lambda: loop.update(x, y))
    assert peak(range(8)) < 1.5 * peak([0])


class Fails(nn.Module):
    "A student module with an error in its k-th forward pass, or NaN from there on."
    def __init__(self, module, k, nan):
        super().__init__()
        self.module, self.left, self.nan = module, k, nan

    def forward(self, x):
        self.left -= 1
        if self.left < 0 and not self.nan: raise KeyboardInterrupt
        return self.module(x) * (float("nan") if self.left < 0 else 1)


def failing(k, nan):
    "(phase, its modules), of which module 1 fails in its k-th pass."
    meta, _, students = chains()
    modules = {i: Fails(s, k, nan) if i == 1 else s for i, s in enumerate(students)}
    return paired(meta, modules, Distillation(alpha=0), 7), modules


def test_the_pair_whose_loss_is_not_finite_is_named(batches, tmp_path):
    phase, _ = failing(6, nan=True)
    with pytest.raises(FloatingPointError, match="loss of module-1 became nan in step 7 of 10; the checkpoint of step 6 is kept"):
        fitted(tmp_path, phase, batches, CLIPPED)
    for n in phase.trains: assert all(v.isfinite().all() for v in Folder(tmp_path/n).checkpoint()["model"].values())


def test_stopped_between_two_pairs(batches, tmp_path):
    "The first pair has gone backward, the second one fails: in the same process, with the same modules, the run ends as the straight one."
    straight = fitted(tmp_path/"straight", failing(10**9, nan=False)[0], batches, CLIPPED)
    phase, modules = failing(6, nan=False)
    with pytest.raises(KeyboardInterrupt): fitted(tmp_path/"stopped", phase, batches, CLIPPED)
    assert any(p.grad is not None for p in modules[0].parameters()) and Folder(tmp_path/"stopped/module-2").checkpoint()["step"] == 6
    modules[1].left = 10**9
    again = fitted(tmp_path/"stopped", phase, batches, CLIPPED)
    assert all(equal(again[n], straight[n]) for n in straight)


def test_only_the_students_change(batches, tmp_path):
    meta, teacher, students, phase = phase_of((0, 2))
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (meta, teacher, *students)]
    meta.requires_grad_(True).train(), teacher.requires_grad_(True).train()                      # the loop is to freeze them
    train(phase, batches, Training(epochs=1, batch_size=16), {n: tmp_path/n for n in phase.trains}, runtime=Runtime(device="cpu"))
    for model in (meta, teacher):
        assert not any(m.training for m in model.modules()) and not any(p.requires_grad or p.grad is not None for p in model.parameters())
    same = [all(torch.equal(v, b[k]) for k, v in m.state_dict().items()) for m, b in zip((meta, teacher, *students), before)]
    assert same == [True, True, False, True, False]


@pytest.mark.parametrize("i", range(3))
def test_only_module_i_has_gradients(batches, i):
    meta, teacher, students, phase = phase_of((0, 1, 2))
    phase.loss(phase.trains, *batches.at(0, 0), 0)[f"module-{i}"]["loss"].backward()
    for model in (meta, teacher, *(s for k, s in enumerate(students) if k != i)): assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(p.grad is not None for p in students[i].parameters()) and any(p.grad.any() for p in students[i].parameters())


class OneToken(nn.Module):
    "Images or tokens -> a single token of width 16."
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 16)

    def forward(self, x): return self.linear(x.flatten(2).mean(-1) if x.dim() == 4 else x.mean(1)).unsqueeze(1)


def test_hybrids_of_different_token_counts(batches):
    meta, teacher, _ = chains(torch.float64)
    x = batches.at(0, 0)[0].double()
    modules = {0: OneToken(3).double(), 1: teacher[1], 2: nn.Sequential(nn.Flatten(1), nn.Linear(5 * 16, 5)).double()}
    joint = hybrids(meta, modules, prefix(meta, x))
    for i, module in modules.items(): assert torch.allclose(joint[i], hybrid(meta, i, module)(x), atol=1e-12)
    modules[1] = OneToken(16).double()
    assert torch.allclose(hybrids(meta, modules, prefix(meta, x))[1], hybrid(meta, 1, modules[1])(x), atol=1e-12)


def test_the_meta_chain_sees_each_flow_once(batches):
    "The prefix is computed once; behind it each hybrid goes alone, the teacher's and the student's."
    meta, teacher, students, phase = phase_of()
    calls = []
    for j, link in enumerate(meta): link.register_forward_hook(lambda m, a, out, j=j: calls.append((j, len(out))))
    phase.loss(phase.trains, *batches.at(0, 0), 0)
    assert sorted(calls) == [(j, 16) for j in range(3) for _ in range(1 + 2 * j)]


def test_matching_the_host(batches):
    "A meta module inside a frozen teacher: the targets are the teacher's own logits, for every module."
    meta, teacher, _ = chains()
    x, y = batches.at(0, 0)
    terms = paired(teacher, dict(enumerate(meta)), Distillation(alpha=1), 0, match_host, name="fit").loss({f"fit-{i}": m for i, m in enumerate(meta)}, x, y, 0)
    for i in range(3):
        kl = F.kl_div(hybrid(teacher, i, meta[i])(x).log_softmax(1), teacher(x).softmax(1), reduction="batchmean")
        assert torch.allclose(terms[f"fit-{i}"]["distill"], kl, atol=1e-6)


def test_targets_of_one_s_own(batches):
    "One pass of a teacher that nobody froze, for all pairs: the targets are without gradient."
    meta, teacher, students = chains()
    teacher.requires_grad_(True)
    calls = []
    def whole(flows, wanted):
        calls.append([*wanted])
        return dict.fromkeys(wanted, teacher(flows[0]))
    phase = paired(meta, dict(enumerate(students)), Distillation(alpha=1), 0, whole)
    for part in phase.parts(phase.trains, *batches.at(0, 0), 0): sum(t["loss"] for t in part.values()).backward()
    assert calls == [[0, 1, 2]] and all(p.grad is None for p in teacher.parameters())
    assert all(any(p.grad.any() for p in s.parameters() if p.grad is not None) for s in students)


def test_a_module_that_is_not_there():
    meta, _, students = chains()
    with pytest.raises(IndexError, match=r"module index 3 is outside 0\.\.2"): paired(meta, {3: students[0]}, Distillation(), 0)


# --- what the teacher's passes cost ---

def trained(folder, batches, stop=None, only=(0, 1, 2), phase=None):
    "{name: content of done.json} of students that are distilled; KeyboardInterrupt before step `stop`."
    phase = phase or phase_of(only)[3]
    def loss(models, x, y, step):
        if step == stop: raise KeyboardInterrupt
        return phase.loss(models, x, y, step)
    return train(Phase(phase.trains, loss, phase.fixed), batches, BRIEF, {n: folder/n for n in phase.trains}, runtime=EACH)

def of_a_step(run):
    with flop_counter() as counter: run()
    return counter.get_total_flops()

def as_before(folder):
    "The checkpoint as it was written when only all FLOPs were counted."
    for file in [f for f in map(folder.__truediv__, Folder.checkpoints) if f.exists()]:
        saved = Folder(folder).checkpoint(file)
        saved |= dict(paid=list(saved["paid"]["flops"]), counted=[saved["counted"][0], saved["counted"][1]["flops"]])
        torch.save(saved, file)
        seal(file, saved["step"], len(saved["pending"]))

def test_teacher_flops_are_those_of_its_passes(batches, tmp_path):
    "Counted by hand: the teacher's modules in the meta model, 10 steps of 16 images; exact in runs that were stopped, also before it was counted."
    meta, teacher, _ = chains()
    flows = prefix(meta, torch.zeros(16, 3, 8, 8))
    with torch.no_grad(): by_hand = 10 * of_a_step(lambda: hybrids(meta, dict(enumerate(teacher)), flows))
    straight = trained(tmp_path/"straight", batches)
    assert sum(d["teacher_flops"] for d in straight.values()) == pytest.approx(by_hand, rel=1e-12) and by_hand > 0
    assert all(0 < d["teacher_flops"] < d["flops"] for d in straight.values())
    for name, stops, before in (("resumed", (3, 7), False), ("old", (3, 7), True), ("older", (5,), True)):
        for stop in stops:
            with pytest.raises(KeyboardInterrupt): trained(tmp_path/name, batches, stop)
            for n in straight if before else (): as_before(tmp_path/name/n)
        again = trained(tmp_path/name, batches)
        assert all(again[n][k] == straight[n][k] for n in straight for k in ("flops", "teacher_flops"))

def test_a_fitted_meta_model_pays_for_the_teacher_s_own_pass(batches, tmp_path):
    meta, teacher, _ = chains()
    modules = [dict(enumerate(spec.build(5, 8))) for spec in (Meta(like=TEACHER), TEACHER)]
    fitted = trained(tmp_path/"fit", batches, phase=paired(teacher, modules[0], Distillation(alpha=1), 0, match_host))
    assert sum(d["teacher_flops"] for d in fitted.values()) == pytest.approx(10 * of_a_step(lambda: prefix(teacher, torch.zeros(16, 3, 8, 8))), rel=1e-12)
    incubated = trained(tmp_path/"incubate", batches, phase=paired(meta, modules[1], Distillation(alpha=0), 0))
    assert {d["teacher_flops"] for d in incubated.values()} == {0}
