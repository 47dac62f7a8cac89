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
where its class token is among them.
"""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet.arch import MB3D, ArchConfig, ViT


class Reducer(nn.Module):
    """Tokens of a map (N, side * side, C) to those of its windows (N, T, C)."""

    def __init__(self, dim: int, side: int, kind: str, n: int) -> None:
        super().__init__()
        self.side = side
        rows = 1 if kind == "none" else isqrt(n)  # 1, 1, 2, 2, 4 for n = 1, 2, 4, 8, 16 ...
        rows = 1 << (rows.bit_length() - 1)
        self.window = (rows, 1 if kind == "none" else n // rows)
        self.pad = tuple(-side % step for step in self.window)
        self.conv = nn.Conv2d(dim, dim, self.window, self.window) if kind == "conv" else None
        if self.conv is not None:
            assert self.conv.bias is not None
            nn.init.zeros_(self.conv.bias)
            with torch.no_grad():
                average = torch.eye(dim) / (self.window[0] * self.window[1])
                self.conv.weight.copy_(average[:, :, None, None].expand_as(self.conv.weight))

    def places(self) -> Tensor:
        """Return the first position (y, x) of every window: (T, 2) int64."""
        y, x = (torch.arange(0, self.side, step) for step in self.window)
        return torch.cartesian_prod(y, x)

    def forward(self, x: Tensor) -> Tensor:
        if self.window == (1, 1):
            return x
        x = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        x = F.pad(x, (0, self.pad[1], 0, self.pad[0]), mode="replicate")
        x = F.avg_pool2d(x, self.window) if self.conv is None else self.conv(x)
        return x.flatten(2).transpose(1, 2)


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


class ConcatPlexer(nn.Module):
    """A network whose last token blocks take groups of `mux.n` consecutive images: (N, 3, S, S) to (N, num_classes), any N.

    `network` is the network without multiplexing, so that its weights go in as they are.
    """

    offsets: Tensor
    same: Tensor
    pair: Tensor

    def __init__(self, network: nn.Sequential, arch: ArchConfig) -> None:
        super().__init__()
        assert arch.mux is not None
        self.mux = arch.mux
        named = arch.named_layers()
        last = [(name, layer.spec) for name, layer in named if name.startswith(f"stage{len(arch.stages)}_block")]
        tokens = [(name, spec) for name, spec in last if isinstance(spec, MB3D | ViT)]
        self.grouped = [name for name, _ in tokens[self.mux.start :]]
        names = [name for name, _ in named]
        self.alone = names[: names.index(self.grouped[0])]
        self.network = network
        n, dim, side = self.mux.n, arch.widths[-1], arch.resolutions[-1]
        self.has_class_token = arch.head == "class_token"
        self.reducer = Reducer(dim, side, self.mux.reducer, n)
        self.segments = nn.Parameter(torch.zeros(n, 1, dim))
        self.demultiplexers = nn.ModuleList(Demultiplexer(dim) for _ in range(n))
        self.has_biases = isinstance(tokens[0][1], MB3D)
        if self.has_biases and self.mux.mixing == "full":
            self.pair_biases = nn.Parameter(torch.zeros(len(self.grouped), n, n))
        self._register_indices(n, side)

    def _register_indices(self, n: int, side: int) -> None:
        """What pairs of positions of a sequence are: their offset in the map, whether of one image, which pair of slots."""
        places = self.reducer.places()
        apart = (places[:, None] - places[None]).abs()  # (T, T, 2)
        offsets = apart[..., 0] * side + apart[..., 1]
        per_sequence = 1 if self.mux.mixing == "none" else n
        slot = torch.arange(per_sequence).repeat_interleave(len(places) + self.has_class_token)
        same = slot[:, None] == slot[None]
        indices = {
            "offsets": offsets.repeat(per_sequence, per_sequence),
            "same": same,
            "pair": slot[:, None] * n + slot[None],
        }
        for name, index in indices.items():
            self.register_buffer(name, index, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for name in self.alone:
            x = self.network.get_submodule(name)(x)
        x = self._join(self._filled(x))
        for number, name in enumerate(self.grouped):
            block = self.network.get_submodule(name)
            x = block(x, self._bias(block, number))
        return self._read(x)[: images.shape[0]]

    def _filled(self, x: Tensor) -> Tensor:
        """Return the images' tokens with the last group filled by repeating its own: (N, L, C) to (G * n, L, C)."""
        count, n = x.shape[0], self.mux.n
        left = count % n
        if not left:
            return x
        return torch.cat((x, *[x[count - left + i % left, None] for i in range(n - left)]))

    def _join(self, x: Tensor) -> Tensor:
        """Return the sequences of the groups: (G * n, L, C) to (G, n * K, C), or one more in front where a class token is
        shared; (G * n, K, C) for the mixing `none`."""
        if self.has_class_token:
            class_token, x = x[:, :1], self.reducer(x[:, 1:])
            if self.mux.readout == "slot":
                x = torch.cat((class_token, x), 1)
        else:
            x = self.reducer(x)
        x = x.unflatten(0, (-1, self.mux.n)) + self.segments  # (G, n, K, C)
        x = x.flatten(0, 1) if self.mux.mixing == "none" else x.flatten(1, 2)
        if self.has_class_token and self.mux.readout == "shared":
            x = torch.cat((class_token.unflatten(0, (-1, self.mux.n)).mean(1), x), 1)
        return x

    def _bias(self, block: nn.Module, number: int) -> Tensor | None:
        """Return what is added to the attention's logits of the grouped block of this number."""
        if not self.has_biases:
            return torch.where(self.same, 0.0, -torch.inf) if self.mux.mixing == "block" else None
        own: Tensor = block.token_mixer.attention_biases[:, self.offsets]  # type: ignore[union-attr, index]
        if self.mux.mixing == "none":
            return own
        # no scalar: coremltools knows `where` of tensors alone
        apart = self.pair_biases[number].flatten()[self.pair] if self.mux.mixing == "full" else torch.full_like(own, -torch.inf)
        return torch.where(self.same, own, apart)

    def _read(self, x: Tensor) -> Tensor:
        """Return the logits of all slots, image by image: (G * n, num_classes)."""
        n = self.mux.n
        if self.mux.readout == "slot":
            x = x.reshape(-1, x.shape[1] if self.mux.mixing == "none" else x.shape[1] // n, x.shape[2])  # (G * n, K, C)
        x = self.network.head.norm(x[:, 0]) if self.has_class_token else self.network.head.norm(x).mean(1)  # type: ignore
        x = x.unflatten(0, (-1, n)) if self.mux.readout == "slot" else x[:, None].expand(-1, n, -1)  # (G, n, C)
        x = torch.stack([demultiplexer(x[:, slot]) for slot, demultiplexer in enumerate(self.demultiplexers)], 1)
        logits: Tensor = self.network.head.fc(x.flatten(0, 1))  # type: ignore
        return logits
