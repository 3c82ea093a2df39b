"""Inception v3 as a source of features: torchvision's, and the variant that FID was defined with (Heusel et al. 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # of ImageNet, torchvision's own
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
CLASSES_OF_FID = 1008


def build(weights: dict[str, torch.Tensor]) -> nn.Module:
    """A network that takes (B, 3, H, W) in 0..1 and gives (B, 2048), from a state dict in torchvision's names.

    1008 classes mark the TensorFlow graph of 2015 that FID stands on: it averages without counting the padding, takes
    the maximum in its last block, and has a resize of its own. Raises ValueError for other weights.
    """
    from torchvision.models import Inception3

    head = weights.get("fc.weight")
    if head is None or head.shape[1:] != (2048,) or "Mixed_7c.branch_pool.conv.weight" not in weights:
        raise ValueError("these are not the weights of an Inception v3 in torchvision's names")
    of_fid = len(head) == CLASSES_OF_FID
    network = Inception3(num_classes=len(head), aux_logits=False, transform_input=False, init_weights=False)
    own = network.state_dict()
    weights = {k: v for k, v in weights.items() if not k.startswith("AuxLogits.")}
    wrong = sorted(k for k in own if k not in weights and not k.endswith("num_batches_tracked"))
    if wrong or any(own[k].shape != weights[k].shape for k in own if k in weights):
        raise ValueError(f"these weights do not fit an Inception v3 ({len(wrong)} tensors are missing)")
    network.load_state_dict(weights, strict=False)
    network.fc, network.dropout = nn.Identity(), nn.Identity()
    if of_fid:
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
            _pool_differently(getattr(network, f"Mixed_{name}"), name == "7c")
    return _Prepared(network.eval().requires_grad_(False), tensorflow if of_fid else imagenet)


class _Prepared(nn.Module):
    def __init__(self, network: nn.Module, prepare):
        super().__init__()
        self.network, self.prepare = network, prepare

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(self.prepare(images))


def _pool_differently(block: nn.Module, maximum: bool) -> None:
    """The pooled branch comes last in a block's output; it is computed again from another pooling."""

    def again(block: nn.Module, given: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        x = given[0]
        pooled = F.max_pool2d(x, 3, 1, 1) if maximum else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        branch = block.branch_pool(pooled)
        return torch.cat([out[:, : -branch.shape[1]], branch], 1)

    block.register_forward_hook(again)


def tensorflow(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in 0..1 -> (B, 3, 299, 299) in -1..1, with 8 bits, resized as TensorFlow 1 did: the corner of pixel i
    of the small picture lies at i * H / 299 of the large one, without smoothing."""
    x = (images * 255).round().clamp(0, 255)
    for axis in (2, 3):
        n = x.shape[axis]
        place = torch.arange(299, device=x.device, dtype=x.dtype) * (n / 299)
        below = place.floor().long()
        above, share = (below + 1).clamp(max=n - 1), (place - below).view([-1 if a == axis else 1 for a in range(4)])
        x = x.index_select(axis, below).lerp(x.index_select(axis, above), share)
    return (x - 128) / 128


def imagenet(images: torch.Tensor) -> torch.Tensor:
    """As torchvision's weights expect: the smaller side to 342, the middle 299 x 299, ImageNet's mean and deviation."""
    height, width = images.shape[2:]
    scale = 342 / min(height, width)
    size = (342, int(342 * width / height)) if height <= width else (int(342 * height / width), 342)
    x = F.interpolate(images, size=size, mode="bilinear", antialias=True) if scale != 1 else images
    top, left = (round((s - 299) / 2) for s in size)
    return (x[:, :, top : top + 299, left : left + 299] - MEAN.to(x)) / STD.to(x)
