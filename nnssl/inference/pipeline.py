"""Preprocessing, network and export side by side, with every failure named by its case."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnssl.inference.cases import InputCase
from nnssl.inference.workers import CaseQueue, WorkerKilled, export_case, most_open, preprocess_case, worker_pool

if TYPE_CHECKING:
    from nnssl.inference.predictor import Predictor

_FEWER_PROCESSES = "use fewer processes (-npp 1 -nps 1, or 0 for none) and --continue_prediction"


class CasePipeline:
    """Segments cases one after the other while background processes prepare the next and write the last.

    The three steps are nnU-Net's. Its own loop over cases is not used: it does not tell which case made a worker
    fail, loses all finished cases then, and writes masks directly under their final names.

    Args:
        predictor: with its networks loaded.
        output: folder for the masks.
        save_probabilities: write the class probabilities too.
        save_uncertainty: write maps and estimates of `nnssl.inference.uncertainty`, too.
        not_finite_is_zero: take NaN and infinite values in NIfTI files for 0, as their reader does.
        workers: processes for preprocessing and for export; 0 works without any, None chooses.
        verbose: print tracebacks of failed cases.
        progress: print the name of each case.

    Attributes:
        written: names of the cases that were written.
        failed: reasons by name of the other cases.
    """

    def __init__(
        self,
        predictor: Predictor,
        output: Path,
        *,
        save_probabilities: bool = False,
        save_uncertainty: bool = False,
        not_finite_is_zero: bool = False,
        workers: tuple[int | None, int | None] = (None, None),
        verbose: bool = False,
        progress: bool = True,
    ):
        self.predictor = predictor
        self.output = output
        self.save_probabilities = save_probabilities
        self.save_uncertainty = save_uncertainty
        self.not_finite_is_zero = not_finite_is_zero
        self.workers = workers
        self.verbose = verbose
        self.progress = progress
        self.written: list[str] = []
        self.failed: dict[str, str] = {}

    def run(self, cases: Sequence[tuple[InputCase, Path | None]]) -> None:
        """Segments ``cases``, given with the masks of the previous stage (None where there is none).

        A case that fails is noted, and the others go on.

        Raises:
            UserError: if a background process was killed.
        """
        preparing, writing = self._number_of_workers(len(cases))
        with worker_pool(preparing) as preprocess, worker_pool(writing) as export:
            coming = CaseQueue(preprocess, "preprocessing", _FEWER_PROCESSES)
            exports = CaseQueue(export, "the export", _FEWER_PROCESSES)
            for number, (case, prepared) in enumerate(self._prepared(cases, coming, preparing), start=1):
                if self.progress:
                    print(f"{case} ({number} of {len(cases)})", flush=True)
                logits = None
                if prepared is not None:
                    logits = self._attempt(case, "the network", partial(self._logits, prepared[0]))
                if prepared is not None and logits is not None:
                    exports.submit(case, export_case, *self._export_arguments(case, prepared[1], logits))
                while len(exports) > most_open(writing):
                    self._finish(exports)
            while exports:
                self._finish(exports)

    def _prepared(
        self, cases: Iterable[tuple[InputCase, Path | None]], coming: CaseQueue, processes: int
    ) -> Iterator[tuple[str, tuple[np.ndarray, dict] | None]]:
        """Names of cases with their preprocessed images and properties, None for those that failed."""
        waiting = iter(cases)

        def submit_next() -> None:
            for case, mask in waiting:
                coming.submit(case.name, preprocess_case, *self._preprocess_arguments(case, mask))
                return

        for _ in range(max(1, processes)):
            submit_next()
        while coming:
            case = coming.first
            prepared = self._attempt(case, "preprocessing", coming.take)
            submit_next()
            yield case, prepared

    def _finish(self, exports: CaseQueue) -> None:
        case = exports.first
        self._attempt(case, "the export", exports.take)
        if case not in self.failed:
            self.written.append(case)

    def _attempt(self, case: str, step: str, work: Callable[[], Any]) -> Any:
        """The result of ``work``, or None after an error, which is noted for the case."""
        try:
            return work()
        except WorkerKilled:
            raise
        except Exception as error:
            if self.verbose:
                traceback.print_exc()
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.failed[case] = f"{step} failed: {lines[-1].strip()}"
            print(f"{case}: {self.failed[case]}", flush=True)
            return None

    def _logits(self, data: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits, and those of the members if their uncertainty is to be written."""
        import torch

        image = torch.from_numpy(data)
        if not self.save_uncertainty:
            return self.predictor.predict_logits_from_preprocessed_data(image).cpu().numpy(), []
        logits, members = self.predictor.predict_members(image)
        return logits.cpu().numpy(), [member.cpu().numpy() for member in members]

    def _preprocess_arguments(self, case: InputCase, mask: Path | None) -> tuple:
        p = self.predictor
        managers = (p.plans_manager, p.configuration_manager, p.dataset_json)
        return case, mask, *managers, p.verbose_preprocessing, self.not_finite_is_zero

    def _export_arguments(self, case: str, properties: dict, logits: tuple[np.ndarray, list[np.ndarray]]) -> tuple:
        p = self.predictor
        managers = (p.configuration_manager, p.plans_manager, p.dataset_json)
        return logits[0], properties, *managers, self.output, case, self.save_probabilities, logits[1]

    def _number_of_workers(self, cases: int) -> tuple[int, int]:
        # On the CPU the network takes tens of times longer than the rest (0.2 to 0.6 microseconds per voxel) and needs
        # all cores. With one case there is nothing to do beside it, and a process takes seconds to start.
        default = 3 if self.predictor.device.type == "cuda" and cases > 1 else 0
        preparing, writing = (default if count is None else count for count in self.workers)
        return min(preparing, cases), min(writing, cases)
