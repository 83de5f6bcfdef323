"""Training runs, one after another, on the ranks of one torchrun. The argument is a JSON file, a list of cases:

"flags"           a command line of train.py; its losses and error are written to OUT/seen-<rank>.json
"compiler": name  the backend of torch.compile, for --compile
"ddp": "torch"    use torch's DistributedDataParallel instead of the hand-written DDP
"die": [rank, n]  this rank kills itself when it computes its n-th loss, counted from 0; not after a restart
"stop": n         every rank but the first sends itself SIGTERM after n losses
"slow": [n, s]    the n-th loss, counted from 0, takes s seconds; the file OUT/slow then exists
"pinned": true    no training but one step of FSDP with --offload, its pinned memory emulated: each allocation takes a
                  power of two. Print the bytes that weights, gradients and moments take on all ranks
"unused": true    no training: print gradients of parameters that not every rank uses
"""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
from machine.ranks import gathered, join, leave  # noqa: E402
from training.ranks import SharedError  # noqa: E402
from training.settings import parse  # noqa: E402


class TorchDDP:
    """torch's own, with the names of ours that the training loop uses.

    torch wraps a model and expects the wrapper to be called; train.py calls the model. The model's forward therefore
    goes through the wrapper, whose Shim holds the original one.
    """

    class Shim(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model, self.run = model, model.forward

        def forward(self, *inputs):
            return self.run(*inputs)

    def __init__(self, model: nn.Module, passes: int):
        self.model, self.passes, self.passed = model, passes, 0
        self.wrapped = DistributedDataParallel(self.Shim(model))
        model.forward = self.forward

    def forward(self, *inputs):
        self.passed += 1  # torch decides in forward whether this pass reduces gradients, ours in backward
        self.wrapped.require_backward_grad_sync = self.passed == self.passes
        return self.wrapped(*inputs)

    def zero(self) -> None:
        self.passed = 0
        for parameter in self.model.parameters():
            parameter.grad = None

    def wait(self) -> None:
        pass


def unused() -> None:
    """Rank k multiplies by k + 1; the middle parameter is used by the first rank only."""
    model = nn.ParameterList([torch.ones(()) for _ in range(3)])
    ddp = train.DDP(model)
    ddp.zero()
    everywhere, first, _ = model
    ((dist.get_rank() + 1) * everywhere + (0 if dist.get_rank() else first)).backward()
    ddp.wait()
    if not dist.get_rank():
        names = ("everywhere", "first rank", "nowhere")
        print(*(f"{name} {p.grad and p.grad.item()}" for name, p in zip(names, model, strict=True)), sep=", ")


def pinned(flags: list[str]) -> None:
    blocks = set()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.nbytes
        block = torch.empty(1 << (size - 1).bit_length() if size else 0, dtype=torch.uint8)
        blocks.add(block.untyped_storage().data_ptr())
        return block[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def pin_gradient(parameter: nn.Parameter) -> None:
        parameter.grad._local_tensor = pin(parameter.grad._local_tensor)

    torch.Tensor.pin_memory = pin
    torch.Tensor.is_pinned = lambda tensor: tensor.untyped_storage().data_ptr() in blocks
    job = train.open_job(parse(flags))
    job = replace(job, settings=replace(job.settings, offload=True))  # which a run on CPUs drops
    model, _ = train.load_models(job)
    optimizer, config = train.new_optimizer(job.settings, model), model.config
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(pin_gradient)
    latent, context = torch.randn(1, 16, 4, 4), torch.randn(1, 8, config.context_dim)
    model(latent, torch.rand(1), context, torch.randn(1, config.pooled_dim), None).square().mean().backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *moments]
    total = sum(gathered(sum(t.to_local().untyped_storage().nbytes() for t in tensors)))
    if not dist.get_rank():
        print("bytes", total)


def main() -> None:
    join(torch.device("cpu"), sharded=False)
    ddp, formula, compiles = train.DDP, train.objective, torch.compile
    for case in json.loads(Path(sys.argv[1]).read_text()):
        if "unused" in case:
            unused()
            continue
        if "pinned" in case:
            pinned(case["flags"])
            continue
        settings, losses = parse(case["flags"]), []

        def watched(*inputs, case=case, losses=losses, out=Path(settings.out)):
            if case.get("die") == [dist.get_rank(), len(losses)] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            if case.get("slow", [None])[0] == len(losses):
                (out / "slow").touch()
                time.sleep(case["slow"][1])
            loss = formula(*inputs)
            losses.append(loss.item())
            if dist.get_rank() and len(losses) == case.get("stop"):
                os.kill(os.getpid(), signal.SIGTERM)
            return loss

        train.objective, train.DDP = watched, ddp
        torch.compile = partial(compiles, backend=case.get("compiler", "inductor"))
        if case.get("ddp") == "torch":
            train.DDP = partial(TorchDDP, passes=settings.accumulate)
        error = ""
        try:
            train.train(settings)
        except SharedError as failure:
            error = str(failure)
        out = Path(settings.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"seen-{dist.get_rank()}.json").write_text(json.dumps({"losses": losses, "error": error}))
        dist.barrier()
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
