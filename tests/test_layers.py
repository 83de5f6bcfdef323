"""What both transformers share: formulas, their derivatives, the memory they save, and that every module is called."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from golden import DATA
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import layers
from flux import FluxConfig, new_flux
from layers import (
    RULES,
    Positions,
    amplitude,
    attend,
    check_positions,
    frequencies,
    gelu_linear,
    gelu_mlp,
    is_plain,
    modulated_norm,
    sharpening,
)
from mmdit import MMDiTConfig, new_mmdit

MODELS = {
    "mmdit": (new_mmdit, MMDiTConfig(64, 2, context_dim=24, pooled_dim=20, table_side=4, mlp_hidden=96, qk_norm=True,
                                     dual_attention=(0,))),
    "flux": (new_flux, FluxConfig(64, 1, 2, 32, context_dim=24, pooled_dim=20, mlp_hidden=96, axes_dim=(4, 14, 14)))}
LAYERS = {"mmdit": 27, "flux": 26}  # linears and convolutions
BOTH = pytest.mark.parametrize("name", MODELS)


def random(*shapes: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes)


# ---- formulas

@pytest.mark.parametrize("batch", [1, 3])
def test_modulated_norm_is_its_formula_and_so_are_its_first_and_second_derivatives(batch):
    x, shift, scale = random((batch, 5, 8), (batch, 1, 8), (batch, 1, 8))
    expected = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift
    assert (modulated_norm(x, shift, scale) - expected).abs().max() < 1e-12
    assert torch.autograd.gradcheck(modulated_norm, (x, shift, scale))
    assert torch.autograd.gradgradcheck(modulated_norm, (x, shift, scale))


@pytest.mark.parametrize("large", [1, 1 << 30], ids=["computed again", "stored"])
def test_gelu_linear_is_its_formula_and_so_are_its_first_and_second_derivatives(large, monkeypatch):
    monkeypatch.setattr(layers, "LARGE_MAP", large)
    hidden, weight, bias = random((2, 3, 8), (5, 8), (5,))
    expected = F.linear(F.gelu(hidden, approximate="tanh"), weight, bias)
    assert (gelu_linear(hidden, weight, bias) - expected).abs().max() < 1e-12
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(gelu_linear, (hidden, weight, bias))
        assert check(lambda h, w: gelu_linear(h, w, None), (hidden, weight))


@pytest.mark.parametrize("function, shapes", [(gelu_linear, ((2, 3, 8), (5, 8), (5,))),
                                              (modulated_norm, ((3, 5, 8), (3, 1, 8), (3, 1, 8)))])
def test_forward_mode_derivatives_are_refused(function, shapes):
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(function, random(*shapes), random(*shapes, seed=1))


# ---- memory

def test_without_gradients_gelu_linear_needs_no_second_map():
    hidden, weight, bias = (t.detach() for t in random((2, 3, 8), (5, 8), (5,)))
    active = F.gelu(hidden, approximate="tanh")
    with torch.no_grad():
        assert torch.equal(gelu_linear(hidden, weight, bias), F.linear(active, weight, bias))
    assert torch.equal(hidden, active)


@pytest.mark.parametrize("large, maps", [(1, 1), (1 << 30, 2)])
def test_a_large_widest_map_is_stored_once(large, maps, monkeypatch):
    monkeypatch.setattr(layers, "LARGE_MAP", large)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t.shape) or t, lambda t: t):
        gelu_mlp(torch.randn(2, 3, 4), nn.Linear(4, 16), nn.Linear(16, 4))
    assert stored.count((2, 3, 16)) == maps


# ---- torch.compile

@BOTH
@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without"])
def test_a_compiled_block_is_one_graph_and_computes_what_the_block_does(name, gradients):
    model, inputs = shaken(name), inputs_of(name)
    blocks = [blocks[-1] for blocks in model.children() if isinstance(blocks, nn.ModuleList)]
    with torch.set_grad_enabled(gradients):
        results = []
        for _ in range(2):
            velocity = model(*inputs)
            slopes = torch.autograd.grad(velocity.square().mean(), list(model.parameters())) if gradients else ()
            results.append((velocity, *slopes))
            for block in blocks:
                block.compile(backend="aot_eager", fullgraph=True)
    for compiled, eager in zip(*reversed(results), strict=True):
        assert (compiled - eager).abs().max() <= 1e-5 * eager.abs().max() + 1e-7


# ---- modules are called

class LoRA(nn.Module):
    """base(x) + up(down(x)), rank 4."""

    def __init__(self, base: nn.Linear | nn.Conv2d):
        super().__init__()
        self.base = base
        if isinstance(base, nn.Linear):
            self.down = nn.Linear(base.in_features, 4, bias=False)
            self.up = nn.Linear(4, base.out_features, bias=False)
        else:
            self.down = nn.Conv2d(base.in_channels, 4, base.kernel_size, base.stride, bias=False)
            self.up = nn.Conv2d(4, base.out_channels, 1, bias=False)
        generator = torch.Generator().manual_seed(base.weight.numel())
        for part in (self.down, self.up):
            nn.init.normal_(part.weight, std=0.2, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))

    def product(self) -> torch.Tensor:
        return (self.up.weight.flatten(1) @ self.down.weight.flatten(1)).view_as(self.base.weight)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def double_class(linear: nn.Linear) -> None:
    linear.__class__ = Doubled


def double_forward(linear: nn.Linear) -> None:
    linear.forward = lambda x: 2 * nn.Linear.forward(linear, x)


def double_hook(linear: nn.Linear) -> None:
    linear.register_forward_hook(lambda _, __, out: 2 * out)


def double_pre_hook(linear: nn.Linear) -> None:
    linear.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def shaken(name: str) -> nn.Module:
    """All weights random, so that every layer matters."""
    new, config = MODELS[name]
    model, generator = new(config, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs_of(name: str) -> tuple[torch.Tensor, ...]:
    config, generator = MODELS[name][1], torch.Generator().manual_seed(2)
    inputs = (torch.randn(2, 16, 8, 4, generator=generator), torch.rand(2, generator=generator),
              torch.randn(2, 3, config.context_dim, generator=generator),
              torch.randn(2, config.pooled_dim, generator=generator))
    return (*inputs, torch.full((2,), 3.5)) if name == "flux" else inputs


def called_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


@BOTH
@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without"])
def test_a_forward_hook_fires_on_every_layer_alone_and_sees_its_result(name, gradients):
    model, inputs = shaken(name), inputs_of(name)
    modules = called_layers(model)
    assert len(modules) == LAYERS[name]
    with torch.set_grad_enabled(gradients):
        for path, module in modules.items():
            seen = []
            handle = module.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append((inputs[0], out)))
            model(*inputs)
            handle.remove()
            [(x, out)] = seen
            formula = F.linear if isinstance(module, nn.Linear) else partial(F.conv2d, stride=2)
            expected = formula(x, module.weight, module.bias)
            assert (out - expected).abs().max() < 1e-4, path  # nothing was written over it afterwards


@BOTH
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_global_hooks_and_hooks_on_all_layers_leave_velocity_and_gradients_as_they_are(name, recompute):
    model, inputs = shaken(name), inputs_of(name)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        velocity = model(*inputs)
        velocity.square().sum().backward()
        return [velocity.detach(), *(p.grad for p in model.parameters())]

    expected = gradients()
    for child in model.children() if recompute else ():
        for block in child if isinstance(child, nn.ModuleList) else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    handle, fired = nn.modules.module.register_module_forward_hook(lambda *_: None), []
    globally = gradients()
    handle.remove()
    for module in called_layers(model).values():
        module.register_forward_hook(lambda *_: fired.append(1))
    for others in (globally, gradients()):
        assert all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in zip(others, expected, strict=True))
    assert len(fired) >= LAYERS[name]


@BOTH
def test_lora_on_any_layer_gives_what_merged_weights_give_and_both_of_its_parts_a_gradient(name):
    model, inputs = shaken(name), inputs_of(name)
    with torch.no_grad():
        velocity = model(*inputs)
    for path, module in called_layers(model).items():
        lora, original = LoRA(module), module.weight.detach().clone()
        model.set_submodule(path, lora)
        adapted = model(*inputs)
        adapted.square().mean().backward()
        assert all(part.weight.grad.abs().max() > 0 for part in (lora.down, lora.up)), path
        with torch.no_grad():
            assert (model(*inputs) - adapted).abs().max() < 1e-4, path
            model.set_submodule(path, module)
            module.weight += lora.product()
            merged = model(*inputs)
            module.weight.copy_(original)
        assert (adapted - velocity).abs().max() > 1e-3, path
        assert (adapted - merged).abs().max() < 1e-3 * merged.abs().max(), path


@BOTH
def test_lora_on_all_layers_at_once_has_a_gradient_everywhere(name):
    model, inputs = shaken(name), inputs_of(name)
    velocity = model(*inputs)
    loras = {path: LoRA(module.requires_grad_(False)) for path, module in called_layers(model).items()}
    for path, lora in loras.items():
        model.set_submodule(path, lora)
    adapted = model(*inputs)
    adapted.square().mean().backward()
    assert (adapted - velocity).abs().max() > 0.1
    assert all(part.weight.grad.abs().max() > 0 for lora in loras.values() for part in (lora.down, lora.up))
    assert all(lora.base.weight.grad is None for lora in loras.values())


@BOTH
@pytest.mark.parametrize("double", [double_class, double_forward, double_hook, double_pre_hook])
@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without"])
def test_a_changed_linear_is_used_whatever_changes_it(name, double, gradients):
    inputs = inputs_of(name)
    with torch.set_grad_enabled(gradients):
        for path in (path for path, module in called_layers(shaken(name)).items() if isinstance(module, nn.Linear)):
            model, other = shaken(name), shaken(name)
            double(model.get_submodule(path))
            with torch.no_grad():
                linear = other.get_submodule(path)
                linear.weight *= 2
                if double is not double_pre_hook:
                    linear.bias *= 2
            expected = other(*inputs)
            assert (model(*inputs) - expected).abs().max() < 1e-4 * expected.abs().max(), path


def test_a_weight_that_is_a_tensor_subclass_is_not_plain():
    """Quantisation replaces the weight of an nn.Linear, and leaves the module what it is."""
    linear = nn.Linear(4, 4)
    assert is_plain(linear, nn.Linear(4, 2))
    linear.weight = nn.Parameter(TwoTensor(linear.weight.detach(), linear.weight.detach()))
    assert not is_plain(linear) and not is_plain(nn.Linear(4, 2), linear)


# ---- positions beyond the trained side

GOLDEN_POSITIONS = json.loads((DATA / "positions.json").read_text())  # "dim,side,length" -> by the released functions


@pytest.mark.parametrize("rule", ["yarn", "resonance"])
@pytest.mark.parametrize("case", GOLDEN_POSITIONS)
def test_frequencies_equal_those_of_the_released_functions_of_dype_and_ultraflux(case, rule):
    (dim, side, length), golden = map(int, case.split(",")), GOLDEN_POSITIONS[case]
    expected = torch.tensor(golden[rule], dtype=torch.float64)
    ours = frequencies(dim, 10_000, Positions(rule, side), length)
    assert (ours - expected).abs().max() < 1e-7  # released cosines are fp32
    assert abs(amplitude(Positions(rule, side), length) - golden["amplitude"]) < 1e-6


@pytest.mark.parametrize("stretch", [1.5, 2, 4])
def test_interpolation_divides_all_frequencies_and_ntk_the_lowest(stretch):
    stock, pi, ntk = (frequencies(56, 10_000, Positions(rule, 64), int(64 * stretch)) for rule in RULES[:3])
    assert torch.equal(pi, stock / stretch)
    assert ntk[0] == stock[0] and abs(ntk[-1] * stretch / stock[-1] - 1) < 1e-12
    assert (ntk[1:] < stock[1:]).all() and (ntk[:-1] > pi[:-1]).all()


def test_yarn_keeps_no_frequency_of_less_than_two_turns_as_trained():
    """SD3's table has steps of 1/3: 32 tokens are 1.7 turns of the fastest channel, and ntk keeps that one alone."""
    shorter, longer = (frequencies(768, 10_000, Positions("yarn", side), 4 * side, 1 / 3) for side in (32, 640))
    stock = frequencies(768, 10_000, Positions(), 128, 1 / 3)
    assert (shorter[1:] < stock[1:]).all() and (longer[:9] == stock[:9]).all()


def test_resonance_rounds_frequencies_to_complete_turns_within_the_trained_side():
    turns = frequencies(56, 10_000, Positions("resonance", 10_000), 10_001) * 10_000 / math.tau
    fast = turns > 16  # yarn leaves these as they are
    assert fast.sum() > 9 and (turns[fast] - turns[fast].round()).abs().max() < 1e-9


@pytest.mark.parametrize("rule", RULES)
@BOTH
def test_within_the_trained_side_every_rule_is_stock_bit_for_bit(name, rule):
    make, config = MODELS[name]
    model = make(config, torch.Generator().manual_seed(0)).eval()
    stock = model.position(4, 8)
    model.config = replace(config, positions=Positions(rule, 4))
    assert torch.equal(model.position(4, 8), stock)
    assert sharpening(model.config.positions, 8, 5) == 1


@BOTH
def test_interpolated_places_are_those_of_the_trained_side(name):
    make, config = MODELS[name]
    config = replace(config, table_side=32) if name == "mmdit" else config
    model = make(config, torch.Generator().manual_seed(0))
    trained = model.position(16, 24)
    model.config = replace(config, positions=Positions("pi", 8))
    # 8 rows as trained, 12 columns within 8: every third new column lies on every second trained one
    first = 2 if name == "mmdit" else 0  # the table's centre is cut out; Flux counts from 0
    assert (model.position(16, 24)[:, ::3] - trained[:, first:first + 8:2]).abs().max() < 1e-6


@BOTH
@pytest.mark.parametrize("rule", RULES[1:])
def test_every_rule_changes_the_velocity_beyond_the_trained_side_alone(name, rule):
    make, config = MODELS[name]
    config = replace(config, table_side=16) if name == "mmdit" else config
    model = make(config, torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    inputs = torch.ones(1), torch.ones(1, 5, 24), torch.ones(1, 20), torch.ones(1) if name == "flux" else None
    for side, same in ((8, True), (16, False)):
        latent = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(1))
        velocities = []
        for positions in (Positions(), Positions(rule, 4)):
            model.config = replace(config, positions=positions)
            velocities.append(model(latent, *inputs))
        assert torch.equal(*velocities) is same and velocities[1].isfinite().all()


def test_sharper_attention_is_attention_with_that_factor_of_its_logits():
    q, k, v = (t.detach() for t in random((2, 6, 3, 8), (2, 6, 3, 8), (2, 6, 3, 8)))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 1.25 / 8**0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)
    assert (attend(q, k, v, 1.25) - expected).abs().max() < 1e-12
    assert abs(sharpening(Positions("pi", 64), 128**2, 512) - (math.log(128**2 + 512) / math.log(4608))**0.5) < 1e-12


@pytest.mark.parametrize("rule, side, why", [("PI", 4, "the rules are stock, pi"), ("pi", 0, "need the trained side"),
                                             ("yarn", 10**9, "need the trained side")])
def test_positions_that_cannot_be_are_refused(rule, side, why):
    with pytest.raises(ValueError, match=why):
        check_positions(Positions(rule, side))
