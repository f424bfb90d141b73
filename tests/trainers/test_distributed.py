"""Trainings that several processes share (gloo, CPU), against the same training in one process.

Starting processes anew costs seconds, so most are forked here, as no CUDA device is in use.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nnssl.cli import run as run_command
from nnssl.dataloading.mixed_pairs import PairedCases
from nnssl.errors import UserError
from nnssl.evaluation import evaluator
from nnssl.inference.checkpoint import read_model_checkpoint
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine import budget, validation
from nnssl.trainers.engine import run as run_module
from nnssl.trainers.engine.distributed import Ranks, current_ranks, ranks_of_environment, synchronize_batch_norms
from nnssl.trainers.engine.launch import launch
from nnssl.trainers.engine.loop import begin_phase
from nnssl.trainers.registry import get_trainer, trainer_names
from nnssl.utils.files import write_json
from tests.support import ranks as rank_functions
from tests.support.tiny import DEVICE, PLANS, Tiny

NAMES = trainer_names()
# what the loss of a shared batch has to look after
VARIANTS: dict[str, dict[str, Any]] = {
    "Dice of the batch": {"dimensions": 2, "labeled_batch": 4},
    "ignore label": {"ignore": True, "labeled_batch": 4},
    "regions and ignore label": {"ignore": True, "regions": True, "classes": 3, "labeled_batch": 4},
    "micro-batches": {"labeled_batch": 4, "micro_batch": 1},
}
STEPS = 3
# AdamW makes full steps of gradients that are nothing but rounding, those of biases before norms
RECIPE = "nnunet"

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="two processes would need two devices")


@pytest.fixture(autouse=True, scope="module")
def _restore_torch() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def _data(folder: Path, **options: Any) -> Tiny:
    return Tiny(**{"labeled": 3, "labeled_batch": 2, "unlabeled_batch": 4} | options, folder=folder)


# ---------------------------------------------------------------------- in the processes


def _look(data: Tiny, name: str) -> dict[str, Any]:
    """Batches, gradients, weights and results of a few steps."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[variable] = str(data.folder / variable)
    trainer = data.trainer(name, fold=get_trainer(name).min_labeled - 1, recipe=RECIPE)
    terms = trainer.unsupervised_loss

    def visible(value: torch.Tensor) -> torch.Tensor:
        """At the start of a training some terms are too small to be seen in the sum."""
        return value / trainer.ranks.mean(value).abs().clamp_min(1e-3)

    trainer.unsupervised_loss = lambda step: {key: visible(value) for key, value in terms(step).items()}
    trainer.on_train_start()
    _use_double_precision(trainer)
    batches, gradients = [], {}
    for i in range(STEPS):
        if trainer.iteration in trainer.phase_starts:
            assert begin_phase(trainer, lambda: False)
        batches.append(next(trainer.dataloader_train))
        trainer.meter.add(trainer.train_step(batches[-1]))
        if i == 0:
            gradients = _gradients(trainer)
    trainer.meter.average(trainer.ranks.mean)
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        outputs = [trainer.validation_step(next(trainer.dataloader_val)) for _ in range(2)]
    trainer.on_validation_epoch_end(trainer.ranks.gather(outputs))
    # pairs of a labeled and a pseudo-labeled case come as labeled patches
    paired = isinstance(trainer.unlabeled_cases(), PairedCases)
    trainer.ranks.disconnect()
    unlabeled = [batch["unlabeled"] for batch in batches if batch["unlabeled"] is not None]
    return {
        "labeled": torch.stack([batch["data"] for batch in batches]),
        "unlabeled": torch.stack(unlabeled) if trainer.uses_unlabeled and not paired else None,
        "gradients": gradients,
        "weights": _all_weights(trainer),
        "losses": trainer.meter.means(),
        "validation": {key: trainer.logger.get_value(key, -1) for key in ("val_losses", "dice_per_class_or_region")},
    }


def _use_double_precision(trainer: Any) -> None:
    """Computes so exactly that two ranks differ from one process by a mistake, not by rounding.

    Single precision is too coarse for terms that choose voxels (C3S3): another kernel of the same convolution changes
    a gradient by 5e-4 of its largest value.
    """
    for module in (unwrap(trainer.network), *trainer._modules.values()):
        if any(True for _ in module.parameters()):
            module.double().register_forward_pre_hook(_to_double)


def _to_double(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.double() if torch.is_tensor(value) and value.is_floating_point() else value for value in arguments
    )


def _gradients(trainer: Any) -> dict[str, torch.Tensor]:
    modules = {"student": unwrap(trainer.network), **trainer._modules}
    named = {f"{name}.{key}": p.grad for name, module in modules.items() for key, p in module.named_parameters()}
    return {key: gradient for key, gradient in named.items() if gradient is not None}


def _all_weights(trainer: Any) -> dict[str, torch.Tensor]:
    modules = {"student": unwrap(trainer.network), **trainer._modules}
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def _look_and_stop(folder: Path) -> None:
    """As a rank: looks at all trainers and variants, then trains until a stop file appears after step 4."""
    torch.set_num_threads(1)
    rank = current_ranks().rank
    for name in NAMES:
        torch.save(_look(_data(folder / "3D"), name), folder / f"{name}_{rank}.pth")
    for variant, options in VARIANTS.items():
        torch.save(_look(_data(folder / variant, **options), "Supervised"), folder / f"{variant}_{rank}.pth")
    os.environ["nnUNet_preprocessed"] = str(folder / "3D" / "nnUNet_preprocessed")
    os.environ["nnUNet_results"] = str(folder / "stopped")
    trainer = _data(folder / "3D").trainer("MeanTeacher", fold=0, num_iterations_per_epoch=3, recipe=RECIPE)
    real = trainer.train_step

    def train_step(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        losses = real(batch)
        if trainer.iteration == 4 and rank == 0:
            Path(trainer.output_folder, "stop").touch()
        return losses

    trainer.train_step = train_step
    with pytest.raises(SystemExit, match="0"):
        trainer.run_training()
    (folder / f"stopped_{rank}").write_text(str(trainer.iteration))


# ---------------------------------------------------------------------- two processes against one


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data sets and with what two ranks saw and left there."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        for name, options in ({"3D": {}} | VARIANTS).items():
            data = _data(folder / name, **options).write(folder / name, patch)
            # two validation cases, one for each rank; where a method needs it, two labeled ones
            folds = [
                {"train": ["labeled_0"], "val": ["labeled_1", "labeled_2"]},
                {"train": ["labeled_0", "labeled_1"], "val": ["labeled_2"]},
            ]
            write_json(folds, data.base / "splits_final.json")
        launch(_look_and_stop, (folder,), 2, "fork")
        yield folder


@pytest.fixture(scope="module")
def whole(looked: Path) -> Path:
    """Results of a training of MeanTeacher that one process has made alone and undisturbed."""
    with pytest.MonkeyPatch.context() as patch:
        _use(patch, looked, "whole")
        assert run_command("train", [*COMMAND, "--deterministic", *BUDGET]) == 0
    return looked / "whole"


COMMAND = ("901", "MeanTeacher", "0", "-p", PLANS, "-device", "cpu")
# fp32: sums in another order would differ by more in bf16, which some CPUs have
BUDGET = ("--epochs", "2", "--iterations-per-epoch", "3", "--seed", "0", "--set", f"recipe={RECIPE}")
BUDGET += ("--precision", "fp32")


def _use(patch: pytest.MonkeyPatch, folder: Path, results: str) -> None:
    patch.setenv("nnUNet_preprocessed", str(folder / "3D" / "nnUNet_preprocessed"))
    patch.setenv("nnUNet_results", str(folder / results))
    patch.setenv("nnUNet_n_proc_DA", "0")


@pytest.mark.parametrize("name", [*NAMES, *VARIANTS])
def test_two_ranks_do_the_steps_of_one_process(name, looked, monkeypatch):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, "")
    ranks = [torch.load(looked / f"{name}_{rank}.pth", weights_only=False) for rank in range(2)]
    if name in VARIANTS:
        alone = _look(_data(looked / name, **VARIANTS[name]), "Supervised")
    else:
        alone = _look(_data(looked / "3D"), name)
    assert torch.equal(torch.cat([one["labeled"] for one in ranks], 1), alone["labeled"])
    if alone["unlabeled"] is not None:
        assert torch.equal(torch.cat([one["unlabeled"] for one in ranks], 1), alone["unlabeled"])
        assert sum(abs(value) for key, value in alone["losses"].items() if key not in ("loss", "supervised")) > 0.01
    for one in ranks:
        assert one["weights"].keys() == alone["weights"].keys()
        assert all(torch.equal(value, ranks[0]["weights"][key]) for key, value in one["weights"].items())
        _assert_close(one["gradients"], alone["gradients"])
        _assert_close(one["weights"], alone["weights"])
        assert one["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert one["validation"]["val_losses"] == pytest.approx(alone["validation"]["val_losses"], rel=1e-4)
        assert one["validation"]["dice_per_class_or_region"] == pytest.approx(
            alone["validation"]["dice_per_class_or_region"], abs=1e-3
        )


def _assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    # the gradient of a bias before a norm is 0 but for rounding, hence a share of the largest of all
    largest = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        tolerance = 1e-4 * float(value.abs().max()) + 1e-5 * largest
        torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=lambda text, k=key: f"{k}: {text}")


def _finished(results: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, Any]]:
    """Weights, curves and validation of a finished run."""
    (folder,) = results.glob("*/MeanTeacher__*/fold_0")
    content = read_model_checkpoint(folder / "checkpoint_final.pth")
    side = content["semi_supervised"]
    weights = {f"teacher.{key}": value for key, value in side["modules"]["teacher"].items()}
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    return content["network_weights"] | weights, side["history"], summary


def _assert_same_run(found: Path, expected: Path) -> None:
    (weights, curves, summary), (other_weights, other_curves, other_summary) = _finished(found), _finished(expected)
    _assert_close(weights, other_weights)
    for row, other in zip(curves, other_curves, strict=True):
        for key in ("loss", "supervised", "consistency", "val_loss", "pseudo_dice"):
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6)
    assert [case["prediction_file"].split("/")[-1] for case in summary["metric_per_case"]] == [
        "labeled_1.nii.gz",
        "labeled_2.nii.gz",
    ]
    assert summary["foreground_mean"]["Dice"] == pytest.approx(other_summary["foreground_mean"]["Dice"], abs=1e-2)


def test_two_ranks_stop_together_and_one_process_goes_on(looked, whole, monkeypatch):
    steps = {(looked / f"stopped_{rank}").read_text() for rank in range(2)}
    assert steps == {"5"}, "asked for after step 4, agreed upon during step 5"
    _use(monkeypatch, looked, "stopped")
    assert run_command("train", [*COMMAND, "--c"]) == 0
    _assert_same_run(looked / "stopped", whole)


def test_one_process_stops_and_two_machines_of_torchrun_go_on(looked, whole, monkeypatch):
    _use(monkeypatch, looked, "resumed")
    real = SemiSupervisedTrainer.train_step

    def train_step(self: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        losses = real(self, batch)
        if self.iteration == 4:
            Path(self.output_folder, "stop").touch()
        return losses

    monkeypatch.setattr(SemiSupervisedTrainer, "train_step", train_step)
    with pytest.raises(SystemExit):
        run_command("train", [*COMMAND, "--deterministic", *BUDGET])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
    machines = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(machine), "-m", "nnssl", "train", *COMMAND, "--c"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for machine in range(2)
    ]
    try:
        main, other = (machine.communicate(timeout=180)[0] for machine in machines)
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], main + other
    assert main.count("epoch 2/2") == 1
    assert main.count("Mean Validation Dice") == 1
    assert "epoch" not in other, "only the main rank prints"
    _assert_same_run(looked / "resumed", whole)
    (folder,) = (looked / "resumed").glob("*/MeanTeacher__*/fold_0")
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    assert len(list(folder.glob("training_log_*"))) == 2


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_ranks_evaluate_what_they_predicted(looked, whole, tmp_path, monkeypatch):
    _use(monkeypatch, looked, "whole")
    monkeypatch.setattr(run_module, "launch", partial(launch, start_method="fork"))
    predict, evaluate = validation.predict_logits, evaluator.evaluate_case

    def predict_beside_the_other(*arguments: Any) -> torch.Tensor:
        (tmp_path / f"rank_{current_ranks().rank}").touch()
        waited = time.monotonic() + 60
        while len(list(tmp_path.glob("rank_*"))) < 2:
            assert time.monotonic() < waited
            time.sleep(0.01)
        return predict(*arguments)

    def evaluate_and_tell(task: Any) -> Any:
        (tmp_path / f"{task.case}_on_{current_ranks().rank}").touch()
        return evaluate(task)

    monkeypatch.setattr(validation, "predict_logits", predict_beside_the_other)
    monkeypatch.setattr(evaluator, "evaluate_case", evaluate_and_tell)
    before = _finished(whole)[2]
    assert run_command("train", [*COMMAND, "--val", "-num_gpus", "2"]) == 0
    told = sorted(path.name for path in tmp_path.glob("labeled_*"))
    assert told in (["labeled_1_on_0", "labeled_2_on_1"], ["labeled_1_on_1", "labeled_2_on_0"])
    assert _finished(whole)[2] == before


def test_two_ranks_plan_the_same_minutes(looked, monkeypatch, capfd):
    _use(monkeypatch, looked, "minutes")
    monkeypatch.setattr(run_module, "launch", partial(launch, start_method="fork"))
    monkeypatch.setattr(budget, "FEWEST_STEPS", 4)
    monkeypatch.setattr(budget, "EPOCHS", 2)
    real = budget.measure_costs

    def measure_costs(trainer: Any) -> budget.Costs:
        assert real(trainer).step > 0
        return budget.Costs(step=100.0 * (1 + current_ranks().rank), start=0)

    monkeypatch.setattr(budget, "measure_costs", measure_costs)
    command = ["901", "auto", "0", "-p", PLANS, "-device", "cpu", "-num_gpus", "2", "--disable_memory_check"]
    assert run_command("train", [*command, "--minutes", "10"]) == 0
    output = capfd.readouterr().out
    assert "auto: Supervised" in output
    assert output.count("2 epochs of 2 steps") == 1
    assert output.count("epoch 2/2") == output.count("Mean Validation Dice") == 1


# ---------------------------------------------------------------------- endings


def test_a_killed_rank_ends_all_and_leaves_the_last_checkpoint(looked, monkeypatch, capfd):
    _use(monkeypatch, looked, "killed")
    monkeypatch.setattr(run_module, "launch", partial(launch, start_method="fork"))
    real = SemiSupervisedTrainer.train_step

    def train_step(self: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.iteration == 11 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, batch)

    monkeypatch.setattr(SemiSupervisedTrainer, "train_step", train_step)
    command = [*COMMAND, "-num_gpus", "2", "--epochs", "12", "--iterations-per-epoch", "1"]
    assert run_command("train", command) == 2
    output, errors = capfd.readouterr()
    assert errors.count("nnssl_train: process 1 of the training was killed (SIGKILL)") == 1
    assert "Traceback" not in output + errors
    assert output.count("epoch 11/12") == 1
    (file,) = (looked / "killed").glob("*/MeanTeacher__*/fold_0/checkpoint_latest.pth")
    assert read_model_checkpoint(file)["current_epoch"] == 10

    monkeypatch.setattr(SemiSupervisedTrainer, "train_step", real)
    assert run_command("train", [*command, "--c"]) == 0
    output = capfd.readouterr().out
    assert "epoch 10/12" not in output
    assert output.count("epoch 12/12") == output.count("Mean Validation Dice") == 1


def test_what_the_first_rank_says_that_fails_is_told_once(capfd):
    with pytest.raises(UserError, match="case_7 cannot be read"):
        launch(rank_functions.fail_on_rank_1, ("a mistake",), 2, "fork")
    output, errors = capfd.readouterr()
    assert output == "rank 0 is here\n", "only the main rank prints"
    assert errors == ""
    with pytest.raises(SystemExit, match="1"):
        launch(rank_functions.fail_on_rank_1, ("a defect",), 2, "fork")
    errors = capfd.readouterr().err
    assert errors.count("Traceback") == 1
    assert errors.count("ValueError: seven is not a number") == 1


def test_a_signal_to_the_launcher_stops_all_ranks_after_the_same_step(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    launch(rank_functions.stop_when_told, (tmp_path,), 2, "fork")
    assert signal.getsignal(signal.SIGTERM) == before
    assert (tmp_path / "steps_0").read_text() == (tmp_path / "steps_1").read_text()
    assert (tmp_path / "steps_0").read_text().endswith("SIGTERM")


# ---------------------------------------------------------------------- parts


def test_what_ranks_exchange(tmp_path):
    launch(rank_functions.exchange, (tmp_path,), 2)
    main, other = (torch.load(tmp_path / f"rank_{rank}.pth") for rank in range(2))
    sizes = (4, 2, 8, 1, 1)
    assert main["gradients"] == [[5.0 + i] * size for i, size in enumerate(sizes)] + [None]
    assert sorted(main["dealt"] + other["dealt"]) == ["a", "b", "c", "d", "e"]
    assert len(other["dealt"]) > len(main["dealt"]), "the faster one takes more"
    assert main["from main"]["rank"] == 0
    assert (main["rows"], other["rows"]) == ([0, 1, 2], [3, 4, 5])
    for one in (main, other):
        assert one["gradients"] == main["gradients"]
        assert one["copied"] == [5.0, 7]
        # the larger wish wins, a call later; while it is granted, it is not asked for again
        assert one["wishes"] == [0, 0, 2, 0, 0]
        assert one["mean"] == [1.0, 1.5]
        numbers = [[0, 1], [4, 5], [10, 11], [14, 15]]
        assert one["all rows"] == [numbers, numbers, [[bool(n) for n in row] for row in numbers]]
        assert one["gathered"] == ["from 0", "from 1"]
        assert one["from main"] == main["from main"]


def test_one_process_exchanges_nothing():
    ranks = Ranks()
    value = torch.ones(2, requires_grad=True)
    assert torch.equal(ranks.mean(value), value)
    assert not ranks.mean(value).requires_grad
    assert [ranks.agree(wish) for wish in (0, 2, 1)] == [0, 2, 1]
    assert ranks.from_main(lambda: 3) == 3
    assert list(ranks.deal("ab")) == ["a", "b"]
    assert ranks.gather([1]) == [1]
    assert ranks.own_rows(torch.arange(3)).tolist() == [0, 1, 2]
    assert torch.equal(ranks.all_rows(value), value)
    assert not ranks.all_rows(value).requires_grad
    assert ranks.collect(5) == [5]
    for nothing in (ranks.barrier, ranks.disconnect):
        nothing()


@pytest.mark.parametrize(
    ("patches", "size", "advice"),
    [(3, 2, "labeled_batch_size=4, or start 1 instead of 2"), (2, 4, "labeled_batch_size=4, or start 2 instead of 4")],
)
def test_a_batch_that_cannot_be_shared_evenly_is_refused(patches, size, advice):
    with pytest.raises(UserError, match="cannot be shared evenly") as caught:
        Ranks(0, size, store=torch.distributed.HashStore()).even_share(patches, "labeled")
    assert advice in caught.value.fix


def test_an_empty_batch_is_refused():
    with pytest.raises(UserError, match="unlabeled_batch_size must be at least 1"):
        Ranks().even_share(0, "unlabeled")


def test_rows_of_all_ranks_are_the_batch():
    ranks = [Ranks(rank, 3, store=torch.distributed.HashStore()) for rank in range(3)]
    assert [row for one in ranks for row in one.rows(one.even_share(6, "labeled"))] == list(range(6))


def test_variables_of_torchrun_are_complete_or_absent(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_of_environment().size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="torchrun") as caught:
        ranks_of_environment()
    assert caught.value.found == "no LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"


def test_the_number_of_processes_is_given_once(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command("train", [*COMMAND, "-num_gpus", "2"]) == 2
    assert "given twice" in capsys.readouterr().err


def test_processes_that_others_have_connected_are_refused(looked, monkeypatch):
    _use(monkeypatch, looked, "foreign")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="others have connected"):
        _data(looked / "3D").bare_trainer("Supervised")


def test_batch_norms_are_not_shared_on_a_cpu():
    two = Ranks(0, 2, store=torch.distributed.HashStore())
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.InstanceNorm2d(1))
    assert synchronize_batch_norms(network, two, torch.device("cpu")) is network
    network.append(torch.nn.BatchNorm2d(1))
    with pytest.raises(UserError, match="batch norms"):
        synchronize_batch_norms(network, two, torch.device("cpu"))
