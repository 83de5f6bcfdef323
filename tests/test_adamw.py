"""AdamW in bf16: its mean is exact, small updates are not lost, the same seed gives the same bits."""

import pytest
import torch
from conftest import seeded
from torch import nn

from training.adamw import RoundedAdamW, round_randomly


def test_rounding_is_to_a_neighbour_and_exact_in_the_mean():
    x = torch.randn(1000, generator=seeded(0))
    down = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)
    up = ((x.view(torch.int32) + (1 << 16)) & -(1 << 16)).view(torch.float32)
    drawn = torch.stack([round_randomly(x, seeded(seed)).float() for seed in range(400)])
    assert ((drawn == down) | (drawn == up)).all()
    deviation = (up - down).abs() / 2 / 400**0.5  # of a mean of 400, at most
    assert ((drawn.mean(0) - x).abs() < 5 * deviation).all()


def test_rounding_leaves_bf16_numbers_unchanged():
    x = torch.cat((torch.randn(100, generator=seeded(0)).bfloat16().float(), torch.tensor([0.0, -0.0, 1.0, -2.0])))
    assert torch.equal(round_randomly(x, seeded(1)), x.bfloat16())


def take_steps(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, count: int) -> None:
    generator = seeded(3)
    for _ in range(count):
        parameter.grad = (0.3 + torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_mean_update_is_that_of_torchs_adamw(weight_decay):
    start = torch.randn(20_000, generator=seeded(0)).bfloat16()
    ours, exact = nn.Parameter(start.clone()), nn.Parameter(start.float())
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": weight_decay}
    take_steps(RoundedAdamW([ours], **options, seed=0), ours, 20)
    take_steps(torch.optim.AdamW([exact], **options), exact, 20)
    update, expected = ours.detach().float() - start.float(), exact.detach() - start.float()
    assert abs(update.mean() / expected.mean() - 1) < 0.03
    assert torch.corrcoef(torch.stack((update, expected)))[0, 1] > 0.5


def test_updates_far_below_the_precision_of_a_weight_are_not_lost():
    start = torch.full((10_000,), 1.0)
    ours, plain = nn.Parameter(start.bfloat16()), nn.Parameter(start.bfloat16())
    rounded = RoundedAdamW([ours], 1e-5, (0.9, 0.999), 0.0, seed=0)
    for parameter, optimizer in ((ours, rounded), (plain, torch.optim.AdamW([plain], 1e-5))):
        for _ in range(30):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert torch.equal(plain, start.bfloat16())  # 1 - 1e-5 rounds to 1
    assert ours.detach().float().mean().item() == pytest.approx(1 - 30e-5, abs=1e-4)


def test_same_seed_gives_the_same_bits_and_another_seed_does_not():
    def run(seed: int) -> torch.Tensor:
        parameter = nn.Parameter(torch.randn(500, generator=seeded(0)).bfloat16())
        take_steps(RoundedAdamW([parameter], 1e-3, (0.9, 0.999), 0.0, seed), parameter, 3)
        return parameter.detach()

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_parameter_without_a_gradient_is_unchanged():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = RoundedAdamW([parameter], 1e-3, (0.9, 0.999), 0.1, seed=0)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3, dtype=torch.bfloat16)) and not optimizer.state[parameter]
