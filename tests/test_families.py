"timm's models as chains: the chain is the model, from settings and back, inside the method; what cannot be cut or had is named."
import huggingface_hub, pytest, timm, torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2mkd import families
from m2mkd.chain import assemble, flow, freeze, hybrid
from m2mkd.core import from_plain, hash_of, seeded, to_plain
from m2mkd.data import Augment, Data
from m2mkd.distill import Distillation
from m2mkd.families import cut, from_chain, stages, to_chain
from m2mkd.pipeline import Lab, Task, load
from m2mkd.train import Runtime, Training
from m2mkd.vit import Meta, Timm, ViT, meta_chain
from m2mkd.vmoe import VMoE

SMALL = dict(embed_dim=24, depth=3, num_heads=2)
VITS = {"vit_tiny_patch16_224": 32, "deit_tiny_distilled_patch16_224": 32, "deit3_small_patch16_224": 32,
        "vit_base_patch16_siglip_224": 32, "vit_small_patch14_reg4_dinov2": 28, "vit_base_patch16_clip_224": 32,
        "flexivit_small": 32, "eva02_tiny_patch14_224": 28, "eva_giant_patch14_224": 28,
        "vit_small_patch16_dinov3": 32, "vit_medium_patch16_rope_reg1_gap_256": 32,
        "vit_small_patch16_rope_mixed_224": 32, "vit_pe_core_tiny_patch16_384": 32,
        "beit_base_patch16_224": 32, "beitv2_base_patch16_224": 32, "vit_tiny_r_s16_p8_224": 64}
NETS = {"resnet18": (2, 2, 4), "resnext26ts": (2, 6), "regnetx_002": (2, 4, 7), "test_convnext": (1, 2, 4, 2),
        "tf_efficientnet_lite0": (1, 6, 9), "mobilenetv3_small_050": (1, 5, 6), "poolformer_s12": (2, 2, 8),
        "test_efficientnet": (1, 2, 2), "test_nfnet": (1, 1, 2), "test_resnet": (1, 2, 1)}
CASES = {n: (n, (1, 2), size, SMALL) for n, size in VITS.items()} | {n: (n, d, 32, {}) for n, d in NETS.items()}
FEW = ("deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "test_resnet",
       "vit_small_patch16_rope_mixed_224", "beit_base_patch16_224", "vit_tiny_r_s16_p8_224", "regnetx_002",
       "test_convnext", "test_efficientnet", "mobilenetv3_small_050", "test_nfnet")
each, some = (pytest.mark.parametrize("name, depths, size, options", [CASES[n] for n in names], ids=names)
              for names in (tuple(CASES), FEW))


def made(name, size, options):
    "A timm model in which every value matters, and images for it."
    with seeded(0, name):
        whole = timm.create_model(name, num_classes=5, **options, **({"img_size": size} if options else {}))
        for p in whole.parameters():
            if p.dim() == 1: nn.init.uniform_(p, 0.5, 1.5)
        return whole, torch.randn(2, 3, size, size)

def grads(model, parameters, images):
    for p in parameters: p.grad = None
    model(images).square().sum().backward()
    return [p.grad for p in parameters]

def refused(kind, f, *args, **kwargs):
    with pytest.raises(kind) as e: f(*args, **kwargs)
    assert "\n" not in str(e.value) and e.value.__suppress_context__ | (e.value.__context__ is None), str(e.value)
    return str(e.value)


# --- the chain is the model ---

def owners(whole, chain, name):
    "The parameters that `whole` and `chain` share; each is in one module."
    owned = [p for module in chain for p in module.parameters()]
    own = [p for p in whole.parameters() if any(p is q for q in owned)]
    missing, extra = (1, 3) if "mixed" in name else (0, 0)                    # learned angles: a slice a block
    assert len(own) == len(list(whole.parameters())) - missing == len({id(p) for p in owned}) - extra
    assert len(owned) == len(own) + extra
    return own


@each
def test_the_chain_is_the_whole(name, depths, size, options):
    whole, images = made(name, size, options)
    chain, before = to_chain(whole, depths), images.clone()
    own = owners(whole, chain, name)
    for mode in (True, False):
        whole.train(mode), chain.train(mode)
        with seeded(1, "drop"): want = grads(whole, own, images)
        with seeded(1, "drop"): got = grads(chain, own, images)
        assert all(torch.equal(a, b) for a, b in zip(want, got))
    freeze(chain)
    state, want = {k: v.clone() for k, v in chain.state_dict().items()}, whole(images)
    assert torch.equal(chain(images), want) and torch.equal(images, before)
    assert all(torch.equal(hybrid(chain, i, module)(images), want) for i, module in enumerate(chain))
    assert all(torch.equal(v, state[k]) for k, v in chain.state_dict().items())       # running statistics too
    assert [len(module.blocks) for module in chain] == list(depths) and flow(chain, images)[-1] == (5,)


@pytest.mark.parametrize("name", VITS)
def test_joined_again(name):
    whole, images = made(name, VITS[name], SMALL)
    joined, state = from_chain(to_chain(whole.eval(), (2, 1))).eval(), whole.state_dict()
    assert joined.state_dict().keys() == state.keys() and torch.equal(joined(images), whole(images))
    assert all(torch.equal(v, state[k]) for k, v in joined.state_dict().items())


@pytest.mark.parametrize("options", [dict(global_pool="map", class_token=False, reg_tokens=2), dict(global_pool="avg", fc_norm=True, pre_norm=True),
                                     dict(no_embed_class=True, reg_tokens=1, init_values=0.1), dict(pos_embed="none"), dict(patch_drop_rate=0.5),
                                     dict(global_pool="avgmax", qk_norm=True, drop_rate=0.2, drop_path_rate=0.2)], ids=lambda o: "-".join(o))
def test_every_option_of_a_vit_comes_along(options):
    whole, images = made("vit_tiny_patch16_224", 32, {**SMALL, **options})
    chain = to_chain(whole, (2, 1))
    for mode in (True, False):
        whole.train(mode), chain.train(mode)
        with seeded(1, "drop"): want = whole(images)
        with seeded(1, "drop"): assert torch.equal(chain(images), want)


def test_a_grid_that_is_read_off_the_image():
    whole, _ = made("vit_tiny_patch16_224", 32, {**SMALL, "dynamic_img_size": True})
    larger = torch.randn(1, 3, 64, 32)
    assert torch.equal(to_chain(whole, (1, 2))(larger), whole(larger))
    rotary, images = made("vit_small_patch16_dinov3", 32, SMALL)              # tokens alone do not tell their grid
    assert torch.equal(to_chain(rotary, (1, 2))(images), rotary(images)) and rotary(larger).shape == (1, 5)
    with pytest.raises(AssertionError, match="doesn't match"): to_chain(rotary, (1, 2))(larger)


class Writing(nn.Module):
    "A net in timm's form, the layers of whose blocks work in place."
    def __init__(self, act):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stages = nn.Sequential(*(nn.Sequential(nn.Sequential(act(), nn.Conv2d(4, 4, 1)), act()) for _ in range(2)))
        self.fc = nn.Linear(4, 3)
        nn.init.ones_(self.stem.bias)
    def forward_features(self, x): return self.stages(self.stem(x))
    def forward(self, x): return self.fc(self.forward_features(x).mean((2, 3)))

class Doubling(nn.Module):
    def forward(self, x): return x.mul_(2)

def test_layers_that_write_into_what_flows_no_longer_do():
    net, x = Writing(lambda: nn.ReLU(inplace=True)), torch.rand(2, 3, 16, 16)
    chain, want = to_chain(net, (1,) * 4), net(x)
    images = x
    with torch.no_grad():
        for module in chain:
            version, after = images._version, module(images)
            assert images._version == version
            images = after
    assert stages(net) == (2, 2) and torch.equal(images, want)
    assert "in place" in refused(TypeError, to_chain, Writing(Doubling), (1,) * 4)


def test_a_table_of_relative_positions_keeps_its_centre_its_corners_and_its_last_rows():
    with seeded(0, "table"): old = torch.randn(7 * 7 + 3, 2)
    new = families.resize_bias(old, torch.zeros(15 * 15 + 3, 2))
    (a, b) = (table[:-3].view(side, side, 2) for table, side in ((old, 7), (new, 15)))
    torch.testing.assert_close(torch.stack([b[0, 0], b[0, 14], b[7, 7]]), torch.stack([a[0, 0], a[0, 6], a[3, 3]]))
    assert torch.equal(new[-3:], old[-3:])
    torch.testing.assert_close(families.resize_bias(torch.ones_like(old), torch.zeros_like(new)), torch.ones_like(new))


# --- from settings ---

@some
def test_from_settings_and_back(name, depths, size, options, tmp_path):
    spec = from_plain(to_plain(ViT(name=name, depths=depths, options=options)))
    with seeded(0, "init"): chain = spec.build(10, size)
    images, other = torch.randn(2, 3, size, size), spec.build(10, size)
    other.load_state_dict(chain.state_dict())
    assert torch.equal(other.eval()(images), chain.eval()(images))
    target = spec.build(4, 2 * size)
    treated = assemble(target, [m.state_dict() for m in chain], spec.rules())
    assert target(torch.randn(2, 3, 2 * size, 2 * size)).shape == (2, 4)
    classifiers = [f"{c}.{k}" for c in families.classifiers(name) for k in ("weight", "bias")]
    assert all(k.endswith(("pos_embed", "relative_position_bias_table", *classifiers)) for k in treated)
    assert sum(k.endswith(tuple(classifiers)) for k in treated) == len(classifiers)
    whole = spec.vit(10, size)
    torch.save(whole.state_dict(), tmp_path/"whole.pth")
    loaded = spec.but(checkpoint=str(tmp_path/"whole.pth")).build(10, size)
    assert torch.equal(loaded.eval()(images), whole.eval()(images))


@some
def test_the_meta_model_carries_the_same_flow(name, depths, size, options):
    like = Timm(name=name, depths=depths, options=options)
    meta, teacher, images = Meta(like=like).build(10, size), like.build(10, size), torch.randn(2, 3, size, size)
    assert flow(meta, images) == flow(teacher, images)
    for i, module in enumerate(teacher): assert hybrid(meta, i, module)(images).shape == (2, 10)
    if options: assert [len(m.blocks) for m in meta] == [1, 1]


@pytest.mark.parametrize("name", VITS)
def test_the_meta_model_takes_no_value_over(name):
    whole, _ = made(name, VITS[name], SMALL)
    with torch.no_grad():
        for p in whole.parameters(): p.fill_(torch.nan)
    assert all(p.isfinite().all() for p in meta_chain(whole, 2).parameters())


def test_a_layer_without_a_new_value_stops_the_meta_chain():
    whole, _ = made("vit_tiny_patch16_224", 32, SMALL)
    whole.head.scale = nn.Parameter(torch.ones(1))
    assert "head.scale no new value" in refused(ValueError, meta_chain, whole, 2)


def test_settings_are_named_as_before():
    assert hash_of(ViT(depths=(2, 1))) == hash_of(from_plain(to_plain(ViT(depths=(2, 1)))))
    assert to_plain(ViT(depths=(2, 1))).keys() == {"class", "name", "depths", "pretrained", "checkpoint", "options"}


# --- what cannot be ---

class Own(VisionTransformer):
    def forward_features(self, x): return super().forward_features(x) * 2

@pytest.mark.parametrize("name, kind", [("swin_tiny_patch4_window7_224", "SwinTransformer"), ("pvt_v2_b0", "PyramidVisionTransformerV2"),
                                        ("cait_xxs24_224", "Cait"), ("xcit_nano_12_p8_224", "Xcit"), ("levit_128s", "LevitDistilled")])
def test_timm_has_it_but_it_cannot_be_cut(name, kind):
    said = refused(ValueError, ViT(name=name, depths=(1, 1)).build, 10, 64)
    assert name in said and f"timm has it, as {kind}; build a chain yourself, see own_models" in said


def test_parts_that_are_not_the_whole():
    own = Own(img_size=32, num_classes=5, **SMALL)
    assert "its own forward_features" in refused(TypeError, to_chain, own, (1, 2))
    shared, _ = made("beit_base_patch16_224", 32, {**SMALL, "use_shared_rel_pos_bias": True})
    assert "beit_base_patch16_224" in refused(TypeError, to_chain, shared, (1, 2))
    net, _ = made("resnet18", 32, {})
    net.layer3[1] = net.layer3[0] = nn.Sequential(net.layer3[0])                 # one block twice
    assert "cannot be cut" in refused(TypeError, cut, net)
    net, _ = made("resnet18", 32, {})
    whole = type(net).forward_features
    class Twice(type(net)):
        def forward_features(self, x): return whole(self, x) * 2
    net.__class__ = Twice
    assert "not the whole" in refused(TypeError, cut, net)
    distilled, _ = made("deit_tiny_distilled_patch16_224", 32, SMALL)
    distilled.set_distilled_training(True)
    assert "two logits" in refused(ValueError, to_chain, distilled, (1, 2))
    for thing in (nn.Linear(2, 2), "resnet18", None): assert "to_chain takes a timm model" in refused(TypeError, to_chain, thing, (1, 2))


@pytest.mark.parametrize("changes, size, said", [
    (dict(name="resnt18"), 32, "unknown timm model 'resnt18'; nearest: resnet18"),
    (dict(name="resnet18.nothing"), 32, "unknown pretrained tag of resnet18 'nothing'"),
    (dict(depths=(3, 4)), 32, "sum to 7, but the model has 8 layers, by stages (2, 2, 2, 2)"),
    ({}, 16, "image size 16 is smaller than the stride 32 of ResNet"),
    (dict(options=dict(depth=3)), 32, "timm cannot make resnet18"),
    (dict(options=dict(num_classes=3)), 32, "num_classes comes with the images"),
    (dict(name="eva02_tiny_patch14_224", options=SMALL, depths=(1, 2)), 32, "image size 32 is not divisible by the patch size 14"),
    (dict(name="vit_small_patch16_dinov3", options={**SMALL, "rope_jitter_coords": 2.}, depths=(1, 2)), 32, "draws once for all blocks"),
    (dict(name="vit_small_patch16_dinov3", options={**SMALL, "patch_drop_rate": .5}, depths=(1, 2)), 32, "patch_drop_rate"),
    (dict(name="resnet50t", pretrained=True), 32, "timm has no pretrained weights for resnet50t: give checkpoint="),
])
def test_what_does_not_fit_is_one_sentence(changes, size, said):
    spec = Timm(name="resnet18", depths=(2, 2, 2, 2)).but(**changes)
    assert said in refused(ValueError, spec.build, 10, size)


def test_a_net_whose_blocks_need_each_other_has_no_meta_chain():
    said = refused(ValueError, Meta(like=Timm(name="densenet121", depths=(5, 6))).build, 10, 32)
    assert "own_models" in said and "DenseNet" in said


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch32_224"])
def test_pretrained_without_a_network(name, monkeypatch, tmp_path):
    "The hub is asked once, shortly, and not again and again."
    def gone(*_, **__): raise ConnectionError("no network")
    asked = []
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: asked.append(1) or gone())
    monkeypatch.setattr(torch.hub, "download_url_to_file", gone)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    spec = ViT(name=name, depths=(6, 6), pretrained=True, options=dict(cache_dir=str(tmp_path)))
    said = refused(FileNotFoundError, spec.build, 10, 224)
    assert f"pretrained weights of {name} cannot be had here" in said and "checkpoint=" in said and len(asked) == 1
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


# --- inside the method ---

def test_a_convnet_teaches(tmp_path):
    "An EfficientNet as it is given, its meta chain fitted to it, a small V-MoE distilled against it."
    task = Task(train=Data(name="digits", image_size=32, per_class=4), test=(Data(name="digits", image_size=32, split="test", per_class=2),))
    brief, lab = Training(epochs=1, batch_size=20, augment=Augment(flip=0)), Lab(tmp_path, runtime=Runtime(device="cpu"), floor=0)
    spec = Timm(name="test_efficientnet", depths=(2, 1, 2), options=dict(drop_path_rate=0.1))
    teacher = lab.given("teacher", spec, task)
    before = {k: v.clone() for k, v in teacher.state().items()}
    fitted = lab.fit("fit", Meta(like=spec), teacher, task, brief)
    meta = lab.finetune("meta", Meta(like=spec), fitted, task, brief)
    student = VMoE(depths=(1, 1, 1), width=8, heads=2, patch=8, experts=2, top_k=2, class_token=False)
    modules = lab.distill("distill", student, meta, teacher, task, brief, Distillation())
    assert len(modules) == 3 and lab.finetune("student", student, modules, task, brief).done["results"]["top1"] >= 0
    assert all(torch.equal(v, before[k]) for k, v in teacher.state().items())
    assert any("running_mean" in k for k in meta.state())
    again = load(meta.path)
    assert all(torch.equal(v, meta.state()[k]) for k, v in again.state_dict().items())

@pytest.mark.parametrize("name", ["vit_tny_patch16_224", "vit_base_patch16_224_in21k",
                                  "resnet18.nowhere", ""])
def test_a_name_that_timm_does_not_know_has_no_classifiers(name):
    rules = lambda n: Timm(name=n, depths=(1,)).rules()
    for what in (families.create, families.classifiers, rules):
        assert repr(name.partition(".")[2] or name) in refused(ValueError, what, name)

def test_a_model_without_blocks_takes_no_jax_vit_and_bias_tables_are_resized_only_if_they_are():
    from m2mkd.vit import from_jax
    state = {"Transformer/encoderblock_0/x": torch.zeros(1)}
    assert from_jax(state, timm.create_model("test_resnet"), "x.npz") is state
    own, table = torch.zeros(7**2 + 3, 2), torch.randn(5**2 + 3, 2)
    assert families.resize_bias(table, own).shape == own.shape
    rows = [torch.zeros(n, 2) for n in (2, 4, 4**2 + 3)]
    for odd in (None, torch.zeros(()), table[:, :1], table[:-1], table[None], *rows):
        assert families.resize_bias(odd, own) is odd
    assert families.resize_bias(table, torch.zeros(7**2, 2)) is table
