"""ConcatPlexer (Han et al., arXiv 2308.11199): the token blocks take the tokens of several images as one sequence.

From the source: a convolution, shared by all images, reduces each image's tokens; those of N images are concatenated along
the token dimension; the shared backbone runs on that sequence; N demultiplexers read it out. There is no published code, and
the text at hand leaves much open. Our choices, none of them the authors':

- N is a power of two, and the reducer leaves an N-th of an image's tokens, so that a group is about as long as one image:
  windows of the map of 1 x 2 (N = 2), 2 x 2 (4), 2 x 4 (8) positions without overlap, the map's last row and column repeated
  where windows do not fit (7 x 7 becomes 7 x 4, then 4 x 4). The convolution is a full one, starts as the average of its
  window, and stands between blocks without norm or activation.
- The images run by themselves up to the token block `start`: the source's "patchifier" is those blocks of the backbone.
- A learned segment embedding of each slot, zero at first, is added to all of an image's tokens when the group is formed.
  Position embeddings were added before, by the patch stem.
- The bias of MB3D's attention: inside an image, that of the unreduced map between the windows' first positions, so that the
  published tables serve; between two images one learned scalar for each ordered pair of slots and block, zero at first, for all
  heads. ViT's attention has no bias and gets none.
- `readout`: `slot` keeps each image's class token (or its tokens' mean) as what its demultiplexer reads. `shared` has one class
  token in a group, the mean of the images' (or the mean of all tokens), which all N demultiplexers read: the source's
  drawing.
- A demultiplexer stands between the head's norm and its classifier, which is shared: `x + linear(gelu(linear(x)))`.
- A ragged last group is filled by repeating its own images: nothing is dropped, and no other group's images decide.
- Losses, warm-up and distillation are recipe: there is no part for them here.

The predictions of an image depend on the others of its group, unless `mixing` is `block` or `none`.

Shapes: G groups of n images, T reduced tokens of an image, C channels, K positions of an image in the sequence: T, and one more
where its class token is among them; L the tokens of a sequence (`Group.length`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet.blocks.efficientformer import MB3DModule
from supernet.blocks.layers import HeadModule, Layout, Run
from supernet.blocks.vit import ViTModule
from supernet.ports import Group
from supernet.specs import GroupedMB3D, GroupedViT, GroupHead, Join


def is_group_part(name: str) -> bool:
    """Whether a tensor of this name in a network that multiplexes has no part in the same network without."""
    return name.split(".")[0].endswith("_join") or name.endswith(".pair_biases") or ".demultiplexers." in name


class Multiplexed(nn.Sequential):
    """The layers of a network that multiplexes: (N, 3, S, S) to (N, num_classes), any N; images of a group are consecutive."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images)
        return logits[: images.shape[0]]


class Reducer(nn.Module):
    """Tokens of a map (N, side * side, C) to those of its windows (N, T, C)."""

    def __init__(self, dim: int, side: int, kind: str, window: tuple[int, int]) -> None:
        super().__init__()
        self.side = side
        self.window = window
        self.pad = tuple(-side % step for step in window)
        self.conv = nn.Conv2d(dim, dim, window, window) if kind == "conv" else None
        if self.conv is not None:
            assert self.conv.bias is not None
            nn.init.zeros_(self.conv.bias)
            with torch.no_grad():
                average = torch.eye(dim) / (window[0] * window[1])
                self.conv.weight.copy_(average[:, :, None, None].expand_as(self.conv.weight))

    def forward(self, x: Tensor) -> Tensor:
        if self.window == (1, 1):
            return x
        x = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        x = F.pad(x, (0, self.pad[1], 0, self.pad[0]), mode="replicate")
        x = F.avg_pool2d(x, self.window) if self.conv is None else self.conv(x)
        return x.flatten(2).transpose(1, 2)


def places(side: int, window: tuple[int, int]) -> Tensor:
    """Return the first position (y, x) of every window of a map: (T, 2) int64."""
    y, x = (torch.arange(0, side, step) for step in window)
    return torch.cartesian_prod(y, x)


class JoinModule(nn.Module):
    """Images' tokens (N, side * side, C), after a class token where there is one, to sequences of groups (G, L, C), or, for the
    mixing `none`, (G * n, K, C). A ragged last group is filled."""

    def __init__(self, spec: Join, resolution: int) -> None:
        super().__init__()
        self.group = spec.group
        self.reducer = Reducer(spec.dim, resolution, spec.reducer, spec.group.window)
        self.segments = nn.Parameter(torch.zeros(spec.n, 1, spec.dim))

    def forward(self, x: Tensor) -> Tensor:
        group, x = self.group, self._filled(x)
        class_token = x[:, :1]
        x = self.reducer(x[:, 1:] if group.class_token else x)
        if group.class_token and group.readout == "slot":
            x = torch.cat((class_token, x), 1)
        x = x.unflatten(0, (-1, group.n)) + self.segments  # (G, n, K, C)
        x = x.flatten(0, 1) if group.mixing == "none" else x.flatten(1, 2)
        if group.class_token and group.readout == "shared":
            x = torch.cat((class_token.unflatten(0, (-1, group.n)).mean(1), x), 1)
        return x

    def _filled(self, x: Tensor) -> Tensor:
        """Return the images' tokens with the last group filled by repeating its own."""
        count, n = x.shape[0], self.group.n
        left = count % n
        if not left:
            return x
        return torch.cat((x, *[x[count - left + i % left, None] for i in range(n - left)]))


class GroupedMB3DModule(MB3DModule):
    """MB3D on sequences of groups: (G, L, C) to the same. Its bias table is that of the unreduced map."""

    offsets: Tensor
    same: Tensor
    pair: Tensor

    def __init__(self, spec: GroupedMB3D, resolution: int) -> None:
        super().__init__(spec, resolution)
        self.mixing = spec.mixing
        apart = places(resolution, spec.group.window)
        apart = (apart[:, None] - apart[None]).abs()  # (T, T, 2)
        offsets = (apart[..., 0] * resolution + apart[..., 1]).repeat(spec.group.images, spec.group.images)
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("same", _same_image(spec.group, resolution), persistent=False)
        slot = _slots(spec.group, resolution)
        self.register_buffer("pair", slot[:, None] * spec.n + slot[None], persistent=False)
        if spec.mixing == "full":
            self.pair_biases = nn.Parameter(torch.zeros(spec.n, spec.n))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x, self.attention_bias())

    def attention_bias(self) -> Tensor:
        """Return what is added to the logits of the attention: (heads, L, L)."""
        own = self.token_mixer.attention_biases[:, self.offsets]
        if self.mixing == "none":
            return own
        # no scalar: coremltools knows `where` of tensors alone
        apart = self.pair_biases.flatten()[self.pair] if self.mixing == "full" else torch.full_like(own, -torch.inf)
        return torch.where(self.same, own, apart)


class GroupedViTModule(ViTModule):
    """ViT's block on sequences of groups: (G, L, C) to the same."""

    same: Tensor

    def __init__(self, spec: GroupedViT, resolution: int) -> None:
        super().__init__(spec, resolution)
        self.masked = spec.mixing == "block"
        if self.masked:
            self.register_buffer("same", _same_image(spec.group, resolution), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.where(self.same, 0.0, -torch.inf) if self.masked else None)


def _slots(group: Group, side: int) -> Tensor:
    """Return the slot of every position of a sequence whose images do not share a class token: (L,) int64."""
    per_image = len(places(side, group.window)) + group.class_token
    return torch.arange(group.images).repeat_interleave(per_image)


def _same_image(group: Group, side: int) -> Tensor:
    """Return whether two positions are of one image: (L, L) bool."""
    slot = _slots(group, side)
    return slot[:, None] == slot[None]


class Demultiplexer(nn.Module):
    """What one slot reads: (G, C) to the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(dim, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class GroupHeadModule(HeadModule):
    """Sequences of groups to the logits of all slots, image by image: (G * n, num_classes)."""

    def __init__(self, spec: GroupHead, resolution: int) -> None:
        super().__init__(spec, resolution)
        self.group = spec.group
        self.demultiplexers = nn.ModuleList(Demultiplexer(spec.dim) for _ in range(spec.n))

    def forward(self, x: Tensor) -> Tensor:
        n = self.group.n
        if self.group.readout == "slot":
            x = x.reshape(-1, x.shape[1] // self.group.images, x.shape[2])  # (G * n, K, C)
        x = self.norm(x[:, 0]) if self.group.class_token else self.norm(x).mean(1)
        x = x.unflatten(0, (-1, n)) if self.group.readout == "slot" else x[:, None].expand(-1, n, -1)  # (G, n, C)
        x = torch.stack([demultiplexer(x[:, slot]) for slot, demultiplexer in enumerate(self.demultiplexers)], 1)
        logits: Tensor = self.fc(x.flatten(0, 1))
        return logits

    @staticmethod
    def unit_layout(spec: GroupHead) -> Layout:
        found: dict[str, dict[int, tuple[Run, ...]]] = {}
        for slot in range(spec.n):
            hidden = (Run(f"demultiplexer{slot}", 0, spec.dim),)
            found[f"demultiplexers.{slot}.fc1."] = {0: hidden}
            found[f"demultiplexers.{slot}.fc2.weight"] = {1: hidden}
        return found
