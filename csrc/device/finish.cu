// What follows the loops over rows: their sums to losses, and a gradient times what came from above.
//
// Sums are added in a fixed order by one block, or by one thread for each example. A few kilobytes; what counts is the launch.
// Rows with gaps between them leave a sum each: where those are many, several blocks first make few of them.
#include "memory.cuh"
#include "rows.cuh"

namespace fastvae {
namespace device {
namespace {

// `count` sums for each loss, `stride` apart.
struct Part {
    double* sums;
    int64_t count, stride;
    double weight;
    int type;
    void* out;
};

__device__ void put(int type, void* out, int64_t index, double value) {
    if (type == FLOAT64) static_cast<double*>(out)[index] = value;
    else static_cast<float*>(out)[index] = static_cast<float>(value);
}

__device__ double block_total(BlockSum::TempStorage& storage, const Part& part) {
    double value = 0;
    for (int64_t k = threadIdx.x; k < part.count; k += THREADS) value += part.sums[k * part.stride];
    return BlockSum(storage).Sum(value) * part.weight;
}

constexpr int64_t MANY = 8 * PARTIALS;  // sums that one block adds up in the time of a launch

// The first of every `piece` sums becomes the sum of them, a piece a block. Its threads have read all of it before they meet
// to add up what they read.
__global__ void __launch_bounds__(THREADS) fold_sums(double* sums, int64_t count, int64_t piece) {
    __shared__ BlockSum::TempStorage storage;
    const int64_t begin = blockIdx.x * piece, end = begin + piece < count ? begin + piece : count;
    double value = 0;
    for (int64_t k = begin + threadIdx.x; k < end; k += THREADS) value += sums[k];
    const double total = BlockSum(storage).Sum(value);
    if (threadIdx.x == 0) sums[begin] = total;
}

Part folded(const Part& part, cudaStream_t stream) {
    if (part.count <= MANY) return part;
    const int64_t least = ceil_divide(part.count, PARTIALS), piece = least > MANY / 4 ? least : MANY / 4;
    const int64_t pieces = ceil_divide(part.count, piece);
    launch(fold_sums, static_cast<unsigned>(pieces), stream, part.sums, part.count, piece);
    return {part.sums, pieces, piece, part.weight, part.type, part.out};
}

// One loss; with a second part, loss = first + beta·second.
__global__ void __launch_bounds__(THREADS) finish_total(Part first, Part second, double beta, int type, void* loss) {
    __shared__ BlockSum::TempStorage storage, other;
    const double total = block_total(storage, first);
    if (threadIdx.x == 0) put(first.type, first.out, 0, total);
    if (second.out == nullptr) return;
    const double more = block_total(other, second);
    if (threadIdx.x == 0) {
        put(second.type, second.out, 0, more);
        put(type, loss, 0, total + beta * more);
    }
}

__device__ double row_total(const Part& part, int64_t row) {
    double total = 0;
    for (int64_t k = 0; k < part.count; ++k) total += part.sums[row * part.count + k];
    return total;
}

__global__ void __launch_bounds__(THREADS)
    finish_rows(Part first, Part second, double beta, int type, void* loss, int64_t rows) {
    for (int64_t row = int64_t{blockIdx.x} * THREADS + threadIdx.x; row < rows; row += int64_t{gridDim.x} * THREADS) {
        const double total = row_total(first, row);
        put(first.type, first.out, row, total);
        if (second.out == nullptr) continue;
        const double more = row_total(second, row);
        put(second.type, second.out, row, more);
        put(type, loss, row, total + beta * more);
    }
}

void finish(Reduction reduction, const Part& first, const Part& second, double beta, int type, void* loss, int64_t rows,
            const Queue& queue) {
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    if (reduction != EXAMPLE) {
        launch(finish_total, 1, stream, folded(first, stream), folded(second, stream), beta, type, loss);
    } else if (rows != 0) {
        const int64_t blocks = ceil_divide(rows, THREADS), full = resident_blocks<finish_rows>(queue.device);
        const auto grid = static_cast<unsigned>(blocks < full ? blocks : full);
        launch(finish_rows, grid, stream, first, second, beta, type, loss, rows);
    }
}

// What a reduction sums over: the items of each row, or all of them.
Part part_of(Reduction reduction, double* sums, int64_t segments, int64_t rows, double weight, int type, void* out) {
    return {sums, reduction == EXAMPLE ? segments : segments * rows, 1, weight, type, out};
}

template <class T, class U>
__global__ void __launch_bounds__(THREADS) rescale_kernel(T* gradient, int64_t total, const U* upstream) {
    rescale_part(gradient, total, *upstream, blockIdx.x, gridDim.x);
}

template <class T, class U>
void launch_rescale(const Rescale& work, const void* upstream, const Queue& queue) {
    const int64_t blocks = ceil_divide(work.total, THREADS * 16), full = resident_blocks<rescale_kernel<T, U>>(queue.device);
    const auto grid = static_cast<unsigned>(blocks < full ? blocks : full);
    launch(rescale_kernel<T, U>, grid, static_cast<cudaStream_t>(queue.stream), static_cast<T*>(work.gradient), work.total,
           static_cast<const U*>(upstream));
}

}  // namespace

std::pair<int, int> versions() {
    int driver = 0, runtime = 0;
    check(cudaDriverGetVersion(&driver));
    check(cudaRuntimeGetVersion(&runtime));
    return {driver, runtime};
}

void finish_sums(double* sums, int64_t segments, int64_t rows, Reduction reduction, double weight, int type,
                 void* loss, const Queue& queue) {
    finish(reduction, part_of(reduction, sums, segments, rows, weight, type, loss), Part{}, 0, 0, nullptr, rows, queue);
}

void elbo_forward(Reconstruction reconstruction, Latent latent, double beta, Reduction reduction, const ELBO& out,
                  const Queue& queue) {
    const OnDevice guard(queue.device);
    const int64_t examples = reconstruction.grid.rows;
    const double nll_weight = reduction_weight(reduction, reconstruction.grid);
    const double kl_weight = reduction_weight(reduction, latent.grid);
    reconstruction.weight = nll_weight;
    if (reduction != EXAMPLE) {
        merge_rows(reconstruction, reconstruction.grid.total > 0 ? reconstruction.grid.total : 1);
        merge_rows(latent, latent.grid.total > 0 ? latent.grid.total : 1);
    }
    reconstruction.sums = queue.scratch;
    latent.sums = queue.scratch + (examples > PARTIALS ? examples : PARTIALS);
    const Segments segments = sum_rows(reconstruction, latent, queue);
    const Part nll = part_of(reduction, reconstruction.sums, segments.of_data, reconstruction.grid.rows, nll_weight,
                             reconstruction.recon_type, out.nll);
    const Part kl = part_of(reduction, latent.sums, segments.of_latent, latent.grid.rows, kl_weight, latent.type, out.kl);
    finish(reduction, nll, kl, beta, out.type, out.loss, examples, queue);
}

void rescale(const Rescale& work, const void* upstream, int upstream_type, const Queue& queue) {
    if (work.total == 0) return;
    const OnDevice guard(queue.device);
    with_dtype(work.type, [&](auto element) {
        using T = decltype(element);
        if (upstream_type == FLOAT64) launch_rescale<T, double>(work, upstream, queue);
        else launch_rescale<T, float>(work, upstream, queue);
    });
}

}  // namespace device
}  // namespace fastvae
