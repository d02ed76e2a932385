/* The arithmetic of offload/rules.py, for all that is compiled: every operation rounds once, in that order. Contraction
 * is off; the fused multiply-adds are those of torch's lerp, addcmul, and add with a factor. */

#ifndef MEMPLAN_NATIVE_RULES
#define MEMPLAN_NATIVE_RULES

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#pragma STDC FP_CONTRACT OFF

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

static inline float lerp(float from, float to, float weight) {
    float apart = to - from;
    return weight < 0.5f ? fmaf(weight, apart, from) : fmaf(weight - 1.0f, apart, to);
}

static inline float pulled(float gradient, float master, float share) {
    return share != 0.0f ? fmaf(share, master, gradient) : gradient;
}

/* The rules: a master and its gradient, two places for moments, the scalars of the rule; the new master. */

typedef struct {
    float pull, shrink, lerp, beta2, rest2, correction2, eps, step_size;
} adam_scalars;

static inline float adam(float master, float gradient, float *exp_avg, float *exp_avg_sq, const adam_scalars *how) {
    float g = pulled(gradient, master, how->pull);
    float m = *exp_avg = lerp(*exp_avg, g, how->lerp);
    float v = *exp_avg_sq = fmaf(how->rest2 * g, g, *exp_avg_sq * how->beta2);
    float denominator = sqrtf(v) / how->correction2 + how->eps;
    return master * how->shrink + how->step_size * m / denominator;
}

typedef struct {
    float shrink, lerp1, lerp2, step_size;
} lion_scalars;

static inline float lion(float master, float gradient, float *exp_avg, float *unused, const lion_scalars *how) {
    float average = lerp(*exp_avg, gradient, how->lerp1);
    float sign = (float)((average > 0.0f) - (average < 0.0f));
    *exp_avg = lerp(*exp_avg, gradient, how->lerp2);
    return master * how->shrink + how->step_size * sign;
}

typedef struct {
    float pull, step_size;
} sgd_scalars;

static inline float sgd(float master, float gradient, float *unused1, float *unused2, const sgd_scalars *how) {
    return fmaf(how->step_size, pulled(gradient, master, how->pull), master);
}

typedef struct {
    float pull, momentum, share, nesterov, step_size;
} momentum_scalars;

static inline float momentum(float master, float gradient, float *buffer, float *unused, const momentum_scalars *how) {
    float g = pulled(gradient, master, how->pull);
    float b = *buffer = fmaf(how->share, g, *buffer * how->momentum);
    return fmaf(how->step_size, how->nesterov != 0.0f ? fmaf(how->momentum, b, g) : b, master);
}

typedef struct {
    float pull, first, initial, eps, step_size;
} adagrad_scalars;

static inline float adagrad(float master, float gradient, float *sum, float *unused, const adagrad_scalars *how) {
    float g = pulled(gradient, master, how->pull);
    float total = *sum = fmaf(g, g, how->first != 0.0f ? how->initial : *sum);
    return master + how->step_size * g / (sqrtf(total) + how->eps);
}

/* A bf16 weight above and a signed 16-bit remainder below are a master. */

static inline float joined(uint16_t weight, int16_t remainder) {
    return float_of(((uint32_t)weight << 16) + (uint32_t)(int32_t)remainder);
}

static inline uint16_t upper(float master) {
    uint16_t high = (uint16_t)((bits_of(master) + 0x8000u) >> 16);
    return master != master ? 0x7fc0 : high; /* rounding up may carry a NaN over to zero */
}

static inline int16_t lower(float master) {
    return (int16_t)(uint16_t)bits_of(master);
}

/* Elements that a thread takes at a time. Threads that feed a GPU run on the same cores now and then: with a fixed part
 * for each thread, all would wait for the one that was put aside. */
#define TAKEN 65536

#endif
