"""The steps that keep less for backward: values and gradients of their formulas."""

import pytest
import torch
import torch.nn.functional as F

from layers import gelu_linear, modulated_norm


@pytest.mark.parametrize("batch", [1, 3])
def test_modulated_norm_is_its_formula_and_so_is_its_gradient(batch):
    generator = torch.Generator().manual_seed(0)
    x, shift, scale = (torch.randn(batch, n, 8, generator=generator, dtype=torch.float64, requires_grad=True) for n in (5, 1, 1))
    expected = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift
    assert (modulated_norm(x, shift, scale) - expected).abs().max() < 1e-12
    assert torch.autograd.gradcheck(modulated_norm, (x, shift, scale))


@pytest.mark.parametrize("large", [1, 1 << 30])
def test_gelu_linear_is_its_formula_and_so_is_its_gradient(large, monkeypatch):
    monkeypatch.setattr("lean.LARGE_MAP", large)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
                            for shape in ((2, 3, 8), (5, 8), (5,)))
    expected = F.linear(F.gelu(hidden, approximate="tanh"), weight, bias)
    assert (gelu_linear(hidden, weight, bias) - expected).abs().max() < 1e-12
    assert torch.autograd.gradcheck(gelu_linear, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h, w: gelu_linear(h, w, None), (hidden, weight))


def test_without_gradients_gelu_linear_needs_no_second_map():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 8), (5, 8), (5,)))
    active = F.gelu(hidden, approximate="tanh")
    with torch.no_grad():
        assert torch.equal(gelu_linear(hidden, weight, bias), F.linear(active, weight, bias))
    assert torch.equal(hidden, active)
