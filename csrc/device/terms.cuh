// What the loops over a reconstruction term share: how much a thread takes at once, and which kernel a call is for.
#pragma once

#include "../likelihoods.h"
#include "memory.cuh"
#include "rows.cuh"

namespace fastvae {
namespace device {

// Elements of Y in 16 bytes.
template <class Y>
constexpr int VECTOR = 16 / sizeof(Y);

// An SM has at least so many: two would not leave the counts of float64 the registers they need.
template <class Y>
constexpr int BLOCKS = sizeof(Y) == 8 ? 1 : 2;

// launch(TERM{}, y, x) for the likelihood of `of`, with values of the types of recon and target.
template <class LAUNCH>
int64_t for_types(const Reconstruction& of, LAUNCH launch) {
    int64_t segments = 0;
    with_likelihood(of.likelihood, [&](auto term) {
        using TERM = decltype(term);
        with_dtype(of.recon_type, [&](auto y) {
            using Y = decltype(y);
            if (of.target_type == of.recon_type) {
                segments = launch(TERM{}, y, y);
                return;
            }
            if constexpr (sizeof(Y) < 8) {  // beside float64, a target of another type is converted by torch
                if constexpr (TERM::TARGET != Domain::COUNT) {  // a byte is x/255: counts come as floats
                    if (of.target_type == UINT8) {
                        segments = launch(TERM{}, y, uint8_t{});
                        return;
                    }
                }
                if (of.target_type == FLOAT32) {
                    segments = launch(TERM{}, y, float{});
                    return;
                }
            }
            throw std::invalid_argument("target must be uint8, float32 or of the dtype of recon");
        });
    });
    return segments;
}

}  // namespace device
}  // namespace fastvae
