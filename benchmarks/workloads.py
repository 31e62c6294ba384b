"""What is stepped: sets of shapes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """Parameters of these shapes."""

    name: str
    shapes: tuple[Shape, ...]


@functools.cache
def gradients(workload: Workload, device: str) -> list[Tensor]:
    """Normal gradients, the same in each call; nobody writes to them."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device) for shape in workload.shapes]


def alike(count: int, *shape: int) -> Workload:
    """``count`` parameters of one shape."""
    return Workload(f"{count} of {'x'.join(map(str, shape))}", (shape,) * count)


def one_of_megabytes(size: int) -> Workload:
    """One matrix of ``size`` MiB."""
    return Workload(f"one of {size} MiB", ((size * 2**18 // 1024, 1024),))


def _resnet50() -> Iterable[Shape]:
    def normalized(*conv: int) -> Iterable[Shape]:
        return conv, conv[:1], conv[:1]  # a convolution, and the scale and shift of its batch normalization

    yield from normalized(64, 3, 7, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from normalized(width, channels, 1, 1)
            yield from normalized(width, width, 3, 3)
            yield from normalized(4 * width, width, 1, 1)
            if block == 0:
                yield from normalized(4 * width, channels, 1, 1)
            channels = 4 * width
    yield from ((1000, channels), (1000,))


def _gpt2_small(width: int = 768) -> Iterable[Shape]:
    yield from ((50257, width), (1024, width))
    for _ in range(12):
        yield from ((width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,))  # attention
        yield from ((width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,))  # MLP
    yield from ((width,), (width,))


SMALL_BATCH = Workload("batch of 256x3x32x32", ((256, 3, 32, 32),))
LARGE_BATCH = Workload("batch of 64x3x224x224", ((64, 3, 224, 224),))
RESNET = Workload("ResNet-50", tuple(_resnet50()))
GPT2 = Workload("GPT-2 small", tuple(_gpt2_small()))
MANY = alike(2000, 16, 16)
SOME = alike(200, 64, 64)

MODELS = (MANY, SOME, RESNET, GPT2)
ALL = (SMALL_BATCH, LARGE_BATCH, *MODELS)
