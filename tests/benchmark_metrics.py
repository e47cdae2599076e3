"""Compare metrics.pixel_metrics with scikit-learn: results, time, memory.

    python tests/benchmark_metrics.py [N]

N maps (1725) of 224 x 224: smooth and random, higher in random blobs.
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics


def benchmark(count=1725):
    rng = np.random.default_rng(0)
    maps = np.empty((count, 224, 224), np.float32)
    masks = np.empty(maps.shape, bool)
    for i in range(count):
        maps[i], blobs = ndimage.zoom(rng.random((2, 14, 14), np.float32), (1, 16, 16), order=1)
        masks[i] = blobs > 0.85
    maps[masks] += 0.3

    start = time.perf_counter()
    ours = metrics.pixel_metrics(maps, masks)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak /= 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kilobytes elsewhere
    start = time.perf_counter()
    auroc = roc_auc_score(masks.ravel(), maps.ravel())
    precision = average_precision_score(masks.ravel(), maps.ravel())
    ratio = (time.perf_counter() - start) / seconds
    difference = max(abs(ours["p_auroc"] - auroc), abs(ours["p_aupr"] - precision))
    print(f"{count} maps of 224 x 224: {seconds:.2f} s, peak memory {peak:.1f} GB")
    print(f"scikit-learn's AUROC and AP take {ratio:.1f} times as long")
    print(f"largest difference {difference:.0e}")


if __name__ == "__main__":
    benchmark(*map(int, sys.argv[1:2]))
