/* Rows times packed weights, and what follows while the sums are at hand, in fp32 or bf16; part of a compiled library.
 *
 * export/products.py states the same in torch. Weights lie in panels of 64 outputs: a 32-bit word of each of them (a value
 * of fp32, two of bf16), then the next word of each. Six rows share every load of a panel, and their sums fill 24 of the
 * 32 registers: ten loads for 24 products. With the shapes of B/32 a thread of a Zen 5 does 517 GFLOP/s in bf16 where
 * oneDNN does 444 and the vector units can 548; in fp32 253 of 273. Prefetching the next panel, blocks of rows, twelve
 * rows by 32 outputs and eight by 48 were no faster.
 */
#include "vectors.h"

enum { NIGHTJAR_STRIP = 6, NIGHTJAR_PANEL = 64, NIGHTJAR_VECTORS = NIGHTJAR_PANEL / 16 };

struct nightjar_product {
    const int32_t *x;       /* (m, words) */
    const __m512i *weights; /* (n / 64, words, 4) */
    const float *bias;      /* (n) */
    const char *add;        /* (m, n) like `made`, or null */
    char *made;             /* (m, n) */
    int64_t m, n, words;
    int bf16, silu;
};

/* Written out, because GCC 12 keeps some of the sums of the intrinsics in memory: two thirds of the speed. */
static inline __attribute__((always_inline)) __m512 nightjar_add_products(const int bf16, __m512 sums, __m512i x, __m512i w) {
    if (bf16)
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    else
        __asm__("vfmadd231ps %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    return sums;
}

static inline __attribute__((always_inline)) void nightjar_sums(
    const int bf16, const int rows, const int32_t *x, const __m512i *weights, int64_t words, __m512 *made) {
    __m512 sums[NIGHTJAR_STRIP][NIGHTJAR_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < NIGHTJAR_VECTORS; v++) sums[r][v] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; word++) {
        __m512i of_panel[NIGHTJAR_VECTORS];
        for (int v = 0; v < NIGHTJAR_VECTORS; v++) {
            of_panel[v] = _mm512_loadu_si512(weights + word * NIGHTJAR_VECTORS + v);
            __asm__("" : "+v"(of_panel[v])); /* loaded once, not for each row */
        }
        for (int r = 0; r < rows; r++) {
            const __m512i of_row = _mm512_set1_epi32(x[r * words + word]);
            for (int v = 0; v < NIGHTJAR_VECTORS; v++) sums[r][v] = nightjar_add_products(bf16, sums[r][v], of_row, of_panel[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < NIGHTJAR_VECTORS; v++) made[r * NIGHTJAR_VECTORS + v] = sums[r][v];
}

/* Of 16 outputs of a few rows. Never inlined: its constants would take registers from the sums. */
__attribute__((noinline, optimize("O3"))) static void nightjar_finish(
    const struct nightjar_product *p, const __m512 *sums, int64_t first, int64_t rows, int64_t column) {
    const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1), bias = _mm512_loadu_ps(p->bias + column);
    const int bf16 = p->bf16, silu = p->silu;
    const char *add = p->add;
    char *made = p->made;
    for (int64_t row = first; row < first + rows; row++, sums += NIGHTJAR_VECTORS) {
        const int64_t at = (row * p->n + column) * (bf16 ? 2 : 4);
        __m512 value = _mm512_add_ps(*sums, bias);
        if (silu) value = _mm512_div_ps(value, _mm512_add_ps(one, nightjar_exp(_mm512_sub_ps(zero, value))));
        if (add && bf16)
            value = _mm512_add_ps(value, nightjar_widened(add + at));
        else if (add)
            value = _mm512_add_ps(value, _mm512_loadu_ps((const float *)(add + at)));
        if (bf16)
            _mm256_storeu_si256((__m256i *)(made + at), (__m256i)_mm512_cvtneps_pbh(value));
        else
            _mm512_storeu_ps((float *)(made + at), value);
    }
}

static inline __attribute__((always_inline)) void nightjar_panel(const int bf16, const struct nightjar_product *p, int64_t panel) {
    const __m512i *weights = p->weights + panel * p->words * NIGHTJAR_VECTORS;
    __m512 sums[NIGHTJAR_STRIP * NIGHTJAR_VECTORS];
    for (int64_t row = 0; row < p->m; row += NIGHTJAR_STRIP) {
        const int64_t rows = p->m - row < NIGHTJAR_STRIP ? p->m - row : NIGHTJAR_STRIP;
        const int32_t *x = p->x + row * p->words;
        switch (rows) { /* a number that the compiler knows keeps the sums in registers */
        case 6: nightjar_sums(bf16, 6, x, weights, p->words, sums); break;
        case 5: nightjar_sums(bf16, 5, x, weights, p->words, sums); break;
        case 4: nightjar_sums(bf16, 4, x, weights, p->words, sums); break;
        case 3: nightjar_sums(bf16, 3, x, weights, p->words, sums); break;
        case 2: nightjar_sums(bf16, 2, x, weights, p->words, sums); break;
        default: nightjar_sums(bf16, 1, x, weights, p->words, sums);
        }
        for (int v = 0; v < NIGHTJAR_VECTORS; v++) nightjar_finish(p, sums + v, row, rows, panel * NIGHTJAR_PANEL + 16 * v);
    }
}

__attribute__((optimize("O3"))) static void nightjar_panel_bf16(const struct nightjar_product *p, int64_t panel) {
    nightjar_panel(1, p, panel);
}

__attribute__((optimize("O3"))) static void nightjar_panel_fp32(const struct nightjar_product *p, int64_t panel) {
    nightjar_panel(0, p, panel);
}

AOTITorchError aoti_torch_cpu_product(
    AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle bias, AtenTensorHandle *add, int32_t silu, AtenTensorHandle *made) {
    struct nightjar_product p = {};
    int64_t *of_x, *of_packed;
    int32_t dtype;
    AOTITorchError error = aoti_torch_get_sizes(x, &of_x);
    if (error || (error = aoti_torch_get_sizes(packed, &of_packed)) || (error = aoti_torch_get_dtype(x, &dtype))) return error;
    p.m = of_x[0], p.n = of_packed[0] * NIGHTJAR_PANEL, p.words = of_packed[1];
    p.bf16 = dtype == aoti_torch_dtype_bfloat16(), p.silu = silu;
    const int64_t shape[] = {p.m, p.n}, strides[] = {p.n, 1};
    if ((error = aoti_torch_empty_strided(2, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, made)) ||
        (error = aoti_torch_get_data_ptr(x, (void **)&p.x)) || (error = aoti_torch_get_data_ptr(packed, (void **)&p.weights)) ||
        (error = aoti_torch_get_data_ptr(bias, (void **)&p.bias)) || (error = aoti_torch_get_data_ptr(*made, (void **)&p.made)) ||
        (add && (error = aoti_torch_get_data_ptr(*add, (void **)&p.add))))
        return error;
#pragma omp parallel for
    for (int64_t panel = 0; panel < p.n / NIGHTJAR_PANEL; panel++) {
        if (p.bf16)
            nightjar_panel_bf16(&p, panel);
        else
            nightjar_panel_fp32(&p, panel);
    }
    return 0;
}
