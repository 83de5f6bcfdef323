"""Flux: parity with the official code and with diffusers, published shapes, positions far out, refusals, training."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from golden import BOUNDS, diffusers_names, distance, lazy, lazy_tensors, published, read_case, shapes_of, write_weights
from safetensors.torch import save_file

from checkpoint import open_weights
from flow import euler, flux_sigmas, interpolate
from flux import Flux, FluxConfig, axis_turns, new_flux, read_config, rotate
from layers import timestep_embedding
from mmdit import MMDiT, MMDiTConfig, new_mmdit
from wavelet import wlf_loss

TOLERANCE = 1e-5  # absolute, fp32: see test_mmdit.py; flux_dev has 7e-6, the last digit of exp() times 3500
GOLDEN_AXES = (8, 12, 12)  # of the golden cases; not in proportion to 16, 56, 56
TINY = FluxConfig(hidden_size=64, depth=2, depth_single=3, head_dim=32, context_dim=24, pooled_dim=20, mlp_hidden=256,
                  axes_dim=(4, 14, 14))
SCHNELL = replace(TINY, depth=1, guidance=False)
NARROW = replace(TINY, depth=1, depth_single=1, hidden_size=32, mlp_hidden=32)
BOTH = pytest.mark.parametrize("config", [TINY, SCHNELL], ids=["dev", "schnell"])


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_flux(config: FluxConfig, seed: int = 0) -> Flux:
    """All weights random, so that nothing hides behind an initial zero."""
    model, rng = new_flux(config, generator(seed)), generator(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.05 + (1 if name.endswith(".scale") else 0))
    return model


def random_inputs(config: FluxConfig, batch: int = 2, height: int = 12, width: int = 8, tokens: int = 7,
                  seed: int = 1) -> tuple:
    rng = generator(seed)
    inputs = (torch.randn(batch, config.in_channels, height, width, generator=rng), torch.rand(batch, generator=rng),
              torch.randn(batch, tokens, config.context_dim, generator=rng),
              torch.randn(batch, config.pooled_dim, generator=rng))
    return inputs + ((3.5 * torch.rand(batch, generator=rng),) if config.guidance else ())


def of_diffusers(config: FluxConfig, seed: int = 0) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=4 * config.in_channels, num_layers=config.depth, num_single_layers=config.depth_single,
        attention_head_dim=config.head_dim, num_attention_heads=config.hidden_size // config.head_dim,
        joint_attention_dim=config.context_dim, pooled_projection_dim=config.pooled_dim,
        guidance_embeds=config.guidance, axes_dims_rope=config.axes_dim)
    rng = generator(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.05
                        + (1 if ".norm_" in name and parameter.ndim == 1 else 0))
    return model.eval()


def run_diffusers(model: FluxTransformer2DModel, latent, sigma, context, pooled, guidance=None) -> torch.Tensor:
    """With the packing and the position ids of diffusers' own pipeline."""
    from diffusers import FluxPipeline
    batch, channels, height, width = latent.shape
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latent.device, latent.dtype)
    out = model(hidden_states=FluxPipeline._pack_latents(latent, batch, channels, height, width),
                encoder_hidden_states=context, pooled_projections=pooled, timestep=sigma, img_ids=ids,
                txt_ids=torch.zeros(context.shape[1], 3), guidance=guidance).sample
    return FluxPipeline._unpack_latents(out, 8 * height, 8 * width, 8)


# ---- the official code

@pytest.mark.parametrize("case, mids", [("flux_dev", 6), ("flux_schnell", 5)])
def test_velocity_and_every_block_equal_the_official_ones(case, mids, tmp_path, device):
    path, golden = write_weights(case, tmp_path, device)
    model = Flux.load(path, device, axes_dim=GOLDEN_AXES)
    assert model.config.guidance == ("in/guidance" in golden)
    seen = {}
    for i, block in enumerate(model.double_blocks):
        block.register_forward_hook(
            lambda _, __, out, i=i: seen.update({f"mid/double{i}.txt": out[0], f"mid/double{i}.img": out[1]}))
    for i, block in enumerate(model.single_blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({f"mid/single{i}": out}))
    seen["out/pred_unpacked"] = model(golden["in/latent"], golden["in/timesteps"], golden["in/txt"], golden["in/vec"],
                                      golden.get("in/guidance"))
    assert len(seen) == mids + 1
    assert {name: d for name, value in seen.items() if (d := distance(value, golden[name])) > BOUNDS[device]} == {}


@pytest.mark.parametrize("case, shift", [("flux_dev", True), ("flux_schnell", False)])
def test_four_euler_steps_on_the_official_schedule_equal_the_official_ones(case, shift, tmp_path):
    path, golden = write_weights(case, tmp_path)
    model = Flux.load(path, axes_dim=GOLDEN_AXES)
    guidance = torch.tensor([3.5]) if model.config.guidance else None
    latent = euler(lambda z, sigma: model(z, sigma, golden["in/txt"], golden["in/vec"], guidance), golden["in/latent"],
                   flux_sigmas(4, tokens=24, shift=shift))
    assert distance(latent, golden["out/denoised_unpacked"]) <= TOLERANCE


@pytest.mark.parametrize("case", ["flux_dev", "flux_schnell"])
def test_positions_equal_the_official_ones(case, tmp_path):
    path, golden = write_weights(case, tmp_path)
    official = golden["mid/pe"][0, 0, golden["in/txt"].shape[1]:]          # (N, d/2, 2, 2), [[cos, -sin], [sin, cos]]
    ours = Flux.load(path, axes_dim=GOLDEN_AXES).position(*golden["in/latent"].shape[-2:]).flatten(0, 1)
    cos, sin = ours.unbind(-1)
    matrices = torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))
    assert distance(matrices, official) <= 1e-6


def test_axis_turns_equal_the_official_rope():
    golden = read_case("flux_primitives")
    for dim, name, tolerance in ((16, "rope16", TOLERANCE), (56, "rope56", TOLERANCE),
                                 (56, "rope56_float64angles", 1e-6)):
        ours = axis_turns(256, dim)[golden["in/pos"][0].long()]
        official = golden[f"out/{name}"][0]
        assert distance(ours, official[..., 0]) <= tolerance


def test_timestep_embedding_equals_the_official_one_but_for_the_last_digit_of_exp():
    """exp() rounds three of the 128 frequencies otherwise on another machine: 6e-8 times 1000·t is up to 3e-5."""
    golden = read_case("flux_primitives")
    ours, official = timestep_embedding(1000 * golden["in/t"]), golden["out/flux_temb"]
    frequency = torch.exp(-math.log(10_000) * torch.arange(128) / 128).repeat(2)
    assert ((ours - official).abs() <= 1e-6 + 2**-23 * 1000 * golden["in/t"][:, None] * frequency).all()


@pytest.mark.parametrize("case", ["flux_dev", "flux_schnell"])
def test_bf16_is_as_far_from_fp32_as_bf16_is_in_diffusers(case, tmp_path):
    path, golden = write_weights(case, tmp_path)
    half, exact = (Flux.load(path, dtype=dtype, axes_dim=GOLDEN_AXES) for dtype in (torch.bfloat16, None))
    names = ("in/latent", "in/timesteps", "in/txt", "in/vec", "in/guidance")
    inputs = [golden[name] for name in names if name in golden]
    theirs = of_diffusers(exact.config).to(torch.bfloat16)
    theirs.load_state_dict(diffusers_names(half.state_dict()), strict=True)
    rounded = [x.bfloat16() if i in (0, 2, 3) else x for i, x in enumerate(inputs)]
    velocity = exact(*inputs)
    velocities = (half(*inputs), run_diffusers(theirs, *rounded))
    ours, others = ((v.float() - velocity).norm() / velocity.norm() for v in velocities)
    print(f"{case}: bf16 is {ours:.2%} off fp32, diffusers' {others:.2%}")
    assert half(*inputs).dtype == torch.float32 and ours < 0.02 and ours < 1.2 * others


# ---- names and shapes of the published files

@pytest.mark.parametrize("name, config, tensors", [("flux1-dev", FluxConfig(), 780),
                                                   ("flux1-schnell", FluxConfig(guidance=False), 776)])
def test_published_names_and_shapes_are_exactly_the_models(name, config, tensors):
    weights = lazy(published(name))
    assert len(weights) == tensors and read_config(weights) == config
    with torch.device("meta"):
        assert shapes_of(Flux(config).state_dict()) == shapes_of(weights)


def test_published_diffusers_names_are_those_of_the_official_file():
    weights = lazy(published("flux1-dev.diffusers")).with_official_names()
    assert shapes_of(weights) == published("flux1-dev") and read_config(weights) == FluxConfig()


@BOTH
def test_to_diffusers_and_back_is_the_identity(config, tmp_path):
    tensors = random_flux(config).state_dict()
    save_file({name: t.contiguous() for name, t in diffusers_names(tensors).items()},
              tmp_path / "diffusion_pytorch_model.safetensors")
    back = open_weights(tmp_path)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name].read(), t) for name, t in tensors.items())


# ---- diffusers

@BOTH
@pytest.mark.parametrize("shard", ["10GB", "300KB"], ids=["one file", "shards"])
def test_folder_of_diffusers_gives_the_velocity_of_diffusers(config, shard, tmp_path):
    theirs = of_diffusers(config)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "300KB")
    ours, inputs = Flux.load(tmp_path), random_inputs(config)
    assert ours.config == config
    velocity = run_diffusers(theirs, *inputs)
    assert velocity.std() > 0.1
    assert distance(ours(*inputs), velocity) <= TOLERANCE


@pytest.mark.parametrize("height, width", [(2, 20), (20, 2), (6, 14), (64, 2)])
def test_any_even_shape_equals_diffusers(height, width):
    ours, theirs, inputs = random_flux(TINY), of_diffusers(TINY), random_inputs(TINY, height=height, width=width)
    theirs.load_state_dict(diffusers_names(ours.state_dict()), strict=True)
    assert distance(ours(*inputs), run_diffusers(theirs, *inputs)) <= TOLERANCE


# ---- what a file says

def test_axes_come_from_the_keyword_then_the_file_then_the_official_proportion(tmp_path):
    tensors, config = random_flux(TINY).state_dict(), lambda path, **kw: Flux.load(path, **kw).config.axes_dim
    save_file(tensors, tmp_path / "plain.safetensors")
    save_file(tensors, tmp_path / "said.safetensors", {"axes_dim": "(8, 12, 12)"})
    assert config(tmp_path / "plain.safetensors") == (4, 14, 14)
    assert config(tmp_path / "said.safetensors") == (8, 12, 12)
    assert config(tmp_path / "said.safetensors", axes_dim=(16, 8, 8)) == (16, 8, 8)
    inputs = random_inputs(TINY)
    assert distance(Flux.load(tmp_path / "said.safetensors")(*inputs),
                    Flux.load(tmp_path / "plain.safetensors")(*inputs)) > 1e-3
    assert Flux.load(tmp_path / "plain.safetensors", theta=100).config.theta == 100
    for axes in ("16, 56, 56", "default", "-4, 14, 14", "0, 16, 16", "4, 14", "9" * 6000):
        save_file(tensors, tmp_path / "wrong.safetensors", {"axes_dim": axes})
        with pytest.raises(ValueError, match=f"wrong.safetensors: RoPE axes '{axes[:40]}' do not divide a head of 32"):
            Flux.load(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize("name", [
    "img_in.weight", "txt_in.weight", "time_in.in_layer.weight", "vector_in.in_layer.weight",
    "guidance_in.out_layer.bias", "double_blocks.0.img_mod.lin.weight", "double_blocks.1.img_mlp.2.bias",
    "double_blocks.1.txt_attn.norm.key_norm.scale",
    "single_blocks.0.linear1.weight", "single_blocks.0.norm.query_norm.scale", "single_blocks.1.linear2.weight",
    "single_blocks.1.modulation.lin.bias", "final_layer.adaLN_modulation.1.weight", "final_layer.linear.weight"])
@pytest.mark.parametrize("damage", ["missing", "misshapen", "extra"])
def test_one_wrong_tensor_is_refused_by_name(name, damage, tmp_path):
    tensors = random_flux(TINY).state_dict()
    wrong = tensors.pop(name)
    if damage == "extra":
        tensors |= {name: wrong, name + "_more": torch.ones(1)}
    elif damage == "misshapen":
        tensors[name] = torch.cat((wrong, wrong[:1]))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as refusal:
        Flux.load(tmp_path, axes_dim=TINY.axes_dim)
    assert name + ("_more" if damage == "extra" else "") in str(refusal.value) and "\n" not in str(refusal.value)


def test_file_of_something_else_is_refused(tmp_path):
    mmdit = new_mmdit(MMDiTConfig(64, 1, context_dim=24, pooled_dim=20, table_side=4, mlp_hidden=64), generator())
    save_file(mmdit.state_dict(), tmp_path / "sd3.safetensors")
    save_file(random_flux(TINY).state_dict(), tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match="no Flux transformer"):
        Flux.load(tmp_path / "sd3.safetensors")
    with pytest.raises(ValueError, match="no SD3 transformer"):
        MMDiT.load(tmp_path / "flux.safetensors")


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_storage_dtype_changes_weights_only_by_rounding(storage, tmp_path):
    model, inputs = random_flux(TINY), random_inputs(TINY)
    save_file({name: t.to(storage) for name, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    for parameter in model.state_dict().values():
        parameter.copy_(parameter.to(storage).float())
    assert torch.equal(Flux.load(tmp_path)(*inputs), model(*inputs))


def test_prefix_of_other_tools_is_accepted(tmp_path):
    model, inputs = random_flux(SCHNELL), random_inputs(SCHNELL)
    save_file({f"model.diffusion_model.{name}": t for name, t in model.state_dict().items()},
              tmp_path / "model.safetensors")
    assert torch.equal(Flux.load(tmp_path)(*inputs), model(*inputs))


# ---- inputs

def test_image_k_does_not_depend_on_its_batch():
    model, inputs = random_flux(TINY), random_inputs(TINY, batch=3)
    together = model(*inputs)
    for k in range(3):
        assert distance(model(*(x[k:k + 1] for x in inputs)), together[k:k + 1]) <= 1e-6


def test_guidance_too_much_or_too_little_is_refused():
    with pytest.raises(ValueError, match="no guidance_in .schnell.: leave guidance None"):
        random_flux(SCHNELL)(*random_inputs(SCHNELL), guidance=torch.ones(2))
    with pytest.raises(ValueError, match="distilled on its guidance: give a number"):
        random_flux(TINY)(*random_inputs(TINY)[:4])


def test_guidance_changes_the_velocity():
    model, (*inputs, guidance) = random_flux(TINY), random_inputs(TINY)
    assert distance(model(*inputs, guidance), model(*inputs, guidance + 1)) > 1e-3


@pytest.mark.parametrize("height, width", [(7, 8), (8, 9)])
def test_odd_sides_are_refused(height, width):
    with pytest.raises(ValueError, match="multiples of the patch"):
        new_flux(TINY, generator())(*random_inputs(TINY, height=height, width=width))


# ---- positions far out

def test_turns_are_exact_to_rows_and_columns_of_8192_px_at_factor_8_and_beyond():
    """Factor 16 ends at row 255 for 8192 px, factor 8 at 511; 4095 stands for anything larger."""
    turns = axis_turns(4096, 56)
    frequency = [10_000 ** (-2 * k / 56) for k in range(28)]
    for position in (0, 1, 255, 256, 257, 511, 1023, 4095):
        exact = torch.tensor([[math.cos(position * f), math.sin(position * f)] for f in frequency], dtype=torch.float64)
        assert (turns[position].double() - exact).abs().max() < 1e-6


def test_rotated_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 56, generator=generator())
    turns = axis_turns(600, 56)

    def score(i: int, j: int) -> torch.Tensor:
        return (rotate(q, turns[i:i + 1]) * rotate(k, turns[j:j + 1])).sum()

    assert abs(score(3, 0) - score(511, 508)) < 1e-5 and abs(score(3, 0) - score(4, 0)) > 1e-3


def test_positions_do_not_depend_on_the_dtype_of_the_weights():
    model = random_flux(NARROW)
    assert torch.equal(model.to(torch.bfloat16).position(512, 600), random_flux(NARROW).position(512, 600))


@pytest.mark.parametrize("side", [256, 512], ids=["16,384 tokens", "65,536 tokens"])
def test_large_latents_run_and_a_distant_corner_equals_fp64(side):
    """One single block of one head: its last patch sees every token, and fp64 can compute that patch alone."""
    config = replace(NARROW, depth=0)
    model, inputs = random_flux(config), random_inputs(config, batch=1, height=side, width=side)
    velocity = model(*inputs)
    assert velocity.shape == inputs[0].shape and velocity.isfinite().all() and velocity.std() > 0.01
    assert distance(velocity[..., -2:, -2:], last_patch_in_fp64(model, *inputs)) <= 1e-5


def last_patch_in_fp64(model: Flux, latent, sigma, context, pooled, guidance) -> torch.Tensor:
    """The velocity of the last patch by the official formulas, for a Flux of one single block and one head."""
    w = {name: t.double() for name, t in model.state_dict().items()}

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def embed(x, name):
        return linear(torch.nn.functional.silu(linear(x, name + ".in_layer")), name + ".out_layer")

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def rms(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"single_blocks.0.norm.{name}_norm.scale"]

    side = latent.shape[-1] // 2
    tokens = latent.double().reshape(16, side, 2, side, 2).permute(1, 3, 0, 2, 4).reshape(side * side, 64)
    x = torch.cat((linear(context[0].double(), "txt_in"), linear(tokens, "img_in")))
    cond = torch.nn.functional.silu(embed(timestep_embedding(1000 * sigma).double(), "time_in")
                                    + embed(pooled.double(), "vector_in")
                                    + embed(timestep_embedding(1000 * guidance).double(), "guidance_in"))
    shift, scale, gate = linear(cond, "single_blocks.0.modulation.lin").chunk(3, -1)
    fused = linear(norm(x) * (1 + scale) + shift, "single_blocks.0.linear1")
    q, k, v, mlp = fused.split((32, 32, 32, 32), -1)
    index = torch.arange(side * side)
    places = torch.stack((0 * index, index // side, index % side), 1)
    positions = torch.cat((torch.zeros(context.shape[1], 3), places)).double()
    angles = torch.cat([torch.outer(p, 10_000 ** (-torch.arange(0, d, 2).double() / d))
                        for p, d in zip(positions.T, (4, 14, 14), strict=True)], 1)
    turns = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.view_as_complex(rms(t, name).reshape(len(t), 16, 2)) * turns
            for t, name in ((q, "query"), (k, "key")))
    q, k = (torch.view_as_real(t).flatten(1) for t in (q, k))
    attended = torch.softmax(q[-1] @ k.T / 32**0.5, -1) @ v
    out = linear(torch.cat((attended, torch.nn.functional.gelu(mlp[-1], approximate="tanh"))),
                 "single_blocks.0.linear2")
    shift, scale = linear(cond, "final_layer.adaLN_modulation.1").chunk(2, -1)
    last = linear(norm(x[-1:] + gate * out) * (1 + scale) + shift, "final_layer.linear")
    return last.reshape(1, 16, 2, 2).float()


# ---- training

def test_new_model_is_a_function_of_its_generator_and_begins_at_zero():
    torch.manual_seed(0)
    one, state = new_flux(TINY, generator(3)), torch.get_rng_state()
    torch.manual_seed(1)
    two, other = new_flux(TINY, generator(3)), new_flux(TINY, generator(4))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.img_in.weight, other.img_in.weight)
    assert one(*random_inputs(TINY)).abs().max() == 0


@pytest.mark.parametrize("bands", [(1, 1, 1, 1), (1, 2, 2, 4)], ids=["equal bands", "weighted bands"])
def test_four_latents_are_learnt_by_heart_with_the_wavelet_loss(bands):
    """With fixed noise and sigma each velocity can be learnt. The loss begins near 2, the variance of a velocity."""
    model, inputs = new_flux(TINY, generator()), random_inputs(TINY, batch=4, height=8, width=8)
    latent, sigma, context, pooled, guidance = inputs
    noise = torch.randn(latent.shape, generator=generator(5))
    z, losses = interpolate(latent, noise, sigma), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    with torch.enable_grad():
        for _ in range(150):
            loss = wlf_loss(model(z, sigma, context, pooled, guidance), noise - latent, None, bands)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.4f}")
    assert losses[0] > 1.5 and losses[-1] < 0.02 * losses[0]


@BOTH
def test_every_weight_has_a_gradient(config):
    model, inputs = random_flux(config), random_inputs(config)
    with torch.enable_grad():
        model(*inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_gradients_equal_those_of_diffusers():
    ours, theirs, inputs = random_flux(TINY), of_diffusers(TINY), random_inputs(TINY)
    theirs.load_state_dict(diffusers_names(ours.state_dict()), strict=True)
    with torch.enable_grad():
        ours(*inputs).square().sum().backward()
        run_diffusers(theirs, *inputs).square().sum().backward()
    expected = lazy_tensors({name: p.grad for name, p in theirs.named_parameters()}).with_official_names()
    for name, parameter in ours.named_parameters():
        other = expected[name].read()
        assert (parameter.grad - other).abs().max() <= 1e-4 * other.abs().max(), name


def test_autocast_trains_in_bf16_over_fp32_weights():
    model, inputs = random_flux(TINY), random_inputs(TINY)
    with torch.enable_grad():
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(*inputs)
        velocity.float().square().mean().backward()
    exact = model(*inputs)
    assert (velocity.float() - exact).norm() / exact.norm() < 0.02
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
