"""Tokens shared by ranks: velocity and gradients of one rank; the same picture; what cannot be shared is refused.

The ranks are threads, each with its own group of gloo and its own model: as many as wanted start in no time.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import seeded
from torch import Tensor, nn

import layers
from flux import FluxConfig, new_flux
from mmdit import MMDiTConfig, new_mmdit
from training.model import recomputed

SD3 = MMDiTConfig(320, 2, context_dim=40, pooled_dim=24, table_side=16, mlp_hidden=128, qk_norm=True,
                  dual_attention=(0,))
FLUX = FluxConfig(160, 2, 2, 32, context_dim=40, pooled_dim=24, mlp_hidden=128, axes_dim=(4, 14, 14))
IMAGE, TEXT = (10, 14), 39  # 35 + 39 = 2·37 tokens: neither part divides by 2, the image and all of them not by 3


def on_ranks(count: int, work: Callable[[dist.ProcessGroup], object]) -> list[object]:
    """work(group) on each rank of a group."""
    store = dist.HashStore()

    def of_rank(rank: int) -> object:
        group = dist.ProcessGroup(store, rank, count)
        gloo = dist.ProcessGroupGloo(store, rank, count)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        return work(group)

    with ThreadPoolExecutor(count) as ranks:
        return list(ranks.map(of_rank, range(count)))


def gradients(group: dist.ProcessGroup | None, config: MMDiTConfig | FluxConfig,
              recompute: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The velocity of a model whose parts all have gradients, and these, of its mean square error."""
    model, generator = (new_mmdit if config is SD3 else new_flux)(config, seeded(0)).double(), seeded(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    for block in layers.blocks_of(model):
        if recompute:
            block.forward = partial(recomputed, block.forward, False)
    model.sequence = group
    latent, target = torch.randn(2, 2, 16, *IMAGE, generator=generator, dtype=torch.float64)
    context = torch.randn(2, TEXT, 40, generator=generator)
    sigma, pooled = torch.rand(2, generator=generator), torch.randn(2, 24, generator=generator)
    velocity = model(latent, sigma, context, pooled, 3 * sigma if config is FLUX else None)
    nn.functional.mse_loss(velocity, target).backward()
    return velocity.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("config, recompute", [(SD3, False), (FLUX, False), (SD3, True)])
def test_velocity_and_averaged_gradients_are_those_of_one_rank(config, recompute, ranks):
    velocity, expected = gradients(None, config)
    shared = on_ranks(ranks, lambda group: gradients(group, config, recompute))
    for own, grads in shared:
        assert (own - velocity).abs().max() < 1e-5 and grads.keys() == expected.keys()
    for name, gradient in expected.items():
        average = sum(grads[name] for _, grads in shared) / ranks
        assert (average - gradient).norm() <= 1e-5 * gradient.norm(), name
