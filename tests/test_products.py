"Who computes a product, and how many FLOPs it counts."
import runpy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from m2mkd import products
from m2mkd.core import seeded
from m2mkd.evaluate import cost
from m2mkd.folder import environment
from m2mkd.measure import flop_counter
from m2mkd.modulated import ModFC
from m2mkd.products import ONEDNN, Linear, attend, choose, linear, rule
from m2mkd.vit import ViT
from m2mkd.vmoe import Mixture, VMoE

needs_onednn = pytest.mark.skipif(ONEDNN is None, reason="this torch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch): monkeypatch.setenv("M2MKD_PRODUCTS", "onednn")


class Calls(TorchDispatchMode):
    "The number of products that oneDNN is asked for."
    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.number += op.overloadpacket is ONEDNN
        return op(*args, **(kwargs or {}))


def calls(run):
    with Calls() as found: run()
    return found.number


# --- the rule ---

@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel", "CentaurHauls", None])
@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT", "SVE256", None])
@pytest.mark.parametrize("blas", ["mkl", "open", None])
def test_only_amd_with_avx512_and_mkl_gets_onednn(vendor, capability, blas):
    found, why = choose(vendor, capability, blas, True)
    wanted = (vendor, capability, blas) == ("AuthenticAMD", "AVX512", "mkl")
    assert found == ("onednn" if wanted else blas or "torch") and why
    assert choose(vendor, capability, blas, False)[0] == (blas or "torch")
    assert choose(vendor, capability, blas, True, "onednn")[0] == "onednn"
    assert choose(vendor, capability, blas, True, "mkl")[0] == (blas or "torch")


def test_what_is_asked_for_in_vain_is_said():
    with pytest.raises(ValueError, match="no oneDNN"): choose("AuthenticAMD", "AVX512", "mkl", False, "onednn")
    with pytest.raises(ValueError, match="M2MKD_PRODUCTS 'MKL'"): choose("AuthenticAMD", "AVX512", "mkl", True, "MKL")


@pytest.mark.filterwarnings("ignore::RuntimeWarning:runpy")
def test_a_wrong_value_stops_the_import_with_one_sentence(monkeypatch):
    monkeypatch.setenv("M2MKD_PRODUCTS", "fast")
    with pytest.raises(ValueError, match="^unknown value of M2MKD_PRODUCTS 'fast'; there are: mkl, onednn$"): runpy.run_module("m2mkd.products")


@pytest.mark.parametrize("text", [None, "", "no colon\n\x00\n", "processor\t: 0\nCPU implementer\t: 0x41\n"])
def test_a_processor_that_nobody_names(text, tmp_path, monkeypatch):
    file = tmp_path/"cpuinfo"
    if text is not None: file.write_text(text)
    monkeypatch.delenv("M2MKD_PRODUCTS", raising=False)
    monkeypatch.setattr(products, "Path", lambda _: file)
    products._rule.cache_clear()
    try:
        assert rule().vendor is None and rule().products == (rule().blas or "torch")
        assert environment()["processor"] is None and environment()["products"] == rule().products
    finally: products._rule.cache_clear()


def test_a_processor_is_named(tmp_path, monkeypatch):
    (tmp_path/"cpuinfo").write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9R14: 96 cores\n\nprocessor\t: 1\nvendor_id\t: other\n")
    monkeypatch.setattr(products, "Path", lambda _: tmp_path/"cpuinfo")
    assert products._processor() == ("AuthenticAMD", "AMD EPYC 9R14: 96 cores")


def test_a_record_says_who_computed(monkeypatch):
    found = environment()
    assert found["threads"] == torch.get_num_threads() and found["capability"] == torch.backends.cpu.get_cpu_capability()
    assert {k: found[k] for k in ("processor", "blas", "products")} == {k: getattr(rule(), k) for k in ("processor", "blas", "products")}
    if ONEDNN is not None:
        monkeypatch.setenv("M2MKD_PRODUCTS", "onednn")
        assert environment()["products"] == "onednn"


# --- products ---

@needs_onednn
def test_the_variable_is_read_at_each_product(monkeypatch):
    layer, x = Linear(256, 256), torch.randn(64, 256)
    for value, number in (("onednn", 1), ("mkl", 0), ("onednn", 1)):
        monkeypatch.setenv("M2MKD_PRODUCTS", value)
        assert calls(lambda: layer(x)) == number


@needs_onednn
def test_changing_numbers_of_rows_never_go_to_onednn(onednn):
    "An expert's rows; whatever the variable says."
    m, x = Mixture(256, 256, experts=2, top_k=2), torch.randn(512, 256, requires_grad=True)
    assert calls(lambda: m(x).sum().backward()) == 0
    with seeded(0, "model"): model = VMoE(depths=(1, 1), width=128, heads=4, patch=2, experts=2, top_k=2).build(10, 16)
    images = torch.randn(4, 3, 16, 16)
    mixtures = [part for part in model.modules() if isinstance(part, Mixture)]
    inside = []
    for part in mixtures: part.register_forward_hook(lambda m, args, y: inside.append(args[0].detach().clone()))
    whole = calls(lambda: model(images))
    assert mixtures and whole > 0 and sum(calls(lambda: m(x)) for m, x in zip(mixtures, list(inside))) == 0


@needs_onednn
@pytest.mark.parametrize("inputs", [
    ((64, 256), (128, 256), (128,)), ((64, 256), (128, 256), (1,)), ((64, 256), (128, 256), (64, 128)), ((64, 256), (256,), None), ((0, 256), (128, 256), (128,)),
    ((2, 0, 256), (128, 256), None), ((64, 256), (0, 256), None), ((256,), (128, 256), (128,)), ((2, 3, 64, 256), (128, 256), (128,)), ((2048, 0), (1024, 0), None)])
def test_a_layer_is_torchs_in_every_shape(onednn, inputs):
    x, weight, bias = (None if s is None else torch.randn(s, requires_grad=True) for s in inputs)
    given = [t for t in (x, weight, bias) if t is not None]
    ours, theirs = ((y := f(x, weight, bias), *torch.autograd.grad(y.square().sum(), given)) for f in (linear, F.linear))
    for a, b in zip(ours, theirs, strict=True): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@needs_onednn
@pytest.mark.parametrize("change", [lambda x: x[:, ::2], lambda x: x.t().contiguous().t(), lambda x: x[:1].expand(64, -1), lambda x: x[::2], lambda x: x * torch.nan,
                                    lambda x: torch.where(x > 2, torch.inf, x)])
def test_strides_and_numbers_that_are_none(onednn, change):
    x, weight = change(torch.randn(64, 512)), torch.randn(256, 512)
    weight = weight[:, :x.shape[1]]
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4, equal_nan=True)


@needs_onednn
@pytest.mark.parametrize("shapes", [((64, 100), (128, 256), None), ((64, 256), (128, 256), (127,))])
def test_errors_are_torchs(onednn, shapes):
    tensors = [s and torch.randn(s) for s in shapes]
    with pytest.raises(RuntimeError) as theirs: F.linear(*tensors)
    with pytest.raises(RuntimeError) as ours: linear(*tensors)
    assert str(ours.value) == str(theirs.value)


@needs_onednn
def test_vit_and_nac_follow_the_rule(monkeypatch):
    with seeded(0, "model"): vit, layer = ViT(depths=(1,), options=dict(embed_dim=64, num_heads=2, patch_size=2)).build(10, 16), ModFC(128, 128, 16)
    images, x, codes = torch.randn(8, 3, 16, 16), torch.randn(8, 16, 128), torch.randn(16, 16)
    found = {}
    for value in ("mkl", "onednn"):
        monkeypatch.setenv("M2MKD_PRODUCTS", value)
        found[value] = calls(lambda: vit(images)), calls(lambda: layer(x, codes))
    assert found["mkl"] == (0, 0) and min(found["onednn"]) > 0


# --- FLOPs ---

def flops(run):
    with flop_counter() as counter: run()
    return counter.get_total_flops()


@pytest.mark.parametrize("geometry", [{}, dict(stride=2), dict(padding=1), dict(dilation=2), dict(stride=3, padding=2, dilation=2, bias=False)])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_backward_of_a_convolution_is_twice_its_forward_pass(layer, groups, geometry):
    m = layer(8, 16, 3, groups=groups, **geometry)
    dimensions = m.weight.dim() - 2
    x = torch.zeros(2, 8, *[7] * dimensions, requires_grad=True)
    places = (x if "Transpose" in layer.__name__ else m(x))[0, 0].numel()
    once = 2 * 2 * places * m.weight.numel()
    assert flops(lambda: m(x)) == once and flops(lambda: m(x).sum().backward()) == 3 * once
    def to(tensor): return flops(lambda: torch.autograd.grad(m.forward(x).sum(), tensor))
    assert to(x) == to(m.weight) == 2 * once and (m.bias is None or to(m.bias) == once)                    # the bias' gradient is a sum
    m.requires_grad_(False)
    assert flops(lambda: m(x).sum().backward()) == 2 * once


def test_convolutions_of_one_image_and_of_none():
    m, transposed = nn.Conv1d(8, 16, 3, groups=2), nn.ConvTranspose2d(8, 16, 3, groups=2, stride=2, output_padding=1)
    for layer, x, places in ((m, torch.zeros(8, 9), 7), (m, torch.zeros(0, 8, 9), 0), (transposed, torch.zeros(3, 8, 5, 5), 75)):
        x.requires_grad_()
        assert flops(lambda: layer(x).sum().backward()) == 3 * 2 * places * layer.weight.numel()


def t(*shape): return torch.zeros(shape, requires_grad=True)

B, M, K, N, H = 2, 5, 7, 3, 4
BMM = 2 * B * M * K * N
LSTM = nn.LSTM(K, N, num_layers=2, bidirectional=True)
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("masks", ["one", "each"])
@pytest.mark.parametrize("shape", [(64, 3, 32, 48, 16), (30, 3, 32, 48, 16), (2, 12, 8, 9, 4), (1, 1, 1, 1, 1),
                                   (3, 6, 128, 172, 8), (2, 2, 256, 260, 8)])
def test_attention_with_a_bias_that_learns(shape, masks, dtype, near):
    "Few scores an image and many, on both sides of a tile: numbers, gradients, equal calls."
    batch, heads, u, v, d = shape
    torch.manual_seed(0)
    def by_head(n): return torch.randn(batch, n, heads, d, dtype=dtype).transpose(1, 2).requires_grad_()
    bias = torch.randn(batch if masks == "each" else 1, 1, u, v, dtype=dtype)
    if v > 1: bias[..., 1:].masked_fill_(bias[..., 1:] > 1, -torch.inf)        # each hears the first
    given, target = (by_head(u), by_head(v), by_head(v), bias.requires_grad_()), by_head(u).detach()
    def results(f):
        y = f(*given)
        return y, *torch.autograd.grad((y * target).sum(), given)
    ours, again, theirs = map(results, (attend, attend, F.scaled_dot_product_attention))
    assert type(ours[0].grad_fn).__name__ == "_AttendBackward"
    for a, b, c in zip(ours, again, theirs):
        assert torch.equal(a, b)
        assert (a - c).norm() <= near * c.norm()


def test_attention_is_torchs_own_where_somebody_rewrites_it():
    q, bias = torch.randn(2, 2, 4, 4), torch.randn(2, 1, 4, 4)
    def loss(f): return lambda m: f(q, q, q, m).square().sum()
    ours, theirs = (torch.func.grad(loss(f))(bias) for f in (attend, F.scaled_dot_product_attention))
    assert torch.equal(ours, theirs)
    assert attend(q[:0], q[:0], q[:0], bias[:0].requires_grad_()).shape == (0, 2, 4, 4)


PRODUCTS = {
    "mm": (lambda: t(M, K) @ t(K, N), 2 * M * K * N, 3), "mv": (lambda: t(M, K) @ t(K), 2 * M * K, None), "dot": (lambda: t(K) @ t(K), 2 * K, None),
    "addmv": (lambda: torch.addmv(t(M), t(M, K), t(K)), 2 * M * K, None), "bmm": (lambda: t(B, M, K) @ t(B, K, N), BMM, 3),
    "einsum": (lambda: torch.einsum("bmk,bkn->bnm", t(B, M, K), t(B, K, N)), BMM, 3), "broadcast": (lambda: t(B, M, K) @ t(K, N), BMM, 3),
    "addmm": (lambda: torch.addmm(t(N), t(M, K), t(K, N)), 2 * M * K * N, 3), "baddbmm": (lambda: torch.baddbmm(t(B, M, N), t(B, M, K), t(B, K, N)), BMM, 3),
    "addbmm": (lambda: torch.addbmm(t(M, N), t(B, M, K), t(B, K, N)), BMM, 3), "in place": (lambda: torch.zeros(M, N).addmm_(t(M, K), t(K, N)), 2 * M * K * N, 3),
    "activation": (lambda: torch._addmm_activation(torch.zeros(N), torch.zeros(M, K), torch.zeros(K, N)), 2 * M * K * N, None),
    "linear": (lambda: F.linear(t(B, M, K), t(N, K), t(N)), BMM, 3), "ours": (lambda: linear(t(B, M, K), t(N, K), t(N)), BMM, 3),
    "no rows": (lambda: F.linear(t(0, K), t(N, K), t(N)), 0, 3), "vector": (lambda: F.linear(t(K), t(N, K), t(N)), 2 * K * N, None),
    "bilinear": (lambda: F.bilinear(t(B, M), t(B, K), t(N, M, K), t(N)), BMM, 4), "conv_tbc": (lambda: torch.conv_tbc(t(9, B, K), t(3, K, N), t(N)), 2 * 7 * B * 3 * K * N, 3),
    "lstm": (lambda: LSTM(t(M, B, K))[0], 2 * M * B * sum(w.numel() for w in LSTM.parameters() if w.dim() == 2), 3),
    "learned mask": (lambda: attend(t(B, H, M, K), t(B, H, N, K), t(B, H, N, K), t(B, 1, M, N)), 2 * H * BMM, 3),
    "learned mask, large": (lambda: attend(t(1, 2, 128, K), t(1, 2, 128, K), t(1, 2, 128, K), t(1, 1, 128, 128)), 2 * 2 * 2 * 128 * 128 * K, 3),
    "fused": (lambda: F.scaled_dot_product_attention(t(B, H, M, K), t(B, H, N, K), t(B, H, N, K)), 2 * H * BMM, 3.5),      # its scores, once more
    "fused, masked": (lambda: F.scaled_dot_product_attention(t(B, H, M, K), t(B, H, N, K), t(B, H, N, K), torch.zeros(M, N)), 2 * H * BMM, 3.5),
    "not fused": (lambda: F.scaled_dot_product_attention(t(B, H, M, K), t(B, H, N, K), t(B, H, N, K), t(M, N)), 2 * H * BMM, 3),
    "checkpointed": (lambda: torch.utils.checkpoint.checkpoint(lambda x: F.linear(F.linear(x, t(K, K)).relu(), t(N, K)), t(B * M, K), use_reentrant=True),
                     2 * B * M * K * (K + N), 4)}


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_of_products(name):
    "Forward, and forward and backward as times the forward pass."
    run, wanted, both = PRODUCTS[name]
    assert flops(run) == wanted
    if both: assert flops(lambda: run().sum().backward()) == both * wanted
    if name not in ("checkpointed", "learned mask", "learned mask, large"):
        with torch.no_grad(): assert flops(run) == wanted


@pytest.mark.parametrize("ends", [(8, 16), (0, 16), (16, 16)])
def test_flops_of_experts_do_not_depend_on_who_gets_the_rows(ends):
    rows, weights = torch.ones(16, 16, dtype=torch.bfloat16), torch.ones(2, 16, 32, dtype=torch.bfloat16)
    assert flops(lambda: F.grouped_mm(rows, weights, offs=torch.tensor(ends, dtype=torch.int32))) == 2 * 16 * 16 * 32
    assert flops(lambda: F.grouped_mm(rows.t(), torch.ones(16, 32, dtype=torch.bfloat16), offs=torch.tensor(ends, dtype=torch.int32))) == 2 * 16 * 16 * 32
    assert flops(lambda: F.grouped_mm(rows[:0], weights, offs=torch.tensor([0, 0], dtype=torch.int32))) == 0


def test_flops_of_a_whole_attention_and_of_an_encoder_in_evaluation_mode():
    "Where torch has a fast path without a formula; which is on again afterwards."
    x, attention, layer = torch.zeros(2, 5, 8), nn.MultiheadAttention(8, 2, batch_first=True).eval(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    wanted = 2 * 2 * 5 * 4 * 8 * 8 + 2 * 2 * 2 * 5 * 5 * 8
    with torch.inference_mode():
        assert flops(lambda: attention(x, x, x)) == wanted and flops(lambda: layer(x)) == cost(layer, x).flops == wanted + 2 * 2 * 5 * 2 * 8 * 16
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), flop_counter(): raise KeyError
    assert torch.backends.mha.get_fastpath_enabled()


@needs_onednn
def test_flops_do_not_depend_on_who_computes(monkeypatch):
    layer, x, found = Linear(256, 128), torch.zeros(64, 256, requires_grad=True), []
    for value in ("mkl", "onednn"):
        monkeypatch.setenv("M2MKD_PRODUCTS", value)
        found.append(flops(lambda: layer(x).sum().backward()))
    assert found == [3 * 2 * 64 * 256 * 128] * 2


def test_cost_counts_a_shared_parameter_once():
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert cost(model, torch.zeros(3, 8, 5, 5)) == (layer.weight.numel() + 8, 2 * 2 * 3 * 25 * layer.weight.numel())
