// The number formats that kernels take, and how one of them is read as float32: exactly.
#pragma once

#include "portable.h"

namespace attent::gpu {

enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// As it lies in memory, without a CUDA header.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// f(Score{}), Score being the type that `dtype` names.
template <typename F>
auto for_dtype(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::float16:
            return f(Half{});
        case Dtype::bfloat16:
            return f(BFloat16{});
        default:
            return f(float{});
    }
}

// As load_of_others of portable.h.
ATTENT_HD Half load_of_others(const Half* place) {
    return {load_of_others(&place->bits)};
}
ATTENT_HD BFloat16 load_of_others(const BFloat16* place) {
    return {load_of_others(&place->bits)};
}

ATTENT_HD float to_float32(float value) {
    return value;
}

ATTENT_HD float to_float32(BFloat16 value) {
    return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

ATTENT_HD float to_float32(Half value) {
#if defined(__CUDA_ARCH__) && !defined(ATTENT_EMULATE)
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    const uint32_t rest = value.bits & 0x7FFF;
    if (rest >= 0x7C00) return bit_cast<float>(sign | 0x7F800000 | (rest - 0x7C00) << 13);  // infinite, or NaN
    // rest · 2^13 as bits is the number times 2^-112, or that of a subnormal one: multiplied as an integer there.
    const float size =
        rest < 0x400 ? static_cast<float>(rest) * 0x1p-24f : bit_cast<float>((rest << 13) + (112u << 23));
    return bit_cast<float>(sign | bit_cast<uint32_t>(size));
#endif
}

}  // namespace attent::gpu
