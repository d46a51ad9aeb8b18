/* The 8-bit rows that go into the second product of an MLP, from the sums of the first; part of the compiled library.
 *
 * export/int8.py states the same in torch (`silu_levels`), and export/to_aoti.py puts it into the library, where
 * torch's compiler would make two passes of 43 cycles for 16 values: exp() by a call, a division, NaN-proof minima. Here
 * they take 15, which makes int8 of B/32 5 % faster. A row with a NaN keeps it in its mean, and so in its vector.
 * exp and the reciprocal are good to 4e-6 and 6e-5 of their value; a level is 4e-3 of the range of a row.
 */
#include "vectors.h"

__attribute__((optimize("O3"))) AOTITorchError aoti_torch_cpu_silu_levels(
    AtenTensorHandle product, AtenTensorHandle step, AtenTensorHandle low, AtenTensorHandle mean, AtenTensorHandle ones,
    AtenTensorHandle true_ones, AtenTensorHandle bias, AtenTensorHandle *levels, AtenTensorHandle *rows) {
    const AtenTensorHandle given[] = {product, step, low, mean, ones, true_ones, bias};
    float *values[7], *made_rows;
    uint8_t *made_levels;
    int64_t *sizes;
    AOTITorchError error = aoti_torch_get_sizes(product, &sizes);
    for (int i = 0; i < 7 && !error; i++) error = aoti_torch_get_data_ptr(given[i], (void **)&values[i]);
    if (error) return error;
    const int64_t n = sizes[0], width = sizes[1];
    const int64_t levels_shape[] = {n, width}, levels_strides[] = {width, 1}, rows_shape[] = {3, n}, rows_strides[] = {n, 1};
    const int32_t cpu = aoti_torch_device_type_cpu();
    if ((error = aoti_torch_empty_strided(2, levels_shape, levels_strides, aoti_torch_dtype_uint8(), cpu, 0, levels)) ||
        (error = aoti_torch_empty_strided(2, rows_shape, rows_strides, aoti_torch_dtype_float32(), cpu, 0, rows)) ||
        (error = aoti_torch_get_data_ptr(*levels, (void **)&made_levels)) ||
        (error = aoti_torch_get_data_ptr(*rows, (void **)&made_rows)))
        return error;

#pragma omp parallel for
    for (int64_t row = 0; row < n; row++) {
        float *sums = values[0] + row * width; /* becomes the activations: nobody reads the sums again */
        const __m512 scale = _mm512_set1_ps(values[1][row]), middle = _mm512_set1_ps(values[3][row]);
        const __m512 offset = _mm512_set1_ps(values[2][row] - values[3][row]);
        __m512 least = _mm512_set1_ps(INFINITY), most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += 16) {
            __m512 x = _mm512_fmadd_ps(scale, _mm512_loadu_ps(sums + i), _mm512_loadu_ps(values[6] + i));
            x = _mm512_fmadd_ps(offset, _mm512_loadu_ps(values[4] + i), x);
            x = _mm512_fmadd_ps(middle, _mm512_loadu_ps(values[5] + i), x);
            const __m512 e = nightjar_exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
            x = _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(e, _mm512_set1_ps(1))));
            _mm512_storeu_ps(sums + i, x);
            least = _mm512_min_ps(least, x);
            most = _mm512_max_ps(most, x);
            total = _mm512_add_ps(total, x);
        }
        const float bottom = _mm512_reduce_min_ps(least), range = _mm512_reduce_max_ps(most) - bottom;
        const float one_level = (range > 1e-12f ? range : 1e-12f) / 255;
        const __m512 base = _mm512_set1_ps(bottom), per_value = _mm512_set1_ps(1 / one_level);
        for (int64_t i = 0; i < width; i += 16) {
            const __m512 level = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(sums + i), base), per_value);
            _mm_storeu_si128((__m128i *)(made_levels + row * width + i), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(level)));
        }
        made_rows[row] = one_level;
        made_rows[n + row] = bottom;
        made_rows[2 * n + row] = _mm512_reduce_add_ps(total) / width;
    }
    return 0;
}
