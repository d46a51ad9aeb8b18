/* Rows of activations in 8 bits, from what comes before them; part of a compiled library of int8.
 *
 * export/int8.py states the same in torch: `levels`, `norm_levels` and `silu_levels`. torch's compiler makes several
 * passes of each, with exp() by a call, a division and NaN-proof minima: 43 cycles for 16 values after the first product of
 * an MLP, 15 here. A row with a NaN keeps it in its mean, and so in its vector. The reciprocal of SiLU is good to 6e-5 of
 * its value; a level is 4e-3 of the range of a row.
 */
#include "vectors.h"

struct nightjar_range { __m512 least, most, total; };

static inline __attribute__((always_inline)) struct nightjar_range nightjar_no_range(void) {
    const struct nightjar_range none = {_mm512_set1_ps(INFINITY), _mm512_set1_ps(-INFINITY), _mm512_setzero_ps()};
    return none;
}

static inline __attribute__((always_inline)) void nightjar_widen(struct nightjar_range *range, __m512 x) {
    range->least = _mm512_min_ps(range->least, x);
    range->most = _mm512_max_ps(range->most, x);
    range->total = _mm512_add_ps(range->total, x);
}

static inline __attribute__((always_inline)) __m512 nightjar_taken(const void *from, int64_t at, int bf16) {
    return bf16 ? nightjar_widened((const uint16_t *)from + at) : _mm512_loadu_ps((const float *)from + at);
}

/* `rows`: step, low and mean of row `row` of `n`. */
static inline __attribute__((always_inline)) void nightjar_quantise(
    const void *values, int bf16, int64_t width, struct nightjar_range range, uint8_t *levels, float *rows, int64_t row, int64_t n) {
    const float bottom = _mm512_reduce_min_ps(range.least), extent = _mm512_reduce_max_ps(range.most) - bottom;
    const float one_level = (extent > 1e-12f ? extent : 1e-12f) / 255;
    const __m512 base = _mm512_set1_ps(bottom), per_value = _mm512_set1_ps(1 / one_level);
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 level = _mm512_mul_ps(_mm512_sub_ps(nightjar_taken(values, i, bf16), base), per_value);
        _mm_storeu_si128((__m128i *)(levels + i), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(level)));
    }
    rows[row] = one_level;
    rows[n + row] = bottom;
    rows[2 * n + row] = _mm512_reduce_add_ps(range.total) / width;
}

static AOTITorchError nightjar_new_levels(
    int64_t n, int64_t width, AtenTensorHandle *levels, AtenTensorHandle *rows, uint8_t **made_levels, float **made_rows) {
    const int64_t levels_shape[] = {n, width}, levels_strides[] = {width, 1}, rows_shape[] = {3, n}, rows_strides[] = {n, 1};
    const int32_t cpu = aoti_torch_device_type_cpu();
    AOTITorchError error;
    if ((error = aoti_torch_empty_strided(2, levels_shape, levels_strides, aoti_torch_dtype_uint8(), cpu, 0, levels)) ||
        (error = aoti_torch_empty_strided(2, rows_shape, rows_strides, aoti_torch_dtype_float32(), cpu, 0, rows)) ||
        (error = aoti_torch_get_data_ptr(*levels, (void **)made_levels)) ||
        (error = aoti_torch_get_data_ptr(*rows, (void **)made_rows)))
        return error;
    return 0;
}

__attribute__((optimize("O3"))) AOTITorchError aoti_torch_cpu_levels(
    AtenTensorHandle x, AtenTensorHandle *levels, AtenTensorHandle *rows) {
    const char *values;
    uint8_t *made_levels;
    float *made_rows;
    int64_t *sizes;
    int32_t dtype;
    AOTITorchError error;
    if ((error = aoti_torch_get_sizes(x, &sizes)) || (error = aoti_torch_get_data_ptr(x, (void **)&values)) ||
        (error = aoti_torch_get_dtype(x, &dtype)) ||
        (error = nightjar_new_levels(sizes[0], sizes[1], levels, rows, &made_levels, &made_rows)))
        return error;
    const int64_t n = sizes[0], width = sizes[1];
    const int bf16 = dtype == aoti_torch_dtype_bfloat16();
#pragma omp parallel for
    for (int64_t row = 0; row < n; row++) {
        const char *of_row = values + row * width * (bf16 ? 2 : 4);
        struct nightjar_range range = nightjar_no_range();
        for (int64_t i = 0; i < width; i += 16) nightjar_widen(&range, nightjar_taken(of_row, i, bf16));
        nightjar_quantise(of_row, bf16, width, range, made_levels + row * width, made_rows, row, n);
    }
    return 0;
}

__attribute__((optimize("O3"))) AOTITorchError aoti_torch_cpu_norm_levels(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle bias, double eps, AtenTensorHandle *levels,
    AtenTensorHandle *rows) {
    const float *values, *scale, *offset;
    uint8_t *made_levels;
    float *made_rows;
    int64_t *sizes;
    AOTITorchError error;
    if ((error = aoti_torch_get_sizes(x, &sizes)) || (error = aoti_torch_get_data_ptr(x, (void **)&values)) ||
        (error = aoti_torch_get_data_ptr(weight, (void **)&scale)) || (error = aoti_torch_get_data_ptr(bias, (void **)&offset)) ||
        (error = nightjar_new_levels(sizes[0], sizes[1], levels, rows, &made_levels, &made_rows)))
        return error;
    const int64_t n = sizes[0], width = sizes[1];
#pragma omp parallel for
    for (int64_t row = 0; row < n; row++) {
        const float *of_row = values + row * width;
        float normed[width];
        __m512 total = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += 16) total = _mm512_add_ps(total, _mm512_loadu_ps(of_row + i));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / width);
        for (int64_t i = 0; i < width; i += 16) {
            const __m512 off = _mm512_sub_ps(_mm512_loadu_ps(of_row + i), mean);
            squares = _mm512_fmadd_ps(off, off, squares);
        }
        const __m512 factor = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / width + (float)eps));
        struct nightjar_range range = nightjar_no_range();
        for (int64_t i = 0; i < width; i += 16) {
            const __m512 off = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(of_row + i), mean), factor);
            const __m512 value = _mm512_fmadd_ps(off, _mm512_loadu_ps(scale + i), _mm512_loadu_ps(offset + i));
            _mm512_storeu_ps(normed + i, value);
            nightjar_widen(&range, value);
        }
        nightjar_quantise(normed, 0, width, range, made_levels + row * width, made_rows, row, n);
    }
    return 0;
}

__attribute__((optimize("O3"))) AOTITorchError aoti_torch_cpu_silu_levels(
    AtenTensorHandle product, AtenTensorHandle of_rows, AtenTensorHandle of_columns, AtenTensorHandle *levels,
    AtenTensorHandle *rows) {
    const float *sums, *given, *columns;
    float *made_rows;
    uint8_t *made_levels;
    int64_t *sizes;
    AOTITorchError error;
    if ((error = aoti_torch_get_sizes(product, &sizes)) || (error = aoti_torch_get_data_ptr(product, (void **)&sums)) ||
        (error = aoti_torch_get_data_ptr(of_rows, (void **)&given)) ||
        (error = aoti_torch_get_data_ptr(of_columns, (void **)&columns)) ||
        (error = nightjar_new_levels(sizes[0], sizes[1], levels, rows, &made_levels, &made_rows)))
        return error;
    const int64_t n = sizes[0], width = sizes[1];
    const float *ones = columns + width, *true_ones = columns + 2 * width, *bias = columns + 3 * width;
#pragma omp parallel for
    for (int64_t row = 0; row < n; row++) {
        const float *of_row = sums + row * width;
        float activations[width];
        const __m512 step = _mm512_set1_ps(given[row]), mean = _mm512_set1_ps(given[2 * n + row]);
        const __m512 low = _mm512_set1_ps(given[n + row] - given[2 * n + row]);
        struct nightjar_range range = nightjar_no_range();
        for (int64_t i = 0; i < width; i += 16) {
            __m512 x = _mm512_fmadd_ps(step, _mm512_loadu_ps(of_row + i), _mm512_loadu_ps(bias + i));
            x = _mm512_fmadd_ps(low, _mm512_loadu_ps(ones + i), x);
            x = _mm512_fmadd_ps(mean, _mm512_loadu_ps(true_ones + i), x);
            const __m512 e = nightjar_exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
            x = _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(e, _mm512_set1_ps(1))));
            _mm512_storeu_ps(activations + i, x);
            nightjar_widen(&range, x);
        }
        nightjar_quantise(activations, 0, width, range, made_levels + row * width, made_rows, row, n);
    }
    return 0;
}
