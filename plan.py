"""plan"""
import torch
from torch.utils.flop_counter import FlopCounterMode


def flop_of_image(model_class, config, side: int, context_tokens: int) -> int:
    """Floating-point operations of one image in one training step: the matrix products of forward, three times, since backward has two
    for each of them. Counted on the meta device, without weights.

    side   of the latent
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        guided = torch.empty(1) if getattr(config, "guidance", False) else None
        model_class(config)(torch.empty(1, config.in_channels, side, side), torch.empty(1),
                            torch.empty(1, context_tokens, config.context_dim), torch.empty(1, config.pooled_dim), guided)
    return 3 * counter.get_total_flops()
