/* AdamW on host memory in one pass, in the arithmetic of offload/optimizer.py: every operation rounds once, in that
 * order. Contraction is off; the two fused multiply-adds are those of torch's lerp and addcmul. Elements are independent,
 * so the number of threads changes nothing. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#pragma STDC FP_CONTRACT OFF

typedef struct {
    float clip, decay, lerp, beta2, rest2, correction2, eps, step_size;
} How;

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float adamw(float master, float gradient, float *exp_avg, float *exp_avg_sq, const How *how) {
    float g = gradient * how->clip, m = *exp_avg, apart = g - m;
    m = how->lerp < 0.5f ? fmaf(how->lerp, apart, m) : fmaf(how->lerp - 1.0f, apart, g);
    float v = *exp_avg_sq * how->beta2;
    v = fmaf(how->rest2 * g, g, v);
    *exp_avg = m;
    *exp_avg_sq = v;
    float denominator = sqrtf(v) / how->correction2 + how->eps;
    return master * how->decay + how->step_size * m / denominator;
}

/* Master: a bf16 weight above, a signed 16-bit remainder below; the gradient is bf16. */
void memplan_adamw_split(uint16_t *restrict weight, int16_t *restrict remainder, const uint16_t *restrict gradient,
                         float *restrict exp_avg, float *restrict exp_avg_sq, int64_t elements, const How *given,
                         int threads) {
    const How how = *given;
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < elements; i++) {
        uint32_t before = ((uint32_t)weight[i] << 16) + (uint32_t)(int32_t)remainder[i];
        float master = adamw(float_of(before), float_of((uint32_t)gradient[i] << 16), &exp_avg[i], &exp_avg_sq[i], &how);
        uint32_t bits = bits_of(master);
        uint16_t high = (uint16_t)((bits + 0x8000u) >> 16);
        weight[i] = master != master ? 0x7fc0 : high; /* rounding up may carry a NaN over to zero */
        remainder[i] = (int16_t)(uint16_t)bits;
    }
}

void memplan_adamw_fp32(float *restrict weight, const float *restrict gradient, float *restrict exp_avg,
                        float *restrict exp_avg_sq, int64_t elements, const How *given, int threads) {
    const How how = *given;
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < elements; i++)
        weight[i] = adamw(weight[i], gradient[i], &exp_avg[i], &exp_avg_sq[i], &how);
}
