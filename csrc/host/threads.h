// Runs a span function over rows on several threads: those of the OpenMP runtime the process has loaded, which are
// torch's, so that nothing fights torch for cores and a thread torch has just used is still awake. Found by name when
// first needed; nothing links to it. They do not survive a fork: a forked child, a process without OpenMP and other
// systems take helpers of our own, which sleep between calls.
//
// Rows are handed out in small pieces as threads become free, so one that wakes late delays nobody. Any number of
// threads may call at once.
#pragma once

#include <cstdint>

namespace fastvae {

using Piece = int (*)(const void* work, int64_t first, int64_t last);

// The bitwise or of what the pieces return. `cost` is the number of elements of one row: small work is not shared.
int run_rows(Piece piece, const void* work, int64_t rows, int64_t cost, int threads);

}  // namespace fastvae
