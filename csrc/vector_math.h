// Vectors of VECTOR_BYTES bytes and the exponential and capped logit on them, written once for every instruction set.
//
// Included by row_kernels_body.h only, inside the region that a row_kernels_<instruction set>.cpp compiles for its own
// set. Everything here has internal linkage: a shared inline function would be kept once by the linker, perhaps in the
// AVX-512 form, and crash on a processor without it. For the same reason nothing here includes or calls the standard
// library.
//
// The vectors are the compiler's own (GCC and Clang: `vector_size`), so that +, *, <, ?: mean the same on every
// processor; only the fused multiply-add, which no operator spells, is an intrinsic.
//
// -ffast-math would fold the rounding trick in `exponential` away and must not be used.

namespace attent {
namespace {

template <typename T>
constexpr int lanes = VECTOR_BYTES / int(sizeof(T));

template <typename T>
struct IntegerOf;  // unsigned, so that bits may be shifted out
template <>
struct IntegerOf<float> {
    using type = uint32_t;
};
template <>
struct IntegerOf<double> {
    using type = uint64_t;
};

template <typename T>
struct VectorOf {
    using Integer = typename IntegerOf<T>::type;
    typedef T type __attribute__((vector_size(VECTOR_BYTES)));
    typedef Integer integer __attribute__((vector_size(VECTOR_BYTES)));
    typedef T unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
using IntegerVector = typename VectorOf<T>::integer;  // same bits as Vector<T>, for exponents and signs

template <typename T>
inline Vector<T> load(const T* from) {
    return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}

template <typename T>
inline void store(T* to, Vector<T> value) {
    *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = value;
}

template <typename T>
inline Vector<T> broadcast(T value) {
    return value - Vector<T>{};  // minus, because -0 - 0 = -0
}

// a b + c with one rounding where the instruction set has it. Plain C++ leaves the fusing to the compiler.
#if VECTOR_BYTES == 64
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
    return _mm512_fmadd_ps(a, b, c);
}
inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
    return _mm512_fmadd_pd(a, b, c);
}
#elif VECTOR_BYTES == 32
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
    return _mm256_fmadd_ps(a, b, c);
}
inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
    return _mm256_fmadd_pd(a, b, c);
}
#else
template <typename V>
inline V multiply_add(V a, V b, V c) {
    return a * b + c;
}
#endif

// exp(x) = 2^n (1 + f), n = round(x / log 2), f = expm1(x - n log 2) with |x - n log 2| <= log(2)/2.
template <typename T>
struct ExponentialOf;

template <>
struct ExponentialOf<float> {
    static constexpr int mantissa_bits = 23, bias = 127;
    static constexpr float round = 0x1.8p23f;  // adding it leaves no bits below the units: they are the rounded integer
    static constexpr float inverse_log2 = 1.44269504088896341f;
    static constexpr float log2_high = 0.693359375f, log2_low = -2.12194440e-4f;  // n log2_high is exact
    // expm1(f) = f + f^2 P(f): the minimax polynomial of Cephes' expf (S. Moshier), error 2e-8 on |f| <= log(2)/2.
    static constexpr float polynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                           4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    static constexpr float smallest = -87.3365f;      // exp(x) is a normal number from here up
    static constexpr float smallest_square = -43.6f;  // exp(x)^2 is
};

template <>
struct ExponentialOf<double> {
    static constexpr int mantissa_bits = 52, bias = 1023;
    static constexpr double round = 0x1.8p52;
    static constexpr double inverse_log2 = 1.44269504088896340736;
    static constexpr double log2_high = 6.93145751953125e-1, log2_low = 1.42860682030941723212e-6;
    // Taylor: 1/13! ... 1/2!; the next term is below 4e-18 on |f| <= log(2)/2.
    static constexpr double polynomial[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                            1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                            1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2};
    static constexpr double smallest = -708.39;
    static constexpr double smallest_square = -354.19;
};

template <typename T>
struct Exponential {
    Vector<T> power;     // 2^n
    Vector<T> fraction;  // f
};

// For smallest <= x <= 88 (float64: 709). NaN gives NaN in `fraction`; what other x give must be masked by the caller.
template <typename T>
inline Exponential<T> exponential(Vector<T> x) {
    using E = ExponentialOf<T>;
    const Vector<T> rounded = multiply_add(x, broadcast(E::inverse_log2), broadcast(E::round));
    const Vector<T> n = rounded - E::round;
    Vector<T> f = multiply_add(n, broadcast(-E::log2_high), x);
    f = multiply_add(n, broadcast(-E::log2_low), f);
    Vector<T> polynomial = broadcast(E::polynomial[0]);
    constexpr int terms = sizeof(E::polynomial) / sizeof(E::polynomial[0]);
    for (int i = 1; i < terms; ++i) polynomial = multiply_add(polynomial, f, broadcast(E::polynomial[i]));
    // The low bits of `rounded` are n, and 2^n has the exponent field n + bias: shifting drops all else.
    const IntegerVector<T> exponent = ((IntegerVector<T>)rounded + E::bias) << E::mantissa_bits;
    return {(Vector<T>)exponent, multiply_add(f * f, polynomial, f)};
}

// exp(x), and 0 below `floor` (a threshold of ExponentialOf<T>): no denormal number is made, none slows the sums down.
template <typename T>
inline Vector<T> exp_or_zero(Vector<T> x, T floor) {
    const Exponential<T> e = exponential<T>(x);
    return x < floor ? Vector<T>{} : multiply_add(e.power, e.fraction, e.power);
}

template <typename T>
struct CappedLogit {
    Vector<T> value;  // z~ = c tanh(z/c)
    Vector<T> slope;  // d = 1 - (z~/c)^2
};

// With u = |z|/c and q = expm1(-2u): tanh u = -q / (2 + q), and d = 1 - tanh^2 u = 4 (1 + q) / (2 + q)^2, so neither a
// small u nor a saturated one cancels. Error of the value 4 u c, of the slope 4 u (1 + 2 |z|/c) relative (u: roundoff).
template <typename T>
inline CappedLogit<T> capped_logit(Vector<T> z, T softcap) {
    const IntegerVector<T> sign = (IntegerVector<T>)z & (IntegerVector<T>)broadcast(T(-0.0));
    const Vector<T> x =
        (Vector<T>)((IntegerVector<T>)z | (IntegerVector<T>)broadcast(T(-0.0))) * (T(2) / softcap);  // -2u
    const Exponential<T> e = exponential<T>(x);
    const auto saturated = x < ExponentialOf<T>::smallest;
    const Vector<T> exp_x = saturated ? Vector<T>{} : multiply_add(e.power, e.fraction, e.power);
    const Vector<T> q = saturated ? broadcast(T(-1)) : multiply_add(e.power, e.fraction, e.power - T(1));
    const Vector<T> inverse = T(1) / (q + T(2));
    const Vector<T> magnitude = q * inverse * -softcap;
    return {(Vector<T>)((IntegerVector<T>)magnitude | sign), exp_x * inverse * inverse * T(4)};
}

}  // namespace
}  // namespace attent
