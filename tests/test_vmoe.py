"V-MoE against numbers computed from the published model code (tests/reference), and what crosses modules: joint use with chain and vit."
import json, re
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

from m2mkd.chain import assemble, evaluating
from m2mkd.core import from_plain, seeded, to_plain
from m2mkd.vit import from_chain, meta_chain
from m2mkd.vmoe import Mixture, VMoE, grouped, looped

REFERENCE = Path(__file__).parent/"reference"/"vmoe_small"


@pytest.fixture(scope="module")
def published():
    "The published settings, parameters by their `stages.` names, and the inputs and outputs."
    config, tensors = json.loads(REFERENCE.with_suffix(".json").read_text()), load_file(REFERENCE.with_suffix(".safetensors"))
    state = {k.removeprefix("state/stages."): v for k, v in tensors.items() if k.startswith("state/stages.")}
    return config, state, {k.removeprefix("io/"): v for k, v in tensors.items() if k.startswith("io/")}


def settings_of(config):
    return VMoE(depths=config["divided_depths"], width=config["embed_dim"], heads=config["num_heads"], patch=config["patch_size"],
                mlp_ratio=config["mlp_ratio"], experts=config["num_expert"], top_k=config["top_k"], mixtures=config["moe_pos"],
                qkv_bias=config["qkv_bias"], norm_eps=config["norm_eps"])


def our_state(state):
    "Published parameters under our names: experts stacked and transposed, the rest renamed."
    ours, stacks = {}, {"htoh4.weight": "w1", "htoh4.bias": "b1", "h4toh.weight": "w2", "h4toh.bias": "b2"}
    for key, value in state.items():
        stage, rest = key.split(".", 1)
        if m := re.fullmatch(r"(blocks\.\d+)\.moe\.experts\.0\.(.+)", rest):
            one = re.escape(f"{stage}.{m[1]}.moe.experts.") + r"\d+\." + m[2]
            experts = torch.cat([state[k] for k in sorted(state) if re.fullmatch(one, k)])
            ours[f"{stage}.{m[1]}.mlp.{stacks[m[2]]}"] = experts.mT.contiguous() if experts.dim() == 3 else experts
        elif ".experts." not in rest:
            part = "" if rest.startswith("blocks.") else "head.vit." if rest.startswith(("norm.", "head.")) else "embed.vit."
            ours[f"{stage}.{part}{rest.replace('.moe.gate.', '.mlp.router.')}"] = value
    return ours


def test_logits_and_image_gradient_of_the_published_model(published):
    config, state, io = published
    chain = settings_of(config).build(config["num_classes"], config["img_size"]).double().eval()
    chain.load_state_dict(our_state(state))
    image = io["image"].requires_grad_()
    logits = chain(image)
    torch.testing.assert_close(logits, io["logits"], rtol=1e-8, atol=1e-14)
    gradient, = torch.autograd.grad((logits * torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)).sum(), image)
    torch.testing.assert_close(gradient, io["grad_image"], rtol=1e-8, atol=1e-14)


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
