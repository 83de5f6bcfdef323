"""AdamW whose weights and moments are all bf16: 6 bytes per parameter where fp32 takes 12.

Paper     Decoupled Weight Decay Regularization (1711.05101), algorithm 2
Mirrors   torch.optim.AdamW, each step in fp32; tested by tests/test_adamw.py
Rounding  bf16 keeps 8 bits of a number: an update of 1e-6 of a weight would always be rounded away, and a second moment
          with beta 0.999 would never move. Numbers are therefore rounded up or down at random, with the exact mean
Check     python -m pytest tests/test_adamw.py
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.seeds import seed_of

EPS = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of the mean and the mean square


def round_randomly(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to bf16, up or down at random so that the mean is x; a number that bf16 holds exactly stays."""
    noise = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()  # bf16 lacks the lower 16 bits


class RoundedAdamW(torch.optim.Optimizer):
    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float,
                 seed: int):
        """
        seed   of the rounding; use a different seed per rank when sharded, the same when replicated
        """
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, index, group["lr"], *group["betas"], group["weight_decay"])

    def _update(self, parameter: nn.Parameter, index: int, lr: float, beta1: float, beta2: float,
                weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0)} | {name: torch.zeros_like(parameter) for name in MOMENTS}
        state["step"] += 1
        steps = int(state["step"])
        tensors = parameter, parameter.grad, *(state[name] for name in MOMENTS)
        tensors = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)  # under FSDP: this rank's rows
        weight, gradient, mean, square = tensors
        generator = torch.Generator(weight.device).manual_seed(seed_of(self.seed, steps * 65_537 + index))
        gradient = gradient.float()
        new_mean = mean.float().lerp(gradient, 1 - beta1)
        new_square = square.float().lerp(gradient.square(), 1 - beta2)
        size = (new_square / (1 - beta2**steps)).sqrt_().add_(EPS)
        new_weight = weight.float().mul(1 - lr * weight_decay).addcdiv_(new_mean, size, value=-lr / (1 - beta1**steps))
        del gradient, size  # rounding needs as much again
        for old, new in ((weight, new_weight), (mean, new_mean), (square, new_square)):
            old.copy_(round_randomly(new, generator))
