// Checks, threads and the float64 scalars of each row; the loops over the vocabulary are in row_kernels_body.h.
#include "row_statistics.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "row_kernels.h"

namespace attent {
namespace {

// What this processor runs, best first.
struct RunnableSets {
    const InstructionSet* sets[4] = {};
    const char* names[4] = {};
    int count = 0;

    RunnableSets() {
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f")) add(avx512_kernels);
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add(avx2_kernels);
#endif
        add(portable_kernels);
    }

    void add(const InstructionSet& set) {
        sets[count] = &set;
        names[count++] = set.name;
    }
};

const RunnableSets& runnable_sets() {
    static const RunnableSets runnable;
    return runnable;
}

// nullptr if the name is not known here.
const InstructionSet* find_instruction_set(const char* name) {
    const RunnableSets& runnable = runnable_sets();
    if (name == nullptr) return runnable.sets[0];
    for (int i = 0; i < runnable.count; ++i) {
        if (std::strcmp(name, runnable.names[i]) == 0) return runnable.sets[i];
    }
    return nullptr;
}

const RowKernels<float>& kernels_of(const InstructionSet& set, float) {
    return set.float32;
}
const RowKernels<double>& kernels_of(const InstructionSet& set, double) {
    return set.float64;
}

template <typename T>
Status check_sizes(int64_t rows, int64_t vocabulary, double softcap, int threads) {
    if (rows < 0 || vocabulary < 0) return Status::negative_size;
    const bool normal = std::isnormal(softcap) && std::isnormal(T(softcap));
    if (softcap != 0 && !(normal && softcap > 0)) return Status::bad_softcap;
    if (threads < 1) return Status::bad_threads;
    if (rows > 0 && vocabulary == 0) return Status::empty_vocabulary;
    return Status::ok;
}

// Calls body(row) for every row. Rows are handed out in runs of about `run` elements: long enough that handing out
// costs nothing, short enough that ignored rows (padding comes in stretches) do not leave a thread idle.
template <typename Body>
void for_each_row(int64_t rows, int64_t vocabulary, int threads, const Body& body) {
    constexpr int64_t run = 16384;
    const int64_t rows_per_run = std::max<int64_t>(1, run / vocabulary);
    const int64_t runs = (rows + rows_per_run - 1) / rows_per_run;
    threads = int(std::min<int64_t>(threads, runs));
    // One thread stays out of OpenMP altogether: a forked child of a process that used OpenMP may not enter it.
    if (threads <= 1) {
        for (int64_t row = 0; row < rows; ++row) body(row);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, rows_per_run)
    for (int64_t row = 0; row < rows; ++row) body(row);
}

struct Target {
    double logit;  // z~_y
    double slope;  // d_y
};

Target capped_target(double logit, double softcap) {
    if (softcap == 0) return {logit, 1};
    const double hyperbolic_cosine = std::cosh(logit / softcap);
    return {softcap * std::tanh(logit / softcap), 1 / (hyperbolic_cosine * hyperbolic_cosine)};
}

struct RowStatistics {
    double loss, logsumexp, squared_norm;
};

RowStatistics finish_row(const SplitSums& others, const Target& target) {
    const double ahead = target.logit - others.maximum;
    if (target.logit == std::numeric_limits<double>::infinity()) {
        const double nan = std::numeric_limits<double>::quiet_NaN();
        return {nan, nan, nan};
    }
    double loss, logsumexp, miss, square_scale;  // miss = 1 - p_y; square_scale = p_v^2 / exp(2 (z~_v - m))
    if (ahead > 0) {                             // measured from the target's logit
        const double behind = std::exp(-ahead);
        const double ratio = others.sum * behind;
        loss = std::log1p(ratio);
        logsumexp = target.logit + loss;
        miss = ratio / (1 + ratio);
        square_scale = (behind / (1 + ratio)) * (behind / (1 + ratio));
    } else {  // measured from the others' maximum
        const double total = others.sum + std::exp(ahead);
        loss = std::log(total) - ahead;
        logsumexp = others.maximum + std::log(total);
        miss = others.sum / total;
        square_scale = 1 / (total * total);
    }
    const double at_target = target.slope * miss;
    return {loss, logsumexp, at_target * at_target + others.squares * square_scale};
}

}  // namespace

const char* describe(Status status) {
    switch (status) {
        case Status::ok:
            return "ok";
        case Status::negative_size:
            return "rows and vocabulary must not be negative";
        case Status::empty_vocabulary:
            return "vocabulary must not be 0 when there are rows";
        case Status::null_pointer:
            return "a pointer is null";
        case Status::overlapping_rows:
            return "rows that are written must lie at least `vocabulary` elements apart";
        case Status::bad_softcap:
            return "softcap must be a positive normal number, or 0 for none";
        case Status::bad_threads:
            return "threads must be at least 1";
        case Status::bad_instruction_set:
            return "this processor or build has no such instruction set";
    }
    return "unknown status";
}

const char* const* instruction_sets() {
    return runnable_sets().names;
}

template <typename T>
Status row_statistics(const T* logits, int64_t rows, int64_t vocabulary, int64_t row_stride, const int64_t* target,
                      double softcap, T* loss, T* logsumexp, T* squared_norm, int threads,
                      const char* instruction_set) {
    const Status status = check_sizes<T>(rows, vocabulary, softcap, threads);
    if (status != Status::ok || rows == 0) return status;
    if (!logits || !target || !loss || !logsumexp || !squared_norm) return Status::null_pointer;
    const InstructionSet* set = find_instruction_set(instruction_set);
    if (set == nullptr) return Status::bad_instruction_set;
    const RowKernels<T>& kernels = kernels_of(*set, T());

    for_each_row(rows, vocabulary, threads, [&](int64_t row) {
        const T* z = logits + row * row_stride;
        const int64_t y = target[row];
        RowStatistics statistics{0, 0, 0};
        if (y >= 0 && y < vocabulary) {
            statistics = finish_row(kernels.split_sums(z, vocabulary, y, T(softcap)), capped_target(z[y], softcap));
        }
        loss[row] = T(statistics.loss);
        logsumexp[row] = T(statistics.logsumexp);
        squared_norm[row] = T(statistics.squared_norm);
    });
    return Status::ok;
}

template <typename T>
Status logits_gradient(T* logits, int64_t rows, int64_t vocabulary, int64_t row_stride, const int64_t* target,
                       const T* loss, const T* logsumexp, const T* factor, double softcap, int threads,
                       const char* instruction_set) {
    const Status status = check_sizes<T>(rows, vocabulary, softcap, threads);
    if (status != Status::ok || rows == 0) return status;
    if (!logits || !target || !loss || !logsumexp || !factor) return Status::null_pointer;
    if (rows > 1 && row_stride < vocabulary) return Status::overlapping_rows;
    const InstructionSet* set = find_instruction_set(instruction_set);
    if (set == nullptr) return Status::bad_instruction_set;
    const RowKernels<T>& kernels = kernels_of(*set, T());

    for_each_row(rows, vocabulary, threads, [&](int64_t row) {
        T* z = logits + row * row_stride;
        const int64_t y = target[row];
        if (y < 0 || y >= vocabulary || factor[row] == 0) {
            std::fill(z, z + vocabulary, T(0));
            return;
        }
        const Target at_target = capped_target(z[y], softcap);
        // The logsumexp of z~ in two roundings: that of the loss, or its own. The smaller of the two numbers has the
        // smaller one. (A NaN loss comes with a NaN logsumexp, an infinite one with one that is finite or as bad.)
        const double row_loss = loss[row], row_logsumexp = logsumexp[row];
        const bool by_loss = std::abs(row_loss) < std::abs(row_logsumexp);
        const T high = by_loss ? T(at_target.logit + row_loss) : logsumexp[row];
        const T low = by_loss ? T((at_target.logit - double(high)) + row_loss) : T(0);
        kernels.scaled_probabilities(z, vocabulary, high, low, factor[row], T(softcap));
        z[y] = T(double(factor[row]) * at_target.slope * std::expm1(-row_loss));
    });
    return Status::ok;
}

template Status row_statistics(const float*, int64_t, int64_t, int64_t, const int64_t*, double, float*, float*, float*,
                               int, const char*);
template Status row_statistics(const double*, int64_t, int64_t, int64_t, const int64_t*, double, double*, double*,
                               double*, int, const char*);
template Status logits_gradient(float*, int64_t, int64_t, int64_t, const int64_t*, const float*, const float*,
                                const float*, double, int, const char*);
template Status logits_gradient(double*, int64_t, int64_t, int64_t, const int64_t*, const double*, const double*,
                                const double*, double, int, const char*);

}  // namespace attent
