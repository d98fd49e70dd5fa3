"V-MoE: the laws of mixtures, and what crosses modules: joint use with chain, vit, train and distill. Parity with the published code: test_convert_vmoe."
import contextlib, copy, json, math

import pytest, torch
from timm.layers import Mlp
from torch.nn import functional as F

from m2mkd.chain import assemble, evaluating, freeze, load, stitch
from m2mkd.core import from_plain, hash_of, seeded, to_plain
from m2mkd.data import Batches, load as load_data
from m2mkd.distill import Distillation, match_modules, paired
from m2mkd.folder import Folder
from m2mkd.measure import flop_counter, saved_bytes
from m2mkd.products import Linear
from m2mkd.routing import Gating, Routing, importance_loss, limited, load_loss, losses, with_room, z_loss
from m2mkd.train import Runtime, Training, auxiliary, end_to_end, train
from m2mkd.vit import Meta, ViT, from_chain, meta_chain
from m2mkd.vmoe import PIECE, Mixture, SoftMixture, VMoE, from_dense, grouped, looped, preset, routings, upcycle

@pytest.fixture
def student():
    with seeded(0, "student"): return VMoE(depths=(1, 2), width=8, heads=2, patch=4, experts=4, noise=1.)


def test_settings_come_back_from_json(student):
    settings = student.but(mixtures=(0, 2))
    assert from_plain(json.loads(json.dumps(to_plain(settings)))) == settings


def test_noise_and_order_are_functions_of_the_seed(student):
    with seeded(0, "build"): chain, images = student.build(3, 8), torch.randn(4, 3, 8, 8)

    def gradients(seed):
        with seeded(seed, "step"): return torch.autograd.grad(chain(images).square().sum(), list(chain.parameters()))
    first, again, other = gradients(0), gradients(0), gradients(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    with evaluating(chain): assert torch.equal(chain(images), chain(images))


def test_a_new_chain_of_the_same_kind_starts_elsewhere(student):
    vit = from_chain(student.build(3, 8))
    w1 = meta_chain(vit, 2)[0].blocks[0].mlp.w1
    assert not torch.equal(w1, vit.blocks[0].mlp.w1)
    assert len({e.sum().item() for e in w1}) == 4


def test_assembly_for_other_classes_and_image_size(student):
    source, target = student.build(10, 8), student.build(5, 16)
    treated = assemble(target, [m.state_dict() for m in source], student.rules())
    assert treated == ["0.embed.vit.pos_embed", "1.head.vit.head.weight", "1.head.vit.head.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_is_the_same_on_both_paths(dtype, monkeypatch):
    with seeded(0, "mixture"): mixture, x = Mixture(16, 32, experts=4, top_k=2), torch.randn(3, 7, 16)
    with torch.no_grad(): mixture.router.gate.bias[1] = -100.

    def run(path):
        monkeypatch.setattr("m2mkd.vmoe.path_for", lambda *_: path)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16): y = mixture(leaf)
        return [y, *torch.autograd.grad(y.float().square().sum(), [leaf, *mixture.parameters()])]
    one, two = run(looped), run(grouped)
    assert one[0].dtype == two[0].dtype == dtype
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype and (a - b).abs().max() <= (1e-5 if dtype == torch.float32 else 3e-2) * a.abs().max()


FAST = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


@pytest.mark.skipif(not FAST, reason="needs a GPU of compute capability 9")
def test_the_grouped_path_on_a_gpu_does_not_wait_and_agrees():
    with seeded(0, "mixture"): mixture, x = Mixture(64, 256, experts=8, top_k=2).cuda(), torch.randn(4, 50, 64).cuda().requires_grad_()

    def run():
        with torch.autocast("cuda", torch.bfloat16): y = mixture(x)
        return y, *torch.autograd.grad(y.float().square().sum(), [x, *mixture.parameters()])
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: fast = run()
    finally: torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(fast, run()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2mkd.vmoe.path_for", lambda *_: looped)
        slow = run()
    for a, b in zip(fast, slow): assert (a - b).abs().max() <= 3e-2 * a.abs().max()


@pytest.mark.parametrize("changes", [{}, dict(noise=1., importance=0.1, load=0.1, z=0.1, capacity=1.05, priority="weight")], ids=["plain", "everything"])
def test_the_grouped_path_reads_no_value_of_a_tensor(changes, monkeypatch):
    "It runs forward and backward on meta, where there are shapes and no values: no size in it depends on one, as those of the loop do."
    with torch.device("meta"): m, x = Mixture(64, 256, **changes).bfloat16(), torch.empty(4, 50, 64, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setattr("torch.autocast", lambda *_, **__: contextlib.nullcontext())       # which meta does not know
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr("m2mkd.vmoe.path_for", lambda *_: grouped)
    y, inputs = m(x), [x, *m.parameters()]
    own = m.auxiliary()
    gradients = torch.autograd.grad(sum(own.values(), y.float().square().sum()), inputs)
    assert (y.shape, y.dtype) == (x.shape, x.dtype) and [g.shape for g in gradients] == [t.shape for t in inputs] and set(own) == {"importance", "load", "z"} & set(changes)
    monkeypatch.setattr("m2mkd.vmoe.path_for", lambda *_: looped)
    with pytest.raises(RuntimeError, match="meta"): m(x)


# --- laws ---

def mixture(**changes):
    "The same weights whatever the gating."
    with seeded(0, "mixture"): return Mixture(16, 32, **{**dict(experts=4, top_k=2), **changes}).double()


@pytest.fixture
def x():
    with seeded(0, "tokens"): return torch.randn(6, 5, 16, dtype=torch.float64)


def outputs(m, x):
    "Output and all gradients."
    leaf = x.clone().requires_grad_()
    y = m(leaf)
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), [leaf, *m.parameters()])]


@pytest.mark.parametrize("priority", ["order", "weight"])
@pytest.mark.parametrize("softmax", ["after", "before"])
def test_room_for_all_is_no_limit(x, priority, softmax):
    free, roomy = mixture(softmax=softmax), mixture(softmax=softmax, capacity=4 / 2, priority=priority)
    assert all(torch.equal(a, b) for a, b in zip(outputs(free, x), outputs(roomy, x), strict=True))
    assert roomy.observed()["dropped"] == 0


def explicit(m, x, routing):
    "The weighted sum of the chosen experts, token by token."
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for e, w, kept in zip(routing.experts[t], routing.weights[t], routing.kept[t]):
            if kept: y[t] += w * (F.gelu(x[t] @ m.w1[e] + m.b1[e]) @ m.w2[e] + m.b2[e])
    return y


@pytest.mark.parametrize("path", [looped, lambda x, *a: grouped(x.float(), a[0], *a[1:]).double()], ids=["looped", "grouped"])
@pytest.mark.parametrize("capacity,priority", [(0.1, "order"), (0.6, "weight"), (1., "order"), (1.05, "weight")])
def test_a_limit_drops_what_has_no_room_and_nothing_else(x, capacity, priority, path, monkeypatch):
    monkeypatch.setattr("m2mkd.vmoe.path_for", lambda *_: path)
    m = mixture(capacity=capacity, priority=priority)
    tokens, room = x.flatten(0, 1), max(1, math.ceil(capacity * 30 * 2 / 4))
    routing = limited(m.router(tokens), room, priority)
    assert all(((routing.experts == e) & routing.kept).sum() <= room for e in range(4)) and not routing.kept.all()
    leaf = tokens.clone().requires_grad_()
    wanted = explicit(m, leaf, limited(m.router(leaf), room, priority))
    parts = [leaf, *m.parameters()]
    expected = torch.autograd.grad(wanted.square().sum(), parts)
    found = m(leaf)
    tolerance = 1e-10 if path is looped else 1e-4
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(found.square().sum(), parts), expected): torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert m.observed()["dropped"] == pytest.approx(1 - routing.kept.double().mean().item())


def test_batch_priority_keeps_the_surest_tokens():
    with seeded(0, "logits"): logits = torch.randn(40, 4)
    top = logits.topk(1)
    routing = limited(Routing(top.indices, torch.ones(40, 1), logits, logits), 3, "weight")
    for e in range(4):
        mine = (top.indices[:, 0] == e).nonzero()[:, 0]
        surest = mine[logits.softmax(1).amax(1)[mine].argsort(descending=True)][:3]
        assert set(routing.kept[:, 0].nonzero()[:, 0].tolist()) & set(mine.tolist()) == set(surest.tolist())


def test_first_choices_come_before_second_ones():
    "A hundred tokens whose second choice is expert 0, and one at the end whose first it is."
    experts = torch.tensor([[1, 0]] * 100 + [[0, 1]])
    kept = with_room(experts, 2, 1, torch.arange(101))
    assert kept[100, 0] and kept[0, 0] and kept.sum() == 2


def test_limits_differ_between_training_and_evaluation(x):
    m = mixture(capacity=0.5, capacity_eval=1.)
    assert not torch.equal(m(x), m.eval()(x))
    assert (m(x) == 0).all(-1).sum() < (m.train()(x) == 0).all(-1).sum()


def test_one_expert_is_the_dense_mlp(x):
    mlp, m = Mlp(16, 32).double(), mixture(experts=1, top_k=1)
    upcycle(m, *mlp.parameters())
    torch.testing.assert_close(m(x), mlp(x), rtol=1e-12, atol=1e-14)


def test_permuting_the_batch_permutes_the_output(x):
    order, m = torch.tensor([3, 0, 5, 1, 4, 2]), mixture()
    torch.testing.assert_close(m(x[order]), m(x)[order], rtol=1e-12, atol=1e-14)


def test_frozen_experts_let_the_gradient_through(x):
    free, frozen = mixture(), mixture()
    freeze(frozen)
    def by_tokens(m):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(m(leaf).square().sum(), leaf)[0]
    assert torch.equal(by_tokens(free.eval()), by_tokens(frozen)) and all(p.grad is None for p in frozen.parameters())


@pytest.mark.parametrize("piece", [1, 4, 7])
def test_pieces_add_up(x, piece, monkeypatch):
    "Experts take their rows in pieces; here of a few rows, where elsewhere one piece holds all, and with an expert that has none."
    m = mixture()
    with torch.no_grad(): m.router.gate.bias[1] = -100.
    whole = outputs(m, x)
    monkeypatch.setattr("m2mkd.vmoe.PIECE", piece)
    for a, b in zip(outputs(m, x), whole, strict=True): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width,hidden,rows", [(96, 192, PIECE + 76), (1024, 1024, 1), (1024, 1024, PIECE + 1)])
def test_large_experts_in_float32_are_those_in_float64(width, hidden, rows):
    "An expert with one row, or with more than a piece."
    with seeded(0, "large"): m, x = Mixture(width, hidden, experts=2, top_k=2), torch.randn(rows, width)
    found, exact = outputs(m, x), outputs(copy.deepcopy(m).double(), x.double())
    for a, b in zip(found, exact, strict=True): assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(outputs(m, x), found))


def test_no_tokens_at_all():
    m, x = mixture(), torch.empty(0, 5, 16, dtype=torch.float64)
    y, *gradients = outputs(m, x)
    assert y.shape == x.shape and not any(g.any() for g in gradients)


def test_frozen_layers_and_experts_keep_no_inputs(x):
    "As torch's linear layer; what they keep is what their own backward pass needs."
    layer, m, rows = Linear(1024, 1024), mixture(), torch.randn(4, 1024, requires_grad=True)
    assert saved_bytes(lambda: layer(rows + 1), own=layer.parameters()) == rows.nbytes
    freeze(layer), freeze(m)
    assert saved_bytes(lambda: layer(rows + 1), own=layer.parameters()) == 0
    tokens = x.flatten(0, 1).clone().requires_grad_()
    assert saved_bytes(lambda: looped(tokens + 1, torch.tensor([10, 20, 20, 30]), m.w1, m.b1, m.w2, m.b2), own=m.parameters()) == 30 * 32 * 8


def test_nothing_is_kept_for_a_backward_pass_that_does_not_come(x):
    m, saved = mixture(), []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t): m(x)
    assert not saved
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t): looped(x.flatten(0, 1), torch.tensor([10, 20, 20, 30]), m.w1, m.b1, m.w2, m.b2)
    assert sum(s.numel() for s in saved if s[-1:] == (32,) and len(s) == 2) == 30 * 32 + m.b1.numel()   # the hidden states once, and a bias


def test_flops_of_both_directions():
    m = mixture().float()
    with flop_counter() as forward: y = m(torch.zeros(10, 16))
    with flop_counter() as backward: y.sum().backward()
    experts = 2 * 10 * 2 * (16 * 32 + 32 * 16)
    router = 2 * 10 * 16 * 4
    assert forward.get_total_flops() == experts + router and backward.get_total_flops() == 2 * experts + router


# --- losses ---

def test_even_logits_have_no_loss_and_one_expert_for_all_has_the_largest():
    assert importance_loss(torch.zeros(7, 4)) == 0 == load_loss(torch.zeros(7, 4), torch.zeros(7, 4), 2, 0.25)
    sure = torch.tensor([[100., 0, 0, 0]] * 7)
    assert importance_loss(sure) == pytest.approx(3) and load_loss(sure, sure, 1, 0.25) == pytest.approx(3)
    assert z_loss(torch.zeros(7, 4)) == pytest.approx(math.log(4)**2)


def test_losses_push_the_router_towards_balance():
    "Gradient descent on each loss alone evens out a crooked router."
    for name in ("importance", "load"):
        with seeded(0, "crooked"): m, x = Mixture(8, 16, 4, 2, noise=1., **{name: 1.}), torch.randn(256, 8)
        with torch.no_grad(): m.router.gate.bias.copy_(torch.tensor([1., 0, 0, 0]))
        optimizer, shares = torch.optim.SGD(m.router.parameters(), lr=0.3), []
        for step in range(60):
            with seeded(step, "noise"): m(x)
            shares.append(m.observed()["max_share"].item())
            optimizer.zero_grad()
            m.auxiliary()[name].backward()
            optimizer.step()
        assert shares[0] > 0.45 and shares[-1] < 0.3


def test_a_mixture_gives_its_losses_once_and_in_training_only(x):
    m = mixture(importance=0.5, z=2.)
    m(x)
    assert set(m.auxiliary()) == {"importance", "z"} and m.auxiliary() == {} == mixture().auxiliary()
    copy.deepcopy(m)
    m.eval()(x)
    assert m.auxiliary() == {}


def test_losses_are_those_of_the_settings(x):
    gating = dict(noise=1., importance=0.3, load=0.2, z=0.1)
    m = mixture(**gating)
    with seeded(0, "noise"): m(x)
    found = m.auxiliary()
    with seeded(0, "noise"): routing = m.router(x.flatten(0, 1))
    assert found == {"importance": 0.3 * importance_loss(routing.clean), "load": 0.2 * load_loss(routing.clean, routing.logits, 2, 1/4), "z": 0.1 * z_loss(routing.clean)}
    assert losses(routing, Gating(experts=4, **gating)) == found


# --- in training ---

BALANCED = dict(noise=1., importance=0.1, load=0.1, z=0.01)


@pytest.fixture(scope="module")
def batches(): return Batches(load_data("digits", classes=5, per_class=16), 16, seed=0)


def build(settings, dtype=torch.float32):
    with seeded(0, "chain"): return settings.build(5, 8).to(dtype)


def metrics(folder): return [m for m in Folder(folder).metrics() if "loss" in m]


def test_end_to_end_minimises_and_records_the_losses(student, batches, tmp_path):
    settings, every = Training(epochs=1, batch_size=16), Runtime(device="cpu", log_steps=1)
    for name, model in (("plain", student), ("balanced", student.but(**BALANCED))):
        train(end_to_end(build(model), seed=0), batches, settings, {"model": tmp_path/name}, runtime=every)
    plain, balanced = (metrics(tmp_path/name) for name in ("plain", "balanced"))
    assert set(balanced[0]) - set(plain[0]) == {"importance", "load", "z"} and {"entropy", "max_share", "dropped"} <= set(plain[0])
    assert balanced[0]["loss"] - plain[0]["loss"] == pytest.approx(sum(balanced[0][k] for k in ("importance", "load", "z")), rel=1e-4)
    assert plain[1]["loss"] != balanced[1]["loss"] and plain[0]["dropped"] == 0 and 0.25 <= plain[0]["max_share"] <= 0.5 and plain[0]["entropy"] <= math.log(4)


def test_a_model_without_own_losses_records_none(batches, tmp_path):
    train(end_to_end(build(ViT(depths=(1,), options=dict(embed_dim=8, num_heads=2, patch_size=4))), seed=0), batches, Training(epochs=1, batch_size=16), {"model": tmp_path/"vit"})
    assert set(metrics(tmp_path/"vit")[0]) == {"step", "epoch", "loss", "norm", "lr", "seconds"}


def pairs(only, model, host=ViT(depths=(1, 1), options=dict(embed_dim=16, num_heads=2, patch_size=4))):
    "The phase that distils the modules `only` of the V-MoE `model`, in float64, and the modules."
    meta, teacher, chain = build(Meta(like=host), torch.float64), build(host, torch.float64), build(model)
    with seeded(0, "stitch"): students = [m.double().train() for m in stitch(chain, build(Meta(like=host)), torch.zeros(1, 3, 8, 8))]
    for m in (meta, teacher): freeze(m)
    return paired(meta, {i: students[i] for i in only}, Distillation(), 7, match_modules(meta, dict(enumerate(teacher)))), students


def test_losses_in_distillation_are_the_students_own(student, batches):
    x, y = (t.double() for t in batches.at(0, 0))
    terms = {}
    for only in ((0, 1), (0,), (1,)):
        phase, students = pairs(only, student.but(capacity=1., **BALANCED))
        found = phase.loss(phase.trains, x, y, 0)
        sum(t["loss"] for t in found.values()).backward()
        for i in only: terms.setdefault(i, []).append((found[f"module-{i}"], [p.grad for p in students[i].parameters()]))
    for joint, alone in terms.values():
        assert joint[0].keys() == alone[0].keys() >= {"importance", "load", "z", "dropped"}
        assert all(((joint[0][k] - alone[0][k]).abs() < 1e-10).all() for k in joint[0]) and all((a - b).abs().max() < 1e-10 for a, b in zip(joint[1], alone[1]))
    t = {k: v.mean().item() for k, v in terms[0][0][0].items()}
    assert t["loss"] == pytest.approx(0.5 * t["label"] + 0.5 * t["distill"] + t["importance"] + t["load"] + t["z"])


def test_a_host_of_mixtures_adds_no_losses(student, batches):
    "A frozen V-MoE as meta model: it does not train, so its losses do not count."
    with seeded(0, "host"): meta, chain = student.but(**BALANCED).build(5, 8).double(), build(student).double()
    freeze(meta)
    phase = paired(meta, {0: chain[0].train()}, Distillation(alpha=0.), 0)
    terms = phase.loss(phase.trains, *(t.double() for t in batches.at(0, 0)), 0)["module-0"]
    assert terms["loss"] == terms["label"] and "importance" not in terms and auxiliary(meta) == {}


# --- the model ---

@pytest.mark.parametrize("mixtures,expected", [(None, (0, 1, 2, 3)), ("all", (0, 1, 2, 3)), ("every second", (1, 3)), ("last 1", (3,)), ("last 3", (1, 2, 3)), ((), ()), ([0, 2], (0, 2))])
def test_which_blocks_are_mixtures(mixtures, expected):
    settings = VMoE(depths=(2, 2), width=8, heads=2, patch=4, experts=4, mixtures=mixtures)
    chain = settings.build(3, 8)
    assert settings.positions == expected == tuple(i for i, b in enumerate(b for m in chain for b in m.blocks) if isinstance(b.mlp, Mixture))
    assert from_plain(json.loads(json.dumps(to_plain(settings)))) == settings


def test_base_has_the_published_number_of_parameters():
    with torch.device("meta"): base = preset("base").build(classes=1000, image_size=224)
    assert sum(p.numel() for p in base.parameters()) == 483_325_768 and len(base) == 4 and preset("base") == VMoE()
    assert preset("micro", experts=2).experts == 2


def test_models_of_settings_have_our_linear_layers(student):
    vit = ViT(depths=(1, 1), options=dict(embed_dim=8, num_heads=2, patch_size=4))
    for settings, number in ((student, 2 * 3 + 1), (student.but(mixtures=()), 4 * 3 + 1), (vit, 4 * 2 + 1), (Meta(like=vit), 4 * 2 + 1)):
        assert sum(type(m) is Linear for m in build(settings).modules()) - sum(isinstance(m, Mixture) for m in build(settings).modules()) == number


def test_experts_start_equal_or_different():
    for equal in (False, True):
        w = build(VMoE(depths=(1,), width=8, heads=2, patch=4, experts=4, equal_experts=equal))[0].blocks[0].mlp.w1
        assert (w == w[0]).all() == equal


def test_a_dense_model_goes_into_all_experts(student):
    dense = build(ViT(depths=(3,), options=dict(embed_dim=8, num_heads=2, patch_size=4)), torch.float64).eval()
    for mixtures in (None, (1,)):
        chain = student.but(mixtures=mixtures).build(5, 8).double().eval()
        treated = from_dense(chain, dense)
        assert len(treated) == 2 * len(student.but(mixtures=mixtures).positions) and all("router" in k for k in treated)
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(chain(x), dense(x), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="the dense model has 1 blocks, the V-MoE 3"): from_dense(chain, build(ViT(depths=(1,), options=dict(embed_dim=8, num_heads=2, patch_size=4))))


def test_soft_moe_trains_and_drops_nothing(student, batches, tmp_path):
    soft = VMoE(depths=(1, 2), width=8, heads=2, patch=4, experts=4, slots=2)
    done = train(end_to_end(build(soft), seed=0), batches, Training(epochs=1, batch_size=16), {"model": tmp_path/"soft"})
    chain = build(soft)
    assert done["model"]["steps"] == 5 and isinstance(chain[0].blocks[0].mlp, SoftMixture) and all(p.grad is None for p in chain.parameters())
    x = torch.randn(4, 3, 8, 8)
    with evaluating(chain): torch.testing.assert_close(chain(x)[[2, 0]], chain(x[[2, 0]]))


def test_routings_are_by_block(student):
    chain, x = student.but(mixtures=(0, 2)).build(5, 8), torch.randn(4, 3, 8, 8)
    found = routings(chain, x)
    assert set(found) == {"block 0", "block 2"} and found["block 0"].experts.shape == (4 * 5, 2) and chain.training


# --- bad input ---

@pytest.mark.parametrize("wrong,said", [
    (dict(top_k=5), "top_k 5 with 4 experts"), (dict(top_k=0), "top_k 0 with 4 experts"), (dict(capacity=0), "capacity = 0"), (dict(capacity=-1.), "capacity = -1.0"),
    (dict(capacity_eval=0.), "capacity_eval = 0.0"), (dict(mixtures=(0, 3)), "mixture position 3 is outside the model: its blocks are 0 to 2"),
    (dict(mixtures=(-1,)), "mixture position -1"), (dict(mixtures="last 4"), "mixture position -1 is outside"), (dict(mixtures="every third"), "nearest: every second"),
    (dict(noise=0., load=0.1), "load = 0.1: the load loss needs a router with noise"), (dict(importance=-1.), "importance = -1.0"),
    (dict(priority="batch"), "priority = 'batch'"), (dict(slots=2), "noise = 1.0 and slots = 2"), (dict(capasity=1.), "nearest: capacity")])
def test_wrong_settings(student, wrong, said):
    with pytest.raises(ValueError) as e: student.but(**wrong)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_unknown_preset():
    with pytest.raises(ValueError, match="unknown preset of V-MoE 'bse'; nearest: base"): preset("bse")


def test_router_weights_of_another_shape(student):
    chain, state = student.build(5, 8), student.but(experts=3).build(5, 8).state_dict()
    with pytest.raises(ValueError, match=r"0.blocks.0.mlp.w1 is \(3, 8, 32\) in it, \(4, 8, 32\) here"): load(chain, state)
    state = chain.state_dict() | {"1.blocks.1.mlp.router.gate.weight": torch.zeros(3, 8)}
    with pytest.raises(ValueError, match=r"1.blocks.1.mlp.router.gate.weight is \(3, 8\) in it, \(4, 8\) here"): load(chain, state)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_router_is_named_by_its_block(student, value):
    chain = student.build(5, 8)
    with torch.no_grad(): chain[1].blocks[0].mlp.router.gate.weight[0, 0] = value
    with pytest.raises(FloatingPointError, match="the router of block 1 gives logits that are nan or infinite, for .* of 20 tokens: the router's weights are damaged"):
        chain(torch.randn(4, 3, 8, 8))
    with pytest.raises(FloatingPointError, match="the router of block 0 .* for 20 of 20 tokens: its tokens are so already"): chain(torch.full((4, 3, 8, 8), math.nan))


def test_a_damaged_router_stops_the_training(student, batches, tmp_path):
    chain = build(student)
    with torch.no_grad(): chain[1].blocks[1].mlp.router.gate.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the router of block 2"): train(end_to_end(chain, seed=0), batches, Training(epochs=1, batch_size=16), {"model": tmp_path/"model"})


def test_where_routers_do_not_look_the_loss_check_names_the_block(student, batches, tmp_path, monkeypatch):
    "As on a GPU, which would have to wait for the answer."
    chain = build(student)
    with torch.no_grad(): chain[1].blocks[0].mlp.router.gate.weight.fill_(math.nan)
    monkeypatch.setattr("m2mkd.routing.Router.check", lambda *_: None)
    with pytest.raises(FloatingPointError, match=r"loss of model became nan in step 1 of 5 \(entropy from 1.blocks.0.mlp on\); no checkpoint"):
        train(end_to_end(chain, seed=0), batches, Training(epochs=1, batch_size=16), {"model": tmp_path/"model"})


def test_the_hash_depends_on_the_routing(student):
    assert len({hash_of(student.but(**c)) for c in ({}, dict(capacity=1.), dict(importance=0.1), dict(softmax="before"), dict(mixtures="all"))}) == 5
