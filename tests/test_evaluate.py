"What evaluation promises to the floors above: it leaves no trace, and counts every image."
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from m2mkd import core, evaluate, stats


@pytest.fixture
def net():
    with core.seeded(0, "test"): return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 6))

@pytest.fixture
def split():
    g = core.generator(0, "test")
    return torch.randn(11, 3, 2, 2, generator=g), torch.randint(6, (11,), generator=g)

def batches(split, size): return zip(*(t.split(size) for t in split))


@pytest.mark.parametrize("spoilt", [False, True])
def test_modes_are_restored(net, split, spoilt):
    net.train(); net[2].eval(); net[3].requires_grad_(False)
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    x, y = split
    if spoilt:
        with pytest.raises(ValueError): evaluate.evaluate(net, [(x * float("nan"), y)])
    else: evaluate.evaluate(net, [(x, y)])
    assert [m.training for m in net.modules()] == modes and torch.is_grad_enabled()
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, False]
    assert torch.equal(torch.get_rng_state(), state)

def test_shared_parts_get_their_modes_back(net, split):
    hybrids = {"a": nn.Sequential(net[0], net[1]), "b": nn.Sequential(net[0], net[1], net[2], net[3])}
    net[1].eval(); hybrids["a"].train(); net[1].eval()
    before = [m.training for h in hybrids.values() for m in h.modules()]
    with pytest.raises(ValueError, match="labels run from"): evaluate.evaluate_all(hybrids, [(split[0], split[1] + 6)])
    assert [m.training for h in hybrids.values() for m in h.modules()] == before

def test_last_partial_batch_counts(net, split):
    whole = evaluate.evaluate(net, batches(split, 11))
    for size in (1, 4, 10):
        parts = evaluate.evaluate(net, batches(split, size))
        assert parts.summary()["images"] == 11
        assert parts.summary() == pytest.approx(whole.summary(), abs=1e-6)
        assert torch.equal(parts.predictions, whole.predictions)

def test_autocast_outside_does_not_reach_in(net, split):
    plain = evaluate.evaluate(net, batches(split, 4))
    with torch.autocast("cpu", torch.bfloat16): inside = evaluate.evaluate(net, batches(split, 4))
    assert torch.equal(plain.logits, inside.logits)

def test_a_result_does_not_depend_on_company(split):
    class Noisy(nn.Module):
        def forward(self, x): return x.flatten(1) + torch.randn(len(x), 12)
    alone = evaluate.evaluate(Noisy(), batches(split, 4))
    both = evaluate.evaluate_all({"other": Noisy(), "it": Noisy()}, batches(split, 4))
    assert torch.equal(alone.logits, both["it"].logits)

def test_few_classes(split):
    result = evaluate.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), [(split[0], split[1] % 2)])
    assert result.top(5) == 1 and 0 <= result.top(1) <= 1

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(net, split, value):
    net[3].bias.data[2] = value
    with pytest.raises(ValueError, match="model 'student' gives logits that are nan or infinite, for 4 of the 4 images"):
        evaluate.evaluate_all({"student": net}, batches(split, 4))

@pytest.mark.parametrize("model, data, message", [
    (nn.Identity(), None, r"must give logits of shape \(4, classes\), but gave torch.Size\(\[4, 3, 2, 2\]\)"),
    (nn.Flatten(), [], "there are no images"),
])
def test_bad_input(split, model, data, message):
    with pytest.raises(ValueError, match=message): evaluate.evaluate(model, batches(split, 4) if data is None else data)

def test_agreement_needs_the_same_images(net, split):
    a, b = (evaluate.evaluate(net, [(split[0], y)]) for y in (split[1], split[1].flip(0)))
    with pytest.raises(ValueError, match="labels differ"): evaluate.agreement(a, b)


def test_bootstrap_is_deterministic_and_paired():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 400)) < 0.6, rng.random((3, 400)) < 0.5
    state = np.random.get_state()[1].copy()
    one = evaluate.paired_bootstrap(a, b, seed=1)
    assert one == evaluate.paired_bootstrap(torch.tensor(a), torch.tensor(b), seed=1) != evaluate.paired_bootstrap(a, b, seed=2)
    assert (np.random.get_state()[1] == state).all()
    assert one.low < one.mean < one.high and one.mean == pytest.approx(a.mean() - b.mean())
    other = evaluate.paired_bootstrap(b, a, seed=1)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=0.005)
    assert evaluate.paired_bootstrap(a, a, seed=1) == (0, 0, 0)

@pytest.mark.parametrize("a, b, message", [
    (np.ones(3), np.ones(4), r"one shape.*\(3,\) and \(4,\)"),
    (np.ones(0), np.ones(0), "one shape"),
    (np.full(3, 0.5), np.ones(3), "0 or 1"),
    (np.full(3, np.nan), np.ones(3), "0 or 1"),
])
def test_bootstrap_refuses(a, b, message):
    with pytest.raises(ValueError, match=message): evaluate.paired_bootstrap(a, b, seed=0)

SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]   # Student 1908; R: t.test(extra ~ group, sleep, paired)

def test_golden_numbers_over_seeds():
    "Textbook numbers: another ddof, quantile, tail or pairing gives others."
    assert stats.t_interval(SLEEP) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-7)
    assert stats.t_test(SLEEP) == pytest.approx(0.002833, abs=5e-7) == stats.t_test(np.negative(SLEEP))
    assert stats.t_interval([1, 2, 3], 0.9) == pytest.approx((2, 2 - 2.919986 / 3**0.5, 2 + 2.919986 / 3**0.5), abs=1e-6)
    assert evaluate.t_interval is stats.t_interval and evaluate.Interval is stats.Interval

def test_golden_numbers_over_images():
    "Binomial(100, 1/2): 2.5 % lie below 40, 97.5 % at most at 60; 5 % and 95 %: 42 and 58. Frozen: as it was in evaluate."
    a, b = np.ones((2, 100)), np.stack([np.arange(100) >= 50] * 2)
    assert stats.paired_bootstrap(a, b, seed=0) == pytest.approx((0.5, 0.4, 0.6), abs=1e-12)
    assert stats.paired_bootstrap(a[0], b[0], seed=0, confidence=0.9) == pytest.approx((0.5, 0.42, 0.58), abs=1e-12)
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 400)) < 0.6, rng.random((3, 400)) < 0.5
    assert stats.paired_bootstrap(a, b, seed=1) == pytest.approx((0.045, 0.005, 0.08583333333333333), abs=1e-15)
    assert evaluate.paired_bootstrap is stats.paired_bootstrap

@pytest.mark.parametrize("d", [[1, 1, 1, 1, 1, -2], [3, 1, 2, -4, 4, 4, 5.5], [0, 1, 2, 3, -4, 5, 6], [-1, -2, -3, -4, -5, -6]])
def test_signed_ranks_are_exact_with_ties_and_zeros(d):
    "All signs of the ranks, counted one by one."
    d = np.array([x for x in d if x])
    ranks = np.array([np.mean(np.flatnonzero(np.sort(abs(d)) == abs(x)) + 1) for x in d])
    sums = np.array([ranks @ signs for signs in itertools.product([1, -1], repeat=len(d))])
    wanted = np.mean(abs(sums) >= abs(ranks @ np.sign(d)) - 1e-9)
    assert stats.signed_rank(d if len(d) > 5 else [*d, 0]) == pytest.approx(wanted, abs=1e-12)

def test_signed_ranks_of_few_and_of_many():
    assert np.isnan(stats.signed_rank([1, 2, 3, 4, 5])) and stats.signed_rank([0] * 6) == 1
    assert 0 < stats.signed_rank(range(1, 21)) < 1e-4

def test_holm_by_hand():
    "R: p.adjust(c(.01, .04, .03, .005), 'holm')."
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([float("nan"), 0.04, 0.03]) == pytest.approx([float("nan"), 0.06, 0.06], nan_ok=True)
    assert stats.holm([0.6, 0.9]) == [1, 1] and stats.holm([]) == []
    with pytest.raises(ValueError, match="from 0 to 1"): stats.holm([0.5, 1.5])


@pytest.mark.parametrize("differences, message", [([0.1], "at least 2"), ([], "at least 2"), ([0.1, float("nan")], "finite")])
def test_t_interval_refuses(differences, message):
    with pytest.raises(ValueError, match=message): evaluate.t_interval(differences)
