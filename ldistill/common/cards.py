"""GPUs by name, as their vendors' datasheets have them."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """A GPU: dense bf16 peak in FLOP/s, memory in GiB, link to its neighbours in GB/s, one way."""

    flops: float
    memory: float
    link: float


# Links are NVLink where the card has it, else PCIe (gen 4 x16: 32, gen 5 x16: 64). A name that is
# the beginning of another stands behind it, for the first that a driver's name contains counts.
CARDS: dict[str, Card] = {
    "H200 NVL": Card(835e12, 141, 450),
    "H200": Card(989e12, 141, 450),
    "GH200": Card(989e12, 96, 450),
    "H100 PCIe": Card(756e12, 80, 64),
    "H100 NVL": Card(835e12, 94, 300),
    "H100": Card(989e12, 80, 450),
    "B200": Card(2250e12, 180, 900),
    "A100": Card(312e12, 80, 300),
    "RTX PRO 6000": Card(504e12, 96, 64),
    "RTX 6000 Ada": Card(364e12, 48, 32),
    "RTX A6000": Card(155e12, 48, 32),
    "A6000": Card(155e12, 48, 32),
    "A40": Card(150e12, 48, 32),
    "L40S": Card(362e12, 48, 32),
    "RTX 4090": Card(165e12, 24, 32),
    "RTX 3090": Card(71e12, 24, 32),
}
