// The two loops over the vocabulary of one row (what they compute: row_kernels.h), for vectors of VECTOR_BYTES bytes.
// Included once by each row_kernels_<instruction set>.cpp, inside the region compiled for that set.

#include "vector_math.h"

namespace attent {
namespace {

// A lane adds at most this many terms before its sum goes to float64: the 64 of the error bound in row_statistics.h. A
// block (64 vectors: 4 KB of AVX-512) is read twice, for its maximum and for its sums; the second time from L1.
constexpr int vectors_per_block = 64;
template <typename T>
constexpr int block_size = vectors_per_block * lanes<T>;

template <typename T>
constexpr T infinity = T(__builtin_inf());
template <typename T>
constexpr T lowest = sizeof(T) == 4 ? T(-__FLT_MAX__) : T(-__DBL_MAX__);

template <typename T>
struct Block {
    alignas(VECTOR_BYTES) T logits[block_size<T>];
    alignas(VECTOR_BYTES) T slopes[block_size<T>];  // used with a softcap only
};

// Copies logits [count] into the block, capped if asked, and replaces the target (if 0 <= target < count) and the lanes
// beyond count by -inf, which counts for nothing. Returns count rounded up to whole vectors.
template <typename T, bool Capped>
inline int stage(Block<T>& block, const T* logits, int count, int64_t target, T softcap) {
    const int padded = (count + lanes<T> - 1) / lanes<T> * lanes<T>;
    for (int i = 0; i < count; ++i) block.logits[i] = logits[i];
    for (int i = count; i < padded; ++i) block.logits[i] = 0;
    if (Capped) {
        for (int i = 0; i < padded; i += lanes<T>) {
            const CappedLogit<T> capped = capped_logit<T>(load(block.logits + i), softcap);
            store(block.logits + i, capped.value);
            store(block.slopes + i, capped.slope);
        }
    }
    for (int i = count; i < padded; ++i) block.logits[i] = -infinity<T>;
    if (target >= 0 && target < count) block.logits[target] = -infinity<T>;
    return padded;
}

template <typename T, bool Capped>
SplitSums split_sums(const T* logits, int64_t vocabulary, int64_t target, T softcap) {
    Block<T> staged;
    // From the lowest finite number rather than -inf: a difference with -inf logits is then -inf, never NaN.
    T maximum = lowest<T>;
    double sum = 0, squares = 0;
    for (int64_t start = 0; start < vocabulary; start += block_size<T>) {
        const int64_t left = vocabulary - start;
        int count = left < block_size<T> ? int(left) : block_size<T>;
        const T* block = logits + start;
        const bool has_target = target >= start && target < start + count;
        if (Capped || has_target || count % lanes<T> != 0) {
            count = stage<T, Capped>(staged, block, count, target - start, softcap);
            block = staged.logits;
        }

        Vector<T> largest = broadcast(maximum);
        for (int i = 0; i < count; i += lanes<T>) {
            const Vector<T> z = load(block + i);
            largest = z > largest ? z : largest;
        }
        T block_maximum = maximum;
        for (int i = 0; i < lanes<T>; ++i) block_maximum = largest[i] > block_maximum ? largest[i] : block_maximum;
        if (block_maximum > maximum) {
            const double scale = __builtin_exp(double(maximum) - double(block_maximum));
            sum *= scale;
            squares *= scale * scale;
            maximum = block_maximum;
        }

        Vector<T> block_sum{}, block_squares{};
        for (int i = 0; i < count; i += lanes<T>) {
            const Vector<T> e = exp_or_zero<T>(load(block + i) - maximum, ExponentialOf<T>::smallest_square);
            const Vector<T> gradient = Capped ? e * load(staged.slopes + i) : e;
            block_sum += e;
            block_squares = multiply_add(gradient, gradient, block_squares);
        }
        for (int i = 0; i < lanes<T>; ++i) {
            sum += double(block_sum[i]);
            squares += double(block_squares[i]);
        }
    }
    return {double(maximum), sum, squares};
}

template <typename T, bool Capped>
inline Vector<T> scaled_probability(Vector<T> z, T high, T low, T factor, T softcap) {
    CappedLogit<T> capped{z, z};
    if (Capped) capped = capped_logit<T>(z, softcap);
    const Vector<T> x = (capped.value - high) - low;
    const Vector<T> scaled = exp_or_zero<T>(x, ExponentialOf<T>::smallest) * factor;
    return Capped ? scaled * capped.slope : scaled;
}

template <typename T, bool Capped>
void scaled_probabilities(T* logits, int64_t vocabulary, T high, T low, T factor, T softcap) {
    const int64_t whole = vocabulary - vocabulary % lanes<T>;
    for (int64_t v = 0; v < whole; v += lanes<T>) {
        store(logits + v, scaled_probability<T, Capped>(load(logits + v), high, low, factor, softcap));
    }
    if (whole < vocabulary) {
        alignas(VECTOR_BYTES) T rest[lanes<T>] = {};
        for (int64_t v = whole; v < vocabulary; ++v) rest[v - whole] = logits[v];
        store(rest, scaled_probability<T, Capped>(load(rest), high, low, factor, softcap));
        for (int64_t v = whole; v < vocabulary; ++v) logits[v] = rest[v - whole];
    }
}

template <typename T>
SplitSums any_split_sums(const T* logits, int64_t vocabulary, int64_t target, T softcap) {
    return softcap > 0 ? split_sums<T, true>(logits, vocabulary, target, softcap)
                       : split_sums<T, false>(logits, vocabulary, target, softcap);
}

template <typename T>
void any_scaled_probabilities(T* logits, int64_t vocabulary, T high, T low, T factor, T softcap) {
    softcap > 0 ? scaled_probabilities<T, true>(logits, vocabulary, high, low, factor, softcap)
                : scaled_probabilities<T, false>(logits, vocabulary, high, low, factor, softcap);
}

template <typename T>
constexpr RowKernels<T> row_kernels = {any_split_sums<T>, any_scaled_probabilities<T>};

}  // namespace
}  // namespace attent
