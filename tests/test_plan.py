"""The memory plan: equal to a real step's memory, published models, the proposal where a run does not fit, FLOPs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, seeded
from torch.profiler import ProfilerActivity, profile

import data
import train
from checkpoint import open_weights, save
from family import describe, find
from flow import interpolate, loss_weight
from flux import Flux, FluxConfig
from machine.memory import GIB
from mmdit import MMDiT, MMDiTConfig
from training import plan
from training.adapter import state_of, trained
from training.model import autocast, build
from training.plan import flop_of_image, memory, smallest_change, total, verdict
from training.resume import tensors_of
from training.settings import Machine, Settings, settle


def allocated(prof: profile, folder: Path) -> list[int]:
    """Bytes that torch's CPU allocator held after each of its calls, relative to the start."""
    prof.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], k, e["args"]["Bytes"]) for k, e in enumerate(events) if e.get("name") == "[memory]")
    levels, now = [], 0
    for _, _, change in changes:
        now += change
        levels.append(now)
    return levels


def settled(s: Settings) -> tuple:
    family, config, vae_config = describe(s.model, s.weights, s.transformer)
    return settle(s, family), family, config, vae_config


@pytest.mark.parametrize("name, changed", [
    ("tiny-sd3", {}), ("tiny-sd3", {"activations": "recompute", "dtype": "bf16"}), ("tiny-flux", {"res": 128}),
    ("tiny-sd3", {"lora": 4, "lora_init": "minor"}), ("tiny-flux", {"lora": 4, "dtype": "bf16", "res": 128})])
def test_plan_equals_the_memory_of_a_real_step(settings, folders, tmp_path, name, changed):
    s, family, config, vae_config = settled(settings(weights=folders / name, **({"res": 256} | changed)))
    card, _ = memory(s, family, config, vae_config, Machine(1, 0))

    weights = find(s.weights)[1].part("model.diffusion_model.")
    model = build(s, family, config, weights, torch.device("cpu"), None)
    side, generator = s.res // 16, seeded(0)
    latent, noise = torch.randn(2, s.batch, 16, side, side, generator=generator)
    context = torch.randn(s.batch, family.text_tokens(None), config.context_dim, generator=generator)
    pooled = torch.randn(s.batch, config.pooled_dim, generator=generator)
    sigma = torch.rand(s.batch, generator=generator)
    guidance = None if s.guidance is None else torch.full_like(sigma, s.guidance)

    def step() -> None:
        with autocast(s):
            velocity = model(interpolate(latent, noise, sigma), sigma, context, pooled, guidance)
        weight = loss_weight(sigma, s.weighting)
        train.objective(s.objective, velocity, latent, noise, sigma, weight, s.bands, s.huber).backward()

    for p in trained(model).values():
        p.grad = torch.zeros_like(p)  # allocated before the measurement, which is of activations alone
    step()  # the first call fills its own caches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    optimizer = torch.optim.AdamW(trained(model).values(), fused=True)
    optimizer.step()
    moments = tensors_of(model, {}, optimizer, 1)
    adapter = sum(t.nbytes for t in state_of(model).values()) if s.lora else 0
    assert card["parameters"] == sum(p.nbytes for p in model.parameters() if not s.lora or not p.requires_grad)
    assert card["adapter"] == adapter
    assert card["gradients"] == sum(p.grad.nbytes for p in trained(model).values())
    assert card["optimizer"] == sum(t.nbytes for key, t in moments.items() if key.startswith("exp_avg"))
    measured = max(allocated(prof, tmp_path))
    assert abs(card["activations"] / measured - 1) < 0.1


@pytest.fixture
def planned(capsys):
    """planned("--model=flux", ...): the output of train.py."""
    def of(*flags: str) -> str:
        train.main(flags)
        return capsys.readouterr().out
    return of


def rows(table: str) -> dict[str, float]:
    return {m[1].strip(): float(m[2]) for line in table.splitlines() if (m := re.match(r"(.{28}) *([\d.]+) GiB", line))}


def test_every_plan_in_the_readme_is_the_printed_one(planned):
    """Each row of its table: flags, GiB on one card, GiB on a host, verdict."""
    row = r"^\| `(--model \S+ --plan [^`]+)` \| ([\d.]+) \| ([\d.]+) \| (.+) \|$"
    table = re.findall(row, (ROOT / "README.md").read_text(), re.M)
    assert len(table) >= 4
    for flags, card, host, verdict_in_readme in table:
        printed = planned(*flags.split())
        sums = rows(printed)
        assert sums["on one card"] == float(card)
        assert next(v for k, v in sums.items() if k.startswith("on a host")) == float(host)
        assert printed.splitlines()[-1] == verdict_in_readme


def test_planned_parameters_of_flux_are_those_of_the_published_file(planned, monkeypatch):
    monkeypatch.setattr(plan, "activation_bytes", lambda *_: 0)  # the slow part, and not what is tested
    usual = "--model=flux", "--plan=1x80", "--res=512", "--batch=1"
    flux, halved = rows(planned(*usual)), rows(planned(*usual, "--state=bf16"))
    assert flux["parameters"] == pytest.approx(11_901_408_320 * 4 / GIB, abs=0.01)
    assert flux["optimizer"] == pytest.approx(2 * flux["parameters"], abs=0.02)
    assert halved["parameters"] == pytest.approx(flux["parameters"] / 2, abs=0.01)


def test_plan_of_a_manifest_equals_that_of_its_folder(planned, folders, tmp_path):
    shapes = {name: list(t.shape) for name, t in open_weights(folders / "tiny-flux" / "flux.safetensors").items()}
    (tmp_path / "manifest.json").write_text(json.dumps({"tensors": shapes}))
    folder, manifest = (planned(f"--weights={path}", "--plan=2x80", "--res=256", "--batch=2")
                        for path in (folders / "tiny-flux", tmp_path / "manifest.json"))
    assert rows(folder)["parameters"] == rows(manifest)["parameters"] and "it fits" in folder


def test_a_model_that_records_positions_is_planned_beyond_its_trained_side(planned, folders, tmp_path):
    weights = open_weights(folders / "tiny-sd3" / "sd3.safetensors")
    save(tmp_path / "sd3.safetensors", {name: t.read() for name, t in weights.items()},
         weights.metadata | {"positions": "pi", "trained_side": 2})
    usual = f"--weights={folders}/tiny-sd3", "--plan=1x80", "--res=128", "--batch=1"
    assert rows(planned(*usual, f"--transformer={tmp_path}/sd3.safetensors")) == rows(planned(*usual))


def test_json_file_that_is_no_manifest_is_refused(tmp_path):
    (tmp_path / "index.json").write_text('{"weight_map": {}}')
    with pytest.raises(SystemExit, match="^error: .*index.json: no manifest"):
        train.main(["--plan=2x80", f"--weights={tmp_path}/index.json"])


def test_averaged_weights_of_an_offloaded_model_are_on_the_host(planned):
    flags = "--model=sd3", "--plan=2x80", "--res=1024", "--batch=2", "--shard=zero2", "--offload"
    without, averaged = rows(planned(*flags)), rows(planned(*flags, "--ema=0.99"))
    assert averaged["on one card"] == without["on one card"] and "averaged weights" in averaged


@pytest.mark.slow
def test_host_of_the_published_models_is_what_their_shapes_give(planned):
    """Findings by hand: pinning adds 30.9 GiB to Flux on 8 ranks and 7.3 GiB to SD3 on 2."""
    usual = "--res=512", "--batch=32", "--shard=zero2", "--offload"
    flux, sd3 = planned("--model=flux", "--plan=8x80", *usual), planned("--model=sd3", "--plan=2x80", *usual)
    assert rows(flux)["rounded up by pinning"] == 30.91 and rows(sd3)["rounded up by pinning"] == 7.28
    assert rows(flux)["offloaded state"] == pytest.approx(11_901_408_320 * 16 / GIB, rel=1e-3)
    crops = 2 * 32 * 3 * 512**2 / GIB  # uint8, of this step and the next one
    assert rows(flux)["pictures"] == pytest.approx(8 + crops, abs=0.01)
    assert rows(sd3)["text encoders"] == pytest.approx(11.16e9 / GIB, abs=0.01) and "of 512" not in sd3
    small = planned("--model=flux", "--plan=8x80:250", *usual)
    assert "GiB of 250" in small and "it does not fit: no --offload makes it fit" in small
    assert planned("--model=flux", "--plan=8x80:300", *usual).endswith("it fits\n")


def test_sample_pictures_and_text_encoders_are_counted_while_they_live(planned):
    flags = "--model=sd3", "--plan=1x24", "--res=1024", "--batch=1", "--state=bf16"
    usual, drawn = rows(planned(*flags)), rows(planned(*flags, "--sample-every=10"))
    assert drawn["sample decoding"] > usual["VAE encoding"] and "sample decoding" not in usual
    first = sum(usual[row] for row in ("parameters", "VAE weights", "text encoders", "reserve"))
    assert first < usual["on one card"] < sum(usual[row] for row in usual if row != "on one card")


def test_sharding_divides_parameters_and_accumulation_shrinks_activations(settings, folders):
    s, family, config, vae_config = settled(settings(weights=folders / "tiny-sd3", batch=8))

    def card(ranks: int, **changed: object) -> dict[str, int]:
        return memory(replace(s, **changed), family, config, vae_config, Machine(ranks, 0))[0]

    alone, halved, sharded = card(1), card(1, accumulate=2), card(4, shard="zero3")
    assert halved["activations"] < 0.7 * alone["activations"] and halved["parameters"] == alone["parameters"]
    assert sharded["parameters"] == pytest.approx(alone["parameters"] / 4, rel=0.01) and sharded["gathered weights"] > 0
    assert card(1, ema=0.9)["averaged weights"] == alone["parameters"]


@pytest.mark.parametrize("share, proposal", [(0.999, "--activations recompute makes it fit"),
                                             (0.45, "recompute --accumulate 4 --state bf16 make it fit"),
                                             (0.001, "no flag makes it fit")])
def test_smallest_change_that_fits_is_proposed(settings, folders, share, proposal):
    s, family, config, vae_config = settled(settings(weights=folders / "tiny-sd3", res=512, batch=4))
    size = total(memory(s, family, config, vae_config, Machine(1, 0))[0])
    table, advice = verdict(s, family, config, vae_config, Machine(1, size))
    assert table.endswith("it fits") and not advice
    table, advice = verdict(s, family, config, vae_config, Machine(1, int(share * size)))
    assert proposal in advice and table.endswith(f"it does not fit: {advice}")


@pytest.mark.parametrize("ranks, mode", [(1, "zero2"), (4, "zero3")])
def test_offloading_is_proposed_with_the_sharding_it_needs(settings, folders, ranks, mode):
    s, *_ = settled(replace(settings(weights=folders / "tiny-sd3", batch=4), device="cuda"))
    proposed = smallest_change(s, ranks, lambda changed: changed.offload)
    assert proposed == f"--shard {mode} --offload makes it fit"
    together = smallest_change(s, ranks, lambda changed: changed.offload and changed.activations == "host")
    assert f"--shard {mode} --offload --activations host" in together or "--offload" in together
    rounded = smallest_change(s, ranks, lambda changed: changed.state == "bf16" and changed.activations == "host")
    assert "--offload" not in rounded


def test_run_that_cannot_fit_does_not_begin(settings, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SMALL_MODEL", 0)
    monkeypatch.setattr(train, "this_machine", lambda device, ranks: Machine(ranks, 1 << 27))
    monkeypatch.setattr(train, "build", None)
    with pytest.raises(ValueError, match="this run does not fit into memory: .*--state bf16"):
        train.train(settings(weights=folders / "tiny-sd3"))
    assert not (tmp_path / "out").exists()


def test_flop_of_sd3_by_hand():
    """A multiply and an add are two. Per block and token: qkv 3D², projection D², MLP 8D²; attention N²D, twice."""
    config = MMDiTConfig(hidden_size=128, depth=2, context_dim=32, pooled_dim=16, table_side=6, mlp_hidden=512)
    d, image, context = 128, 16, 3
    blocks = (12 * 2 * image + (12 + 3) * context) * d**2        # the last block's context has only its qkv
    attention = 2 * 2 * (image + context) ** 2 * d
    ends = 2 * image * 64 * d + context * 32 * d                 # a patch is 2·2·16 numbers, in and out
    vectors = 256 * d + d**2 + 16 * d + d**2 + (2 * 6 + 6 + 2 + 2) * d**2
    assert flop_of_image(MMDiT, config, 8, 3) == 3 * 2 * (blocks + attention + ends + vectors)


def test_flop_of_flux_by_hand():
    config = FluxConfig(hidden_size=128, depth=1, depth_single=2, head_dim=64, context_dim=32, pooled_dim=16,
                        mlp_hidden=512, axes_dim=(8, 28, 28))
    d, image, context = 128, 16, 3
    blocks, attention = 3 * 12 * (image + context) * d**2, 2 * 3 * (image + context) ** 2 * d
    ends = 2 * image * 64 * d + context * 32 * d
    vectors = 2 * (256 * d + d**2) + 16 * d + d**2 + (2 * 6 + 2 * 3 + 2) * d**2
    assert flop_of_image(Flux, config, 8, 3) == 3 * 2 * (blocks + attention + ends + vectors)


def test_planned_picture_memory_is_the_size_of_the_picture_cache():
    assert plan.PICTURES == data.CACHE_BYTES
