"""Tokens shared by ranks: velocity, gradients, latents and pictures are those of one rank; what cannot be is refused.

The ranks are threads, each with its own model and its own end of a group of gloo: they start in no time.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import refusal_of, run_script, seeded
from PIL import Image
from torch import Tensor, nn

import sample
from drawing.settings import parse
from family import FLUX_DEV
from flow import euler, even_sigmas, velocity_with_cfg
from flux import Flux, FluxConfig, new_flux
from layers import blocks_of, check_ranks, shares
from machine.memory import LiveBytes
from mmdit import MMDiT, MMDiTConfig, new_mmdit
from training.model import recomputed
from training.plan import activation_bytes
from training.settings import settle

SD3 = MMDiTConfig(320, 2, context_dim=40, pooled_dim=24, table_side=16, mlp_hidden=128, qk_norm=True,
                  dual_attention=(0,))
FLUX = FluxConfig(160, 2, 2, 32, context_dim=40, pooled_dim=24, mlp_hidden=128, axes_dim=(4, 14, 14))
IMAGE, TEXT = (10, 14), 39  # 35 and 39 tokens: together 37·2, for 5 heads on 2 and on 3 ranks


def on_ranks(count: int, work: Callable[[dist.ProcessGroup], object]) -> list[object]:
    """work(group) on each rank of a group."""
    store = dist.HashStore()

    def of_rank(rank: int) -> object:
        group, gloo = dist.ProcessGroup(store, rank, count), dist.ProcessGroupGloo(store, rank, count)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        return work(group)

    with ThreadPoolExecutor(count) as ranks:
        return list(ranks.map(of_rank, range(count)))


def model_of(config: MMDiTConfig | FluxConfig, group: dist.ProcessGroup | None) -> MMDiT | Flux:
    """A model whose parts all have gradients."""
    model, generator = (new_mmdit if config is SD3 else new_flux)(config, seeded(0)), seeded(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.sequence = group
    return model


def gradients(group: dist.ProcessGroup | None, config: MMDiTConfig | FluxConfig,
              recompute: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The velocity of two pictures, and the gradients of its mean square error."""
    model, generator = model_of(config, group), seeded(2)
    for block in blocks_of(model):
        if recompute:
            block.forward = partial(recomputed, block.forward, False)
    latent, target = torch.randn(2, 2, 16, *IMAGE, generator=generator)
    context, pooled = torch.randn(2, TEXT, 40, generator=generator), torch.randn(2, 24, generator=generator)
    sigma = torch.rand(2, generator=generator)
    velocity = model(latent, sigma, context, pooled, 3 * sigma if config is FLUX else None)
    nn.functional.mse_loss(velocity, target).backward()
    return velocity.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("config, recompute", [(SD3, False), (FLUX, False), (SD3, True)])
def test_velocity_and_mean_gradients_are_those_of_one_rank(config, recompute, ranks):
    velocity, expected = gradients(None, config)
    shared = on_ranks(ranks, lambda group: gradients(group, config, recompute))
    for own, grads in shared:
        assert (own - velocity).abs().max() < 1e-5 and grads.keys() == expected.keys()
    for name, gradient in expected.items():
        mean = sum(grads[name] for _, grads in shared) / ranks
        assert (mean - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("config", [SD3, FLUX])
def test_latent_drawn_by_three_ranks_is_that_of_one(config):
    @torch.inference_mode()
    def drawn(group: dist.ProcessGroup | None) -> Tensor:
        context, pooled = torch.randn(2, TEXT, 40, generator=seeded(3)), torch.randn(2, 24, generator=seeded(4))
        guidance = 3.5 if config is FLUX else None
        velocity = velocity_with_cfg(model_of(config, group), context, pooled, cfg=2.0, guidance=guidance)
        return euler(velocity, torch.randn(1, 16, *IMAGE, generator=seeded(5)), even_sigmas(4))

    one, shared = drawn(None), on_ranks(3, drawn)
    assert all(torch.equal(latent, shared[0]) for latent in shared)
    assert (shared[0] - one).abs().max() < 1e-5 * one.abs().max()


def test_command_on_two_ranks_writes_the_pictures_of_one(folders, tmp_path):
    flags = [f"--weights={folders}/tiny-sd3", "--prompt=a red boat", "--prompt=snow", "--res=128", "--first=64",
             "--steps=3", "--device=cpu"]
    sample.main([*flags, f"--out={tmp_path}/one"])
    done = run_script("sample.py", *flags, "--together", f"--out={tmp_path}/two", ranks=2, timeout=100)
    assert done.returncode == 0 and "2 ranks together" in done.stdout, done.stderr[-3000:]
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 2 and sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for name in names:
        one, two = (np.array(Image.open(tmp_path / out / name)).astype(int) for out in ("one", "two"))
        assert one.std() > 5 and abs(one - two).max() <= 1  # a value between two grey levels may round either way


def test_plan_counts_what_a_rank_of_a_group_takes(settings):
    s = settle(settings(res=512, batch=2, sequence=2, activations="keep"), FLUX_DEV)

    def peak(group: dist.ProcessGroup) -> int:
        model, latent = model_of(FLUX, group), torch.randn(2, 16, 32, 32)
        with LiveBytes(model) as live:
            velocity = model(latent, torch.rand(2), torch.randn(2, 512, 40), torch.randn(2, 24), torch.rand(2))
            nn.functional.mse_loss(velocity, torch.randn_like(latent)).backward()
        return live.peak

    assert activation_bytes(s, FLUX_DEV, FLUX, ranks=2) == pytest.approx(max(on_ranks(2, peak)), rel=0.15)


def test_each_rank_takes_its_own_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for given, card in ((["--device=cuda"], "cuda:1"), ([], "cuda:1"), (["--device=cuda:0"], "cuda:0")):
        assert sample.prepared(parse(["--prompt=snow", "--memory=8", *given])).settings.device == card
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="--device cuda: card 2 of 2, counted from 0; give torchrun a smaller --nproc"):
        sample.prepared(parse(["--prompt=snow", "--memory=8"]))


def test_what_ranks_cannot_share_is_refused(settings, monkeypatch):
    assert shares(38, 4) == [10, 10, 9, 9] and sum(shares(1037, 3)) == 1037
    check_ranks(24, 24, 512, 16_384)
    with pytest.raises(ValueError, match="5 ranks for one picture: at most 4 can share 24 heads, 77 tokens of text and "
                                         "4 of the picture"):
        check_ranks(5, 24, 77, 4)
    assert "--sequence 2: give a divisor of 1" in refusal_of(settings, sequence=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(SystemExit, match="5 ranks for one picture: at most 4 can share 4 heads"):
        sample.main(["--prompt=snow", "--together", "--device=cpu"])
