// Row statistics of a chunk of logits, and the gradient written over it: the CPU epilogue of linear cross-entropy.
//
// Row t has logits z [V], target y and, with softcap c, capped logits z~ = c tanh(z/c) of slope d = 1 - (z~/c)^2 (else
// z~ = z, d = 1). With p = softmax(z~):
//
//     logsumexp_t    = log sum_v exp(z~_v)                                     natural log, the target included
//     loss_t         = -log p_y
//     squared_norm_t = ||d (p - onehot_y)||^2 = d_y^2 (1 - p_y)^2 + sum_{v != y} d_v^2 p_v^2
//                    = the squared norm of the loss's gradient in the raw logits z
//
// Nothing is subtracted. The vectors sum l = sum_{v != y} exp(z~_v - m) and s2 = sum_{v != y} d_v^2 exp(2 (z~_v - m))
// against m = max_{v != y} z~_v, so l >= 1 however confident the row is; the rest is a handful of float64 scalars:
//
//     r = l exp(m - z~_y),   1 - p_y = r / (1 + r),   loss = log1p(r),
//     sum_{v != y} d_v^2 p_v^2 = s2 (p_y exp(m - z~_y))^2
//
// (or their mirror image around m when the target is not the likeliest, so that no exponential overflows).
//
// Label smoothing is not offered: sum_v (p_v - q_v)^2 expanded into sums of p_v^2 and p_v cancels exactly where
// training ends, at p = q, and the form that does not needs a second pass of exponentials.
//
// Cost per element: one read (the chunk should still be in cache after the matrix product that wrote it), one
// exponential (13 vector operations; the softcap's tanh adds 20 and a division) and 4 operations for maximum and sums.
// The gradient pass reads, takes one exponential, and writes.
//
// Accuracy in type T of unit roundoff u (2^-24 or 2^-53). A lane adds 64 terms at most before its sum goes to float64,
// so the bounds grow with log V only (E under softmax over v != y; an entropy is at most log V):
//
//     l:   lane sums 64, exponential 2, rounding of z~ - m: E|z~ - m| <= log V         (66 + log V) u  relative
//     s2:  64, twice 2, twice E|z~ - m| / 2                                            (68 + log V) u  relative
//     loss:          that of l and its own rounding                                    (67 + log V) u  relative
//     logsumexp:     (1 - p_y) times that of l, and its own rounding u |logsumexp|
//     squared_norm:  that of s2, twice that of l, and its own rounding             (201 + 3 log V) u  relative
//
// These are worst cases: rounding errors average out to a hundredth of them. A softcap adds 4 u c for the rounding of
// z~ to l and loss, 12 u c to squared_norm, and there also 8 u (1 + 2 max|z|/c) for that of d^2. T = float64 has no
// wider format for the scalars: rounding z~_y - m adds |z~_y - m| u to the loss and twice that to squared_norm.
//
// A NaN logit, or (without a softcap, which makes it finite) one of +inf, makes its row's results NaN. A logit of -inf
// has p = 0; a target of -inf has loss inf. A squared norm below the smallest number of T is 0.
//
// Pointers are to host memory that the caller keeps alive and nobody else writes during the call. No allocation, no
// exception, no state kept between calls; the results do not depend on `threads`.
#pragma once

#include <cstdint>

namespace attent {

// What a function here returns: 0, or why it did nothing.
enum class Status : int {
    ok = 0,
    negative_size,        // rows < 0 or vocabulary < 0
    empty_vocabulary,     // rows > 0, vocabulary = 0: a softmax over nothing
    null_pointer,         // a pointer is null though there are rows
    overlapping_rows,     // rows that are written lie closer than `vocabulary` elements
    bad_softcap,          // neither 0 (none) nor a positive normal number of T
    bad_threads,          // threads < 1
    bad_instruction_set,  // a name that instruction_sets() does not list
};

const char* describe(Status status);

// The instruction sets this build has and this processor runs, best first; ends with nullptr. "portable" is always
// there.
const char* const* instruction_sets();

// One pass over logits [rows, vocabulary], elements of a row adjacent, rows `row_stride` elements apart. target [rows]:
// a row whose target is outside [0, vocabulary) is ignored, its results are 0. softcap: 0 for none. loss, logsumexp,
// squared_norm: [rows]. instruction_set: nullptr for the best.
template <typename T>
Status row_statistics(const T* logits, int64_t rows, int64_t vocabulary, int64_t row_stride, const int64_t* target,
                      double softcap, T* loss, T* logsumexp, T* squared_norm, int threads,
                      const char* instruction_set = nullptr);

// Writes factor_t d_v (p_v - [v = y]) over logits [rows, vocabulary], from the loss and logsumexp that row_statistics
// gave: 1 - p_y = -expm1(-loss), and p_v = exp(z~_v - L) where L is the logsumexp as given or z~_y + loss unrounded,
// whichever of logsumexp and loss is the smaller number and so was rounded less. Relative error of p_v: (2 |z~_v - L| +
// min(|loss|, |logsumexp|) + 4) u, beside the (1 - p_y) (66 + log V) u of the sums. An ignored row, and one of factor
// 0, becomes 0 (whatever was in it).
template <typename T>
Status logits_gradient(T* logits, int64_t rows, int64_t vocabulary, int64_t row_stride, const int64_t* target,
                       const T* loss, const T* logsumexp, const T* factor, double softcap, int threads,
                       const char* instruction_set = nullptr);

}  // namespace attent
