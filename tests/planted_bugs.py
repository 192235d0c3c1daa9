"""Plants bugs in the kernels, one at a time, and asks whether the tests see them: a test must be able to fail.

``python tests/planted_bugs.py [NUMBER …]`` (``make bugs``) works on copies of the sources, some minutes in all. It ends
with 1 if a bug goes unseen, and with an error if one cannot be planted any more, because its text is not in the sources
exactly once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulator"))
from fastvae import _C

import build

ROOT = Path(__file__).parent.parent
RECON, KL, OWN = "test_sizes and bce", "test_sizes and gaussian_kl", "test_each_tensor"
NOISE = "test_the_contract or test_one_definition"
INFLATED = "zero_inflat"  # "zero_inflated…" and "test_zero_inflation…"
SCORES = "scores"
MIXTURE, LEVEL, CLASSES = "test_the_mixture", "test_every_level", "test_rows"
AVX512 = "csrc/host/avx512.h"


class Bug(NamedTuple):
    """In ``file``, ``right`` becomes ``wrong``; ``tests`` (``pytest -k``) of ``backend`` must fail."""

    what: str
    backend: str
    file: str
    right: str
    wrong: str
    tests: str


BUGS = [
    Bug("elements after the last vector are lost", "cuda", "csrc/device/rows.cuh",
        "k < left; k += turn.step", "k < before; k += turn.step", RECON),
    Bug("no barrier before storage is used again", "cuda", "csrc/device/rows.cuh",
        "        __syncthreads();  // storage is used again\n", "", KL),
    Bug("all warps share one storage", "cuda", "csrc/device/rows.cuh",
        "storage.warps[threadIdx.x / WARP]", "storage.warps[0]", KL),
    Bug("only the size of an element is asked of an address", "cuda", "csrc/device/memory.cuh",
        "% Raw<N * sizeof(T)>::ALIGNMENT == 0", "% sizeof(T) == 0", OWN),
    Bug("a row of the prior's logvar is found by the stride of its mu", "cuda", "csrc/device/latent.cuh",
        "turn.row * work.prior_logvar_stride", "turn.row * work.prior_mu_stride", OWN),
    Bug("every sample has the same noise", "cuda", "csrc/device/latent.cuh",
        "noise<N>(seed, at);\n                    Values<V, N> drawn;",
        "noise<N>(seed, row.flat + j);\n                    Values<V, N> drawn;", NOISE),
    Bug("only the first sums of a total are added", "cuda", "csrc/device/finish.cu",
        "reduction == EXAMPLE ? segments : segments * rows", "reduction == EXAMPLE ? segments : rows", RECON),
    Bug("two totals share one storage", "cuda", "csrc/device/finish.cu",
        "block_total(other, second)", "block_total(storage, second)", "test_elbo"),
    Bug("a gradient's last elements are not rescaled", "cuda", "csrc/device/rows.cuh",
        "k < total - whole * N", "k < head", "test_upstream_gradient"),
    Bug("factors are multiplied without end", "cuda", "csrc/device/reconstruction.cu",
        "factors += N;", "", "test_factors"),
    Bug("a row of the prior's logvar is found by the stride of its mu", "cpp", "csrc/host/latent.cpp",
        "row * work.prior_logvar_stride", "row * work.prior_mu_stride", OWN),
    Bug("a last single element is lost", "cpp", "csrc/host/reconstruction.cpp",
        "if (j < stop) {", "if (j + 1 < stop) {", RECON),
    Bug("lanes beyond the end are multiplied in", "cpp", "csrc/host/reconstruction.cpp",
        "product *= there ? terms.factor : one;", "product *= terms.factor;", RECON),
    Bug("the gradient of an ELBO has no weight", "cpp", "csrc/host/primitives.cpp",
        "reconstruction.weight = nll_weight;", "reconstruction.weight = 1;", "test_elbo"),
    Bug("bfloat16 is rounded half up", "cpp", "csrc/host/simd.h",
        "((word >> 16) & 1) + 0x7fff", "0x8000", "test_every_half"),
    Bug("the mask of the last elements is one short", "cpp", AVX512,
        "((1u << count) - 1)", "((1u << (count - 1)) - 1)", RECON),
    Bug("a quarter of the noise is there twice", "cpp", AVX512,
        "shuffle_f32x4(first, second, 0xdd)", "shuffle_f32x4(first, second, 0x88)", NOISE),
    Bug("words in odd places of the noise are those in even ones", "cpp", AVX512,
        "return (Wide)words >> 32;", "return (Wide)words;", NOISE),
    Bug("one entry of the table of e^x is off by 1e-5", "cpp", AVX512, "1.0905077327f", "1.0905177327f", RECON),
    Bug("x/255 is rounded to nearest from 32 bits, which is twice", "cpp", AVX512,
        "_MM_FROUND_TO_POS_INF", "_MM_FROUND_TO_NEAREST_INT", "test_every_uint8"),
    Bug("bfloat16 beside a subnormal number is the lower half", "cpp", AVX512,
        "0x00030001", "0x00020000", "test_every_half"),
    Bug("the last elements of a row are lost", "numba", "kernels/numba/reconstruction.py",
        "range(0, end, FACTORS):\n                additive_sum",
        "range(0, end // FACTORS * FACTORS, FACTORS):\n                additive_sum", RECON),
    Bug("a gradient by row has no weight", "numba", "kernels/numba/reconstruction.py",
        "row * upstream_stride) * constant(weight, zero)", "row * upstream_stride)", "test_backward_twice"),
    Bug("every sample has the same noise", "numba", "kernels/numba/latent.py",
        "offset = fill(seed, z, count, tile_ptr)\n                        for j in range(count):\n"
        "                            mu",
        "offset = fill(seed, flat + start, count, tile_ptr)\n                        for j in range(count):\n"
        "                            mu", NOISE),
    Bug("a row of the prior's logvar is found by the stride of its mu", "numba", "kernels/numba/latent.py",
        "prior_logvar_row = row * prior_mu_stride, row * prior_logvar_stride\n                row_sum",
        "prior_logvar_row = row * prior_mu_stride, row * prior_mu_stride\n                row_sum", OWN),
    Bug("free bits stop the wrong gradients", "numba", "kernels/numba/latent.py",
        "c = zero if kl < floor else c", "c = c if kl < floor else zero", "test_dtypes and free_bits"),
    Bug("the gradient of a zero's logit has the other sign", "cpp", "csrc/counts.h",
        "is_zero ? by_nll - of_count : of_zero", "is_zero ? of_count - by_nll : of_zero", INFLATED),
    Bug("a zero's large part is -logit, however likely the count is to be 0", "cpp", "csrc/counts.h",
        "at_most(positive_part(-logit), nll)", "positive_part(-logit)", INFLATED),
    Bug("the mean's gradient takes each zero for a count", "cpp", "csrc/host/reconstruction.cpp",
        "terms.derivative * factor);\n            if constexpr (BY_ROW)",
        "terms.derivative * (upstream != nullptr ? read(upstream) : by_row));\n            if constexpr (BY_ROW)",
        INFLATED),
    Bug("a row of the logits of zero is found by the stride of the dispersion", "cpp", "csrc/host/reconstruction.cpp",
        "row * work.zero_logits_stride", "row * work.parameter_stride", INFLATED),
    Bug("the gradient of a logit is multiplied by that in nll", "cuda", "csrc/device/with_tensor.cu",
        "of_logit.v[k] = term.by_logit * c.v[k];\n                    c.v[k] *= term.by_nll;",
        "c.v[k] *= term.by_nll;\n                    of_logit.v[k] = term.by_logit * c.v[k];", INFLATED),
    Bug("the mean and the dispersion take each zero for a count", "cuda", "csrc/device/with_tensor.cu",
        "                    c.v[k] *= term.by_nll;\n", "", INFLATED),
    Bug("the dispersion by element takes each zero for a count", "numba", "kernels/numba/reconstruction.py",
        "if inflated:\n                        slope *=", "if inflated and by_row:\n                        slope *=",
        INFLATED),
    Bug("a count above 0 costs no more where zeros are likely", "numba", "kernels/numba/likelihoods.py",
        "select(below < nll, below, nll), nll + above)", "select(below < nll, below, nll), nll)", INFLATED),
    Bug("the rest of a row of scores is padded with zeros", "cpp", "csrc/host/reconstruction.cpp",
        "load_first(scores + j, left, V{}) : lowest", "load_first(scores + j, left, V{}) : V{}", SCORES),
    Bug("what a softmax passes on is not lessened by its mean", "cpp", "csrc/host/reconstruction.cpp",
        "less_mean_flow(recon, grad + begin, end, softmax, constant<V>(flow_sum));", "", SCORES),
    Bug("a sum relative to one score is not made relative to a larger one", "cuda", "csrc/device/with_tensor.cu",
        "total * static_cast<double>(exp(shift - larger)) +", "total +", SCORES),
    Bug("the flow of a row is that of its first part", "cuda", "csrc/device/with_tensor.cu",
        "part < parts; ++part) flow", "part < 1; ++part) flow", SCORES),
    Bug("the library is not in the mean", "numba", "kernels/numba/reconstruction.py",
        "factor = load(real, library_ptr, row) * inverse", "factor = inverse", SCORES),
    Bug("the example beside the first of a batch is not the last's", "cpp", "csrc/host/pairs.cpp",
        "next = row + 1 < work.count ? row + 1 : 0;", "next = row + 1;", "test_pairs_equal"),
    Bug("sums over the rows of a panel are those of its last part", "cpp", "csrc/host/pairs.cpp",
        "store(total + k, load(total + k, V{}) + load(part + k, V{}));", "store(total + k, load(part + k, V{}));",
        "test_pairs_equal"),
    Bug("rows beyond the last count in a kernel's sum", "cpp", "csrc/host/pairs.cpp",
        "V found = masked(all.template value<false>(load(distances[r] + v, V{})), there - v);",
        "V found = all.template value<false>(load(distances[r] + v, V{}));", "test_pairs_equal"),
    Bug("a pair of rows of one sample is met twice", "cpp", "csrc/host/pairs.cpp",
        "return lane < itself ? V{} : lane == itself", "return lane == itself", "test_pairs_equal"),
    Bug("the highest level has no mass beyond it", "cpp", "csrc/host/logistic.h",
        "edge = lowest | less(P(constant<V>(EDGE)), x)", "edge = lowest", LEVEL),
    Bug("blue does not move with green", "cpp", "csrc/host/mixture.cpp",
        "place(2, 0) + moved.b + moved.c)", "place(2, 0) + moved.b)", MIXTURE),
    Bug("the class that was seen has the gradient of the others", "cpp", "csrc/host/rows.cpp",
        "store_first(grad + target, 1, at_target);", "", CLASSES),
    Bug("the coefficient of green has the gradient of red's", "triton", "kernels/triton/rows.py",
        "rounded(by_blue * c_slope * green, kind)", "rounded(by_blue * c_slope * x, kind)", MIXTURE),
    Bug("the shift of a mixture is that of its logits", "triton", "kernels/triton/rows.py",
        "value = (top_logit - top)", "value = (top_logit - top_logit)", MIXTURE),
    Bug("a sum relative to one logit is not made relative to a larger one", "triton", "kernels/triton/rows.py",
        "sums * exp_accurate(top - larger, False) + ", "sums + ", "test_rows_longer"),
    Bug("latents beyond a tile are lost", "triton", "kernels/triton/rows.py",
        "sums += tl.where(mask, term, 0.0)", "sums = tl.where(mask, term, 0.0)", "test_rows_longer"),
    Bug("many sums are folded without the last of each piece", "cuda", "csrc/device/finish.cu",
        "k < end; k += THREADS", "k + 1 < end; k += THREADS", "many_rows"),
    Bug("the gradients of the KL that are handed over lack beta", "cpp", "csrc/host/primitives.cpp",
        "work.weight = beta;\n    work.upstream", "work.weight = 1;\n    work.upstream", "test_elbo_gradients"),
]  # fmt: skip


def plant(bug: Bug, folder: Path) -> dict[str, str]:
    """A copy of the sources with the bug in it; what the environment must say for tests to run on it."""
    for name in ("csrc", "fastvae", "kernels", "benchmarks", "tests"):
        target = folder / "fastvae" / name if name in ("kernels", "benchmarks") else folder / name
        shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
    top = bug.file.split("/")[0]
    file = folder / bug.file if top == "csrc" else folder / "fastvae" / bug.file
    text = file.read_text()
    if text.count(bug.right) != 1:
        raise SystemExit(
            f"{bug.file} has {bug.right!r} {text.count(bug.right)} times, not once: mend {Path(__file__).name}"
        )
    file.write_text(text.replace(bug.right, bug.wrong))
    environment = {**os.environ, "PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(folder / "cache")}
    if bug.backend == "triton":
        environment["TRITON_INTERPRET"] = "1"
    if top == "csrc":
        environment["FASTVAE_EMULATED_CUDA"] = str(build.build(folder / "csrc"))
    return environment


def seen(bug: Bug) -> str:
    """The first complaint of the tests; empty if they pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = plant(bug, folder)
        files = [
            f"tests/test_{file}.py" for file in ("ops", "autograd", "noise", "edges", "counts", "pairs", "discrete")
        ]
        if "half" in bug.tests:
            files = ["tests/test_extension.py"]
        chosen = f"({bug.tests})" + (f" and {bug.backend}" if len(files) > 1 else "")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(
                f"{bug.what}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        complaint = re.search(r"^E +(.*)$", done.stdout, re.MULTILINE)
        return complaint[1][:100] if done.returncode == 1 and complaint else ""


def main() -> int:
    """Tries the bugs whose numbers are given, or all."""
    numbers = [int(argument) for argument in sys.argv[1:]] or list(range(1, len(BUGS) + 1))
    if "avx512" not in _C.instruction_sets():
        print("this processor has no AVX-512: bugs in its loops are not planted")
        numbers = [number for number in numbers if BUGS[number - 1].file != AVX512]
    unseen = 0
    with ThreadPoolExecutor(2) as pool:
        for number, complaint in zip(numbers, pool.map(lambda n: seen(BUGS[n - 1]), numbers), strict=True):
            bug = BUGS[number - 1]
            unseen += not complaint
            print(f"{number:2} {bug.backend:5} {bug.what}: {complaint or 'NOT SEEN'}", flush=True)
    print(f"{len(numbers) - unseen} of {len(numbers)} seen")
    return int(unseen > 0)


if __name__ == "__main__":
    raise SystemExit(main())
