"""``nnssl_train``: train one fold with one method."""

from __future__ import annotations

import argparse
import time


def main(argv: list[str]) -> None:
    asked_at = time.time()
    arguments = _parser().parse_args(argv)

    from nnssl.trainers.engine.request import TrainingRequest
    from nnssl.trainers.engine.run import run

    run(
        TrainingRequest(
            dataset=arguments.dataset_name_or_id,
            trainer=arguments.trainer,
            fold=arguments.fold,
            configuration=arguments.c,
            plans=arguments.p,
            device=arguments.device,
            num_gpus=arguments.num_gpus,
            overrides=arguments.set,
            atlas_augmentation=arguments.atlas_augmentation,
            epochs=arguments.epochs,
            iterations_per_epoch=arguments.iterations_per_epoch,
            minutes=arguments.minutes,
            seed=arguments.seed,
            deterministic=arguments.deterministic,
            precision=arguments.precision,
            memory_format=arguments.memory_format,
            micro_batch=arguments.micro_batch,
            disable_memory_check=arguments.disable_memory_check,
            preview_every=arguments.preview_every,
            pretrained_weights=arguments.pretrained_weights,
            resume=arguments.resume,
            only_validate=arguments.val,
            validate_best=arguments.val_best,
            save_probabilities=arguments.npz,
            disable_checkpointing=arguments.disable_checkpointing,
            overwrite=arguments.overwrite,
            asked_at=asked_at,
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nnssl_train", description="Train one fold with one method.")
    add = parser.add_argument
    add("dataset_name_or_id", help="data set name or id")
    add("trainer", help="method, such as Supervised or MeanTeacher (nnssl_trainers lists them), or auto")
    add("fold", help="fold number, or 'all' to train on all labeled cases")
    add("-c", metavar="CONFIGURATION", help="2d, 3d_fullres, 3d_lowres, ... (default: 3d_fullres if planned, else 2d)")
    add("-p", metavar="PLANS", help="plans identifier (default: nnSSLPlans, or the only nnssl plans there are)")
    add("-device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one, else cpu")
    add("-num_gpus", type=int, default=1, help="processes that share each batch: one per GPU, or parts of a CPU")
    add("-pretrained_weights", metavar="FILE", help="checkpoint whose weights the student starts from")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="override a hyper-parameter; repeatable")
    add(
        "--atlas-augmentation",
        choices=("regional_switch", "none"),
        help="regional_switch: pairs of labeled cases exchange boxes at corresponding positions "
        "(default: that of the method, none for most)",
    )
    add("--epochs", type=int, help="number of epochs (default: 1000)")
    add("--iterations-per-epoch", type=int, help="steps per epoch (default: 250)")
    add(
        "--minutes", type=float, help="instead of --epochs: as many steps as end within that time; some are timed first"
    )
    add("--seed", type=int, help="seed of weights, patches and augmentation (default: drawn and recorded)")
    add("--deterministic", action="store_true", help="bit-exact repetition on the same machine; slower on CUDA")
    add("--precision", default="auto", help="auto, fp32, bf16 or fp16 (default: auto)")
    add("--memory-format", default="auto", help="auto, contiguous or channels_last (default: auto, the faster one)")
    add("--micro-batch", type=int, metavar="N", help="pass N patches at a time: same result, less memory, slower")
    add("--disable_memory_check", action="store_true", help="start although the memory is estimated not to suffice")
    add("--preview-every", type=int, metavar="N", help="write a picture of patches and predictions every N "
        "epochs, 0 for none (default: about 20 pictures in a training)")  # fmt: skip
    add("--c", dest="resume", action="store_true", help="continue a training that was stopped")
    add("--val", action="store_true", help="only run the validation of a finished training")
    add("--val_best", action="store_true", help="validate with checkpoint_best instead of checkpoint_final")
    add("--npz", action="store_true", help="save the probabilities of the validation cases")
    add("--disable_checkpointing", action="store_true", help="write no checkpoint")
    add("--overwrite", action="store_true", help="start again although this run has checkpoints")
    return parser
