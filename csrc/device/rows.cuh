// How blocks share rows, and how their sums become a loss.
//
// An item is a segment of a row; a group of threads, a warp where rows are short and a block where they are long, takes one
// item after another. Within an item every thread takes vectors of 16 bytes in turn; elements before and after the aligned
// part go one at a time. Each item leaves one sum in scratch; a second, small kernel adds those up in a fixed order:
// no atomics, the same bits every time.
#pragma once

#include <cub/block/block_reduce.cuh>
#include <cub/warp/warp_reduce.cuh>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "memory.cuh"
#include "primitives.h"

namespace fastvae {
namespace device {

constexpr int THREADS = 256;
constexpr int WARP = 32;

struct Share {
    int group;  // threads an item: WARP or THREADS
    dim3 grid;  // segments of a row, and blocks that share the rows
    int64_t segments() const { return grid.x; }
    int64_t blocks() const { return int64_t{grid.x} * grid.y; }
};

inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Puts `grid` blocks of THREADS on a stream. A call, no <<<>>>, so that any C++ compiler reads it: tests/cuda_emulator/.
template <class... PARAMETERS, class... ARGUMENTS>
void launch(void (*kernel)(PARAMETERS...), dim3 grid, cudaStream_t stream, const ARGUMENTS&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(THREADS);
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Makes the device of the tensors the current one for a launch.
class OnDevice {
  public:
    explicit OnDevice(int device) : device_(device) {
        check(cudaGetDevice(&previous_));
        if (device_ != previous_) check(cudaSetDevice(device_));
    }
    ~OnDevice() {
        if (device_ != previous_) cudaSetDevice(previous_);
    }
    OnDevice(const OnDevice&) = delete;

  private:
    int device_, previous_ = 0;
};

// Blocks of a kernel that the device holds at once: a grid of as many has no last wave that leaves places empty.
template <auto KERNEL>
int64_t resident_blocks(int device) {
    constexpr int DEVICES = 64;
    static int64_t known[DEVICES] = {};  // 0: not asked yet; two threads that ask write the same
    int64_t unknown = 0;
    int64_t& count = device < DEVICES ? known[device] : unknown;
    if (count == 0) {
        int processors = 0, blocks = 0;
        check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, KERNEL, THREADS, 0));
        const int64_t all = int64_t{processors} * (blocks > 0 ? blocks : 1);
        count = all < PARTIALS ? all : PARTIALS;
    }
    return count;
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `full`: blocks that fill the device. Until it is full, a thread takes one vector.
inline Share share_rows(const Rows& grid, int vector, int64_t full) {
    const bool short_rows = grid.cols <= 512 || (grid.cols <= 2048 && grid.rows >= full);
    Share share{};
    share.group = short_rows ? WARP : THREADS;
    int64_t segments = 1;
    if (!short_rows) {
        const int64_t wanted = ceil_divide(grid.cols, int64_t{THREADS} * vector), room = full / grid.rows;
        segments = wanted < room ? wanted : room > 1 ? room : 1;
    }
    const int64_t wanted = ceil_divide(grid.rows, THREADS / share.group), room = ceil_divide(full, segments);
    share.grid = dim3(static_cast<unsigned>(segments), static_cast<unsigned>(wanted < room ? wanted : room));
    return share;
}

// Launches a loop over rows with vectors of `vector` elements; returns how many sums it leaves for each row.
template <auto KERNEL, class WORK>
int64_t launch_rows(const WORK& work, const Rows& grid, int vector, const Queue& queue) {
    const Share share = share_rows(grid, vector, resident_blocks<KERNEL>(queue.device));
    launch(KERNEL, share.grid, static_cast<cudaStream_t>(queue.stream), work, share.group);
    return share.segments();
}

// The part of an item a thread takes.
struct Turn {
    int64_t row, item, first, step;
};

// A block's place among those that share some rows: they may be the whole grid, or a part of it.
struct Place {
    int64_t x, y, width, height;
};
__device__ __forceinline__ Place of_the_grid() { return {blockIdx.x, blockIdx.y, gridDim.x, gridDim.y}; }

// Calls body(turn) for every item of this thread's group.
template <class BODY>
__device__ __forceinline__ void for_items(const Rows& grid, int group, const Place& block, BODY body) {
    const bool warps = group == WARP;
    const int groups = warps ? THREADS / WARP : 1, place = warps ? threadIdx.x / WARP : 0;
    const int lane = warps ? threadIdx.x % WARP : threadIdx.x;
    const int64_t first = block.x * group + lane, step = block.width * group;
    for (int64_t row = block.y * groups + place; row < grid.rows; row += block.height * groups) {
        body(Turn{row, row * block.width + block.x, first, step});
    }
}
template <class BODY>
__device__ __forceinline__ void for_items(const Rows& grid, int group, BODY body) {
    for_items(grid, group, of_the_grid(), body);
}

// Calls body(N, j) for the elements of a row that are this thread's turn: N = VECTOR from `head` on, where that is
// allowed, and N = 1 for the rest.
template <int VECTOR, class BODY>
__device__ __forceinline__ void for_elements(const Turn& turn, int64_t end, int64_t head, bool vectors, BODY body) {
    const int64_t whole = vectors && head < end ? (end - head) / VECTOR : 0;
    for (int64_t k = turn.first; k < whole; k += turn.step) {
        body(std::integral_constant<int, VECTOR>{}, head + k * VECTOR);
    }
    const int64_t left = end - whole * VECTOR, before = whole != 0 ? head : left;
    for (int64_t k = turn.first; k < left; k += turn.step) {
        body(std::integral_constant<int, 1>{}, k < before ? k : k + whole * VECTOR);
    }
}

// Elements before the first one of `pointer` that lies on 16 bytes.
template <int VECTOR, class T>
__device__ __forceinline__ int64_t head_of(const T* pointer) {
    constexpr int PER_PIECE = 16 / sizeof(T) < VECTOR ? 16 / sizeof(T) : VECTOR;
    return (PER_PIECE - reinterpret_cast<uintptr_t>(pointer) / sizeof(T) % PER_PIECE) % PER_PIECE;
}

using BlockSum = cub::BlockReduce<double, THREADS>;
using WarpSum = cub::WarpReduce<double>;
union SumStorage {
    typename BlockSum::TempStorage block;
    typename WarpSum::TempStorage warps[THREADS / WARP];
};

// sums[item] = Σ value over the group; all its threads call.
__device__ __forceinline__ void write_sum(SumStorage& storage, int group, const Turn& turn, double value, double* sums) {
    if (group == WARP) {
        const double total = WarpSum(storage.warps[threadIdx.x / WARP]).Sum(value);
        if (threadIdx.x % WARP == 0) sums[turn.item] = total;
        __syncwarp();
    } else {
        const double total = BlockSum(storage.block).Sum(value);
        if (threadIdx.x == 0) sums[turn.item] = total;
        __syncthreads();  // storage is used again
    }
}

// The part of one of so many blocks in gradient *= factor, unless that is 1: then not even the gradient is read.
template <class T, class U>
__device__ __forceinline__ void rescale_part(T* gradient, int64_t total, U factor, int64_t block, int64_t blocks) {
    using V = compute_t<T>;
    constexpr int N = 16 / sizeof(T);
    if (factor == U{1}) return;
    const V scale = static_cast<V>(factor);
    const int64_t first = block * THREADS + threadIdx.x, step = blocks * THREADS;
    // a gradient is a tensor of its own, or a part of one: elements before the first 16 bytes go one at a time
    int64_t head = (16 - reinterpret_cast<uintptr_t>(gradient) % 16) % 16 / sizeof(T);
    if (head > total) head = total;
    const int64_t whole = (total - head) / N;
    for (int64_t k = first; k < whole; k += step) {
        auto values = load<N>(gradient + head + k * N);
#pragma unroll
        for (int i = 0; i < N; ++i) values.v[i] *= scale;
        store<N>(gradient + head + k * N, values);
    }
    for (int64_t k = first; k < total - whole * N; k += step) {
        T* at = gradient + (k < head ? k : k + whole * N);
        auto value = load<1>(at);
        value.v[0] *= scale;
        store<1>(at, value);
    }
}

// Launch the loops over rows; each item leaves its sum in `sums`, and the number of items of a row is returned.
struct Segments {
    int64_t of_data, of_latent;
};
Segments sum_rows(const Reconstruction& work, const Latent& latent, const Queue& queue);  // in one launch where it can be
int64_t sum_rows(const Latent& work, const Queue& queue);

// The sums of items, `segments` for each of `rows` rows, to a loss of the reduction.
void finish_sums(double* sums, int64_t segments, int64_t rows, Reduction reduction, double weight, int type,
                 void* loss, const Queue& queue);

}  // namespace device
}  // namespace fastvae
