// exp, expm1, tanh, log, log1p and the tail of the normal distribution of a vector of floats: the same operations on
// every level, so with fma the same bits. V is a vector, or Four of them, whose operations alternate: each of these
// functions is one long chain, of which a processor's scheduler holds only a few at a time. Anonymous namespace and no
// containers, as simd.h says.
#pragma once

#include "common/simd.h"

namespace microtome {
namespace {

// power_of_two: 2^n from n + 1.5 * 2^23, whose low bits are n. bits: a float's bits, as a number.
#if defined(__AVX512F__)
inline vf power_of_two(vf shifted) {
    const __m512i biased = _mm512_add_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
inline vf bits(vf a) { return _mm512_cvtepi32_ps(_mm512_castps_si512(a)); }
#elif defined(__AVX2__)
inline vf power_of_two(vf shifted) {
    const __m256i biased = _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline vf bits(vf a) { return _mm256_cvtepi32_ps(_mm256_castps_si256(a)); }
#else
typedef unsigned vu __attribute__((vector_size(16)));
typedef int vi __attribute__((vector_size(16)));
inline vf power_of_two(vf shifted) { return (vf)(((vu)shifted + 127) << 23); }
inline vf bits(vf a) { return __builtin_convertvector((vi)a, vf); }
#endif

// Four vectors in lockstep.
struct Four {
    vf a, b, c, d;
};
inline Four add(Four x, Four y) { return {add(x.a, y.a), add(x.b, y.b), add(x.c, y.c), add(x.d, y.d)}; }
inline Four sub(Four x, Four y) { return {sub(x.a, y.a), sub(x.b, y.b), sub(x.c, y.c), sub(x.d, y.d)}; }
inline Four mul(Four x, Four y) { return {mul(x.a, y.a), mul(x.b, y.b), mul(x.c, y.c), mul(x.d, y.d)}; }
inline Four div(Four x, Four y) { return {div(x.a, y.a), div(x.b, y.b), div(x.c, y.c), div(x.d, y.d)}; }
inline Four max(Four x, Four y) { return {max(x.a, y.a), max(x.b, y.b), max(x.c, y.c), max(x.d, y.d)}; }
inline Four fma(Four x, Four y, Four z) {
    return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b), fma(x.c, y.c, z.c), fma(x.d, y.d, z.d)};
}
inline Four power_of_two(Four x) {
    return {power_of_two(x.a), power_of_two(x.b), power_of_two(x.c), power_of_two(x.d)};
}

// The number c in every lane of a V.
template <class V>
inline V all(float c) {
    return V{set1(c), set1(c), set1(c), set1(c)};
}
template <>
inline vf all<vf>(float c) {
    return set1(c);
}

template <class V>
inline V magnitude(V a) {
    return max(sub(all<V>(0.0f), a), a);
}
template <class V>
inline V at_most(V a, float limit) {
    return sub(all<V>(0.0f), max(all<V>(-limit), sub(all<V>(0.0f), a)));
}

// x = n ln 2 + r, |r| <= ln 2 / 2. Returns e^r - 1 and sets power to 2^n. ln 2 is split so that n times its first
// part is exact. The polynomial is Taylor's up to r^7 / 7!, whose first missing term is below 2^-27 of e^r - 1.
template <class V>
inline V reduced_expm1(V x, V& power) {
    const V magic = all<V>(12582912.0f);
    const V shifted = fma(x, all<V>(1.44269504f), magic), n = sub(shifted, magic);
    const V r = fma(n, all<V>(2.12194440e-4f), fma(n, all<V>(-0.693359375f), x));
    power = power_of_two(shifted);
    V s = fma(r, all<V>(1.0f / 5040), all<V>(1.0f / 720));
    s = fma(s, r, all<V>(1.0f / 120));
    s = fma(s, r, all<V>(1.0f / 24));
    s = fma(s, r, all<V>(1.0f / 6));
    s = fma(s, r, all<V>(0.5f));
    return fma(s, mul(r, r), r);
}

// e^x for x <= 88, within 1.1 ulp. Below -87 the answer is e^-87. NaN stays NaN.
template <class V>
inline V exp(V x) {
    V power;
    const V s = reduced_expm1(max(all<V>(-87.0f), x), power);
    return fma(power, s, power);
}

// e^x - 1 for x <= 88, within 2 ulp: no digits are lost near zero. NaN stays NaN.
template <class V>
inline V expm1(V x) {
    V power;
    const V s = reduced_expm1(max(all<V>(-87.0f), x), power);
    return fma(power, s, sub(power, all<V>(1.0f)));
}

// tanh x = (e^2x - 1) / (e^2x + 1), within 2.5 ulp: no digits are lost near zero.
template <class V>
inline V tanh(V x) {
    V power;
    const V s = reduced_expm1(at_most(max(all<V>(-40.0f), add(x, x)), 40.0f), power);
    const V e = fma(power, s, sub(power, all<V>(1.0f)));  // e^2x - 1
    return div(e, add(e, all<V>(2.0f)));
}

// ln a for 1 <= a < 2^32, within 6e-8 + 1 ulp: the exponent and mantissa, then Halley's step on e^y = a twice.
inline vf log(vf a) {
    vf y = fma(bits(a), set1(8.26295829e-8f), set1(-88.0f));  // ln 2 / 2^23
    for (int step = 0; step < 2; ++step) {
        const vf e = exp(y), difference = sub(a, e);
        y = add(y, div(add(difference, difference), add(a, e)));
    }
    return mul(y, at_most(mul(sub(a, set1(1.0f)), set1(16777216.0f)), 1.0f));  // exactly 0 at 1
}

// ln(1 + u) for 0 <= u <= 1, within 2.5 ulp: 2 artanh(s), s = u / (2 + u) <= 1/3, by its series up to s^15 / 15, whose
// first missing term is below 2^-29 of the sum.
template <class V>
inline V log1p(V u) {
    const V s = div(u, add(u, all<V>(2.0f))), z = mul(s, s);
    V series = fma(z, all<V>(1.0f / 15), all<V>(1.0f / 13));
    series = fma(series, z, all<V>(1.0f / 11));
    series = fma(series, z, all<V>(1.0f / 9));
    series = fma(series, z, all<V>(1.0f / 7));
    series = fma(series, z, all<V>(1.0f / 5));
    series = fma(series, z, all<V>(1.0f / 3));
    const V twice = add(s, s);
    return fma(twice, mul(z, series), twice);
}

// What a standard normal variable falls below t with, -8 <= t <= 0, within 6e-8: exp(-ln 2 + t Q(t)), Q fitted for the
// least largest error of t times the answer.
template <class V>
inline V normal_tail(V t) {
    V q = fma(t, all<V>(-2.85532138e-7f), all<V>(-5.62130936e-6f));
    q = fma(q, t, all<V>(-4.60775918e-5f));
    q = fma(q, t, all<V>(-1.78895833e-4f));
    q = fma(q, t, all<V>(2.16215758e-5f));
    q = fma(q, t, all<V>(4.83652437e-3f));
    q = fma(q, t, all<V>(3.63626704e-2f));
    q = fma(q, t, all<V>(-3.18303466e-1f));
    q = fma(q, t, all<V>(7.97885060e-1f));
    V power;
    const V s = reduced_expm1(fma(q, t, all<V>(-0.693147181f)), power);
    return fma(power, s, power);
}

}  // namespace
}  // namespace microtome
