"Published V-MoE and ViT checkpoints against numbers computed from the published model code (tests/reference), in every layout, and what is refused."
import json, re
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

from m2mkd.convert import published_settings, read, to_published, unwrap, vit_from_published, vmoe_from_published
from m2mkd.core import seeded

REFERENCE = Path(__file__).parent/"reference"/"vmoe_small"
MIXED = dict(img_size=16, patch_size=4, embed_dim=12, num_heads=3, qkv_bias=True, num_classes=5, divided_depths=[1, 3, 1], moe_pos=[1, 3], num_expert=3, norm_eps=1e-6)
DENSE = dict(img_size=16, patch_size=4, embed_dim=12, num_heads=3, num_classes=5, divided_depths=[2, 1])


@pytest.fixture(scope="module")
def small():
    "(settings, published state, inputs and outputs) of the reference model."
    settings, tensors = json.loads(REFERENCE.with_suffix(".json").read_text()), load_file(REFERENCE.with_suffix(".safetensors"))
    return settings, *({k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("state/", "io/"))


def old_layout(state):
    "Experts stacked, as FastMoE had them before 2023."
    found, experts = {}, {}
    for k, v in state.items():
        if m := re.fullmatch(r"(.*moe\.experts\.)(\d+)\.(.*)", k): experts.setdefault(m[1] + m[3], []).append((int(m[2]), v))
        else: found[k] = v
    return found | {k: torch.cat([v for _, v in sorted(parts, key=lambda p: p[0])]) for k, parts in experts.items()}


def by_module(state): return {k: v for k, v in state.items() if k.startswith("stages.")}


LAYOUTS = {"as it is": lambda s: s, "stacked": old_layout, "by module": by_module, "stacked, by module": lambda s: by_module(old_layout(s)),
           "half of the duplicates": lambda s: {k: v for k, v in s.items() if not k.startswith("blocks.")},
           "model": lambda s: {"model": s, "epoch": 1, "optimizer": {"state": {}}},
           "within DistributedDataParallel, compiled": lambda s: {"state_dict": {"module._orig_mod." + k: v for k, v in s.items()}},
           "model and model_stages": lambda s: {"model": s, "model_stages": stages_of(s)}, "model_stages": lambda s: {"model_stages": stages_of(s)}}


def stages_of(state):
    number = 1 + max(int(k.split(".")[1]) for k in by_module(state))
    return [{k.removeprefix(f"stages.{i}."): v for k, v in state.items() if k.startswith(f"stages.{i}.")} for i in range(number)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_logits_and_image_gradient_of_the_published_model(small, layout):
    settings, state, io = small
    chain = vmoe_from_published(layout(state), settings)
    image = io["image"].clone().requires_grad_()
    logits = chain(image)
    torch.testing.assert_close(logits, io["logits"], rtol=1e-8, atol=1e-14)
    gradient, = torch.autograd.grad((logits * torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)).sum(), image)
    torch.testing.assert_close(gradient, io["grad_image"], rtol=1e-8, atol=1e-14)
    back = to_published(chain)
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())


def test_the_chain_does_not_share_the_checkpoints_memory(small):
    settings, state, _ = small
    before = {k: v.clone() for k, v in state.items()}
    chain = vmoe_from_published(state, settings)
    with torch.no_grad():
        for p in chain.parameters(): p.zero_()
    assert all(torch.equal(before[k], v) for k, v in state.items()) and all(p.requires_grad and p.is_contiguous() for p in chain.parameters())


@pytest.mark.parametrize("depths", [(4,), (1, 2, 1), (3, 1)])
def test_the_same_blocks_in_other_modules(small, depths):
    settings, state, io = small
    settings = settings | dict(divided_depths=depths)
    with pytest.raises(ValueError, match=r"divided_depths are \[.*\], but module \d of the checkpoint has 2 blocks"): vmoe_from_published(state, settings)
    where = [(i, j) for i, d in enumerate(depths) for j in range(d)]
    def moved(key):
        if not key.startswith("blocks."): return f"stages.{len(depths) - 1 if key.startswith(('norm', 'head')) else 0}.{key}"
        return "stages.{}.blocks.{}.{}".format(*where[int(key.split(".")[1])], key.split(".", 2)[2])
    chain = vmoe_from_published({moved(k): v for k, v in state.items() if not k.startswith("stages.")}, settings)
    torch.testing.assert_close(chain(io["image"]), io["logits"], rtol=1e-8, atol=1e-14)


def explicit(state, settings, x):
    "The published model's arithmetic on its own names, in a few lines."
    F, depth = torch.nn.functional, sum(settings["divided_depths"])
    at = lambda name: state[name]
    x = F.conv2d(x, at("patch_embed.proj.weight"), at("patch_embed.proj.bias"), stride=settings["patch_size"]).flatten(2).mT
    x = torch.cat([at("cls_token").expand(len(x), -1, -1), x], 1) + at("pos_embed")
    norm = lambda n, x: F.layer_norm(x, x.shape[-1:], at(n + ".weight"), at(n + ".bias"), settings.get("norm_eps", 1e-5))
    for b in (f"blocks.{i}." for i in range(depth)):
        qkv = F.linear(norm(b + "norm1", x), at(b + "attn.qkv.weight"), state.get(b + "attn.qkv.bias"))
        q, k, v = qkv.unflatten(2, (3, settings["num_heads"], -1)).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT / q.shape[-1]**.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, at(b + "attn.proj.weight"), at(b + "attn.proj.bias"))
        h = norm(b + "norm2", x)
        if b + "mlp.fc1.weight" in state:
            x = x + F.linear(F.gelu(F.linear(h, at(b + "mlp.fc1.weight"), at(b + "mlp.fc1.bias"))), at(b + "mlp.fc2.weight"), at(b + "mlp.fc2.bias"))
            continue
        scores = F.linear(h, at(b + "moe.gate.gate.weight"), at(b + "moe.gate.gate.bias"))
        top = scores.topk(settings.get("top_k", 2))
        gates = torch.zeros_like(scores).scatter(-1, top.indices, top.values.softmax(-1))
        for e in range(settings["num_expert"]):
            w = lambda name: at(f"{b}moe.experts.{e}.{name}")[0]
            x = x + gates[..., e, None] * F.linear(F.gelu(F.linear(h, w("htoh4.weight"), w("htoh4.bias"))), w("h4toh.weight"), w("h4toh.bias"))
    return F.linear(norm("norm", x)[:, 0], at("head.weight"), at("head.bias"))


def random_state(settings):
    "A published state with random numbers in every place."
    model, classes, pixels = published_settings(settings)
    with seeded(0, "published"):
        chain = model.build(classes, pixels).double()
        with torch.no_grad():
            for p in chain.parameters(): p.normal_(0, 0.3)
    return to_published(chain)


@pytest.mark.parametrize("changes", [{}, dict(moe_pos=[0, 1, 2, 3, 4]), dict(moe_pos=[4]), dict(divided_depths=[5]), dict(num_expert=12, top_k=3, moe_pos=[0]),
    dict(qkv_bias=False, norm_eps=1e-5), dict(moe_pos=None), dict(divided_depths=[2, 2, 2, 2], moe_pos=[1, 3, 5, 7]), dict(mlp_ratio=2.5)], ids=str)
def test_mixed_blocks_other_depths_splits_and_experts(changes):
    settings = MIXED | changes
    state, x = random_state(settings), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert any(".mlp.fc1." in k for k in state) == (len(settings["moe_pos"] or ()) < sum(settings["divided_depths"]))
    for layout in (LAYOUTS["as it is"], LAYOUTS["stacked"], LAYOUTS["model_stages"]):
        chain = vmoe_from_published(layout(state), settings)
        assert len(chain) == len(settings["divided_depths"])
        torch.testing.assert_close(chain(x), explicit(state, settings, x), rtol=1e-10, atol=1e-12)
        assert all(torch.equal(v, state[k]) for k, v in to_published(chain).items())


def test_a_teacher_as_a_whole_and_its_modules():
    state, x = random_state(DENSE), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    expected = explicit(state, DENSE, x)
    for layout in LAYOUTS.values(): torch.testing.assert_close(vit_from_published(layout(state), DENSE)(x), expected, rtol=1e-10, atol=1e-12)
    files = [dict(model_name="vit_huge_patch14_224", block_index=i, block_state_dict=s, divided_depths=[2, 1]) for i, s in enumerate(stages_of(state))]
    sizes = {k: v for k, v in DENSE.items() if k != "divided_depths"}
    first, second = (vit_from_published(f, sizes) for f in files)
    torch.testing.assert_close(second(first(x)), expected, rtol=1e-10, atol=1e-12)


def test_the_published_teachers_by_name():
    for name, width, bias, eps in (("vit_large_patch16_224", 1024, True, 1e-6), ("vit_huge_patch14_224", 1280, False, 1e-5), ("deit_base_patch16_224", 768, True, 1e-6)):
        model, classes, pixels = published_settings(dict(model_name=name, divided_depths=[3, 3]))
        assert (model.width, model.qkv_bias, model.norm_eps, classes, pixels, model.positions) == (width, bias, eps, 1000, 224, ())


def test_files(tmp_path):
    state = random_state(DENSE)
    torch.save({"model": state, "epoch": 3, "scaler": {}}, tmp_path/"good.pth")
    assert unwrap(read(tmp_path/"good.pth")).keys() == state.keys()
    with pytest.raises(FileNotFoundError, match="absent.pth is missing"): read(tmp_path/"absent.pth")
    (tmp_path/"bad.pth").write_bytes((tmp_path/"good.pth").read_bytes()[:1000])
    with pytest.raises(ValueError, match="bad.pth is damaged"): read(tmp_path/"bad.pth")
    torch.save({"model": Path("code")}, tmp_path/"code.pth")
    with pytest.raises(ValueError, match="holds more than tensors and plain data"): read(tmp_path/"code.pth")


BAD = {
    "missing": (lambda s: {k: v for k, v in s.items() if "norm1" not in k}, "missing: stages.0.blocks.0.norm1.weight.* and 4 more"),
    "a twin that is missing": (lambda s: {k: v for k, v in s.items() if k != "stages.1.norm.bias"}, r"missing: stages.1.norm.bias; unknown: norm.bias"),
    "unknown": (lambda s: s | {"stages.0.blocks.0.gamma": s["norm.bias"]}, r"unknown: stages.0.blocks.0.gamma$"),
    "unknown, as a whole": (lambda s: s | {"fc.weight": s["norm.bias"]}, "unknown: fc.weight"),
    "a block too many": (lambda s: s | {"blocks.9.norm1.bias": s["norm.bias"]}, "unknown: blocks.9.norm1.bias"),
    "router": (lambda s: by_module(s) | {"stages.0.blocks.1.moe.gate.gate.weight": torch.zeros(3, 12)}, r"model: stages.0.blocks.1.moe.gate.gate.weight is \(3, 12\) in it, \(4, 12\) here$"),
    "expert": (lambda s: {k: v for k, v in s.items() if "experts.3." not in k}, r"htoh4.weight is \(3, 48, 12\) in it, \(4, 48, 12\) here"),
    "a hole": (lambda s: {k: v for k, v in s.items() if "experts.1." not in k}, "expert 1 of 4 is missing"),
    "duplicate": (lambda s: s | {"blocks.2.attn.proj.bias": s["norm.bias"] + 1}, "blocks.2.attn.proj.bias differs from its duplicate stages.1.blocks.0.attn.proj.bias"),
    "stages": (lambda s: {"model": s, "model_stages": stages_of({k: v + 1 for k, v in s.items()})}, "differs from its duplicate"),
    "wrapper": (lambda s: {"state_dict": {}, "epoch": 3}, "no checkpoint: .* not one with state_dict, epoch"),
    "two": (lambda s: {"net": s, "other": {k: v + 1 for k, v in s.items()}}, "holds two such models, net and other"),
    "one expert of another kind": (lambda s: s | {"stages.0.blocks.0.moe.experts.2.h4toh.bias": torch.zeros(1, 12, dtype=torch.int8)}, "expert 2 is .*int8"),
    "one expert of another shape": (lambda s: s | {"stages.1.blocks.0.moe.experts.1.htoh4.bias": torch.zeros(1, 12)}, r"expert 1 is \(\(1, 12\)"),
    "NaN": (lambda s: s | {k: s["norm.bias"] * torch.nan for k in ("norm.bias", "stages.1.norm.bias")}, "damaged checkpoint: NaN or infinity in stages.1.norm.bias"),
    "nothing": (lambda s: {}, "not an empty one"), "a list": (lambda s: [s], "not a list"),
}


@pytest.mark.parametrize("spoil,said", BAD.values(), ids=BAD)
def test_bad_checkpoints(small, spoil, said):
    settings, state, _ = small
    with pytest.raises(ValueError, match=said) as e: vmoe_from_published(spoil(state), settings)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize("wrong,said", [(dict(moe_pos=[4]), "mixture position 4 is outside the model"), (dict(top_k=5), "top_k 5 with 4 experts"),
    (dict(num_experts=4), "nearest: num_expert"), (dict(divided_depths=None), "divided_depths is missing"), (dict(num_heads=5), "not divisible by 5 heads"),
    (dict(model_name="vmoe_bsae"), "nearest: vmoe_base"), (dict(num_classes=7), r"head.weight is \(10, 12\) in it, \(7, 12\) here"),
    (dict(img_size=30), "not divisible by the patch size")])
def test_bad_settings(small, wrong, said):
    with pytest.raises(ValueError, match=said): vmoe_from_published(small[1], small[0] | wrong)


def test_a_teacher_has_no_mixtures(small):
    with pytest.raises(ValueError, match="take vmoe_from_published"): vit_from_published(small[1], small[0])
    with pytest.raises(ValueError, match="block_index 3 is outside 0..1"):
        vit_from_published(dict(model_name="vit_base_patch16_224", block_index=3, block_state_dict=small[1], divided_depths=[2, 1]))
