"""CPU seconds that a patch takes in prediction: mirrored copies in pairs, and one by one as in nnU-Net.

    python benchmarks/prediction_time.py -m MODEL_FOLDER

One thread, random patches of the model's size, medians; results of both ways are compared, too.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnssl.inference.models import open_model
from nnssl.inference.predictor import Predictor

REPETITIONS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", required=True, type=Path, help="folder of a trained model")
    model = open_model(parser.parse_args().m)
    torch.set_num_threads(1)
    predictor = Predictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_model(model)
    predictor.network.eval()
    patch_size = predictor.configuration_manager.patch_size
    layout = torch.channels_last_3d if len(patch_size) == 3 else torch.channels_last
    channels = len(predictor.dataset_json["channel_names"])
    patch = torch.randn(1, channels, *patch_size).contiguous(memory_format=layout)
    axes = range(len(patch_size))
    print("mirrored axes  pairs  one by one  times faster")
    for mirrored in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in (0, 1, len(patch_size))):
        predictor.allowed_mirroring_axes = mirrored or None
        pairs, result = _seconds(lambda: predictor._predict_pairs(patch))
        single, expected = _seconds(lambda: nnUNetPredictor._internal_maybe_mirror_and_predict(predictor, patch))
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
        print(f"{mirrored!s:<13}{pairs:>7.3f}{single:>12.3f}{single / pairs:>14.1f}")


def _seconds(function: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    times = []
    with torch.inference_mode():
        for _ in range(REPETITIONS):
            start = time.process_time()
            result = function()
            times.append(time.process_time() - start)
    return statistics.median(times), result


if __name__ == "__main__":
    main()
