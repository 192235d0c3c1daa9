// Runs a span function over rows on the calling thread and on helpers that sleep between calls.
//
// Not OpenMP: its pools do not survive a fork, so a forked DataLoader worker that asked for two threads would wait for
// ever, and a second runtime beside torch's own would fight it for cores. Rows are handed out in small pieces as threads
// become free, so a helper that wakes late delays nobody. Any number of threads may call at once.
#pragma once

#include <cstdint>

namespace fastvae {

using Piece = int (*)(const void* work, int64_t first, int64_t last);

// The bitwise or of what the pieces return. `cost` is the number of elements of one row: small work is not shared.
int run_rows(Piece piece, const void* work, int64_t rows, int64_t cost, int threads);

}  // namespace fastvae
