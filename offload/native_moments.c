/* The update of host memory whose moments are in bf16 or 8 bits, in one pass: offload/moments.py around the update with
 * fp32 moments, to the last bit. A block of elements at a time is widened, updated and rounded in local arrays, by loops
 * of one length that a compiler makes vectors of. Blocks are independent: the number of threads changes nothing. */

#include "native_rules.h"

#ifdef __AVX512VBMI__
#include <immintrin.h>
#endif

/* Elements that share a scale. */
#define BLOCK 64
/* Decades of the longer map. */
#define LINES 8

/* 256 numbers, and the same by their bytes: all the lowest ones first. */
typedef struct {
    const float *numbers;
    const uint8_t *planes;
} table;

/* A map of codes: native_moments.py. The lines lie over its numbers, index by ratio, a little too low. */
typedef struct {
    table values; /* by code, as an unsigned byte */
    table sizes;  /* the numbers that are not negative, in order */
    float slopes[LINES], offsets[LINES];
    int32_t last; /* the last of them but one */
} code_map;

/* What is updated. Moments that a rule does not have, scales of bf16 and remainders of fp32 weights are not touched. */
typedef struct {
    void *weight;
    int16_t *remainder;
    const void *gradient;
    void *moments[2];
    float *scales[2];
    const code_map *maps; /* of signed numbers, and of squares */
    int64_t elements;
    float clip;
    uint32_t seed;
} span;

/* A block of it in fp32, zeros behind the last element. */
typedef struct {
    float master[BLOCK], gradient[BLOCK], moments[2][BLOCK];
    uint32_t draw[BLOCK];
    int64_t at; /* its first element */
    int count;
} block;

#define EACH(i) _Pragma("omp simd") for (int i = 0; i < BLOCK; i++)

/* Between memory and a local array: constant sizes where the block is whole. */
static inline void copy(void *to, const void *from, int count, size_t size) {
    if (count == BLOCK)
        memcpy(to, from, BLOCK * size);
    else
        memcpy(to, from, (size_t)count * size);
}

static inline void load_split(const span *all, block *here) {
    uint16_t weight[BLOCK] = {0}, gradient[BLOCK] = {0};
    int16_t remainder[BLOCK] = {0};
    copy(weight, (const uint16_t *)all->weight + here->at, here->count, sizeof *weight);
    copy(gradient, (const uint16_t *)all->gradient + here->at, here->count, sizeof *gradient);
    copy(remainder, all->remainder + here->at, here->count, sizeof *remainder);
    EACH(i) {
        here->master[i] = joined(weight[i], remainder[i]);
        here->gradient[i] = float_of((uint32_t)gradient[i] << 16);
    }
}

static inline void store_split(const span *all, const block *here) {
    uint16_t weight[BLOCK];
    int16_t remainder[BLOCK];
    EACH(i) {
        weight[i] = upper(here->master[i]);
        remainder[i] = lower(here->master[i]);
    }
    copy((uint16_t *)all->weight + here->at, weight, here->count, sizeof *weight);
    copy(all->remainder + here->at, remainder, here->count, sizeof *remainder);
}

static inline void load_fp32(const span *all, block *here) {
    if (here->count < BLOCK) {
        memset(here->master, 0, sizeof here->master);
        memset(here->gradient, 0, sizeof here->gradient);
    }
    copy(here->master, (const float *)all->weight + here->at, here->count, sizeof(float));
    copy(here->gradient, (const float *)all->gradient + here->at, here->count, sizeof(float));
}

static inline void store_fp32(const span *all, const block *here) {
    copy((float *)all->weight + here->at, here->master, here->count, sizeof(float));
}

/* 32 bits for each element, from what the update begins with: moments.py's _drawn. */
static inline void draw(const span *all, block *here) {
    uint32_t seed = all->seed * 0xC2B2AE35u;
    EACH(i) {
        uint32_t x = bits_of(here->gradient[i]) * 0x9E3779B1u + bits_of(here->master[i]) * 0x85EBCA6Bu + seed;
        x = (x ^ x >> 16) * 0x7FEB352Du;
        x = (x ^ x >> 15) * 0x846CA68Bu;
        here->draw[i] = x ^ x >> 16;
    }
}

static inline void widen_bf16(const span *all, block *here, int moment, int squares) {
    uint16_t numbers[BLOCK] = {0};
    float *wide = here->moments[moment];
    copy(numbers, (const uint16_t *)all->moments[moment] + here->at, here->count, sizeof *numbers);
    EACH(i) wide[i] = float_of((uint32_t)numbers[i] << 16);
}

static inline void narrow_bf16(const span *all, const block *here, int moment, int squares) {
    uint16_t numbers[BLOCK];
    const float *wide = here->moments[moment];
    EACH(i) {
        uint32_t drawn = here->draw[i] >> 16 * moment & 0xFFFF;
        uint16_t high = (uint16_t)((bits_of(wide[i]) + drawn) >> 16);
        numbers[i] = wide[i] != wide[i] ? 0x7fc0 : high;
    }
    copy((uint16_t *)all->moments[moment] + here->at, numbers, here->count, sizeof *numbers);
}

/* Numbers of a table, by their index. Without the processor's permutations of bytes it takes twice as long. */
static inline void look_up(const table *from, const uint8_t *index, float *found) {
#ifdef __AVX512VBMI__
    /* A byte of all numbers at a time; the four of a number are then put together, which is done in an order that the
     * first permutation makes up for. */
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i at = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(index)), bytes[4];
    __mmask64 upper_half = _mm512_movepi8_mask(at);
    for (int i = 0; i < 4; i++) {
        const uint8_t *plane = from->planes + 256 * i;
        __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(plane), at, _mm512_loadu_si512(plane + 64));
        __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(plane + 128), at, _mm512_loadu_si512(plane + 192));
        bytes[i] = _mm512_mask_blend_epi8(upper_half, low, high);
    }
    __m512i a = _mm512_unpacklo_epi8(bytes[0], bytes[1]), b = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
    __m512i c = _mm512_unpacklo_epi8(bytes[2], bytes[3]), d = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
    _mm512_storeu_si512(found, _mm512_unpacklo_epi16(a, c));
    _mm512_storeu_si512(found + 16, _mm512_unpackhi_epi16(a, c));
    _mm512_storeu_si512(found + 32, _mm512_unpacklo_epi16(b, d));
    _mm512_storeu_si512(found + 48, _mm512_unpackhi_epi16(b, d));
#else
    EACH(i) found[i] = from->numbers[index[i]];
#endif
}

static inline void widen_8bit(const span *all, block *here, int moment, int squares) {
    float *wide = here->moments[moment], scale = all->scales[moment][here->at / BLOCK];
    uint8_t codes[BLOCK] = {0};
    copy(codes, (const uint8_t *)all->moments[moment] + here->at, here->count, sizeof *codes);
    look_up(&all->maps[squares].values, codes, wide);
    EACH(i) wide[i] *= scale;
}

static inline void narrow_8bit(const span *all, block *here, int moment, int squares) {
    const code_map *map = &all->maps[squares];
    const int32_t last = map->last;
    float *wide = here->moments[moment], ratios[BLOCK], below[BLOCK], above[BLOCK];
    uint8_t index[BLOCK], next[BLOCK], codes[BLOCK];
    uint32_t largest = 0;
    for (int i = here->count; i < BLOCK; i++)
        wide[i] = 0.0f;
    /* Without their signs bits are in the order of the numbers, and those of a NaN are above them all. */
    _Pragma("omp simd reduction(max : largest)") for (int i = 0; i < BLOCK; i++) {
        uint32_t size = bits_of(wide[i]) & 0x7fffffffu;
        largest = size > largest ? size : largest;
    }
    float scale = float_of(largest > 0x7f800000u ? 0x7fc00000u : largest), divisor = scale == 0.0f ? 1.0f : scale;
    EACH(i) {
        float ratio = ratios[i] = fabsf(wide[i]) / divisor, lowest = 256.0f; /* as it stays where a ratio is NaN */
        for (int line = 0; line < LINES; line++) {
            float height = fmaf(map->slopes[line], ratio, map->offsets[line]);
            lowest = height < lowest ? height : lowest;
        }
        int32_t at = lowest < (float)last ? (int32_t)lowest : last;
        at = (int32_t)bits_of(ratio) < 0 ? 0 : at; /* of infinity by itself: a NaN with a sign, where it has one */
        index[i] = (uint8_t)at;
        next[i] = (uint8_t)(at + 1);
    }
    look_up(&map->sizes, next, above);
    EACH(i) {
        int32_t at = index[i] + (ratios[i] >= above[i]);
        at = at > last ? last : at;
        index[i] = (uint8_t)at;
        next[i] = (uint8_t)(at + 1);
    }
    look_up(&map->sizes, index, below);
    look_up(&map->sizes, next, above);
    EACH(i) {
        int32_t at = index[i];
        float apart = above[i] - below[i];
        float drawn = (float)(int32_t)(here->draw[i] >> 16 * moment & 0xFFFF);
        at += ratios[i] - below[i] > apart * drawn * 0x1p-16f;
        codes[i] = (uint8_t)(squares ? at : at * ((wide[i] > 0.0f) - (wide[i] < 0.0f)));
    }
    copy((uint8_t *)all->moments[moment] + here->at, codes, here->count, sizeof *codes);
    all->scales[moment][here->at / BLOCK] = scale;
}

/* Each rule over a span: how many moments it keeps, and whether the first are squares; second ones always are. Weights
 * and gradients are as in native_update.c. */
#define SPAN(rule, kept, squares, weights, format)                                                                     \
    void memplan_##rule##_##weights##_##format(const span *given, const rule##_scalars *scalars, int threads) {        \
        const span all = *given;                                                                                       \
        const rule##_scalars how = *scalars;                                                                           \
        _Pragma("omp parallel for num_threads(threads) schedule(dynamic)") for (int64_t from = 0; from < all.elements; \
                                                                                from += TAKEN) {                       \
            int64_t stop = from + TAKEN < all.elements ? from + TAKEN : all.elements;                                  \
            for (int64_t at = from; at < stop; at += BLOCK) {                                                          \
                block here;                                                                                            \
                here.at = at, here.count = at + BLOCK < stop ? BLOCK : (int)(stop - at);                               \
                load_##weights(&all, &here);                                                                           \
                widen_##format(&all, &here, 0, squares);                                                               \
                if (kept > 1)                                                                                          \
                    widen_##format(&all, &here, 1, 1);                                                                 \
                draw(&all, &here);                                                                                     \
                EACH(i) {                                                                                              \
                    float m = here.moments[0][i], v = kept > 1 ? here.moments[1][i] : 0.0f;                            \
                    here.master[i] = rule(here.master[i], here.gradient[i] * all.clip, &m, &v, &how);                  \
                    here.moments[0][i] = m;                                                                            \
                    if (kept > 1)                                                                                      \
                        here.moments[1][i] = v;                                                                        \
                }                                                                                                      \
                store_##weights(&all, &here);                                                                          \
                narrow_##format(&all, &here, 0, squares);                                                              \
                if (kept > 1)                                                                                          \
                    narrow_##format(&all, &here, 1, 1);                                                                \
            }                                                                                                          \
        }                                                                                                              \
    }

#define SPANS(rule, kept, squares)                                                                                     \
    SPAN(rule, kept, squares, split, bf16)                                                                             \
    SPAN(rule, kept, squares, split, 8bit)                                                                             \
    SPAN(rule, kept, squares, fp32, bf16)                                                                              \
    SPAN(rule, kept, squares, fp32, 8bit)

SPANS(adam, 2, 0)
SPANS(lion, 1, 0)
SPANS(momentum, 1, 0)
SPANS(adagrad, 1, 1)
