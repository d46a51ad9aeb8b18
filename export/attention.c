/* Attention of pictures in bf16, from the rows of q, k and v as one product made them; part of a compiled library.
 *
 * export/attention.py states the same in torch, and export/to_aoti.py puts it into the library. With 50 tokens
 * the products are so small that rearranging rows for them, a call for each and the passes of softmax cost three times
 * what they compute. Here one picture and head at a time stays in the first-level cache: k is turned so that 16 scores
 * are neighbours, v is paired so that two tokens are multiplied at once (VDPBF16PS), four rows of q share every load.
 * Scores, softmax and sums are fp32; the probabilities are rounded to bf16 as in torch, and divided by their sum last.
 */
#include "vectors.h"

#define HEAD 64              /* values of a head */
#define PAIRS (HEAD / 2)     /* VDPBF16PS multiplies two at a time */
#define WIDTH_OF_BLOCK 64    /* scores in four registers */
#define ROWS 4               /* of q at a time: 16 sums in registers */

static inline __attribute__((always_inline)) void nightjar_transpose16(const __m512i *in, __m512i *out) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            b[i + 2 * k] = _mm512_unpacklo_epi64(a[i + k], a[i + k + 2]);
            b[i + 2 * k + 1] = _mm512_unpackhi_epi64(a[i + k], a[i + k + 2]);
        }
    for (int k = 0; k < 4; k++) {
        const __m512i low = _mm512_shuffle_i32x4(b[k], b[4 + k], 0x88), high = _mm512_shuffle_i32x4(b[k], b[4 + k], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(b[8 + k], b[12 + k], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(b[8 + k], b[12 + k], 0xdd);
        out[k] = _mm512_shuffle_i32x4(low, low2, 0x88);
        out[8 + k] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        out[4 + k] = _mm512_shuffle_i32x4(high, high2, 0x88);
        out[12 + k] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

/* sums += asked times each of four neighbours, for every row: the loads of the four are shared. */
static inline __attribute__((always_inline)) void nightjar_dots(
    __m512 sums[ROWS][4], const int32_t *const *asks, int64_t pair, const __m512i *with) {
    __m512i four[4];
    for (int c = 0; c < 4; c++) {
        four[c] = _mm512_load_si512(with + c);
        __asm__("" : "+v"(four[c])); /* once, not for each row */
    }
    for (int r = 0; r < ROWS; r++) {
        const __m512bh asked = (__m512bh)_mm512_set1_epi32(asks[r][pair]);
        for (int c = 0; c < 4; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], asked, (__m512bh)four[c]);
    }
}

/* Of 16 scores, those of tokens there are. */
static inline __attribute__((always_inline)) __mmask16 nightjar_counted(int64_t tokens) {
    return tokens >= 16 ? 0xffff : tokens > 0 ? (1 << tokens) - 1 : 0;
}

__attribute__((optimize("O3"))) static void nightjar_attend(const uint16_t *q, int64_t tokens, int64_t width, uint16_t *out) {
    const int64_t pitch = 3 * width, padded = (tokens + WIDTH_OF_BLOCK - 1) / WIDTH_OF_BLOCK * WIDTH_OF_BLOCK;
    const uint16_t *k = q + width, *v = q + 2 * width;
    __m512i k_turned[PAIRS * padded / 16], v_paired[padded / 2 * 4];
    float scores[ROWS * padded];
    uint16_t parts[ROWS * padded];
    for (int64_t j = 0; j < padded; j += 16)
        for (int half = 0; half < 2; half++) {
            __m512i rows[16], turned[16];
            for (int i = 0; i < 16; i++)
                rows[i] = j + i < tokens ? _mm512_loadu_si512(k + (j + i) * pitch + 32 * half) : _mm512_setzero_si512();
            nightjar_transpose16(rows, turned);
            for (int i = 0; i < 16; i++) k_turned[(16 * half + i) * (padded / 16) + j / 16] = turned[i];
        }
    for (int64_t j = 0; j < padded; j += 2)
        for (int half = 0; half < 2; half++) {
            const __m512i none = _mm512_setzero_si512();
            const __m512i one = j < tokens ? _mm512_loadu_si512(v + j * pitch + 32 * half) : none;
            const __m512i two = j + 1 < tokens ? _mm512_loadu_si512(v + (j + 1) * pitch + 32 * half) : none;
            v_paired[2 * j + 2 * half] = _mm512_unpacklo_epi16(one, two); /* values 0-3, 8-11, ... of this half */
            v_paired[2 * j + 2 * half + 1] = _mm512_unpackhi_epi16(one, two); /* values 4-7, 12-15, ... */
        }
    for (int64_t row = 0; row < tokens; row += ROWS) {
        const int32_t *asks[ROWS], *asks_of_v[ROWS]; /* rows beyond the last one are the last one again, and not written */
        __m512 most[ROWS], over[ROWS];
        for (int r = 0; r < ROWS; r++) {
            asks[r] = (const int32_t *)(q + (row + r < tokens ? row + r : tokens - 1) * pitch);
            asks_of_v[r] = (const int32_t *)(parts + r * padded);
            most[r] = _mm512_set1_ps(-INFINITY);
        }
        for (int64_t j = 0; j < padded; j += WIDTH_OF_BLOCK) {
            __m512 sums[ROWS][4];
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_ps();
            for (int pair = 0; pair < PAIRS; pair++) nightjar_dots(sums, asks, pair, k_turned + pair * (padded / 16) + j / 16);
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < 4; c++) {
                    _mm512_storeu_ps(scores + r * padded + j + 16 * c, sums[r][c]);
                    most[r] = _mm512_mask_max_ps(most[r], nightjar_counted(tokens - j - 16 * c), most[r], sums[r][c]);
                }
        }
        for (int r = 0; r < ROWS; r++) {
            const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most[r]));
            __m512 total = _mm512_setzero_ps();
            for (int64_t j = 0; j < padded; j += 16) {
                const __m512 score = _mm512_loadu_ps(scores + r * padded + j);
                const __m512 all = nightjar_exp(_mm512_sub_ps(score, largest));
                const __m512 part = _mm512_maskz_mov_ps(nightjar_counted(tokens - j), all);
                total = _mm512_add_ps(total, part);
                _mm256_storeu_si256((__m256i *)(parts + r * padded + j), (__m256i)_mm512_cvtneps_pbh(part));
            }
            over[r] = _mm512_set1_ps(1 / _mm512_reduce_add_ps(total));
        }
        __m512 sums[ROWS][4];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_ps();
        for (int64_t pair = 0; pair < (tokens + 1) / 2; pair++) nightjar_dots(sums, asks_of_v, pair, v_paired + 4 * pair);
        for (int r = 0; r < ROWS && row + r < tokens; r++)
            for (int half = 0; half < 2; half++) {
                const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sums[r][2 * half], over[r]));
                const __m256i high = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sums[r][2 * half + 1], over[r]));
                const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
                uint16_t *to = out + (row + r) * width + 32 * half;
                _mm256_storeu_si256((__m256i *)to, _mm256_permute2x128_si256(even, odd, 0x20));
                _mm256_storeu_si256((__m256i *)(to + 16), _mm256_permute2x128_si256(even, odd, 0x31));
            }
    }
}

AOTITorchError aoti_torch_cpu_attention(AtenTensorHandle qkv, int64_t tokens, AtenTensorHandle *seen) {
    int64_t *sizes;
    uint16_t *given, *made;
    AOTITorchError error = aoti_torch_get_sizes(qkv, &sizes);
    if (error || (error = aoti_torch_get_data_ptr(qkv, (void **)&given))) return error;
    const int64_t rows = sizes[0], width = sizes[1] / 3, heads = width / HEAD, shape[] = {rows, width}, strides[] = {width, 1};
    const int32_t cpu = aoti_torch_device_type_cpu();
    if ((error = aoti_torch_empty_strided(2, shape, strides, aoti_torch_dtype_bfloat16(), cpu, 0, seen)) ||
        (error = aoti_torch_get_data_ptr(*seen, (void **)&made)))
        return error;
#pragma omp parallel for
    for (int64_t part = 0; part < rows / tokens * heads; part++) {
        const int64_t first = part / heads * tokens, start = part % heads * HEAD;
        nightjar_attend(given + first * 3 * width + start, tokens, width, made + first * width + start);
    }
    return 0;
}
