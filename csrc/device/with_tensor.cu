// A reconstruction term whose parameter is a tensor, on a GPU: loss and gradients in one pass over the data.
//
// Beside those of recon and target, it reads 4 bytes an element of a parameter by element (by column, that row stays in the
// cache) and of the logits of a zero, and writes as many of each gradient. From scores there are three launches: the softmax
// of each row, this pass, and what the softmax passes on; the mean is never stored.
#include "terms.cuh"

namespace fastvae {
namespace device {
namespace {

// shift and factor of each row of scores, read once: the largest so far, and the sum relative to that.
template <class Y>
__global__ void __launch_bounds__(THREADS) softmax_kernel(const WithTensor work) {
    using V = compute_t<Y>;
    __shared__ double shifts[THREADS], totals[THREADS];
    const int thread = threadIdx.x;
    for (int64_t row = blockIdx.x; row < work.of.grid.rows; row += gridDim.x) {
        const Y* scores = static_cast<const Y*>(work.of.recon) + row * work.of.recon_stride;
        V shift = std::is_same_v<V, double> ? V(-1.7976931348623157e308) : V(-3.4028234663852886e38f);
        double total = 0;
        const int64_t head = head_of<VECTOR<Y>>(scores);
        const Turn turn{row, row, thread, THREADS};
        for_elements<VECTOR<Y>>(turn, work.of.grid.cols, head, aligned<VECTOR<Y>>(scores + head), [&](auto n, int64_t j) {
            constexpr int N = decltype(n)::value;
            const Values<V, N> y = load<N>(scores + j);
            V larger = shift, sum = 0;
#pragma unroll
            for (int k = 0; k < N; ++k) larger = y.v[k] > larger ? y.v[k] : larger;
#pragma unroll
            for (int k = 0; k < N; ++k) sum += exp(y.v[k] - larger);
            total = total * static_cast<double>(exp(shift - larger)) + static_cast<double>(sum);
            shift = larger;
        });
        shifts[thread] = shift;
        totals[thread] = total;
        __syncthreads();
        for (int half = THREADS / 2; half > 0; half /= 2) {
            if (thread < half) {
                const double a = shifts[thread], b = shifts[thread + half], larger = a > b ? a : b;
                const double of_a = totals[thread] * exp(static_cast<V>(a - larger));
                totals[thread] = of_a + totals[thread + half] * exp(static_cast<V>(b - larger));
                shifts[thread] = larger;
            }
            __syncthreads();
        }
        if (thread == 0) {
            work.softmax[row] = shifts[0];
            work.softmax[work.of.grid.rows + row] = static_cast<double>(static_cast<const V*>(work.library)[row]) / totals[0];
        }
        __syncthreads();  // before they are written again
    }
}

// From y·∂nll/∂y to the gradient in the scores. The flow of a row is in `parts`.
template <class Y>
__global__ void __launch_bounds__(THREADS) less_mean_flow_kernel(const WithTensor work, const int group, const int64_t parts) {
    using V = compute_t<Y>;
    const Reconstruction& of = work.of;
    for_items(of.grid, group, [&](const Turn& turn) {
        const Y* scores = static_cast<const Y*>(of.recon) + turn.row * of.recon_stride;
        Y* grad = static_cast<Y*>(of.grad) + turn.row * of.grid.cols;
        double flow = 0;
        for (int64_t part = 0; part < parts; ++part) flow += work.flow[turn.row * parts + part];
        const V shift = static_cast<V>(work.softmax[turn.row]);
        const double library = static_cast<double>(static_cast<const V*>(work.library)[turn.row]);
        const V share = static_cast<V>(work.softmax[of.grid.rows + turn.row] / library * flow);
        const int64_t head = head_of<VECTOR<Y>>(scores);
        const bool vectors = aligned<VECTOR<Y>>(scores + head) && aligned<VECTOR<Y>>(grad + head);
        for_elements<VECTOR<Y>>(turn, of.grid.cols, head, vectors, [&](auto n, int64_t j) {
            constexpr int N = decltype(n)::value;
            const Values<V, N> score = load<N>(scores + j);
            Values<V, N> slope = load<N>(grad + j);
#pragma unroll
            for (int k = 0; k < N; ++k) slope.v[k] -= exp(score.v[k] - shift) * share;
            store<N>(grad + j, slope);
        });
    });
}

// What has an address is written. INFLATED: the logits of a zero are read; SCORES: recon are scores.
template <class TERM, class Y, class X, bool BY_ROW, bool INFLATED, bool SCORES>
__global__ void __launch_bounds__(THREADS, BLOCKS<Y>) with_tensor_kernel(const WithTensor work, const int group) {
    using V = compute_t<Y>;
    __shared__ SumStorage storage;
    const Reconstruction& of = work.of;
    for_items(of.grid, group, [&](const Turn& turn) {
        const int64_t begin = turn.row * of.grid.cols, left = of.grid.total - begin;
        const int64_t end = left < of.grid.cols ? left : of.grid.cols;
        const Y* recon = static_cast<const Y*>(of.recon) + turn.row * of.recon_stride;
        const X* target = static_cast<const X*>(of.target) + turn.row * of.target_stride;
        const V* parameter = static_cast<const V*>(work.parameter) + turn.row * work.parameter_stride;
        Y* nll = of.nll == nullptr ? nullptr : static_cast<Y*>(of.nll) + begin;
        Y* grad = of.grad == nullptr ? nullptr : static_cast<Y*>(of.grad) + begin;
        V* grad_parameter = work.grad_parameter == nullptr ? nullptr : static_cast<V*>(work.grad_parameter) + begin;
        const Y* upstream = nullptr;
        V by_row = static_cast<V>(of.weight);
        if (of.upstream_by_element) upstream = static_cast<const Y*>(of.upstream) + turn.row * of.upstream_stride;
        else if (of.upstream != nullptr) by_row *= static_cast<const V*>(of.upstream)[turn.row * of.upstream_stride];
        const int64_t head = head_of<VECTOR<Y>>(recon);
        bool vectors = aligned<VECTOR<Y>>(recon + head) && aligned<VECTOR<Y>>(target + head) &&
                       (BY_ROW || aligned<VECTOR<Y>>(parameter + head));
        if (nll != nullptr) vectors = vectors && aligned<VECTOR<Y>>(nll + head);
        if (grad != nullptr) vectors = vectors && aligned<VECTOR<Y>>(grad + head);
        if (grad_parameter != nullptr) vectors = vectors && aligned<VECTOR<Y>>(grad_parameter + head);
        if (upstream != nullptr) vectors = vectors && aligned<VECTOR<Y>>(upstream + head);
        const V* logits = nullptr;
        V* grad_logits = nullptr;
        if constexpr (INFLATED) {
            logits = static_cast<const V*>(work.zero_logits) + turn.row * work.zero_logits_stride;
            vectors = vectors && aligned<VECTOR<Y>>(logits + head);
            if (work.grad_zero_logits != nullptr) {
                grad_logits = static_cast<V*>(work.grad_zero_logits) + begin;
                vectors = vectors && aligned<VECTOR<Y>>(grad_logits + head);
            }
        }
        V shift = 0, factor = 0;
        if constexpr (SCORES) {
            shift = static_cast<V>(work.softmax[turn.row]);
            factor = static_cast<V>(work.softmax[of.grid.rows + turn.row]);
        }
        double sum = 0, slope_sum = 0, flow_sum = 0;
        for_elements<VECTOR<Y>>(turn, end, head, vectors, [&](auto n, int64_t j) {
            constexpr int N = decltype(n)::value;
            Values<V, N> y = load<N>(recon + j);
            const Values<V, N> x = load<N>(target + j);
            Values<V, N> p, c, of_nll, of_recon, of_parameter, logit, of_logit;
            if constexpr (!BY_ROW) p = load<N>(parameter + j);
            if constexpr (INFLATED) logit = load<N>(logits + j);
            if (upstream != nullptr) c = load<N>(upstream + j);
            V additive = 0, slopes = 0, flow = 0;
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if constexpr (BY_ROW) p.v[k] = *parameter;
                if (upstream == nullptr) c.v[k] = by_row;
                if constexpr (SCORES) y.v[k] = exp(y.v[k] - shift) * factor;
                const Terms<V> terms = TERM::terms(y.v[k], x.v[k], p.v[k]);
                of_nll.v[k] = terms.additive;
                if constexpr (INFLATED) {
                    const ZeroInflated<V> term = zero_inflated(terms.additive, x.v[k], logit.v[k]);
                    of_nll.v[k] = term.nll;
                    of_logit.v[k] = term.by_logit * c.v[k];
                    c.v[k] *= term.by_nll;
                }
                of_recon.v[k] = terms.derivative * c.v[k];
                of_parameter.v[k] = TERM::slope(y.v[k], x.v[k], p.v[k]) * c.v[k];
                if constexpr (SCORES) {
                    of_recon.v[k] *= y.v[k];
                    flow += of_recon.v[k];
                }
                additive += of_nll.v[k];
                slopes += of_parameter.v[k];
            }
            sum += static_cast<double>(additive);
            slope_sum += static_cast<double>(slopes);
            flow_sum += static_cast<double>(flow);
            if (nll != nullptr) store<N>(nll + j, of_nll);
            if (grad != nullptr) store<N>(grad + j, of_recon);
            if (grad_parameter != nullptr) store<N>(grad_parameter + j, of_parameter);
            if constexpr (INFLATED) {
                if (grad_logits != nullptr) store<N>(grad_logits + j, of_logit);
            }
        });
        if (of.sums != nullptr) write_sum(storage, group, turn, sum, of.sums);
        if (work.parameter_sums != nullptr) write_sum(storage, group, turn, slope_sum, work.parameter_sums);
        if constexpr (SCORES) {
            if (work.flow != nullptr) write_sum(storage, group, turn, flow_sum, work.flow);
        }
    });
}

template <class TERM, class Y, class X>
int64_t launch(const WithTensor& work, const Queue& queue) {
    if constexpr (TERM::WITH_TENSOR) {
        const Rows& grid = work.of.grid;
        const auto rows = [&](auto inflated, auto scores) {
            constexpr bool INFLATED = decltype(inflated)::value, SCORES = decltype(scores)::value;
            if (work.by_row) {
                return launch_rows<with_tensor_kernel<TERM, Y, X, true, INFLATED, SCORES>>(work, grid, VECTOR<Y>, queue);
            }
            return launch_rows<with_tensor_kernel<TERM, Y, X, false, INFLATED, SCORES>>(work, grid, VECTOR<Y>, queue);
        };
        const std::true_type yes;
        const std::false_type no;
        if constexpr (TERM::TARGET == Domain::COUNT) {
            const bool inflated = work.zero_logits != nullptr;
            if (work.library == nullptr) return inflated ? rows(yes, no) : rows(no, no);
            if constexpr (sizeof(Y) >= 4) {  // half precision is converted by torch
                constexpr auto SOFTMAX = &softmax_kernel<Y>;
                constexpr auto LESS_MEAN_FLOW = &less_mean_flow_kernel<Y>;
                const auto stream = static_cast<cudaStream_t>(queue.stream);
                const int64_t full = resident_blocks<SOFTMAX>(queue.device);
                device::launch(SOFTMAX, dim3(static_cast<unsigned>(grid.rows < full ? grid.rows : full)), stream, work);
                const int64_t parts = inflated ? rows(yes, yes) : rows(no, yes);
                if (work.of.grad != nullptr) {
                    const Share share = share_rows(grid, VECTOR<Y>, resident_blocks<LESS_MEAN_FLOW>(queue.device));
                    device::launch(LESS_MEAN_FLOW, share.grid, stream, work, share.group, parts);
                }
                return parts;
            }
            throw std::invalid_argument("scores must be float32 or float64");
        }
        return rows(no, no);
    } else {
        throw std::invalid_argument(std::string(TERM::NAME) + " takes no tensor for its parameter");
    }
}

}  // namespace

int64_t with_tensor(const WithTensor& work, const Queue& queue) {
    const OnDevice guard(queue.device);
    return for_types(work.of, [&](auto term, auto y, auto x) {
        return launch<decltype(term), decltype(y), decltype(x)>(work, queue);
    });
}

}  // namespace device
}  // namespace fastvae
