"""The predicted peak of a plain training step beside the measured one, on this machine's GPU.

    python -m benchmarks.memory

Several models, each in three precisions with three optimizers. A row gives both peaks, and the error of the prediction.
"""

import itertools
import statistics

from benchmarks.common import save
from profiler import profile_model
from tests.test_profiler_gpu import MODELS, OPTIMIZERS, PRECISIONS, measure


def main() -> None:
    """Measure every case, print a table, save the rows."""
    rows = []
    for name, precision, optimizer in itertools.product(MODELS, PRECISIONS, OPTIMIZERS):
        model, batch, loss = MODELS[name]()
        predicted = profile_model(model, batch, loss=loss, precision=precision, optimizer=optimizer)
        peaks, reserved = measure(model, batch, loss, precision, optimizer)
        allocated = max(peaks.values())
        rows.append(
            {
                "model": name,
                "precision": precision,
                "optimizer": optimizer,
                "predicted_bytes": predicted.peaks.overall_bytes,
                "measured_bytes": allocated,
                "error": round(predicted.peaks.overall_bytes / allocated - 1, 4),
                "predicted_reserved_bytes": predicted.peaks.reserved_bytes,
                "measured_reserved_bytes": reserved,
                "reserved_error": round(predicted.peaks.reserved_bytes / reserved - 1, 4),
            }
        )
        print(" ".join(f"{value}" for value in rows[-1].values()), flush=True)
    for key in ("error", "reserved_error"):
        errors = sorted(abs(row[key]) for row in rows)
        print(f"{key}: median {statistics.median(errors):.2%}, worst {errors[-1]:.2%}")
    print(save("memory", rows))


if __name__ == "__main__":
    main()
