"""Counter-based noise: the same seed gives the same lesson on every backend, at any chunking, in any order.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a counter and a key
into four random 32-bit lanes and keeps no state, so the noise of example ``i`` does not depend on who else is drawn.
Counter and key are laid out as in Triton's ``tl.randint4x(seed, offset)``: counter ``(offset, offset >> 32, 0, 0)``,
key ``(seed, seed >> 32)``, 32 bits each. A Triton kernel that calls it gets the same integers, bit for bit.

32-bit lanes live in int64 tensors, since PyTorch has no arithmetic on uint32.
"""

from __future__ import annotations

import torch
from torch import Tensor

Lanes = tuple[Tensor, Tensor, Tensor, Tensor]

_LOW_32_BITS = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by each round

# A chunk's dozen temporaries should stay in a CPU core's cache; elsewhere fewer, larger launches are better.
_CPU_CHUNK = 1 << 15
_DEVICE_CHUNK = 1 << 20

_LARGEST_BELOW_1 = 1.0 - 2.0**-24  # in float32


def philox_4x32(counter: Lanes, key: tuple[Tensor, Tensor]) -> Lanes:
    """Philox4x32-10: four random lanes for each counter. Lanes broadcast; they are int64, their values in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # 64-bit products. They wrap around as signed numbers, which leaves their bits right; what the shift copies in
        # from the sign bit is masked off, and lanes c1 and c3 keep their high halves until such a mask takes them off.
        product_0, product_2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product_2 >> 32) ^ c1 ^ k0) & _LOW_32_BITS
        c2 = ((product_0 >> 32) ^ c3 ^ k1) & _LOW_32_BITS
        c1, c3 = product_2, product_0
        k0, k1 = (k0 + _WEYL[0]) & _LOW_32_BITS, (k1 + _WEYL[1]) & _LOW_32_BITS
    return c0, c1 & _LOW_32_BITS, c2, c3 & _LOW_32_BITS


def random_bits(seed: int | Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Lanes 0 and 1 of each offset under ``seed``: int64 tensors of ``offset``'s shape ``[n]``, values in [0, 2^32).

    ``seed`` is an int or an int64 tensor of one element; ``offset`` is int64 ``[n]``. Nothing is read back to the host.
    """
    key_of_seed = seed_tensor(seed, offset.device)
    key = (key_of_seed & _LOW_32_BITS, (key_of_seed >> 32) & _LOW_32_BITS)
    zero = torch.zeros_like(key_of_seed)  # [1]: the first rounds stay scalar where the counter is
    lane_0, lane_1 = torch.empty_like(offset), torch.empty_like(offset)
    chunk = _CPU_CHUNK if offset.device.type == "cpu" else _DEVICE_CHUNK
    for start in range(0, offset.numel(), chunk):
        part = slice(start, start + chunk)
        low, high = offset[part] & _LOW_32_BITS, (offset[part] >> 32) & _LOW_32_BITS
        lane_0[part], lane_1[part], _, _ = philox_4x32((low, high, zero, zero), key)
    return lane_0, lane_1


def uniform(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A number in (0, 1) for each 32-bit lane: ``(bits + 0.5) / 2^32``, at most ``1 - 2^-24``, next to 1 in float32."""
    return bits.to(dtype).add_(0.5).mul_(2.0**-32).clamp_(max=_LARGEST_BELOW_1)


def gumbel(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A standard Gumbel number for each 32-bit lane: ``-log(E)`` with ``E = -log1p(-u)`` exponential.

    The largest Gumbel numbers decide who is chosen, and they come from the smallest ``E``. Those come from ``u`` near
    0, where floating point is dense, so they reach 22.9 in fine steps. The textbook ``-log(-log(u))`` takes them from
    ``u`` near 1, where float32 steps by ``2^-24``: it ends at 16.6, and its largest values are a handful of steps.
    """
    exponential = uniform(bits, dtype).neg_().log1p_().neg_()
    return exponential.log_().neg_()


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """``seed`` as an int64 tensor ``[1]`` on ``device``; None draws one from the device's default generator.

    ``torch.manual_seed`` therefore governs None. Nothing is read back to the host.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=device)
