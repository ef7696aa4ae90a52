// Counter-based noise: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011), bit for bit as attent/philox.py and Triton's
// randint4x(seed, offset) compute it: counter (offset, offset >> 32, 0, 0), key (seed, seed >> 32), 32 bits each.
#pragma once

#include "portable.h"

namespace attent::gpu {

struct Lanes {
    uint32_t lane[4];
};

// 10 rounds of two 32 x 32 -> 64 bit products: 20 wide multiplications, 60 other integer instructions.
ATTENT_HD Lanes philox_4x32(Lanes counter, uint32_t key_0, uint32_t key_1) {
    uint32_t c0 = counter.lane[0], c1 = counter.lane[1], c2 = counter.lane[2], c3 = counter.lane[3];
    for (int round = 0; round < 10; ++round) {
        const uint64_t product_0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
        const uint64_t product_2 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(product_2 >> 32) ^ c1 ^ key_0;
        c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ key_1;
        c1 = static_cast<uint32_t>(product_2);
        c3 = static_cast<uint32_t>(product_0);
        key_0 += 0x9E3779B9u;
        key_1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

ATTENT_HD Lanes random_bits(int64_t seed, int64_t offset) {
    const uint64_t key = static_cast<uint64_t>(seed), counter = static_cast<uint64_t>(offset);
    return philox_4x32({{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0}},
                       static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

}  // namespace attent::gpu
