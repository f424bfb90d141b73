"""``nnssl_preview``: pictures of what a method shows to its networks."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)

    from nnssl.report.preview import save_preview
    from nnssl.trainers.engine.request import TrainingRequest

    request = TrainingRequest(
        dataset=arguments.d,
        trainer=arguments.tr,
        fold=arguments.f,
        configuration=arguments.c,
        plans=arguments.p,
        device=arguments.device,
        overrides=arguments.set,
        atlas_augmentation=arguments.atlas_augmentation,
        seed=arguments.seed,
        disable_checkpointing=True,
    )
    for file in save_preview(request, arguments.o, steps=arguments.steps, checkpoint=arguments.chk):
        print(file)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnssl_preview",
        description="Takes a few steps of a training and writes pictures of the patches of its streams and of what "
        "enters each network, with the labels that it is trained on there. Needs a preprocessed data set; trains "
        "nothing that is kept.",
    )
    add = parser.add_argument
    add("-d", required=True, metavar="DATASET", help="data set name or id")
    add("-tr", required=True, metavar="TRAINER", help="method, such as MeanTeacher (see nnssl_trainers), or auto")
    add("-f", required=True, metavar="FOLD", help="fold number, or 'all'")
    add("-o", required=True, metavar="FOLDER", help="folder for the pictures; those of the same names are replaced")
    add("-c", metavar="CONFIGURATION", help="2d, 3d_fullres, 3d_lowres, ... (default: 3d_fullres if planned, else 2d)")
    add("-p", metavar="PLANS", help="plans identifier (default: nnSSLPlans, or the only nnssl plans there are)")
    add("-chk", metavar="FILE", help="checkpoint of such a training: its step, settings and weights are used, so that "
        "pseudo-labels are meaningful (default: the first step of the main phase, random weights)")  # fmt: skip
    add("-device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one, else cpu")
    add("--steps", type=_positive, default=2, help="steps that are shown (default: 2)")
    add("--seed", type=int, default=0, help="seed of weights, patches and augmentation (default: 0)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="override a hyper-parameter; repeatable")
    add("--atlas-augmentation", choices=("regional_switch", "none"), help="as for nnssl_train")
    return parser
