"""RandAugment (Cubuk et al., NeurIPS 2020) as timm's `rand-mM-mstdS-inc1` has it, for a batch of which every image has its own.

kornia's RandAugment gives all images of a batch the same operation and draws from the global generator, so the policy is here
and kornia does what its functions do as Pillow does: each operation at once to all images that drew it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.data import IMAGENET_MEAN

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def operated(x: Tensor, operations: Tensor, levels: Tensor) -> Tensor:
    """Return images (B, 3, S, S), values from 0 to 1, after their operations (B, n), indices into OPERATIONS or -1, in turn, at
    their levels (B, n): from 0 to 10, and the sign says which way."""
    x = x.clone()
    for operation, level in zip(operations.unbind(1), levels.unbind(1), strict=True):
        at = ((operation >= 0) & (operation < len(GEOMETRIC))).nonzero()[:, 0]
        if len(at):
            there = at.to(x.device)
            x[there] = transformed(x[there], operation[at], level[at])
        for number, change in enumerate(INTENSITIES.values(), len(GEOMETRIC)):
            at = (operation == number).nonzero()[:, 0]
            if len(at):
                there = at.to(x.device)
                x[there] = change(x[there], level[at]).clamp(0, 1)
    return x


# -- Geometry ----------------------------------------------------------------------------------------------------------


def transformed(x: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    """Return images rotated by up to 30 degrees, sheared by up to 0.3 or translated by up to 0.45 of their side; what comes in
    from outside has ImageNet's mean colour. The numbers are those of GEOMETRIC."""
    n, side = len(x), x.shape[2]
    share = (level / 10).double()
    matrix = torch.eye(2, 3, dtype=torch.float64).repeat(n, 1, 1)  # from the target's place to the source's, in pixels
    angle = torch.deg2rad(30 * share)
    turned = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).view(n, 2, 2)
    centre = torch.full((n, 2, 1), side / 2, dtype=torch.float64)
    rotation = torch.cat((turned, centre - turned @ centre), 2)
    matrix = torch.where((operation == 0)[:, None, None], rotation, matrix)
    for number, (row, column), most in ((1, (0, 1), 0.3), (2, (1, 0), 0.3), (3, (0, 2), 0.45 * side), (4, (1, 2), 0.45 * side)):
        matrix[:, row, column] = torch.where(operation == number, most * share, matrix[:, row, column])
    # Places in pixels from the corner, to those of grid_sample, from -1 to 1.
    offset = matrix[:, :, :2].sum(2) - 1 + 2 * matrix[:, :, 2] / side
    grid = F.affine_grid(torch.cat((matrix[:, :, :2], offset[:, :, None]), 2).float().to(x.device), list(x.shape), False)
    mode = "bilinear" if x.device.type == "mps" else "bicubic"  # which Apple's has not, nor "border" in all versions of torch
    beyond = "reflection" if x.device.type == "mps" else "border"  # which is the same to the image's edge
    found = F.grid_sample(x, grid, mode, beyond, False).clamp(0, 1)
    outside = (grid.abs() > 1).any(3)[:, None]
    return torch.where(outside, torch.tensor(IMAGENET_MEAN, device=x.device).view(3, 1, 1), found)


# -- Intensity ---------------------------------------------------------------------------------------------------------


def autocontrast(x: Tensor, level: Tensor) -> Tensor:
    """Every channel stretched to all of the range; one of a single value stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1 / 255), x)


def equalize(x: Tensor, level: Tensor) -> Tensor:
    """Every channel's values spread evenly."""
    from kornia import enhance

    # A little more than a whole level, as it cuts the rest off.
    return enhance.equalize(((x * 255).round() / 255 + 1e-4).clamp(max=1))


def invert(x: Tensor, level: Tensor) -> Tensor:
    """The negative."""
    return 1 - x


def posterize(x: Tensor, level: Tensor) -> Tensor:
    """The highest 4 bits of a value kept at level 0, one from 7.5 on."""
    bits = (4 - (level.abs() / 10 * 4).long()).clamp_min(1)  # timm keeps none at 10, which leaves nothing of the image
    step = (2.0 ** (8 - bits)).view(-1, 1, 1, 1).to(x.device)
    return torch.div((x * 255).round(), step, rounding_mode="floor") * step / 255


def solarize(x: Tensor, level: Tensor) -> Tensor:
    """Values from a threshold on inverted: from none at level 0 to all at 10."""
    threshold = (256 - (level.abs() / 10 * 256).long()).view(-1, 1, 1, 1).to(x.device)
    return torch.where((x * 255).round() < threshold, x, 1 - x)


def solarize_add(x: Tensor, level: Tensor) -> Tensor:
    """Up to 110 of 255 added to the darker half of the values."""
    more = (level.abs() / 10 * 110).long().view(-1, 1, 1, 1).to(x.device)
    return torch.where((x * 255).round() < 128, x + more / 255, x)


def color(x: Tensor, level: Tensor) -> Tensor:
    """Saturation times 0.1 to 1.9."""
    from kornia import enhance

    return enhance.adjust_saturation_with_gray_subtraction(x, _factor(level))


def contrast(x: Tensor, level: Tensor) -> Tensor:
    """Contrast times 0.1 to 1.9."""
    from kornia import enhance

    return enhance.adjust_contrast_with_mean_subtraction(x, _factor(level))


def brightness(x: Tensor, level: Tensor) -> Tensor:
    """Brightness times 0.1 to 1.9."""
    from kornia import enhance

    return enhance.adjust_brightness_accumulative(x, _factor(level))


def sharpness(x: Tensor, level: Tensor) -> Tensor:
    """From a blurred image, at 0.1, to one that is sharper than it was, at 1.9."""
    from kornia import enhance

    return enhance.sharpness(x, _factor(level)) if x.shape[2] > 2 else x


def _factor(level: Tensor) -> Tensor:
    return (1 + 0.09 * level).clamp_min(0.1)


INTENSITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
}
OPERATIONS = (*GEOMETRIC, *INTENSITIES)
