// What an example's score is divided by, of its n tokens: 1 (sum), n (mean) or the root of n (rms). As
// attent_kernels/native.py numbers them.
#pragma once

namespace attent::gpu {

enum class PerExample : int { mean = 0, sum = 1, rms = 2 };

}  // namespace attent::gpu
