// exp, expm1, tanh, log, log1p and the normal tail of a vector of floats: the same operations on every level, so with
// fma the same bits.
// Anonymous namespace and no containers, as simd.h says.
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

inline vf magnitude(vf a) { return max(sub(zero(), a), a); }
inline vf at_most(vf a, float limit) { return sub(zero(), max(set1(-limit), sub(zero(), a))); }

// x = n ln 2 + r, |r| <= ln 2 / 2. Returns e^r - 1 and sets power to 2^n. ln 2 is split so that n times its first
// part is exact. The polynomial is Taylor's up to r^7 / 7!, whose first missing term is below 2^-27 of e^r - 1.
inline vf reduced_expm1(vf x, vf& power) {
    const vf magic = set1(12582912.0f);
    const vf shifted = fma(x, set1(1.44269504f), magic), n = sub(shifted, magic);
    const vf r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
    power = power_of_two(shifted);
    vf s = fma(r, set1(1.0f / 5040), set1(1.0f / 720));
    s = fma(s, r, set1(1.0f / 120));
    s = fma(s, r, set1(1.0f / 24));
    s = fma(s, r, set1(1.0f / 6));
    s = fma(s, r, set1(0.5f));
    return fma(s, mul(r, r), r);
}

// e^x for x <= 88, within 1.1 ulp. Below -87 the answer is e^-87. NaN stays NaN.
inline vf exp(vf x) {
    vf power;
    const vf s = reduced_expm1(max(set1(-87.0f), x), power);
    return fma(power, s, power);
}

// e^x - 1 for x <= 88, within 2 ulp: no digits are lost near zero. NaN stays NaN.
inline vf expm1(vf x) {
    vf power;
    const vf s = reduced_expm1(max(set1(-87.0f), x), power);
    return fma(power, s, sub(power, set1(1.0f)));
}

// tanh x = (e^2x - 1) / (e^2x + 1), within 2.5 ulp: no digits are lost near zero.
inline vf tanh(vf x) {
    vf power;
    const vf s = reduced_expm1(at_most(max(set1(-40.0f), add(x, x)), 40.0f), power);
    const vf e = fma(power, s, sub(power, set1(1.0f)));  // e^2x - 1
    return div(e, add(e, set1(2.0f)));
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
inline vf log1p(vf u) {
    const vf s = div(u, add(u, set1(2.0f))), z = mul(s, s);
    vf series = fma(z, set1(1.0f / 15), set1(1.0f / 13));
    for (float term : {1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3}) series = fma(series, z, set1(term));
    const vf twice = add(s, s);
    return fma(twice, mul(z, series), twice);
}

// What a standard normal variable exceeds a >= 0 with, erfc(a / sqrt 2) / 2, within 4e-8: exp(-a Q(a)) / 2, Q fitted on
// [0, 8] for the least largest error of a times the tail. Beyond 8 the answer is that at 8, 6e-16.
inline vf normal_tail(vf a) {
    a = at_most(a, 8.0f);
    vf q = set1(-2.85532138e-7f);
    for (float term : {5.62130936e-6f, -4.60775918e-5f, 1.78895833e-4f, 2.16215758e-5f, -4.83652437e-3f, 3.63626704e-2f,
                       3.18303466e-1f, 7.97885060e-1f}) {
        q = fma(q, a, set1(term));
    }
    return mul(set1(0.5f), exp(sub(zero(), mul(a, q))));
}

}  // namespace
}  // namespace microtome
