"""MMDiT: parity with the official code and with diffusers, published shapes, refusals, independence, training."""

from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from golden import BOUNDS, diffusers_names, distance, lazy, lazy_tensors, published, read_case, shapes_of, write_weights
from safetensors.torch import save_file

from checkpoint import fill, open_weights
from flow import euler
from layers import Positions
from mmdit import MMDiT, MMDiTConfig, new_mmdit, read_config, sincos_table

TOLERANCE = 1e-5  # absolute, fp32: two right implementations differ by 1e-6 to 5e-6, a wrong epsilon by 2e-5
TINY = MMDiTConfig(hidden_size=128, depth=2, context_dim=24, pooled_dim=20, table_side=10, mlp_hidden=512)
DUAL = replace(TINY, depth=3, qk_norm=True, dual_attention=(0, 1))
PUBLISHED = {
    "sd3_medium": MMDiTConfig(),
    "sd3.5_medium": MMDiTConfig(table_side=384, qk_norm=True, dual_attention=tuple(range(13))),
    "sd3.5_large": MMDiTConfig(hidden_size=2432, depth=38, mlp_hidden=9728, qk_norm=True),
}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_mmdit(config: MMDiTConfig, seed: int = 0) -> MMDiT:
    """All weights random, so that nothing hides behind an initial zero."""
    model, rng = new_mmdit(config, generator(seed)), generator(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.05 + (1 if ".ln_" in name else 0))
    return model


def random_inputs(config: MMDiTConfig, batch: int = 2, height: int = 12, width: int = 8, tokens: int = 7,
                  seed: int = 1) -> tuple:
    rng = generator(seed)
    return (torch.randn(batch, config.in_channels, height, width, generator=rng), torch.rand(batch, generator=rng),
            torch.randn(batch, tokens, config.context_dim, generator=rng),
            torch.randn(batch, config.pooled_dim, generator=rng))


def of_diffusers(config: MMDiTConfig, seed: int = 0) -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=config.patch_size, in_channels=config.in_channels, out_channels=config.out_channels,
        num_layers=config.depth, num_attention_heads=config.hidden_size // 64, attention_head_dim=64,
        joint_attention_dim=config.context_dim, caption_projection_dim=config.hidden_size,
        pooled_projection_dim=config.pooled_dim, pos_embed_max_size=config.table_side,
        qk_norm="rms_norm" if config.qk_norm else None, dual_attention_layers=config.dual_attention)
    rng = generator(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.05
                        + (1 if "norm_" in name and parameter.ndim == 1 else 0))
    return model.eval()


def run_diffusers(model: SD3Transformer2DModel, latent, sigma, context, pooled) -> torch.Tensor:
    return model(hidden_states=latent, timestep=1000 * sigma, encoder_hidden_states=context,
                 pooled_projections=pooled).sample


@pytest.mark.parametrize("case", ["mmdit_sd3", "mmdit_sd35_medium"])
def test_velocity_and_every_block_equal_the_official_ones(case, tmp_path, device):
    path, golden = write_weights(case, tmp_path, device)
    model = MMDiT.load(path, device)
    seen = {}
    for i, block in enumerate(model.joint_blocks):
        block.register_forward_hook(
            lambda _, __, out, i=i: seen.update({f"mid/block{i}.context": out[0], f"mid/block{i}.x": out[1]}))
    model.t_embedder.register_forward_hook(lambda _, __, out: seen.update({"mid/t_emb": out}))
    model.y_embedder.register_forward_hook(lambda _, __, out: seen.update({"mid/y_emb": out}))
    seen["mid/pos_embed_cropped"] = model.position(*golden["in/x"].shape[-2:]).flatten(0, 1)[None]
    seen["out/model_output"] = model(golden["in/x"], golden["in/sigma"], golden["in/context"], golden["in/y"])
    expected = {name: golden[name] for name in seen if name in golden}
    assert len(expected) == {"mmdit_sd3": 7, "mmdit_sd35_medium": 4}[case]
    assert {name: d for name, value in expected.items() if (d := distance(seen[name], value)) > BOUNDS[device]} == {}


def test_two_euler_steps_with_cfg_equal_the_official_ones(tmp_path):
    path, golden = write_weights("mmdit_sd3", tmp_path)
    model = MMDiT.load(path)
    context, pooled = (torch.cat((golden[f"in/{name}_uncond"], golden[f"in/{name}"])) for name in ("context", "y"))

    def velocity(z, sigma):
        negative, positive = model(z.repeat(2, 1, 1, 1), sigma.repeat(2), context, pooled).chunk(2)
        return negative + 5 * (positive - negative)

    assert distance(euler(velocity, golden["in/x"], golden["in/euler_sigmas"]), golden["out/euler2_cfg5"]) <= TOLERANCE


@pytest.mark.parametrize("name, table", [("plain_64_5", (64, 5)), ("scaled3_64_6", (64, 6, 2)),
                                         ("offset_64_4", (64, 4, 2, -0.5))])
def test_sincos_table_equals_the_official_one(name, table):
    assert distance(sincos_table(*table), read_case("pos_embed_sincos")[f"out/{name}"]) <= 1e-6


def test_sincos_table_with_base_equals_that_of_diffusers():
    theirs = of_diffusers(TINY).pos_embed.pos_embed[0]  # sample_size 16 in patches of 2: base 8
    assert distance(sincos_table(TINY.hidden_size, TINY.table_side, base=8), theirs.float()) <= 1e-6


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes_are_exactly_the_models(name):
    weights = lazy(published(name)).part("model.diffusion_model.")
    config = read_config(weights)
    assert config == PUBLISHED[name]
    with torch.device("meta"):
        assert shapes_of(MMDiT(config).state_dict()) == shapes_of(weights)


@pytest.mark.parametrize("config", [TINY, DUAL], ids=["plain", "qk_norm and dual attention"])
@pytest.mark.parametrize("shard", ["10GB", "300KB"], ids=["one file", "shards"])
def test_folder_of_diffusers_gives_the_velocity_of_diffusers(config, shard, tmp_path):
    theirs = of_diffusers(config)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "300KB")
    ours, inputs = MMDiT.load(tmp_path), random_inputs(config)
    assert ours.config == config
    velocity = run_diffusers(theirs, *inputs)
    assert velocity.std() > 0.1
    assert distance(ours(*inputs), velocity) <= TOLERANCE


@pytest.mark.parametrize("config", [TINY, DUAL], ids=["plain", "qk_norm and dual attention"])
def test_weights_go_back_to_diffusers(config):
    ours, theirs, inputs = random_mmdit(config), of_diffusers(config), random_inputs(config)
    theirs.load_state_dict(diffusers_names(ours.state_dict()), strict=True)
    assert distance(ours(*inputs), run_diffusers(theirs, *inputs)) <= TOLERANCE


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_file_with_a_vae_in_it_loads(prefix, tmp_path):
    model, inputs = random_mmdit(TINY), random_inputs(TINY)
    tensors = {prefix + name: t for name, t in model.state_dict().items()}
    if prefix:
        tensors |= {"first_stage_model.encoder.conv_in.weight": torch.ones(2), "text_encoders.clip_l.x": torch.ones(2)}
    save_file(tensors, tmp_path / "sd3_medium.safetensors")
    loaded = MMDiT.load(tmp_path / "sd3_medium.safetensors")
    assert torch.equal(loaded(*inputs), model(*inputs))


@pytest.mark.parametrize("name", [
    "pos_embed", "x_embedder.proj.weight", "t_embedder.mlp.2.bias", "y_embedder.mlp.0.weight",
    "context_embedder.weight", "joint_blocks.0.x_block.mlp.fc1.weight",
    "joint_blocks.0.x_block.attn2.qkv.weight", "joint_blocks.1.context_block.attn.ln_q.weight",
    "joint_blocks.2.context_block.attn.qkv.weight", "joint_blocks.2.x_block.attn.proj.bias",
    "final_layer.linear.weight"])
@pytest.mark.parametrize("damage", ["missing", "misshapen", "extra"])
def test_one_wrong_tensor_is_refused_by_name(name, damage, tmp_path):
    tensors = {key: t.contiguous() for key, t in random_mmdit(DUAL).state_dict().items()}
    wrong = tensors.pop(name)
    if damage == "extra":
        tensors |= {name: wrong, name + "_more": torch.ones(1)}
    elif damage == "misshapen":
        axis = 1 if name == "pos_embed" else 0
        tensors[name] = torch.cat((wrong, wrong.narrow(axis, 0, 1)), dim=axis)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as refusal:
        MMDiT.load(tmp_path)
    assert name + ("_more" if damage == "extra" else "") in str(refusal.value) and "\n" not in str(refusal.value)


def test_file_of_something_else_is_refused(tmp_path):
    save_file({"layer.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no SD3 transformer.*layer.weight"):
        MMDiT.load(tmp_path)


def test_image_k_does_not_depend_on_its_batch():
    model = random_mmdit(DUAL)
    inputs = random_inputs(DUAL, batch=3)
    together = model(*inputs)
    for k in range(3):
        assert distance(model(*(x[k:k + 1] for x in inputs)), together[k:k + 1]) <= 1e-6


@pytest.mark.parametrize("height, width", [(2, 20), (20, 2), (6, 14)])
def test_any_even_shape_within_the_table_keeps_its_shape(height, width):
    inputs = random_inputs(TINY, height=height, width=width)
    theirs, ours = of_diffusers(TINY), MMDiT(TINY)
    fill(ours, lazy_tensors(theirs.state_dict()).with_official_names())
    assert distance(ours(*inputs), run_diffusers(theirs, *inputs)) <= TOLERANCE


def test_positions_beyond_the_trained_side_are_computed_once(monkeypatch):
    config = MMDiTConfig(128, 1, context_dim=32, pooled_dim=32, table_side=8, positions=Positions("pi", 4))
    model = new_mmdit(config, torch.Generator())
    first, seen = model.position(16, 12), []
    monkeypatch.setattr(MMDiT, "resampled", lambda self, length: seen.append(length))
    assert torch.equal(model.position(16, 12), first) and not seen
    model.double()
    with pytest.raises(AttributeError):
        model.position(16, 12)
    assert seen


def test_position_table_is_read_as_a_view():
    model = new_mmdit(TINY, generator())
    assert model.position(8, 12).untyped_storage().data_ptr() == model.pos_embed.untyped_storage().data_ptr()


@pytest.mark.parametrize("height, width, message", [(7, 8, "multiples of the patch"), (8, 9, "multiples of the patch"),
                                                    (8, 22, "20, which is 160 px at factor 8 and 320 px at factor 16")])
def test_impossible_latents_are_refused(height, width, message):
    with pytest.raises(ValueError, match=message):
        new_mmdit(TINY, generator())(*random_inputs(TINY, height=height, width=width))


def test_guidance_is_refused():
    with pytest.raises(ValueError, match="cfg"):
        new_mmdit(TINY, generator())(*random_inputs(TINY), guidance=torch.ones(2))


@pytest.mark.parametrize("config", [TINY, DUAL], ids=["plain", "qk_norm and dual attention"])
def test_bf16_is_within_two_percent(config, tmp_path):
    model, inputs = random_mmdit(config), random_inputs(config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    half = MMDiT.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    exact, rounded = model(*inputs), half(*inputs)
    assert rounded.dtype == inputs[0].dtype
    assert (rounded - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_storage_dtype_changes_weights_only_by_rounding(storage, tmp_path):
    model, inputs = random_mmdit(TINY), random_inputs(TINY)
    save_file({name: t.to(storage) for name, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    for parameter in model.state_dict().values():
        parameter.copy_(parameter.to(storage).float())
    assert torch.equal(MMDiT.load(tmp_path)(*inputs), model(*inputs))


def test_new_model_is_a_function_of_its_generator_and_begins_at_zero():
    torch.manual_seed(0)
    one, state = new_mmdit(DUAL, generator(3)), torch.get_rng_state()
    torch.manual_seed(1)
    two, other = new_mmdit(DUAL, generator(3)), new_mmdit(DUAL, generator(4))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.x_embedder.proj.weight, other.x_embedder.proj.weight)
    assert one(*random_inputs(DUAL)).abs().max() == 0


def test_new_model_overfits_one_batch():
    model, inputs = new_mmdit(TINY, generator()), random_inputs(TINY)
    target = torch.randn(inputs[0].shape, generator=generator(5))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    with torch.enable_grad():
        for _ in range(60):
            loss = (model(*inputs) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    last_context_gradients = [p.grad for name, p in model.named_parameters()
                              if name.startswith("joint_blocks.1.context_block")]
    assert all(g is not None and g.abs().max() > 0 for g in last_context_gradients)


def test_saved_names_open_again(tmp_path):
    model = random_mmdit(DUAL)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert shapes_of(open_weights(tmp_path)) == shapes_of(model.state_dict())
