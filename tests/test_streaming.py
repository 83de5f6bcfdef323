"""Streamed models: equal to resident ones, and no weight is there that is not needed."""

import math
import time
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import layers
from checkpoint import filled, open_weights
from drawing.streaming import FP8, ROWS, Buffers, Hoisted, finish, hoist, in_fp8, streamed
from family import find
from flow import velocity_with_cfg
from machine.memory import LiveBytes, free_memory
from text import T5Encoder

SIGMAS = torch.tensor([1.0, 0.7, 0.3])
BOTH = pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux"])


@pytest.fixture(scope="module")
def opened():
    """Family, configuration and opened weights of an embedded model, by name."""
    families = {}
    for name in ("tiny-sd3", "tiny-flux"):
        family, transformer, _ = find(ROOT / "models" / name)
        families[name] = family, family.config(transformer.part("model.diffusion_model.")), transformer
    return families.get


def inputs(config, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, 16, 8, 12), (batch, 7, config.context_dim), (batch, config.pooled_dim)
    guidance = torch.full((batch,), 3.5) if getattr(config, "guidance", False) else None
    return *(torch.randn(shape, generator=generator) for shape in shapes), guidance


@torch.inference_mode()
def velocities(model, config, plain: bool = False) -> torch.Tensor:
    """At each of SIGMAS, for two pictures."""
    latent, context, pooled, guidance = inputs(config)
    if not plain:
        pooled = hoist(model, SIGMAS, pooled, guidance)
    return torch.stack([model(latent, sigma.expand(2), context, pooled, guidance) for sigma in SIGMAS])


def build(opened, name: str, dtype: torch.dtype | None = None, **how) -> torch.nn.Module:
    family, config, transformer = opened(name)
    weights = transformer.part("model.diffusion_model.")
    return streamed(lambda: family.model(config), weights, "cpu", dtype, **how)


@BOTH
def test_hoisted_modulations_are_those_of_the_plain_model(opened, name):
    family, config, transformer = opened(name)
    plain = velocities(family.model.load(transformer.source), config, plain=True)
    model = build(opened, name)
    assert torch.equal(velocities(model, config), plain)
    assert not [n for n, m in model.named_modules() if isinstance(m, layers.Modulation)]  # their weights are not there
    assert {n for n, m in model.named_modules() if isinstance(m, Hoisted)}


@BOTH
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("fp8", [False, True])
def test_streamed_blocks_are_the_resident_ones_bit_for_bit(opened, name, dtype, fp8):
    config = opened(name)[1]
    resident = velocities(build(opened, name, dtype, fp8=fp8), config)
    for number in (0, 3):
        assert torch.equal(velocities(build(opened, name, dtype, resident=number, fp8=fp8), config), resident)


@BOTH
def test_only_two_blocks_are_in_memory(opened, name):
    config, model = opened(name)[1], build(opened, name, resident=0)
    there, blocks = [], layers.blocks_of(model)
    for block in blocks:
        block.register_forward_hook(lambda *_: there.append(sum(not p.is_meta for b in blocks for p in b.parameters())))
    velocities(model, config)
    assert max(there) <= max(len(list(block.parameters())) for block in blocks)  # and the next one's, in its buffer


@BOTH
def test_guidance_in_two_passes_is_that_of_one_batch(opened, name):
    config, model = opened(name)[1], build(opened, name, resident=1)
    latent, context, pooled, guidance = inputs(config)
    with torch.inference_mode():
        numbers = hoist(model, SIGMAS, pooled, guidance)
        one, two = (velocity_with_cfg(model, context, numbers, 2.0, 3.5 if guidance is not None else None, batched)(
            latent[:1], SIGMAS[1:2]) for batched in (True, False))
    assert (one - two).norm() / one.norm() < 1e-5


def test_a_row_in_fp8_ends_at_the_largest_number_and_keeps_three_binary_digits():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 8)[:, None]
    held = in_fp8(weight)
    assert held.weight.dtype == FP8 and held.scale.shape == (8, 1)
    assert torch.equal(held.weight.float().abs().amax(1), torch.full((8,), 448.0))
    error = (held.weight.float() * held.scale - weight).norm() / weight.norm()
    assert 0.015 < error < 0.03
    assert not in_fp8(torch.zeros(2, 4)).weight.float().any()


def test_a_matrix_is_turned_to_fp8_without_a_copy_in_fp32():
    weight = torch.ones(16 * ROWS, 64)
    with LiveBytes(torch.nn.Module()) as live:
        in_fp8(weight)
    assert live.peak < 1.6 * weight.nbytes  # itself, and the result, a quarter of it


@pytest.mark.parametrize("scaled", [False, True])
def test_a_file_in_fp8_is_kept_as_it_comes(opened, tmp_path, scaled):
    """Its fp8 numbers and scales are those that are held: the model is the one that the file is read as."""
    family, config, transformer = opened("tiny-sd3")
    tensors = {name: t.read() for name, t in transformer.part("model.diffusion_model.").items()}
    for name in [name for name in tensors if name.startswith("joint_blocks.") and tensors[name].ndim == 2]:
        held = in_fp8(tensors[name])
        tensors[name] = held.weight if scaled else tensors[name].to(FP8)
        if scaled:
            tensors[name.replace(".weight", ".scale_weight")] = held.scale
    if scaled:
        tensors["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    save_file(tensors, tmp_path / "sd3.safetensors")
    weights = open_weights(tmp_path / "sd3.safetensors")
    read = velocities(streamed(lambda: family.model(config), weights, "cpu", None), config)
    for name, tensor in weights.items():  # products are made of modulations only
        weights[name] = replace(tensor, read=None) if tensor.scaled and "adaLN" not in name else tensor
    for resident, fp8 in ((None, True), (1, True), (0, False)):
        kept = streamed(lambda: family.model(config), weights, "cpu", None, resident, fp8)
        assert torch.equal(read, velocities(kept, config))


def test_t5_by_blocks_is_t5(opened):
    path = ROOT / "models" / "tiny-sd3" / "text_encoders"
    [path] = path.glob("t5xxl*.safetensors")
    tokens = torch.arange(40).view(2, 20)
    expected = T5Encoder.load(path)(tokens)
    model = T5Encoder.load(path, filled=partial(streamed, resident=1))
    for _ in range(2):
        assert torch.equal(model(tokens), expected)
    assert torch.equal(T5Encoder.load(path)(tokens[1:]), expected[1:])  # a row does not depend on the others


@BOTH
def test_a_level_that_was_not_hoisted_is_refused(opened, name):
    config, model = opened(name)[1], build(opened, name)
    latent, context, pooled, guidance = inputs(config)
    numbers = hoist(model, SIGMAS, pooled, guidance)
    with pytest.raises(RuntimeError, match="a noise level without modulations"):
        model(latent, torch.tensor([0.7, 0.69]), context, numbers, guidance)


def test_a_block_that_cannot_be_read_ends_the_run(opened, monkeypatch):
    config, model = opened("tiny-flux")[1], build(opened, "tiny-flux", resident=0)
    monkeypatch.setattr(Buffers, "from_file", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        velocities(model, config)


def test_a_streamed_block_with_nan_is_refused_by_name(opened, monkeypatch):
    config, model = opened("tiny-flux")[1], build(opened, "tiny-flux", resident=0)
    part = model.reading.parts[1]
    monkeypatch.setitem(part, "img_mlp.0.bias", replace(part["img_mlp.0.bias"], place=None,
                                                        read=lambda: torch.full((1,), math.nan)))
    with pytest.raises(ValueError, match=r"flux.safetensors: double_blocks.1.img_mlp.0.bias holds NaN or Inf"):
        velocities(model, config)


@pytest.mark.parametrize("fp8", [False, True])
def test_streamed_blocks_of_zeros_alone_are_reported_once(opened, fp8, tmp_path):
    family, config, transformer = opened("tiny-flux")
    tensors = {name: t.read() * (name.split(".")[1] not in "12") for name, t in transformer.items()}
    save_file(tensors, tmp_path / "flux.safetensors", transformer.metadata)
    weights = open_weights(tmp_path / "flux.safetensors")
    with pytest.warns(UserWarning, match="hold zeros alone, such as .*: not trained, or its download did not") as told:
        velocities(streamed(lambda: family.model(config), weights, "cpu", None, resident=1, fp8=fp8), config)
    of_blocks = [str(one.message) for one in told if ": double_blocks.1: " in str(one.message)]
    assert len(of_blocks) == len([one for one in told if "_blocks." in str(one.message).split(" matrices")[0]]) == 1


@BOTH
def test_a_module_that_is_let_go_while_a_block_is_read_ahead_leaves_nothing(opened, name, monkeypatch):
    model, read = build(opened, name, resident=0), Buffers.read
    monkeypatch.setattr(Buffers, "read", lambda *given: time.sleep(0.2) or read(*given))
    velocities(model, opened(name)[1])
    buffer = weakref.ref(model.reading.buffers[0])
    finish(model)
    del model
    free_memory()
    assert buffer() is None


def test_names_that_differ_are_refused_as_by_filled(opened):
    family, config, _ = opened("tiny-flux")
    _, _, other = opened("tiny-sd3")
    messages = []
    for how in (filled, streamed):
        with pytest.raises(ValueError, match="names differ from a Flux") as error:
            how(lambda: family.model(config), other.part("model.diffusion_model."), "cpu", None)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
