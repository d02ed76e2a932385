/* The update of host memory in one pass. Elements are independent, so the number of threads changes nothing. */

#include "native_rules.h"

/* Each rule over a span. Split: the master is a bf16 weight above and a signed 16-bit remainder below; the gradient is
 * bf16. A rule without a second moment, or any, is given NULL for it, which it does not touch. */
#define SPANS(rule, moments)                                                                                           \
    void memplan_##rule##_split(uint16_t *restrict weight, int16_t *restrict remainder,                                \
                                const uint16_t *restrict gradient, float *restrict first, float *restrict second,      \
                                int64_t elements, float clip, const rule##_scalars *given, int threads) {              \
        const rule##_scalars how = *given;                                                                             \
        _Pragma("omp parallel for num_threads(threads) schedule(dynamic)") for (int64_t at = 0; at < elements;         \
                                                                                at += TAKEN) {                         \
            int64_t stop = at + TAKEN < elements ? at + TAKEN : elements;                                              \
            _Pragma("omp simd") for (int64_t i = at; i < stop; i++) {                                                  \
                float m = moments > 0 ? first[i] : 0.0f, v = moments > 1 ? second[i] : 0.0f;                           \
                float before = joined(weight[i], remainder[i]), g = float_of((uint32_t)gradient[i] << 16) * clip;      \
                float master = rule(before, g, &m, &v, &how);                                                          \
                weight[i] = upper(master);                                                                             \
                remainder[i] = lower(master);                                                                          \
                if (moments > 0)                                                                                       \
                    first[i] = m;                                                                                      \
                if (moments > 1)                                                                                       \
                    second[i] = v;                                                                                     \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    void memplan_##rule##_fp32(float *restrict weight, const float *restrict gradient, float *restrict first,          \
                               float *restrict second, int64_t elements, float clip, const rule##_scalars *given,      \
                               int threads) {                                                                          \
        const rule##_scalars how = *given;                                                                             \
        _Pragma("omp parallel for num_threads(threads) schedule(dynamic)") for (int64_t at = 0; at < elements;         \
                                                                                at += TAKEN) {                         \
            int64_t stop = at + TAKEN < elements ? at + TAKEN : elements;                                              \
            _Pragma("omp simd") for (int64_t i = at; i < stop; i++) {                                                  \
                float m = moments > 0 ? first[i] : 0.0f, v = moments > 1 ? second[i] : 0.0f;                           \
                weight[i] = rule(weight[i], gradient[i] * clip, &m, &v, &how);                                         \
                if (moments > 0)                                                                                       \
                    first[i] = m;                                                                                      \
                if (moments > 1)                                                                                       \
                    second[i] = v;                                                                                     \
            }                                                                                                          \
        }                                                                                                              \
    }

SPANS(adam, 2)
SPANS(lion, 1)
SPANS(sgd, 0)
SPANS(momentum, 1)
SPANS(adagrad, 1)
