"""Training runs, one after another, on the ranks of one torchrun. The argument is a JSON file, a list of cases:

"flags"           a command line of train.py; its losses and error are written to OUT/seen-<rank>.json
"ddp": "torch"    use torch's DistributedDataParallel instead of the hand-written DDP
"die": [rank, n]  this rank kills itself when it computes its n-th loss, counted from 0; not after a restart
"stop": n         every rank but the first sends itself SIGTERM after n losses
"unused": true    no training: print gradients of parameters that not every rank uses
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
from training.ranks import SharedError, join  # noqa: E402
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


def main() -> None:
    join(torch.device("cpu"), sharded=False)
    ddp, formula = train.DDP, train.objective
    for case in json.loads(Path(sys.argv[1]).read_text()):
        if "unused" in case:
            unused()
            continue
        settings, losses = parse(case["flags"]), []

        def watched(*inputs, case=case, losses=losses):
            if case.get("die") == [dist.get_rank(), len(losses)] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            loss = formula(*inputs)
            losses.append(loss.item())
            if dist.get_rank() and len(losses) == case.get("stop"):
                os.kill(os.getpid(), signal.SIGTERM)
            return loss

        train.objective, train.DDP = watched, ddp
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
    sys.stdout.flush()
    os._exit(0)  # everything is written; gloo's threads sometimes abort or block the interpreter's own exit


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
