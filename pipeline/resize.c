/* Bicubic antialias resize and centre crop of 8-bit RGB, bit for bit what Pillow 13 computes (libImaging/Resample.c).
 *
 * Pillow works in 32-bit integers: weights are rounded to 22 bits, each pass adds one half and shifts. So a result does
 * not depend on the order of additions, and any vector width gives the same bits. Only what the crop shows is computed.
 * Both passes are the same sum over 16 neighbours in one register: of a row in the vertical pass, of 16 rows in the
 * horizontal one, which transposes them to 16 bytes per sample and back, into one plane per channel.
 *
 * Called through ctypes (pipeline/resize_cpu.py), which gives the GIL back meanwhile.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BITS 22 /* Pillow's PRECISION_BITS: 32 - 8 bits of a pixel - 2 of headroom for the filter's overshoot */
#define HALF (1 << (BITS - 1))
#define SUPPORT 2.0
#define LANES 16
#define CHANNELS 3

/* out[i] = level of the sum over k of weight[k] * levels[k * pitch + i], for `blocks` times 16 neighbours i. */
typedef void weighted_sum(const uint8_t *levels, ptrdiff_t pitch, const int32_t *weight, int count, int blocks,
                          uint8_t *out);

static void sum_plain(const uint8_t *levels, ptrdiff_t pitch, const int32_t *weight, int count, int blocks,
                      uint8_t *out) {
    for (; blocks; blocks--, levels += LANES, out += LANES) {
        int32_t sum[LANES];
        for (int i = 0; i < LANES; i++) sum[i] = HALF;
        for (int k = 0; k < count; k++)
            for (int i = 0; i < LANES; i++) sum[i] += weight[k] * levels[k * pitch + i];
        for (int i = 0; i < LANES; i++) {
            const int32_t level = sum[i] >> BITS;
            out[i] = level < 0 ? 0 : level > 255 ? 255 : level;
        }
    }
}

#ifdef __x86_64__
#include <immintrin.h>

__attribute__((target("avx2"))) static void sum_avx2(const uint8_t *levels, ptrdiff_t pitch, const int32_t *weight,
                                                     int count, int blocks, uint8_t *out) {
    for (; blocks; blocks--, levels += LANES, out += LANES) {
        __m256i low = _mm256_set1_epi32(HALF), high = low;
        for (int k = 0; k < count; k++) {
            const __m128i level = _mm_loadu_si128((const __m128i *)(levels + k * pitch));
            const __m256i w = _mm256_set1_epi32(weight[k]);
            low = _mm256_add_epi32(low, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(level), w));
            high = _mm256_add_epi32(high, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(level, 8)), w));
        }
        /* packing saturates; it works within halves of 128 bits, hence the permutation */
        const __m256i words = _mm256_packs_epi32(_mm256_srai_epi32(low, BITS), _mm256_srai_epi32(high, BITS));
        const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
        const __m128i first = _mm256_castsi256_si128(ordered), second = _mm256_extracti128_si256(ordered, 1);
        _mm_storeu_si128((__m128i *)out, _mm_packus_epi16(first, second));
    }
}

__attribute__((target("avx512f"))) static void sum_avx512(const uint8_t *levels, ptrdiff_t pitch,
                                                          const int32_t *weight, int count, int blocks, uint8_t *out) {
    for (; blocks; blocks--, levels += LANES, out += LANES) {
        __m512i sum = _mm512_set1_epi32(HALF);
        for (int k = 0; k < count; k++) {
            const __m512i level = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(levels + k * pitch)));
            sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(level, _mm512_set1_epi32(weight[k])));
        }
        const __m512i level = _mm512_max_epi32(_mm512_srai_epi32(sum, BITS), _mm512_setzero_si512());
        _mm_storeu_si128((__m128i *)out, _mm512_cvtusepi32_epi8(level)); /* saturates at 255 */
    }
}
#endif

static weighted_sum *fastest_sum(void) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) return sum_avx512;
    if (__builtin_cpu_supports("avx2")) return sum_avx2;
#endif
    return sum_plain;
}

/* Along one axis: output i is the sum of source pixels first[i] + k by weight[i * most + k], k < count[i]. */
typedef struct {
    int most, start, stop; /* source pixels [start, stop) are all that is read */
    int *first, *count;
    int32_t *weight;
} taps;

static double cubic(double x) { /* a = -0.5 */
    x = fabs(x);
    if (x < 1.0) return ((1.5 * x - 2.5) * x) * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0.0;
}

/* The middle `size` of `out_length` outputs. 0 when there is no memory. */
static int make_taps(taps *t, int length, int64_t out_length, int size) {
    const double scale = (double)length / out_length, stretch = scale < 1.0 ? 1.0 : scale;
    const double support = SUPPORT * stretch, inverse = 1.0 / stretch;
    const int64_t skip = (out_length - size) / 2;
    t->most = (int)ceil(support) * 2 + 1;
    t->first = malloc(sizeof(int) * size);
    t->count = malloc(sizeof(int) * size);
    t->weight = malloc(sizeof(int32_t) * (size_t)size * t->most);
    double *exact = malloc(sizeof(double) * t->most);
    const int whole = t->first && t->count && t->weight && exact;
    t->start = length, t->stop = 0;
    for (int i = 0; whole && i < size; i++) {
        const double centre = (i + skip + 0.5) * scale;
        int first = (int)(centre - support + 0.5), end = (int)(centre + support + 0.5);
        if (first < 0) first = 0;
        if (end > length) end = length;
        double sum = 0.0;
        for (int k = 0; k < end - first; k++) sum += exact[k] = cubic((k + first - centre + 0.5) * inverse);
        for (int k = 0; k < end - first; k++) {
            const double w = sum != 0.0 ? exact[k] / sum : exact[k];
            t->weight[(size_t)i * t->most + k] = (int32_t)((w < 0 ? -0.5 : 0.5) + w * (1 << BITS));
        }
        t->first[i] = first, t->count[i] = end - first;
        if (first < t->start) t->start = first;
        if (end > t->stop) t->stop = end;
    }
    free(exact);
    return whole;
}

static void free_taps(taps *t) {
    free(t->first);
    free(t->count);
    free(t->weight);
}

typedef uint8_t bytes16 __attribute__((vector_size(16)));

/* out[column * 16 + row] = in[row][column], by four rounds of interleaving rows i and i + 8. */
static inline void transpose16(const uint8_t *const in[LANES], size_t at, uint8_t *out) {
    const bytes16 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const bytes16 high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    bytes16 a[LANES], b[LANES];
    for (int i = 0; i < LANES; i++) memcpy(&a[i], in[i] + at, LANES);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            b[2 * i] = __builtin_shuffle(a[i], a[i + 8], low);
            b[2 * i + 1] = __builtin_shuffle(a[i], a[i + 8], high);
        }
        memcpy(a, b, sizeof a);
    }
    memcpy(out, a, sizeof a);
}

/* The horizontal pass over 16 rows of `bytes` (a multiple of 16), from source column t->start on. `turned` and `made`
 * are scratch of 16 * bytes and 16 * 3 * padded. Row r of the result: three planes of `padded` levels at
 * out + r * 3 * padded. */
static void across(weighted_sum *sum, const taps *t, int size, const uint8_t *const rows[LANES], size_t bytes,
                   uint8_t *turned, uint8_t *made, uint8_t *out, size_t padded) {
    const size_t pixel = CHANNELS * LANES;
    for (size_t at = 0; at < bytes; at += LANES) transpose16(rows, at, turned + at * LANES);
    for (int i = 0; i < size; i++) {
        const uint8_t *source = turned + (t->first[i] - t->start) * pixel;
        sum(source, pixel, t->weight + (size_t)i * t->most, t->count[i], CHANNELS, made + i * pixel);
    }
    for (int channel = 0; channel < CHANNELS; channel++)
        for (size_t at = 0; at < padded; at += LANES) {
            const uint8_t *columns[LANES];
            uint8_t block[LANES * LANES];
            for (int i = 0; i < LANES; i++) columns[i] = made + (at + i) * pixel + channel * LANES;
            transpose16(columns, 0, block);
            for (int row = 0; row < LANES; row++)
                memcpy(out + (row * CHANNELS + channel) * padded + at, block + row * LANES, LANES);
        }
}

/* The vertical pass for output row i: `samples` bytes, at least 16. `rows`: source row t->start; `pitch` to the next. */
static void down(weighted_sum *sum, const taps *t, int i, const uint8_t *rows, ptrdiff_t pitch, size_t samples,
                 uint8_t *out) {
    const int32_t *weight = t->weight + (size_t)i * t->most;
    const uint8_t *row = rows + (t->first[i] - t->start) * pitch;
    const size_t last = samples - LANES; /* the end once more, some of it a second time */
    sum(row, pitch, weight, t->count[i], (int)(samples / LANES), out);
    if (samples % LANES) sum(row + last, pitch, weight, t->count[i], 1, out + last);
}

/* Source row `y`, columns [start, stop), as contiguous RGB. */
static void copy_row(const uint8_t *image, ptrdiff_t row_stride, ptrdiff_t col_stride, int y, int start, int stop,
                     uint8_t *line) {
    const uint8_t *pixel = image + y * row_stride + start * col_stride;
    if (col_stride == CHANNELS) {
        memcpy(line, pixel, (size_t)(stop - start) * CHANNELS);
        return;
    }
    for (int x = start; x < stop; x++, pixel += col_stride, line += CHANNELS)
        line[0] = pixel[0], line[1] = pixel[1], line[2] = pixel[2];
}

static size_t round_up(size_t n) { return (n + LANES - 1) / LANES * LANES; }

/* `image`: height x width x 3 bytes with any strides (a turned or mirrored view); resized to out_height x out_width
 * (64 bits: a line of 12 million pixels grows to 224 x 2.7 billion), of which the middle is written to `out_chw`: 3 x size x size, contiguous. Returns 0, or -1 when memory is short. */
int nightjar_resize_crop(const uint8_t *image, int height, int width, ptrdiff_t row_stride, ptrdiff_t col_stride,
                         int64_t out_height, int64_t out_width, int size, int vertical_first, uint8_t *out_chw) {
    weighted_sum *sum = fastest_sum();
    taps rows = {0}, cols = {0};
    const int has_taps = make_taps(&rows, height, out_height, size) & make_taps(&cols, width, out_width, size);
    const int shown = cols.stop - cols.start, tall = rows.stop - rows.start;
    const int straight = col_stride == CHANNELS && shown * CHANNELS >= LANES; /* rows can be read where they are */
    const size_t padded = round_up(size), narrow_bytes = CHANNELS * padded;
    const size_t line_bytes = has_taps ? round_up((size_t)shown * CHANNELS) : 0;
    /* what the horizontal pass makes: all source rows in the usual order, the rows of the result else */
    const size_t narrow_rows = has_taps ? round_up(vertical_first ? size : tall) : 0;
    uint8_t *lines = calloc(LANES, line_bytes), *turned = malloc(LANES * line_bytes);
    uint8_t *made = calloc(LANES, narrow_bytes), *narrow = malloc((narrow_rows + 1) * narrow_bytes);
    uint8_t *source = has_taps && vertical_first && !straight ? calloc(tall, line_bytes) : NULL;
    const int whole = has_taps && lines && turned && made && narrow && (source || !vertical_first || straight);
    const uint8_t *line[LANES];
    for (int row = 0; row < LANES; row++) line[row] = lines + row * line_bytes;
    if (whole && vertical_first) {
        const uint8_t *first = source ? source : image + rows.start * row_stride + cols.start * CHANNELS;
        const ptrdiff_t pitch = source ? (ptrdiff_t)line_bytes : row_stride;
        const size_t samples = source ? line_bytes : (size_t)shown * CHANNELS;
        for (int y = 0; source && y < tall; y++)
            copy_row(image, row_stride, col_stride, rows.start + y, cols.start, cols.stop, source + y * line_bytes);
        for (int y = 0; y < size; y += LANES) {
            for (int row = 0; row < LANES && y + row < size; row++)
                down(sum, &rows, y + row, first, pitch, samples, lines + row * line_bytes);
            across(sum, &cols, size, line, line_bytes, turned, made, narrow + y * narrow_bytes, padded);
        }
    } else if (whole) {
        for (int y = 0; y < tall; y += LANES) {
            for (int row = 0; row < LANES && y + row < tall; row++) {
                const int at = rows.start + y + row;
                if (straight && at > 0 && at < height - 1) { /* up to 15 bytes past its end lies a neighbour */
                    line[row] = image + at * row_stride + cols.start * CHANNELS;
                } else {
                    copy_row(image, row_stride, col_stride, at, cols.start, cols.stop, lines + row * line_bytes);
                    line[row] = lines + row * line_bytes;
                }
            }
            across(sum, &cols, size, line, line_bytes, turned, made, narrow + y * narrow_bytes, padded);
        }
    }
    uint8_t *done = narrow + narrow_rows * narrow_bytes; /* one row more */
    for (int y = 0; whole && y < size; y++) {
        const uint8_t *row = narrow + y * narrow_bytes;
        if (!vertical_first) down(sum, &rows, y, narrow, (ptrdiff_t)narrow_bytes, narrow_bytes, done), row = done;
        for (int channel = 0; channel < CHANNELS; channel++)
            memcpy(out_chw + ((size_t)channel * size + y) * size, row + channel * padded, size);
    }
    free(lines), free(turned), free(made), free(narrow), free(source);
    free_taps(&rows), free_taps(&cols);
    return whole ? 0 : -1;
}
