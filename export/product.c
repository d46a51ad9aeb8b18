/* Rows times packed weights, and what follows while the sums are at hand, in fp32, bf16 or 8 bits; part of a compiled library.
 *
 * export/products.py states the same in torch. Weights lie in panels of 64 outputs: a 32-bit word of each of them (a value
 * of fp32, two of bf16, four of 8 bits), then the next word of each. Six rows share every load of a panel, and their sums
 * fill 24 of the 32 registers: ten loads for 24 products. With the shapes of B/32 a thread of a Zen 5 does 517 GFLOP/s in
 * bf16 where oneDNN does 444 and the vector units can 548; in fp32 253 of 273, in 8 bits 1,020 of 1,100 (oneDNN 970).
 * Blocks of rows, twelve rows by 32 outputs and eight by 48 were no faster.
 *
 * No cache keeps the weights until the next run (170 MB of B/32 in bf16), so a panel is asked for, line by line, while the
 * one before is multiplied: with a line every 16 words all of it is there after 384 rows, eight pictures of B/32. A whole
 * tower is 1.03 times as fast in bf16, 1.07 in 8 bits and fp32. In bursts of 23 lines the same is .96: they are in the way
 * of what is needed now (docs/LOG.md).
 */
#include "vectors.h"

enum { NIGHTJAR_FP32, NIGHTJAR_BF16, NIGHTJAR_INT8 };
enum { NIGHTJAR_SILU = 1, NIGHTJAR_ADD = 2, NIGHTJAR_TO_BF16 = 4, NIGHTJAR_OF_LEVELS = 8 };
enum { NIGHTJAR_STRIP = 6, NIGHTJAR_PANEL = 64, NIGHTJAR_VECTORS = NIGHTJAR_PANEL / 16 };
/* A line of the next panel is asked for every 16 words, so that a panel, four lines a word, takes 64 strips. */
enum { NIGHTJAR_WORDS_A_LINE = 16, NIGHTJAR_STRIPS_A_PANEL = NIGHTJAR_VECTORS * NIGHTJAR_WORDS_A_LINE };

struct nightjar_product {
    const int32_t *x;       /* (m, words) */
    const __m512i *weights; /* (n / 64, words, 4) */
    const float *columns;   /* bias (n), or of 8 bits scale, product of ones, with the true weights too, bias: (4, n) */
    const float *rows;      /* of 8 bits (3, m): step, low and mean */
    const char *add;        /* (m, n) like `made`, or null */
    char *made;             /* (m, n) */
    int64_t m, n, words;
    int how;
};

/* Written out, because GCC 12 keeps some of the sums of the intrinsics in memory: a half to two thirds of the speed. */
static inline __attribute__((always_inline)) __m512i nightjar_add_products(const int kind, __m512i sums, __m512i x, __m512i w) {
    if (kind == NIGHTJAR_FP32) __asm__("vfmadd231ps %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    if (kind == NIGHTJAR_BF16) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    if (kind == NIGHTJAR_INT8) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    return sums;
}

static inline __attribute__((always_inline)) void nightjar_sums(
    const int kind, const int rows, const int32_t *x, const __m512i *weights, int64_t words, const __m512i *soon,
    __m512i *made) {
    __m512i sums[NIGHTJAR_STRIP][NIGHTJAR_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < NIGHTJAR_VECTORS; v++) sums[r][v] = _mm512_setzero_si512();
    for (int64_t word = 0; word < words;) {
        const int64_t until = word + NIGHTJAR_WORDS_A_LINE < words ? word + NIGHTJAR_WORDS_A_LINE : words;
        _mm_prefetch(soon++, _MM_HINT_T1);
        for (; word < until; word++) {
            __m512i of_panel[NIGHTJAR_VECTORS];
            for (int v = 0; v < NIGHTJAR_VECTORS; v++) {
                of_panel[v] = _mm512_loadu_si512(weights + word * NIGHTJAR_VECTORS + v);
                __asm__("" : "+v"(of_panel[v])); /* loaded once, not for each row */
            }
            for (int r = 0; r < rows; r++) {
                const __m512i of_row = _mm512_set1_epi32(x[r * words + word]);
                for (int v = 0; v < NIGHTJAR_VECTORS; v++)
                    sums[r][v] = nightjar_add_products(kind, sums[r][v], of_row, of_panel[v]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < NIGHTJAR_VECTORS; v++) made[r * NIGHTJAR_VECTORS + v] = sums[r][v];
}

/* Of 16 outputs of a few rows. */
static inline __attribute__((always_inline)) void nightjar_follow(
    const int how, const struct nightjar_product *p, const __m512i *sums, int64_t first, int64_t rows, int64_t column) {
    const int value_bytes = how & NIGHTJAR_TO_BF16 ? 2 : 4;
    const int64_t n = p->n, m = p->m;
    const __m512 one = _mm512_set1_ps(1), first_of_columns = _mm512_loadu_ps(p->columns + column);
    const char *add = p->add + (first * n + column) * value_bytes;
    char *made = p->made + (first * n + column) * value_bytes;
    __m512 ones, true_ones, bias;
    if (how & NIGHTJAR_OF_LEVELS) {
        ones = _mm512_loadu_ps(p->columns + n + column), true_ones = _mm512_loadu_ps(p->columns + 2 * n + column);
        bias = _mm512_loadu_ps(p->columns + 3 * n + column);
    }
    for (int64_t row = first; row < first + rows; row++) {
        __m512 value;
        if (how & NIGHTJAR_OF_LEVELS) {
            const float step = p->rows[row], mean = p->rows[2 * m + row], low = p->rows[m + row] - mean;
            const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(*sums), first_of_columns);
            value = _mm512_fmadd_ps(product, _mm512_set1_ps(step), _mm512_fmadd_ps(_mm512_set1_ps(low), ones, bias));
            value = _mm512_fmadd_ps(_mm512_set1_ps(mean), true_ones, value);
        } else
            value = _mm512_add_ps((__m512)*sums, first_of_columns);
        if (how & NIGHTJAR_SILU)
            value = _mm512_div_ps(value, _mm512_add_ps(one, nightjar_exp(_mm512_sub_ps(_mm512_setzero_ps(), value))));
        if (how & NIGHTJAR_ADD)
            value = _mm512_add_ps(value, how & NIGHTJAR_TO_BF16 ? nightjar_widened(add) : _mm512_loadu_ps((const float *)add));
        if (how & NIGHTJAR_TO_BF16)
            _mm256_storeu_si256((__m256i *)made, (__m256i)_mm512_cvtneps_pbh(value));
        else
            _mm512_storeu_ps((float *)made, value);
        sums += NIGHTJAR_VECTORS, add += n * value_bytes, made += n * value_bytes;
    }
}

/* Never inlined: its constants would take registers from the sums. A number that the compiler knows leaves no branches. */
__attribute__((noinline, optimize("O3"))) static void nightjar_finish(
    const struct nightjar_product *p, const __m512i *sums, int64_t first, int64_t rows, int64_t column) {
    switch (p->how) {
#define NIGHTJAR_HOW(how) case how: nightjar_follow(how, p, sums, first, rows, column); break;
#define NIGHTJAR_HOWS(how) NIGHTJAR_HOW(how) NIGHTJAR_HOW(how | NIGHTJAR_ADD) NIGHTJAR_HOW(how | NIGHTJAR_TO_BF16) NIGHTJAR_HOW(how | NIGHTJAR_ADD | NIGHTJAR_TO_BF16)
        NIGHTJAR_HOWS(0)
        NIGHTJAR_HOWS(NIGHTJAR_SILU)
        NIGHTJAR_HOWS(NIGHTJAR_OF_LEVELS)
        NIGHTJAR_HOWS((NIGHTJAR_OF_LEVELS | NIGHTJAR_SILU))
    }
}

static inline __attribute__((always_inline)) void nightjar_panel(const int kind, const struct nightjar_product *p, int64_t panel) {
    const int64_t lines = p->words * NIGHTJAR_VECTORS, lines_a_strip = p->words / NIGHTJAR_WORDS_A_LINE;
    const __m512i *weights = p->weights + panel * lines, *next = weights + lines;
    __m512i sums[NIGHTJAR_STRIP * NIGHTJAR_VECTORS];
    for (int64_t row = 0; row < p->m; row += NIGHTJAR_STRIP) {
        const int64_t rows = p->m - row < NIGHTJAR_STRIP ? p->m - row : NIGHTJAR_STRIP;
        const int32_t *x = p->x + row * p->words;
        const __m512i *soon = next + row / NIGHTJAR_STRIP % NIGHTJAR_STRIPS_A_PANEL * lines_a_strip;
        switch (rows) { /* a number that the compiler knows keeps the sums in registers */
        case 6: nightjar_sums(kind, 6, x, weights, p->words, soon, sums); break;
        case 5: nightjar_sums(kind, 5, x, weights, p->words, soon, sums); break;
        case 4: nightjar_sums(kind, 4, x, weights, p->words, soon, sums); break;
        case 3: nightjar_sums(kind, 3, x, weights, p->words, soon, sums); break;
        case 2: nightjar_sums(kind, 2, x, weights, p->words, soon, sums); break;
        default: nightjar_sums(kind, 1, x, weights, p->words, soon, sums);
        }
        for (int v = 0; v < NIGHTJAR_VECTORS; v++) nightjar_finish(p, sums + v, row, rows, panel * NIGHTJAR_PANEL + 16 * v);
    }
}

__attribute__((optimize("O3"))) static void nightjar_panel_fp32(const struct nightjar_product *p, int64_t panel) {
    nightjar_panel(NIGHTJAR_FP32, p, panel);
}

__attribute__((optimize("O3"))) static void nightjar_panel_bf16(const struct nightjar_product *p, int64_t panel) {
    nightjar_panel(NIGHTJAR_BF16, p, panel);
}

__attribute__((optimize("O3"))) static void nightjar_panel_int8(const struct nightjar_product *p, int64_t panel) {
    nightjar_panel(NIGHTJAR_INT8, p, panel);
}

static AOTITorchError nightjar_product_of(
    AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle columns, AtenTensorHandle *rows, AtenTensorHandle *add, int how,
    AtenTensorHandle *made) {
    struct nightjar_product p = {};
    int64_t *of_x, *of_packed;
    AOTITorchError error;
    if ((error = aoti_torch_get_sizes(x, &of_x)) || (error = aoti_torch_get_sizes(packed, &of_packed))) return error;
    p.m = of_x[0], p.n = of_packed[0] * NIGHTJAR_PANEL, p.words = of_packed[1];
    p.how = how | (add ? NIGHTJAR_ADD : 0);
    const int64_t shape[] = {p.m, p.n}, strides[] = {p.n, 1};
    const int32_t dtype = how & NIGHTJAR_TO_BF16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
    if ((error = aoti_torch_empty_strided(2, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, made)) ||
        (error = aoti_torch_get_data_ptr(x, (void **)&p.x)) || (error = aoti_torch_get_data_ptr(packed, (void **)&p.weights)) ||
        (error = aoti_torch_get_data_ptr(columns, (void **)&p.columns)) || (error = aoti_torch_get_data_ptr(*made, (void **)&p.made)) ||
        (rows && (error = aoti_torch_get_data_ptr(*rows, (void **)&p.rows))) ||
        (add && (error = aoti_torch_get_data_ptr(*add, (void **)&p.add))))
        return error;
    const int levels = how & NIGHTJAR_OF_LEVELS, bf16 = how & NIGHTJAR_TO_BF16;
    void (*const of_panel)(const struct nightjar_product *, int64_t) =
        levels ? nightjar_panel_int8 : bf16 ? nightjar_panel_bf16 : nightjar_panel_fp32;
#pragma omp parallel for
    for (int64_t panel = 0; panel < p.n / NIGHTJAR_PANEL; panel++) of_panel(&p, panel);
    return 0;
}

AOTITorchError aoti_torch_cpu_product(
    AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle bias, AtenTensorHandle *add, int32_t silu, AtenTensorHandle *made) {
    int32_t dtype;
    const AOTITorchError error = aoti_torch_get_dtype(x, &dtype);
    if (error) return error;
    const int to_bf16 = dtype == aoti_torch_dtype_bfloat16() ? NIGHTJAR_TO_BF16 : 0;
    return nightjar_product_of(x, packed, bias, NULL, add, to_bf16 | (silu ? NIGHTJAR_SILU : 0), made);
}

AOTITorchError aoti_torch_cpu_product_of_levels(
    AtenTensorHandle levels, AtenTensorHandle packed, AtenTensorHandle columns, AtenTensorHandle rows, AtenTensorHandle *add,
    int32_t silu, int32_t bf16, AtenTensorHandle *made) {
    const int how = NIGHTJAR_OF_LEVELS | (silu ? NIGHTJAR_SILU : 0) | (bf16 ? NIGHTJAR_TO_BF16 : 0);
    return nightjar_product_of(levels, packed, columns, &rows, add, how, made);
}
