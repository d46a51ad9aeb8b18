/* What the operations in C share. */
#ifndef NIGHTJAR_VECTORS_H
#define NIGHTJAR_VECTORS_H
#include <immintrin.h>

static inline __attribute__((always_inline)) __m512 nightjar_exp(__m512 x) {
    /* 2^power = 2^whole * 2^fraction, the latter in [-.5, .5] by its Taylor series: 4e-6 of the value */
    const __m512 least = _mm512_set1_ps(-126), most = _mm512_set1_ps(126);
    const __m512 power = _mm512_min_ps(most, _mm512_max_ps(least, _mm512_mul_ps(x, _mm512_set1_ps(1.442695041f))));
    const __m512 fraction = _mm512_reduce_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 e = _mm512_set1_ps(0.001333356f);
    e = _mm512_fmadd_ps(e, fraction, _mm512_set1_ps(0.009618129f));
    e = _mm512_fmadd_ps(e, fraction, _mm512_set1_ps(0.055504109f));
    e = _mm512_fmadd_ps(e, fraction, _mm512_set1_ps(0.240226507f));
    e = _mm512_fmadd_ps(e, fraction, _mm512_set1_ps(0.693147181f));
    e = _mm512_fmadd_ps(e, fraction, _mm512_set1_ps(1));
    return _mm512_scalef_ps(e, _mm512_sub_ps(power, fraction));
}

static inline __attribute__((always_inline)) __m512 nightjar_widened(const void *bf16) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)bf16)), 16);
}

#endif
