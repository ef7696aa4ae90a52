// What one pass over the vocabulary keeps of a token's logits, merged in any order, and the token's loss and norm.
//
// Of logits z, z̃ = c tanh(z/c) under a softcap c (else z̃ = z), its slope d = 1 − (z̃/c)² (else 1), and the target's
// mass μ_v = w_v q_v on class v (w: class weights), with M = Σ_v μ_v, the loss and its gradient in the raw logits are
//
//     ℓ = M logsumexp(z̃) − Σ_v μ_v z̃_v          g_v = d_v (M p_v − μ_v),   p = softmax(z̃)
//
// With x_v = z̃_v log2(e) and any number m near the largest x (here: it, rounded), kept are over all v but the target y
//
//     m        a = Σ e_v,  e_v = 2^(x_v − m)        s = Σ d_v² e_v²        and the target's own logit, once
//
// and where the target has mass off y (label smoothing: SPREAD)
//
//     b = Σ d_v² e_v μ_v        c = Σ d_v² μ_v²        t = Σ μ_v (x_v − m)        o = Σ μ_v
//
// A new m' scales a and b by 2^(m − m'), s by its square, and adds (m − m') o to t. Threads, and groups of vocabulary
// tiles, merge by the same rule. Neither ever subtracts what may cancel: with r = 2^(m − max(m, x_y)) and
// l = r a + 2^(x_y − max(m, x_y)),
//
//     1 − p_y = r a / l          ‖g‖² = μ_y² [ d_y² (1 − p_y)² + (r/l)² s ]                       without smoothing
//                                ‖g‖² = d_y² (o − M (1 − p_y))² + (M r/l)² s − 2 M (r/l) b + c    with it
//
// and the loss is log1p(r a) where x_y is the maximum.
//
// Errors, u = 2^-24, of exact logits. x − m is one fused multiply-add, so it is off by u |x − m| only, however large m
// is: m itself is exact by definition. ex2.approx is off by 2 u. So a and s are right to (number of terms on the longest
// chain of additions + 4) u + 2 u |x_v − m| averaged over the sum, and ‖g‖ without smoothing to twice that, however near
// to 1 p_y is. With smoothing ε the square is summed expanded, and off by that times ε²/V where p = q.
#pragma once

#include <cmath>

#include "../half.cuh"

namespace attent::gpu::scorer {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() {
    return -INFINITY;
}

/// log(1 + x) for x >= 0, right to 3 units: what 1 + x is rounded by is divided out again (Kahan).
__device__ __forceinline__ float log_1_plus(float x) {
    const float u = 1.0f + x;
    return u == 1.0f ? x : logf(u) * (x / (u - 1.0f));
}

struct Capped {
    float logit, slope;
};

/// z̃ = c tanh(z/c) and its slope. With e = exp(−2|z|/c), tanh = (1 − e)/(1 + e) is right to 5 units where 1 − e does
/// not cancel, from |z|/c = 1/4 on; below, the series' next term is 9e-3 (1/4)^10 < 1e-8 of it. d = 4e/(1 + e)².
__device__ __forceinline__ Capped capped(float z, float softcap, float inverse) {
    const float x = z * inverse;
    const float e = fast_exp2(fabsf(x) * (-2.0f * kLog2E));
    const float half = __fdividef(1.0f, 1.0f + e);  // the divisor is in [1, 2]: right to 2 units
    const float far = copysignf((1.0f - e) * half, x);
    const float q = x * x;
    const float near = x * (1.0f + q * (-1.0f / 3 + q * (2.0f / 15 + q * (-17.0f / 315 + q * (62.0f / 2835)))));
    return {softcap * (fabsf(x) < 0.25f ? near : far), 4.0f * e * (half * half)};
}

struct Kept {
    float m, a, s;
};

struct Spread {
    float b, c, t, o;
};

__device__ __forceinline__ Kept nothing_kept() {
    return {minus_infinity(), 0.0f, 0.0f};
}
__device__ __forceinline__ Spread nothing_spread() {
    return {0.0f, 0.0f, 0.0f, 0.0f};
}

/// What to count from: 0 where all so far are −inf, whose difference would be NaN.
__device__ __forceinline__ float finite(float m) {
    return m == minus_infinity() ? 0.0f : m;
}

/// Count what is kept from another m.
__device__ __forceinline__ void move_to(float m, Kept& kept, Spread& spread) {
    const float ahead = kept.m - finite(m), shrink = fast_exp2(ahead);
    kept.m = m;
    kept.a *= shrink;
    kept.s *= shrink * shrink;
    spread.b *= shrink;
    spread.t += spread.o == 0.0f ? 0.0f : ahead * spread.o;
}

/// What two parts of the vocabulary keep together.
__device__ __forceinline__ void merge(Kept& kept, Spread& spread, Kept other, Spread other_spread) {
    const float m = fmaxf(kept.m, other.m);
    move_to(m, kept, spread);
    move_to(m, other, other_spread);
    kept.a += other.a;
    kept.s += other.s;
    spread.b += other_spread.b;
    spread.c += other_spread.c;
    spread.t += other_spread.t;
    spread.o += other_spread.o;
}

/// Some more capped logits z̃, −inf where left out. SLOPED: d [n] is read. SPREAD: μ [n] is, 0 where left out.
template <bool SLOPED, bool SPREAD, int N>
__device__ __forceinline__ void keep(Kept& kept, Spread& spread, const float (&z)[N], const float (&d)[N],
                                     const float (&mass)[N]) {
    // Two chains of dependent operations each, for what is waited for most.
    float largest[2] = {z[0], z[1]}, a[2] = {0.0f, 0.0f}, s[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 2; i < N; ++i) largest[i % 2] = fmaxf(largest[i % 2], z[i]);
    const float m = fmaxf(kept.m, fmaxf(largest[0], largest[1]) * kLog2E), pivot = finite(m);
    move_to(m, kept, spread);
    float b = 0.0f, c = 0.0f, t = 0.0f, o = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float x = fmaf(z[i], kLog2E, -pivot);
        const float e = fast_exp2(x);
        const float sloped = SLOPED ? d[i] * e : e;
        a[i % 2] += e;
        s[i % 2] = fmaf(sloped, sloped, s[i % 2]);
        if constexpr (SPREAD) {
            const float sloped_mass = SLOPED ? d[i] * mass[i] : mass[i];
            b = fmaf(sloped, sloped_mass, b);
            c = fmaf(sloped_mass, sloped_mass, c);
            t += mass[i] == 0.0f ? 0.0f : mass[i] * x;  // 0 times a logit of −inf is 0
            o += mass[i];
        }
    }
    kept.a += a[0] + a[1];
    kept.s += s[0] + s[1];
    if constexpr (SPREAD) {
        spread.b += b;
        spread.c += c;
        spread.t += t;
        spread.o += o;
    }
}

struct LossAndSquare {
    float loss, square;
};

/// ℓ and ‖g‖² of a token: `own` is z̃_y, `own_slope` d_y, `own_mass` μ_y.
template <bool SPREAD>
__device__ __forceinline__ LossAndSquare loss_and_square(const Kept& kept, const Spread& spread, float own,
                                                         float own_slope, float own_mass) {
    const float ahead = fmaf(own, kLog2E, -kept.m);  // x_y − m
    const bool own_leads = ahead >= 0.0f;            // then count from x_y, else from m
    const float shrink = own_leads ? fast_exp2(-ahead) : 1.0f;
    const float others = own_leads ? kept.a * shrink + 0.0f * own : kept.a;  // NaN where the own logit is +inf
    const float total = others + (own_leads ? 1.0f : fast_exp2(ahead));
    // Where the target leads the sum is 1 and something, else its logarithm is not near 0.
    const float log_total = own_leads ? log_1_plus(others) : logf(total);
    const float behind = own_leads ? 0.0f : -kLn2 * ahead;  // how far the own logit is behind what is counted from
    const float miss = others / total;                      // 1 − p_y
    float ratio = shrink / total;                           // p_v = ratio e_v
    LossAndSquare result;
    if constexpr (SPREAD) {
        const float mass = spread.o + own_mass;
        const float moved = own_leads && spread.o != 0.0f ? ahead * spread.o : 0.0f;
        result.loss = mass * log_total - kLn2 * (spread.t - moved);
        if (own_mass != 0.0f) result.loss += own_mass * behind;
        ratio *= mass;
        const float at_own = own_slope * (spread.o - mass * miss);
        const float off = ratio * ratio * kept.s - 2.0f * ratio * spread.b + spread.c;
        result.square = at_own * at_own + (off < 0.0f ? 0.0f : off);  // NaN stays NaN
    } else {
        const float at_own = own_slope * miss;
        const bool weighs = own_mass != 0.0f;
        result.loss = weighs ? own_mass * (log_total + behind) : 0.0f;
        result.square = weighs ? own_mass * own_mass * (at_own * at_own + ratio * ratio * kept.s) : 0.0f;
    }
    return result;
}

}  // namespace attent::gpu::scorer
